"""copy_in on the host's side: a local file, tree or set of files becomes the protocol's stream of entries.

    entry := kind:u8 | mode:u16 | length:u16 | name | rest      (mvm.guest.transfer says what rest is)

The path the user named is followed; links inside a tree are sent as links. Devices, sockets and pipes are left out and
counted. Reading is by directory descriptor, so a tree that changes underneath cannot lead elsewhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mvm.core.errors import InvalidInput, MvmError, NotFound
from mvm.hostd.guest_channel.operation import Operation
from mvm.wire import framing, guest_api
from mvm.wire.guest_api import TREE_HEAD, U16, U32, CopyReport
from mvm.wire.guest_session import ClientSession

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW


class TreeSource:
    """Counts while it yields the pieces of a tree's stream, each at most CHUNK and a header long."""

    def __init__(self, on_progress: Callable[[int], object] | None = None) -> None:
        self.entries = 0
        self.size = 0
        self.skipped = 0
        self._on_progress = on_progress

    def local(self, path: Path) -> Iterator[bytes]:
        """The file or directory at `path`. NotFound, InvalidInput, OSError."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise NotFound(f"{path} does not exist on the host") from None
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            yield from self._dir(fd, b"", mode, 0)
        elif stat.S_ISREG(mode):
            yield from self._file(fd, b"", mode)
        else:
            os.close(fd)
            raise InvalidInput(f"{path} is neither a file nor a directory")

    def memory(self, files: Mapping[str, bytes | bytearray | memoryview], mode: int) -> Iterator[bytes]:
        """A flat directory of `files`."""
        yield self._head(guest_api.TREE_DIR, 0o755, b"")
        for name, content in files.items():
            raw = name.encode()
            if not 0 < len(raw) <= guest_api.MAX_NAME or name in (".", "..") or "/" in name or "\0" in name:
                raise InvalidInput(f"{name!r} is not a file name")
            yield self._head(guest_api.TREE_FILE, mode, raw)
            view = memoryview(content)
            for at in range(0, len(view), framing.CHUNK):
                chunk = view[at : at + framing.CHUNK]
                self._count(len(chunk))
                yield U32.pack(len(chunk)) + chunk
            yield U32.pack(0)
        yield TREE_HEAD.pack(guest_api.TREE_UP, 0, 0)

    def _dir(self, fd: int, name: bytes, mode: int, depth: int) -> Iterator[bytes]:
        try:
            if depth >= guest_api.MAX_DEPTH:
                raise InvalidInput(f"directories nest deeper than {guest_api.MAX_DEPTH}")
            yield self._head(guest_api.TREE_DIR, mode, name)
            for entry in sorted(os.listdir(fd)):
                yield from self._entry(fd, entry, depth)
            yield TREE_HEAD.pack(guest_api.TREE_UP, 0, 0)
        finally:
            os.close(fd)

    def _entry(self, parent: int, entry: str, depth: int) -> Iterator[bytes]:
        name = os.fsencode(entry)
        mode = os.stat(entry, dir_fd=parent, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            target = os.fsencode(os.readlink(entry, dir_fd=parent))
            yield self._head(guest_api.TREE_LINK, mode, name) + U16.pack(len(target)) + target
        elif stat.S_ISREG(mode):
            yield from self._file(os.open(entry, _READ, dir_fd=parent), name, mode)
        elif stat.S_ISDIR(mode):
            fd = os.open(entry, _READ | os.O_DIRECTORY, dir_fd=parent)
            yield from self._dir(fd, name, mode, depth + 1)
        else:
            self.skipped += 1
            yield TREE_HEAD.pack(guest_api.TREE_SKIPPED, 0, len(name)) + name

    def _file(self, fd: int, name: bytes, mode: int) -> Iterator[bytes]:
        try:
            yield self._head(guest_api.TREE_FILE, mode, name)
            while chunk := os.read(fd, framing.CHUNK):
                self._count(len(chunk))
                yield U32.pack(len(chunk)) + chunk
            yield U32.pack(0)
        finally:
            os.close(fd)

    def _head(self, kind: int, mode: int, name: bytes) -> bytes:
        self.entries += 1
        return TREE_HEAD.pack(kind, stat.S_IMODE(mode), len(name)) + name

    def _count(self, size: int) -> None:
        self.size += size
        if self._on_progress is not None:
            self._on_progress(self.size)


class SendOperation(Operation):
    """Sends a tree as credit allows; the result is a CopyReport by this side's count."""

    def __init__(
        self, session: ClientSession, number: int, name: str, source: TreeSource, pieces: Iterator[bytes]
    ) -> None:
        super().__init__(session, number, name)
        self._source = source
        self._pieces = pieces
        self._left = b""
        self._sent_all = False

    def produce(self) -> None:
        if self._ended or self._sent_all or self._error is not None:
            return
        session, number = self.session, self.number
        try:
            while session.room(number) > 0:
                piece = self._left or next(self._pieces, b"")
                if not piece:
                    self._sent_all = True
                    session.send_eof(number)
                    return
                self._left = piece[session.send_data(number, piece) :]
        except (OSError, MvmError) as error:
            self.abandon(error)

    def result(self) -> CopyReport:
        super().result()
        return CopyReport(self._source.entries, self._source.size, self._source.skipped)

    def close(self) -> None:
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()
