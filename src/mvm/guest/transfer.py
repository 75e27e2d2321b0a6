"""copy_in and copy_out: a file or a directory tree as a stream of entries.

    entry := kind:u8 | mode:u16 | length:u16 | name | rest
    rest  := FILE: ( size:u32 (1..CHUNK) | bytes )* then size 0; size 0xffffffff: the source failed midway
             LINK: length:u16 | target      DIR: entries follow until UP      UP, SKIPPED: nothing

The first entry is the root, its name is ignored. Files appear under their names complete or not at all
(written beside, then renamed). Devices, sockets and pipes are not copied: SKIPPED names them. Memory is
bounded by the stream's window.
"""

from __future__ import annotations

import os

from mvm.guest import proto
from mvm.guest.conn import HIGH_WATER, Connection, Refusal, Request, refusal_of
from mvm.guest.proto import Malformed, Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

FAILED = 0xFFFFFFFF
_S_IFMT = 0o170000
_S_IFDIR = 0o040000
_S_IFREG = 0o100000
_S_IFLNK = 0o120000


class CopyIn(Request):
    """Receives a tree and writes it at `target`."""

    def __init__(self, conn: Connection, number: int, target: bytes) -> None:
        super().__init__(conn, number)
        self._buf = bytearray()
        self._credit = proto.STREAM_WINDOW
        self._taken = 0
        self._entries = 0
        self._bytes = 0
        self._skipped = 0
        self._file = -1
        self._part = b""
        self._final = b""
        self._mode = 0
        self._left = 0
        self._writer = self._write_tree(target)
        self._need = next(self._writer)
        self._complete = False

    def data(self, stream: int, payload: bytes) -> None:
        if stream != proto.STDIN or len(payload) > self._credit or self._complete:
            raise Malformed
        self._credit -= len(payload)
        self._buf += payload
        self._advance()
        self._taken += len(payload)
        if self._taken >= proto.STREAM_WINDOW // 2:
            self._credit += self._taken
            self.send(proto.OUT_CREDIT, proto.CREDIT_BODY.pack(proto.STDIN, self._taken))
            self._taken = 0

    def _advance(self) -> None:
        """Give the writer what it waits for, as often as it is there."""
        buf = self._buf
        at = 0
        try:
            while len(buf) - at >= self._need:
                piece = bytes(buf[at : at + self._need])
                at += self._need
                self._need = self._writer.send(piece)
        except StopIteration:
            self._complete = True
            if at != len(buf):
                raise Malformed from None
        del buf[:at]

    def eof(self, stream: int) -> None:
        if stream != proto.STDIN or not self._complete:
            raise Malformed
        self.completed()
        self.finish(proto.DONE, proto.COPY_DONE.pack(self._entries, self._bytes, self._skipped))

    def completed(self) -> None:
        """The tree is whole; raises Refusal or OSError if it cannot be put to use."""

    def abort(self) -> None:
        self._writer.close()

    def _write_tree(self, target: bytes) -> Generator[int, bytes, None]:
        """Coroutine: yields how many bytes it needs, is sent exactly those."""
        stack: list[tuple[bytes, int]] = []  # open directories: path, mode to set when done or -1
        while True:
            kind, mode, size = proto.TREE_HEAD.unpack((yield proto.TREE_HEAD.size))
            mode &= 0o7777
            name = (yield size) if size else b""
            if not stack:
                path = target
            elif kind != proto.TREE_UP:
                if (
                    not name
                    or len(name) > proto.MAX_NAME
                    or name in (b".", b"..")
                    or b"/" in name
                    or b"\0" in name
                ):
                    raise Malformed
                path = stack[-1][0] + b"/" + name
            else:
                path = b""
            self._entries += 1
            if kind == proto.TREE_FILE:
                yield from self._write_file(path, mode)
            elif kind == proto.TREE_DIR:
                if len(stack) >= proto.MAX_DEPTH:
                    raise Refusal(proto.E_TOO_LARGE, "directories nest too deep")
                stack.append((path, mode if _make_dir(path) else -1))
                continue
            elif kind == proto.TREE_LINK and stack:
                (size,) = proto.U16.unpack((yield 2))
                if not 0 < size <= proto.MAX_TARGET:
                    raise Malformed
                _make_link((yield size), path)
            elif kind == proto.TREE_SKIPPED and stack:
                self._skipped += 1
            elif kind == proto.TREE_UP and stack:
                self._entries -= 1
                path, mode = stack.pop()
                if mode >= 0:
                    os.chmod(path, mode)
            else:
                raise Malformed
            if not stack:
                return

    def _write_file(self, path: bytes, mode: int) -> Generator[int, bytes, None]:
        if os.path.isdir(path):
            raise Refusal(proto.E_FAILED, f"{os.fsdecode(path)}: is a directory")
        head, _, _tail = path.rpartition(b"/")
        part = head + b"/.mvm-part-%d-%d" % (os.getpid(), id(self))
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            while True:
                (size,) = proto.U32.unpack((yield 4))
                if size == 0:
                    break
                if size == FAILED:
                    raise Refusal(
                        proto.E_FAILED, f"{os.fsdecode(path)}: the source could not be read to its end"
                    )
                if size > proto.CHUNK:
                    raise Malformed
                chunk = yield size
                self._bytes += size
                while chunk:
                    chunk = chunk[os.write(fd, chunk) :]
            os.fchmod(fd, mode)
            os.rename(part, path)
            part = b""
        finally:
            os.close(fd)
            if part:
                os.unlink(part)


