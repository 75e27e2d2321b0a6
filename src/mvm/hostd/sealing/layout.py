"""The plain parts of a sealed image, byte by byte: headers, their limits, and the geometry of a chunk.

All integers are little-endian. Guest memory is an array of 4 KiB pages, grouped into chunks of 128 KiB.

    manifest                              segment-<segment id>                 key
    0   8  "MVMSEALM"                     0   8  "MVMSEALS"                    0   8  "MVMSEALK"
    8   2  version, 1                     8   2  version, 1                    8   2  version, 1
    10  2  I, length of the instance id   10  2  I                             10  2  W
    12  4  F, length of the fingerprint   12  4  chunk size                    12  W  wrapped snapshot key
    16  4  chunk size, 131072             16  16 segment id
    20  4  page size, 4096                32  I  instance id                   state, working-set
    24  8  chunk count                    32+I   records, end to end, each     0   8  "MVMSEALD", "MVMSEALW"
    32  16 snapshot id                           ciphertext then 16 tag        8      sealed box
    48  I  instance id, tenant/pool-n
    48+I F fingerprint                    sealed box: 12 nonce, ciphertext, 16 tag
    48+I+F sealed box: the index (index.py)   in the box of state: 1 codec, 4 size, the state as the codec says

The manifest's bytes before its sealed box are its header. SHA-256 of that header is the associated data of
the three sealed boxes, so none of them can serve another tenant, instance, snapshot, size or fingerprint.
SHA-256 of a segment's header is part of the associated data of each of its records (records.py).

Parsers here take untrusted bytes and raise IntegrityError, nothing else.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, NamedTuple

from mvm.core import limits
from mvm.core.errors import InvalidInput
from mvm.core.ids import InstanceId, SnapshotId
from mvm.hostd.sealing.faults import damaged

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VERSION = 1
PAGE = 4096
CHUNK = 131_072
PAGES_PER_CHUNK = CHUNK // PAGE
FULL = (1 << PAGES_PER_CHUNK) - 1
"""The mask of every page of a chunk; bit i is page i."""

KEY_BYTES = 32
TAG_BYTES = 16
NONCE_BYTES = 12
BOX_OVERHEAD = NONCE_BYTES + TAG_BYTES

CHUNKS_MAX = limits.MEM_MIB_MAX * (1 << 20) // CHUNK
FINGERPRINT_MAX = 16_384
WRAPPED_MAX = 4096
STATE_MAX = 64 << 20

MANIFEST_NAME = "manifest"
KEY_NAME = "key"
STATE_NAME = "state"
WORKING_SET_NAME = "working-set"
SEGMENT_PREFIX = "segment-"

_MANIFEST = struct.Struct("<8sHHIIIQ16s")
_SEGMENT = struct.Struct("<8sHHI16s")
_KEY = struct.Struct("<8sHH")
_MANIFEST_MAGIC = b"MVMSEALM"
_SEGMENT_MAGIC = b"MVMSEALS"
_KEY_MAGIC = b"MVMSEALK"
STATE_MAGIC = b"MVMSEALD"
WORKING_SET_MAGIC = b"MVMSEALW"
_INSTANCE_MAX = limits.TENANT_ID_MAX + limits.POOL_ID_MAX + 6

HEADER_MAX = _MANIFEST.size + _INSTANCE_MAX + FINGERPRINT_MAX
KEY_FILE_MAX = _KEY.size + WRAPPED_MAX


class SnapshotIdentity(NamedTuple):
    """Whose memory an image is, which snapshot, and under what it may be resumed.

    `fingerprint`: canonical bytes, compared whole; make them with `render_fingerprint`.
    """

    instance: InstanceId
    snapshot: SnapshotId
    fingerprint: bytes


class ManifestHeader(NamedTuple):
    """The plain head of a manifest. `raw` is its exact bytes, `digest` their SHA-256."""

    identity: SnapshotIdentity
    chunk_count: int
    raw: bytes
    digest: bytes


def runs(mask: int) -> Iterator[tuple[int, int]]:
    """The runs of set bits, as (first, count), ascending."""
    while mask:
        first = (mask & -mask).bit_length() - 1
        tail = mask >> first
        count = (~tail & (tail + 1)).bit_length() - 1
        yield first, count
        mask &= -1 << (first + count)


def segment_name(segment: SnapshotId) -> str:
    return f"{SEGMENT_PREFIX}{segment}"


def render_fingerprint(parts: Mapping[str, str]) -> bytes:
    """`name=value` lines sorted by name: equal mappings give equal bytes, and differences can be named."""
    for name, value in parts.items():
        if not name or "=" in name or "\n" in name + value:
            raise InvalidInput(f"{name!r} cannot be part of a fingerprint")
    text = "".join(f"{name}={parts[name]}\n" for name in sorted(parts)).encode()
    if len(text) > FINGERPRINT_MAX:
        raise InvalidInput(f"the fingerprint is larger than {FINGERPRINT_MAX} bytes")
    return text


def fingerprint_differences(sealed: bytes, now: bytes) -> tuple[tuple[str, str, str], ...]:
    """(name, sealed, now) for each difference; bytes that are not lines of name=value are compared whole."""
    old, new = _lines(sealed), _lines(now)
    if old is None or new is None:
        short = [hashlib.sha256(raw).hexdigest()[:16] for raw in (sealed, now)]
        return (("fingerprint", short[0], short[1]),)
    names = sorted(old.keys() | new.keys())
    return tuple((n, old.get(n, ""), new.get(n, "")) for n in names if old.get(n) != new.get(n))


def _lines(raw: bytes) -> dict[str, str] | None:
    found: dict[str, str] = {}
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if not equals or not name.isprintable() or not value.isprintable():
            return None
        found[name] = value
    return found


def render_manifest_header(identity: SnapshotIdentity, chunk_count: int) -> bytes:
    if not 0 < chunk_count <= CHUNKS_MAX:
        raise InvalidInput(f"{chunk_count} chunks is not a size of guest memory")
    if len(identity.fingerprint) > FINGERPRINT_MAX:
        raise InvalidInput(f"the fingerprint is larger than {FINGERPRINT_MAX} bytes")
    instance = identity.instance.encode()
    head = _MANIFEST.pack(
        _MANIFEST_MAGIC,
        VERSION,
        len(instance),
        len(identity.fingerprint),
        CHUNK,
        PAGE,
        chunk_count,
        bytes.fromhex(identity.snapshot),
    )
    return head + instance + identity.fingerprint


def parse_manifest_header(untrusted: bytes) -> ManifestHeader:
    """The header at the start of a manifest's bytes; what follows it is not looked at."""
    if len(untrusted) < _MANIFEST.size:
        raise damaged("the snapshot's manifest is truncated")
    fields = _MANIFEST.unpack_from(untrusted)
    magic, version, instance_size, fingerprint_size, chunk, page, chunk_count, snapshot = fields
    if magic != _MANIFEST_MAGIC:
        raise damaged("the snapshot's manifest is not a manifest")
    if version != VERSION:
        raise damaged(
            "the snapshot is of a format this version does not read", f"format {version}, not {VERSION}"
        )
    if (chunk, page) != (CHUNK, PAGE) or not 0 < chunk_count <= CHUNKS_MAX:
        raise damaged("the snapshot's manifest is damaged", "its sizes are impossible")
    end = _MANIFEST.size + instance_size + fingerprint_size
    if instance_size > _INSTANCE_MAX or fingerprint_size > FINGERPRINT_MAX or end > len(untrusted):
        raise damaged("the snapshot's manifest is truncated or damaged")
    at = _MANIFEST.size + instance_size
    try:
        instance = InstanceId.parse(untrusted[_MANIFEST.size : at].decode("ascii"))
    except (InvalidInput, UnicodeDecodeError):
        raise damaged("the snapshot's manifest is damaged", "it names no instance") from None
    identity = SnapshotIdentity(instance, SnapshotId(snapshot.hex()), bytes(untrusted[at:end]))
    raw = bytes(untrusted[:end])
    return ManifestHeader(identity, chunk_count, raw, hashlib.sha256(raw).digest())


