"""A tenant's audit log on disk: appending to the chain of `mvm.core.audit`, and checking it.

    audit.log    one line per entry, only ever appended to
    audit.head   the log's head after the last acknowledged entry, replaced atomically

Ordering of an append, under an exclusive lock on the log itself: the line is written and synced, then the
head is replaced and synced. So the head never runs ahead of the log, and a log shorter than its head has
lost acknowledged entries: nothing is appended to it, `verify` says so, and the operator decides.

What a crash can leave: a last line without its end, which was never acknowledged: the next append cuts it
off and records that it did (`audit.healed`); or a whole last line that the head does not know of yet: the
next append goes on from it.

Whoever can write both files can forget entries at the end. Keep the head, which `verify` returns, elsewhere
too.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from mvm.core import audit, codec, limits
from mvm.core.errors import IntegrityError, InvalidInput, NotFound
from mvm.linux import files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mvm.core.ids import TenantId

LOG_NAME = "audit.log"
HEAD_NAME = "audit.head"
HEALED = "audit.healed"
_MAX_HEAD = 1024


def head_path(log: Path) -> Path:
    return log.with_name(HEAD_NAME)


def append(log: Path, entry: audit.AuditEntry) -> audit.Head:
    """Add `entry` durably; returns the new head. IntegrityError if what is there is not a sound end of the
    log.

    Blocks while another process appends, which is for the time of two fsyncs.
    """
    fd = os.open(log, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        end, torn = _sound_end(fd)
        known = read_head(log)
        head = _last_head(fd, end) if end else audit.Head()
        if known is not None and head.count < known.count:
            raise _cut_off(log, head.count, known.count)
        if known is not None and head.count == known.count and head.hash != known.hash:
            raise _rewritten(log)
        if known is None:
            if end:
                raise _headless(log)
            # From the first entry on there is a head, so that a missing one always means a loss.
            files.write_atomic(head_path(log), codec.encode(audit.Head()), 0o600)
        lines = b""
        if torn:
            os.ftruncate(fd, end)
            note = _healing(entry, torn)
            line, head = audit.chain(head, note)
            lines += line
        line, head = audit.chain(head, entry)
        try:
            files.write_all(fd, lines + line)
        except OSError as error:
            # Half a line would be healed by the next append; taking it back now keeps the log as it was.
            os.ftruncate(fd, end)
            files.raise_if_full(error, log)
            raise
        os.fsync(fd)
        if not end:
            files.fsync_dir(log.parent)
        files.write_atomic(head_path(log), codec.encode(head), 0o600)
        return head
    finally:
        os.close(fd)


def verify(
    log: Path, tenant: TenantId | None = None, *, expected: audit.Head | None = None
) -> audit.Verified:
    """Check the whole log against its chain, its head file and, if given, a head kept elsewhere.

    NotFound without a log. IntegrityError names the first line that is wrong. A torn last line that a crash
    left counts as absent: it was never acknowledged.
    """
    try:
        fd = os.open(log, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if read_head(log) is not None:
            raise _cut_off(log, 0, None) from None
        raise NotFound("the tenant has no audit log", details=str(log)) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        end, _ = _sound_end(fd)
        known = read_head(log)
        if end and known is None:
            raise _headless(log)
        verified = audit.verify_lines(_lines(fd, end), tenant=tenant, expected=known)
        if expected is not None:
            verified = audit.verify_lines(_lines(fd, end), tenant=tenant, expected=expected)
        return verified
    finally:
        os.close(fd)


def read_head(log: Path) -> audit.Head | None:
    """The head kept beside the log, None if there is none."""
    try:
        data = files.read_bounded(head_path(log), _MAX_HEAD)
        return codec.decode(data, audit.Head, limit=_MAX_HEAD, what="the audit head")
    except FileNotFoundError:
        return None
    except InvalidInput as error:
        raise IntegrityError(
            "the head of the audit log is damaged",
            details=f"{head_path(log)}: {error.brief}",
            resolution=_KEEP,
        ) from error


_KEEP = "keep both files as evidence, compare them with a copy, and move them aside to begin a new log"


def _sound_end(fd: int) -> tuple[int, int]:
    """(bytes up to and with the last newline, bytes after it). IntegrityError if no line can be that long."""
    size = os.fstat(fd).st_size
    start = max(0, size - limits.AUDIT_LINE_BYTES - 1)
    tail = os.pread(fd, size - start, start)
    newline = tail.rfind(b"\n")
    if newline < 0 and start > 0:
        raise IntegrityError(
            "the audit log does not end in an entry",
            details=f"no line ends within its last {size - start} bytes",
            resolution=_KEEP,
        )
    end = start + newline + 1
    return end, size - end


def _last_head(fd: int, end: int) -> audit.Head:
    start = max(0, end - limits.AUDIT_LINE_BYTES - 1)
    tail = os.pread(fd, end - start, start)
    line = tail[tail.rfind(b"\n", 0, len(tail) - 1) + 1 :]
    try:
        return audit.head_of(line)
    except InvalidInput as error:
        raise IntegrityError(
            "the last line of the audit log is damaged", details=error.brief, resolution=_KEEP
        ) from error


def _lines(fd: int, end: int) -> Iterator[bytes]:
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        left = end
        while left > 0:
            line = file.readline(min(left, limits.AUDIT_LINE_BYTES + 1))
            if not line:
                return
            left -= len(line)
            yield line


def _healing(entry: audit.AuditEntry, torn: int) -> audit.AuditEntry:
    return audit.AuditEntry(
        time_ns=entry.time_ns, tenant=entry.tenant, action=HEALED, outcome="recovered", node=entry.node,
        host=entry.host, detail=f"an interrupted writer left {torn} bytes without a line's end; they were removed",
    )  # fmt: skip


def _cut_off(log: Path, found: int, known: int | None) -> IntegrityError:
    there = (
        f"it has {found} entries, its head says {known}"
        if known is not None
        else "it is missing, its head is there"
    )
    return IntegrityError("the audit log was cut off", details=f"{log}: {there}", resolution=_KEEP)


def _rewritten(log: Path) -> IntegrityError:
    return IntegrityError(
        "the audit log was rewritten",
        details=f"{log}: its last entry is not the one in its head",
        resolution=_KEEP,
    )


def _headless(log: Path) -> IntegrityError:
    return IntegrityError(
        "the head of the audit log is missing", details=str(head_path(log)), resolution=_KEEP
    )
