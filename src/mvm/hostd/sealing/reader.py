"""Open a sealed image and read chunks of guest memory out of it, one by one, as a waking guest touches them.

`SealedImage.open` checks in this order, and nothing that fails a check is used: the header parses; it is of
the expected instance and snapshot; the manifest's SHA-256 is the one the instance record holds (an older
snapshot, though genuine, stops here); the fingerprint is the present one; the key unwraps; the index
decrypts under the header; every segment is there, of this instance, and of its full length. Records are
checked as they are read, or all at once by `verify_all`.

An image holds descriptors, not names: it stays readable while its directory is renamed or removed, until
`close`. All reads are thread-safe; `close` is not, and comes after the last of them.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from mvm.core.errors import InvalidInput
from mvm.hostd.sealing import plainfile
from mvm.hostd.sealing.faults import FingerprintMismatch, damaged
from mvm.hostd.sealing.index import INDEX_MAX, Index, parse_index
from mvm.hostd.sealing.key_slot import unwrap_snapshot_key
from mvm.hostd.sealing.layout import (
    BOX_OVERHEAD,
    CHUNK,
    FULL,
    HEADER_MAX,
    MANIFEST_NAME,
    PAGE,
    STATE_MAGIC,
    STATE_MAX,
    STATE_NAME,
    TAG_BYTES,
    ManifestHeader,
    SnapshotIdentity,
    fingerprint_differences,
    parse_manifest_header,
    render_segment_header,
    runs,
    segment_name,
)
from mvm.hostd.sealing.parallel import spread
from mvm.hostd.sealing.records import BoxCipher, SegmentCipher, decompress

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from mvm.hostd.sealing.index import Layer, Segment
    from mvm.hostd.sealing.key_slot import Unwrap

ZERO_CHUNK = bytes(CHUNK)
_MEMORY = "the snapshot's memory"


class OpenSegment:
    """A segment file opened and found to be the one the index names. Owns its descriptor."""

    __slots__ = ("cipher", "fd", "segment")

    def __init__(self, directory: int, identity: SnapshotIdentity, segment: Segment) -> None:
        header = render_segment_header(identity.instance, segment.id)
        self.segment = segment
        self.fd = plainfile.open_file(directory, segment_name(segment.id), _MEMORY)
        try:
            size = os.fstat(self.fd).st_size
            if size != segment.size:
                raise damaged(
                    "the snapshot's memory is truncated" if size < segment.size else f"{_MEMORY} is damaged",
                    f"{segment_name(segment.id)} has {size} bytes, not {segment.size}",
                )
            if plainfile.read_at(self.fd, len(header), 0, _MEMORY) != header:
                raise damaged(
                    "the snapshot's memory is damaged or of another instance",
                    f"the header of {segment_name(segment.id)} is not that of {identity.instance}",
                )
            self.cipher = SegmentCipher(segment.key, hashlib.sha256(header).digest())
        except BaseException:
            os.close(self.fd)
            raise


class SealedImage:
    """A verified, open image. Make one with `open`; a context manager that closes it."""

    def __init__(
        self,
        directory: int,
        header: ManifestHeader,
        manifest_sha256: str,
        index: Index,
        segments: list[OpenSegment],
        state_box: BoxCipher,
        working_set_box: BoxCipher,
    ) -> None:
        self.directory_fd = directory
        self.identity = header.identity
        self.chunk_count = header.chunk_count
        self.manifest_sha256 = manifest_sha256
        self.index = index
        self.segments = segments
        self.working_set_box = working_set_box
        self._state_box = state_box
        self._closed = False

    @classmethod
    def open(cls, directory: Path, expected: SnapshotIdentity, unwrap: Unwrap, manifest_sha256: str) -> Self:
        """Open the image in `directory` for `expected`, bound to the digest its instance record holds.

        NotFound: no such directory. FingerprintMismatch: sound, but made under something else.
        IntegrityError: anything else about it is wrong. What `unwrap` raises passes through.
        """
        handle = plainfile.open_directory(directory)
        opened: list[OpenSegment] = []
        try:
            manifest = plainfile.read_all(
                handle, MANIFEST_NAME, HEADER_MAX + BOX_OVERHEAD + INDEX_MAX, "the snapshot's manifest"
            )
            header = parse_manifest_header(manifest)
            _check_binding(header, expected, hashlib.sha256(manifest).hexdigest(), manifest_sha256)
            with unwrap_snapshot_key(handle, expected, unwrap) as key:
                index_box = BoxCipher(key, b"index", header.digest)
                state_box = BoxCipher(key, b"state", header.digest)
                working_set_box = BoxCipher(key, b"working set", header.digest)
            sealed = memoryview(manifest)[len(header.raw) :]
            index = parse_index(index_box.open(sealed, "the index"), header.chunk_count)
            for segment in index.segments:
                opened.append(OpenSegment(handle, expected, segment))
            return cls(handle, header, manifest_sha256, index, opened, state_box, working_set_box)
        except BaseException:
            for each in opened:
                os.close(each.fd)
            os.close(handle)
            raise

    @property
    def size(self) -> int:
        """Bytes of guest memory."""
        return self.chunk_count * CHUNK

    def is_zero(self, chunk: int) -> bool:
        """Whether the chunk has no layers. (A chunk that became zero page by page may still have some.)"""
        self._check(chunk)
        return not self.index.columns.counts[chunk]

    def read_chunk(self, chunk: int) -> bytes | bytearray:
        """The 131,072 bytes of chunk number `chunk` (guest physical memory from chunk * 131072)."""
        self._check(chunk)
        layers = self.index.layers(chunk)
        if not layers:
            return ZERO_CHUNK
        if layers[-1].present == FULL:
            return self._pages_of(chunk, layers[-1])
        buffer = bytearray(CHUNK)
        for layer in layers:
            for first, count in runs(layer.zeroed):
                buffer[first * PAGE : (first + count) * PAGE] = ZERO_CHUNK[: count * PAGE]
            if layer.present:
                pages = memoryview(self._pages_of(chunk, layer))
                at = 0
                for first, count in runs(layer.present):
                    buffer[first * PAGE : (first + count) * PAGE] = pages[at : at + count * PAGE]
                    at += count * PAGE
        return buffer

    def open_layer(self, chunk: int, layer: Layer) -> tuple[int, bytes]:
        """(codec, body) of a layer of `chunk`, decrypted but still compressed."""
        if layer.slot >= len(self.segments) or layer.present & layer.zeroed:
            raise damaged("the index of the snapshot contradicts itself", f"in a layer of chunk {chunk}")
        opened = self.segments[layer.slot]
        if not TAG_BYTES <= layer.length <= CHUNK + TAG_BYTES or (
            layer.offset + layer.length > opened.segment.size
        ):
            raise damaged("the index of the snapshot contradicts itself", f"in a layer of chunk {chunk}")
        sealed = plainfile.read_at(opened.fd, layer.length, layer.offset, _MEMORY)
        body = opened.cipher.open(layer.offset, chunk, layer.present, layer.zeroed, layer.codec, sealed)
        return layer.codec, body

    def state(self) -> bytes:
        """The device state as it was given to the writer."""
        raw = plainfile.read_all(
            self.directory_fd,
            STATE_NAME,
            len(STATE_MAGIC) + BOX_OVERHEAD + 1 + STATE_MAX,
            "the device state of the snapshot",
        )
        if not raw.startswith(STATE_MAGIC):
            raise damaged("the device state of the snapshot is damaged")
        box = self._state_box.open(memoryview(raw)[len(STATE_MAGIC) :], "the device state")
        if len(box) < 5:
            raise damaged("the device state of the snapshot is too short")
        size = int.from_bytes(box[1:5], "little")
        if size > STATE_MAX:
            raise damaged("the device state of the snapshot is too large")
        return decompress(box[0], box[5:], size)

    def verify_all(self) -> None:
        """Read everything once; IntegrityError at the first byte that is not as it was sealed."""
        for chunk in range(self.chunk_count):
            for layer in self.index.layers(chunk):
                if layer.present:
                    self._pages_of(chunk, layer)
        self.state()

    def descriptors(self) -> list[int]:
        """What a forked child must keep open to go on reading."""
        return [self.directory_fd, *(opened.fd for opened in self.segments)]

    def authenticate(self, threads: int = 1) -> None:
        """Check the tag of every record, without decompressing; IntegrityError at the first bad one.

        One thread does it at more than 5 GB/s of what is stored; a second one gains nothing (measured).

        What this passed can still fail to decompress only if it was sealed wrongly, not if it was changed since.
        """
        work = [chunk for chunk in range(self.chunk_count) if self.index.columns.counts[chunk]]

        def check(chunk: int) -> None:
            for layer in self.index.layers(chunk):
                if layer.present:
                    self.open_layer(chunk, layer)

        spread(work, threads, lambda: check)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for opened in self.segments:
            os.close(opened.fd)
        os.close(self.directory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self, chunk: int) -> None:
        if not 0 <= chunk < self.chunk_count:
            raise InvalidInput(f"the snapshot has no chunk {chunk}", details=f"it has {self.chunk_count}")

    def _pages_of(self, chunk: int, layer: Layer) -> bytes:
        codec, body = self.open_layer(chunk, layer)
        return decompress(codec, body, layer.present.bit_count() * PAGE)


def peek(directory: Path) -> tuple[SnapshotIdentity, str]:
    """(identity, manifest SHA-256) of what lies in `directory`, unauthenticated: only for comparing with a record."""
    handle = plainfile.open_directory(directory)
    try:
        manifest = plainfile.read_all(
            handle, MANIFEST_NAME, HEADER_MAX + BOX_OVERHEAD + INDEX_MAX, "the snapshot's manifest"
        )
    finally:
        os.close(handle)
    return parse_manifest_header(manifest).identity, hashlib.sha256(manifest).hexdigest()


def _check_binding(header: ManifestHeader, expected: SnapshotIdentity, found: str, recorded: str) -> None:
    identity = header.identity
    if identity.instance != expected.instance:
        raise damaged(
            "the snapshot is of another instance", f"it is of {identity.instance}, not of {expected.instance}"
        )
    if identity.snapshot != expected.snapshot:
        raise damaged(
            "the snapshot is not the one the instance fell asleep with",
            f"it is {identity.snapshot}; the record names {expected.snapshot}",
        )
    if found != recorded:
        raise damaged(
            "the snapshot is damaged or was replaced",
            f"its manifest has the SHA-256 {found}; the record names {recorded}",
        )
    if identity.fingerprint != expected.fingerprint:
        raise FingerprintMismatch(fingerprint_differences(identity.fingerprint, expected.fingerprint))
