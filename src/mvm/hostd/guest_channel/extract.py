"""copy_out on the host's side: a tree from a hostile guest is written below one directory and nowhere else.

Rules:
- Names are single components; the parser holds a descriptor per open directory and creates everything relative to it,
  exclusively and without following links. There is no path for the guest to play with.
- Only files and directories are made. Links, devices, sockets and pipes are not; they are counted as skipped.
- Modes keep the nine permission bits; set-id and sticky bits are dropped. Owner is whoever runs this.
- Everything is written to a fresh staging entry beside the target and renamed at the end; a failure leaves
  nothing.
- Bytes, entries and depth are bounded.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from mvm.core.errors import Conflict, GuestError, MvmError, NotFound, ResourceExhausted
from mvm.hostd.guest_channel.operation import Operation
from mvm.linux.files import remove_tree
from mvm.wire import framing, guest_api
from mvm.wire.guest_api import TREE_HEAD, U16, U32, CopyReport
from mvm.wire.guest_session import ClientSession, Data, Event

_T = TypeVar("_T")
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class CopyLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most a guest may write here: bytes of content, entries of any kind."""

    max_bytes: int = 64 << 30
    max_entries: int = 1_000_000


class Extractor:
    """Push parser: `feed` bytes from the guest, then `commit` or `discard`.

    `target`: the final path; its parent must exist. `staging`: a name beside it that does not exist yet.
    """

    def __init__(
        self,
        target: Path,
        staging: Path,
        limits: CopyLimits,
        on_progress: Callable[[int], object] | None = None,
    ) -> None:
        self.entries = 0
        self.size = 0
        self.skipped = 0
        self.complete = False
        self._target = target
        self._staging = staging
        self._limits = limits
        self._on_progress = on_progress
        self._buf = bytearray()
        try:
            self._parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"{target.parent} does not exist on the host") from None
        self._writer = self._write()
        self._need = next(self._writer)

    def feed(self, untrusted: bytes) -> None:
        """Take more of the stream. GuestError if it is no tree; ResourceExhausted, Conflict, OSError from writing."""
        if self.complete:
            _malformed("bytes behind the tree's end")
        buf = self._buf
        buf += untrusted
        at = 0
        try:
            while len(buf) - at >= self._need:
                piece = bytes(buf[at : at + self._need])
                at += self._need
                self._need = self._writer.send(piece)
        except StopIteration:
            self.complete = True
            if at != len(buf):
                _malformed("bytes behind the tree's end")
        del buf[:at]

    def commit(self) -> None:
        """Put the finished tree in place. Conflict if a directory is in the way."""
        if not self.complete:
            _malformed("end in the middle of the tree")
        try:
            os.rename(self._staging.name, self._target.name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST):
                raise Conflict(
                    f"{self._target} is in the way", resolution="remove it or name another destination"
                ) from None
            raise
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was staged, if anything; safe to call twice."""
        self._writer.close()
        if self._parent >= 0:
            os.close(self._parent)
            self._parent = -1
            remove_tree(self._staging)

    def _write(self) -> Generator[int, bytes, None]:
        stack: list[tuple[int, int]] = []  # open directories and the modes they get when complete
        try:
            while True:
                kind, mode, size = TREE_HEAD.unpack((yield TREE_HEAD.size))
                mode &= 0o777
                if size > guest_api.MAX_NAME:
                    _malformed("name too long")
                name = (yield size) if size else b""
                self.entries += 1
                if self.entries > self._limits.max_entries:
                    raise ResourceExhausted(
                        "the guest sent more files than allowed", details=f"limit {self._limits.max_entries}"
                    )
                if stack:
                    parent = stack[-1][0]
                    if kind != guest_api.TREE_UP:
                        _check_name(name)
                else:
                    parent, name = self._parent, os.fsencode(self._staging.name)
                if kind == guest_api.TREE_FILE:
                    yield from self._write_file(parent, name, mode)
                elif kind == guest_api.TREE_DIR:
                    if len(stack) >= guest_api.MAX_DEPTH:
                        _malformed("directories nest too deep")
                    _create(partial(os.mkdir, name, 0o700, dir_fd=parent))
                    stack.append((os.open(name, _DIRECTORY, dir_fd=parent), mode))
                elif kind == guest_api.TREE_LINK and stack:
                    (length,) = U16.unpack((yield 2))
                    if not 0 < length <= guest_api.MAX_TARGET:
                        _malformed("link target")
                    yield length
                    self.skipped += 1
                elif kind == guest_api.TREE_SKIPPED and stack:
                    self.skipped += 1
                elif kind == guest_api.TREE_UP and stack:
                    self.entries -= 1
                    fd, mode = stack.pop()
                    os.fchmod(fd, mode)
                    os.close(fd)
                else:
                    _malformed(f"entry of kind {kind}")
                if not stack:
                    return
        finally:
            for fd, _mode in stack:
                os.close(fd)

    def _write_file(self, parent: int, name: bytes, mode: int) -> Generator[int, bytes, None]:
        fd = _create(partial(os.open, name, _CREATE, 0o600, dir_fd=parent))
        try:
            while True:
                (size,) = U32.unpack((yield 4))
                if size == 0:
                    break
                if size == guest_api.TREE_FAILED:
                    raise GuestError(
                        f"the guest could not read {guest_api.printable(name)} to its end",
                        resolution="look into the guest; its disk or the file is damaged",
                    )
                if size > framing.CHUNK:
                    _malformed("chunk too long")
                chunk = memoryview((yield size))
                self.size += size
                if self.size > self._limits.max_bytes:
                    raise ResourceExhausted(
                        "the guest sent more than allowed", details=f"limit {self._limits.max_bytes} bytes"
                    )
                while chunk:
                    chunk = chunk[os.write(fd, chunk) :]
                if self._on_progress is not None:
                    self._on_progress(self.size)
            os.fchmod(fd, mode)
        finally:
            os.close(fd)


class ReceiveOperation(Operation):
    """Feeds an Extractor; the result is a CopyReport by this side's count. A local failure cancels the request."""

    def __init__(self, session: ClientSession, number: int, name: str, extractor: Extractor) -> None:
        super().__init__(session, number, name)
        self._extractor = extractor
        self._seen = False

    @property
    def answered(self) -> bool:
        return self._seen or self._ended

    def event(self, event: Event) -> None:
        if isinstance(event, Data):
            self._seen = True
            if self._error is None:
                try:
                    self._extractor.feed(event.payload)
                except OSError as error:
                    self.abandon(_local(error))
                except MvmError as error:
                    self.abandon(error)
            self.session.consumed(self.number, event.stream, len(event.payload))
        else:
            super().event(event)

    def result(self) -> CopyReport:
        try:
            super().result()
            self._extractor.commit()
        finally:
            self._extractor.discard()
        extractor = self._extractor
        return CopyReport(extractor.entries - extractor.skipped, extractor.size, extractor.skipped)

    def close(self) -> None:
        self._extractor.discard()


def destination(remote: str, local: Path) -> Path:
    """Where `remote` goes: into `local` under its own name if that is a directory, else to `local` itself."""
    if local.is_dir():
        name = remote.rstrip("/").rpartition("/")[2]
        if not name or name in (".", ".."):
            raise Conflict(f"{local} is a directory", resolution="name the new file or directory")
        return local / name
    return local


def _check_name(name: bytes) -> None:
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        _malformed("name of an entry")


def _create(make: Callable[[], _T]) -> _T:
    try:
        return make()
    except FileExistsError:
        _malformed("the same name twice")


def _local(error: OSError) -> MvmError | OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(
            "the host's disk is full", details=str(error), resolution="free space, then copy again"
        )
    return error


def _malformed(what: str) -> NoReturn:
    raise GuestError(
        "the guest sent a malformed file tree", details=what, resolution="do not trust this guest's agent"
    )