def render_segment_header(instance: InstanceId, segment: SnapshotId) -> bytes:
    """A segment's header follows from whose it is and its id, so a reader compares instead of parsing."""
    name = instance.encode()
    return _SEGMENT.pack(_SEGMENT_MAGIC, VERSION, len(name), CHUNK, bytes.fromhex(segment)) + name


def render_key_file(wrapped: bytes) -> bytes:
    if not 0 < len(wrapped) <= WRAPPED_MAX:
        raise InvalidInput(f"a wrapped key of {len(wrapped)} bytes does not fit its slot")
    return _KEY.pack(_KEY_MAGIC, VERSION, len(wrapped)) + wrapped


def parse_key_file(untrusted: bytes) -> bytes:
    """The wrapped key. Nothing here vouches for it: unwrapping does."""
    if len(untrusted) < _KEY.size:
        raise damaged("the snapshot's key file is truncated")
    magic, version, size = _KEY.unpack_from(untrusted)
    if magic != _KEY_MAGIC or version != VERSION or not 0 < size <= WRAPPED_MAX:
        raise damaged("the snapshot's key file is damaged")
    if len(untrusted) != _KEY.size + size:
        raise damaged("the snapshot's key file is truncated or damaged")
    return untrusted[_KEY.size :]


def wrap_context(instance: InstanceId, snapshot: SnapshotId) -> bytes:
    """What a wrapped snapshot key is bound to; the wrapping must authenticate it."""
    return f"snapshot/{snapshot}/{instance}".encode()
