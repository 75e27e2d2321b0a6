"""The audit log of one tenant: a chain of lines, each sealed by the next.

Format (docs/formats/audit.md has an example). One entry is one line:

    <canonical JSON object> LF

    canonical  keys sorted, no white space outside strings, UTF-8, absent values left out (`mvm.core.codec`)
    seq        1, 2, 3, ... without gaps
    prev       "hash" of the line before; of the first line, 64 zeros
    hash       sha256, in hex, over the bytes  "mvm audit 1" NUL <the same object without "hash">

so that `hash` covers every field, `prev` included, and the last `hash` (the **head**) covers the whole log.

What the chain shows: a changed byte anywhere (also one that leaves the JSON's meaning as it was, because a
line must be canonical), a missing, added or moved line. What it cannot show by itself: lines cut off at the
end, or a log rewritten from some point on by somebody who can compute the hashes. Both need a head kept
elsewhere: `verify_lines(..., expected=head)`.

An append that a crash interrupted leaves a last line without LF. It was never acknowledged; whoever appends
next cuts the file back to its last LF first. `head_of(last line)` is where the chain goes on.

Pure: times, hashes of artifacts and identities are given; nothing here opens a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.core import codec, limits
from mvm.core.errors import IntegrityError, InvalidInput
from mvm.core.ids import InstanceId, NodeId, RevisionId, TenantId
from mvm.core.snapshot import Artifacts, Count, Name, Nanoseconds, Sha256

GENESIS: Final = "0" * 64
_DOMAIN: Final = b"mvm audit 1\0"

Word = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z][a-z0-9.-]*\Z")]
Path = Annotated[str, Meta(min_length=1, max_length=limits.PATH_MAX)]
Message = Annotated[str, Meta(max_length=limits.MESSAGE_MAX)]
Arguments = Annotated[
    tuple[Annotated[str, Meta(max_length=limits.MESSAGE_MAX)], ...], Meta(max_length=limits.AUDIT_ARGUMENTS)
]


class AuditLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the instance was allowed when the entry was made."""

    vcpus: Count
    mem_mib: Count
    data_disk_mib: Count


class AuditEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What happened, as the caller saw it. None and () mean "does not apply" and take no room in the line.

    `time_ns`: nanoseconds since 1970. `action`: `tenant.create`, `instance.sleep`, ... `command`: the
    arguments as given, secrets excluded by the caller. `outcome`: `done`, `failed`, `refused`, or
    `recovered`. `host`: the host's identity (host name and machine id)."""

    time_ns: Nanoseconds
    tenant: TenantId
    action: Word
    outcome: Word
    node: NodeId
    host: Annotated[str, Meta(max_length=limits.HOST_IDENTITY_MAX)]
    command: Arguments = ()
    detail: Message = ""
    instance: InstanceId | None = None
    revision: RevisionId | None = None
    flake_ref: Annotated[str, Meta(max_length=limits.FLAKE_REF_MAX)] | None = None
    lock_hash: Sha256 | None = None
    store_paths: Annotated[tuple[Path, ...], Meta(max_length=limits.STORE_PATHS)] = ()
    artifacts: Artifacts = ()
    snapshot_hash: Sha256 | None = None
    final_config_hash: Sha256 | None = None
    ip: Name | None = None
    mac: Name | None = None
    limits: AuditLimits | None = None