def _make_dir(path: bytes) -> bool:
    try:
        os.mkdir(path, 0o700)
        return True
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        return False


def _make_link(target: bytes, path: bytes) -> None:
    try:
        os.symlink(target, path)
    except FileExistsError:
        if not os.path.islink(path):
            raise
        os.unlink(path)
        os.symlink(target, path)


class CopyOut(Request):
    """Sends the tree at `path`; the window bounds what is under way."""

    def __init__(self, conn: Connection, number: int, path: bytes, window: int) -> None:
        super().__init__(conn, number)
        self._credit = window
        self._entries = 0
        self._bytes = 0
        self._skipped = 0
        self._left = b""
        self._reader = self._read_root(path)
        self._busy = False

    def credit(self, stream: int, amount: int) -> None:
        if stream != proto.STDOUT:
            raise Malformed
        self._credit += amount
        self.pump()

    def abort(self) -> None:
        self._reader.close()

    def pump(self) -> None:
        conn = self.conn
        try:
            while self._credit > 0 and conn.pending_out < HIGH_WATER:
                piece = self._left or next(self._reader, b"")
                if not piece:
                    self.finish(proto.DONE, proto.COPY_DONE.pack(self._entries, self._bytes, self._skipped))
                    return
                now = piece[: min(self._credit, proto.CHUNK)]
                self._left = piece[len(now) :]
                self._credit -= len(now)
                self.send(proto.OUT_DATA, b"\x01" + now)
        except Refusal as refusal:
            self._reader.close()
            self.fail(refusal)
        except OSError as error:
            self._reader.close()
            self.fail(refusal_of(error))

    def _read_root(self, path: bytes) -> Generator[bytes, None, None]:
        # The path the user named is followed, links inside the tree are copied as links.
        status = os.stat(path)
        if status.st_mode & _S_IFMT == _S_IFDIR:
            yield from self._read_dir(path, b"", status.st_mode, 0)
        elif status.st_mode & _S_IFMT == _S_IFREG:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            yield from self._read_file(fd, b"", status.st_mode)
        else:
            raise Refusal(proto.E_UNSUPPORTED, f"{os.fsdecode(path)}: neither a file nor a directory")

    def _read_dir(self, path: bytes, name: bytes, mode: int, depth: int) -> Generator[bytes, None, None]:
        if depth >= proto.MAX_DEPTH:
            raise Refusal(proto.E_TOO_LARGE, f"{os.fsdecode(path)}: directories nest too deep")
        self._entries += 1
        yield _head(proto.TREE_DIR, mode, name)
        with os.scandir(path) as entries:
            for entry in entries:
                yield from self._read_entry(entry, depth)
        yield _head(proto.TREE_UP, 0, b"")

    def _read_entry(self, entry: os.DirEntry[bytes], depth: int) -> Generator[bytes, None, None]:
        name = entry.name
        try:
            mode = entry.stat(follow_symlinks=False).st_mode
            kind = mode & _S_IFMT
            if kind == _S_IFLNK:
                target = os.readlink(entry.path)
                self._entries += 1
                yield _head(proto.TREE_LINK, mode, name) + proto.U16.pack(len(target)) + target
                return
            if kind == _S_IFREG:
                fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                yield from self._read_file(fd, name, mode)
                return
        except FileNotFoundError:
            return  # gone since the directory was read
        if kind == _S_IFDIR:
            yield from self._read_dir(entry.path, name, mode, depth + 1)
        else:
            self._skipped += 1
            yield _head(proto.TREE_SKIPPED, mode, name)

    def _read_file(self, fd: int, name: bytes, mode: int) -> Generator[bytes, None, None]:
        try:
            self._entries += 1
            yield _head(proto.TREE_FILE, mode, name)
            while True:
                try:
                    chunk = os.read(fd, proto.CHUNK)
                except OSError:
                    yield proto.U32.pack(FAILED)
                    raise
                self._bytes += len(chunk)
                yield proto.U32.pack(len(chunk)) + chunk
                if not chunk:
                    return
        finally:
            os.close(fd)


def _head(kind: int, mode: int, name: bytes) -> bytes:
    return proto.TREE_HEAD.pack(kind, mode & 0o7777, len(name)) + name


def copy_in(conn: Connection, number: int, body: bytes) -> None:
    """Body: path, base name. A path that ends in "/" or is a directory receives the tree under the base name."""
    reader = Reader(body)
    path = reader.text()
    name = reader.text()
    reader.end()
    if not path.startswith(b"/") or b"\0" in path + name:
        raise Refusal(proto.E_FAILED, "the path in the guest must be absolute")
    if path.endswith(b"/") or os.path.isdir(path):
        if not name or name in (b".", b"..") or b"/" in name:
            raise Malformed
        path = path.rstrip(b"/") + b"/" + name
    parent = path.rpartition(b"/")[0] or b"/"
    if not os.path.isdir(parent):
        raise Refusal(proto.E_NOT_FOUND, f"{os.fsdecode(parent)}: no such directory")
    conn.requests[number] = CopyIn(conn, number, path)


def copy_out(conn: Connection, number: int, body: bytes) -> None:
    """Body: window:u32, path."""
    if len(body) < 4:
        raise Malformed
    (window,) = proto.U32.unpack_from(body)
    reader = Reader(body, 4)
    path = reader.text()
    reader.end()
    if not path.startswith(b"/") or b"\0" in path:
        raise Refusal(proto.E_FAILED, "the path in the guest must be absolute")
    request = CopyOut(conn, number, path, window)
    conn.requests[number] = request
    request.pump()