class Sealed(AuditEntry, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """An entry in its place. `hash` is "" only while it is being computed."""

    seq: Annotated[int, Meta(ge=1, le=limits.INT63_MAX)]
    prev: Sha256
    hash: Annotated[str, Meta(pattern=r"^(?:[0-9a-f]{64})?\Z")] = ""


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a log ends: number of entries and hash of the last. An empty log has 0 and 64 zeros."""

    count: Count = 0
    hash: Sha256 = GENESIS


class Verified(msgspec.Struct, frozen=True):
    """`count` entries, ending in `head`."""

    count: int
    head: str

    def as_head(self) -> Head:
        return Head(self.count, self.head)


def chain(head: Head, entry: AuditEntry) -> tuple[bytes, Head]:
    """(the line to append, newline included; the log's new head).

    Raises InvalidInput if a field of `entry` is out of bounds or the line would be longer than is read back.
    """
    fields = {name: getattr(entry, name) for name in AuditEntry.__struct_fields__}
    sealed = codec.checked(Sealed(**fields, seq=head.count + 1, prev=head.hash), what="the audit entry")
    digest = _digest(sealed)
    line = codec.encode(msgspec.structs.replace(sealed, hash=digest))
    if len(line) > limits.AUDIT_LINE_BYTES:
        raise InvalidInput(
            "the audit entry is too large",
            details=f"It has {len(line)} bytes; at most {limits.AUDIT_LINE_BYTES} are allowed.",
            resolution="Shorten its command or detail.",
        )
    return line, Head(sealed.seq, digest)


def parse_line(untrusted: bytes) -> Sealed:
    """One line, with or without its newline; checks its form and its own hash, not its place. Raises
    InvalidInput for a line that is not an entry, IntegrityError for one whose bytes are not the ones that
    were sealed."""
    body = untrusted.removesuffix(b"\n")
    sealed = codec.decode(body, Sealed, limit=limits.AUDIT_LINE_BYTES, what="the audit entry")
    if codec.encode_line(sealed) != body:
        raise _damaged("it is not in canonical form, so it was edited")
    if sealed.hash != _digest(msgspec.structs.replace(sealed, hash="")):
        raise _damaged("its hash does not match its content, so it was edited")
    return sealed


def head_of(untrusted: bytes) -> Head:
    """The head of a log whose last line this is. Raises as `parse_line`."""
    sealed = parse_line(untrusted)
    return Head(sealed.seq, sealed.hash)


def verify_lines(
    lines: Iterable[bytes], *, tenant: TenantId | None = None, expected: Head | None = None
) -> Verified:
    """Check a whole log, one line at a time, in constant memory.

    `lines`: newlines included; read them with `readline(limits.AUDIT_LINE_BYTES + 1)`, so that a file without
    newlines is not read whole. `tenant`: every entry must be that tenant's.
    `expected`: the log must contain that many entries or more, and that hash at that place. Raises
    IntegrityError whose brief names the line (counted from 1) and what is wrong with it: edited, lost,
    moved, foreign, cut off."""
    count, head = 0, GENESIS
    if expected is not None and expected.count == 0 and expected.hash != GENESIS:
        raise _at(0, "the expected head is not that of any log")
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            raise _at(number, "it has no end, so it was cut off or its writer was interrupted")
        try:
            sealed = parse_line(line)
        except (InvalidInput, IntegrityError) as error:
            raise _at(number, error.brief, error.details) from error
        if sealed.seq != number:
            raise _at(number, _misplaced(sealed.seq, number))
        if sealed.prev != head:
            raise _at(number, "it does not follow the line before, so one of them was replaced")
        if tenant is not None and sealed.tenant != tenant:
            raise _at(number, f"it is an entry of tenant {sealed.tenant}, not {tenant}")
        count, head = number, sealed.hash
        if expected is not None and count == expected.count and head != expected.hash:
            raise _at(number, "it is not the entry that was last seen here, so the log was rewritten")
    if expected is not None and count < expected.count:
        raise _at(
            count + 1, f"it is missing: the log ended with entry {expected.count}, so its end was cut off"
        )
    return Verified(count, head)


def _digest(sealed: Sealed) -> str:
    """`hash` is at its default, which is left out of the encoding."""
    return hashlib.sha256(_DOMAIN + codec.encode_line(sealed)).hexdigest()


def _misplaced(seq: int, number: int) -> str:
    if seq > number:
        return f"entry {number} is missing, entry {seq} stands in its place: lines were lost or moved"
    return f"entry {seq} stands here again or too late: lines were repeated or moved"


def _damaged(reason: str) -> IntegrityError:
    return IntegrityError(reason)


def _at(number: int, reason: str, details: str = "") -> IntegrityError:
    return IntegrityError(
        f"the audit log fails at line {number}: {reason}",
        details=details,
        resolution="Keep the file as evidence and compare it with a copy; entries before that line are sound.",
    )
