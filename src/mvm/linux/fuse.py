"""A FUSE file system that is one read-only-in-effect file, spoken directly to /dev/fuse.

The kernel protocol (include/uapi/linux/fuse.h, version 7.31 and later) is small for a single file, and speaking it here
instead of through libfuse gives what a pager needs: no C library to install, no helper thread of somebody else's,
`FUSE_NOTIFY_STORE` to place pages in the kernel's cache before anyone asks, and a mount that only one uid may open.

Rules:
- The mount's root *is* the file (`rootmode` is a regular file), so the mount point must be a regular file.
- Only the uid given at mount time may open it; without `allow_other` the kernel refuses everybody else, root included.
- The file opens for reading and writing, because QEMU opens its memory file so, but no write ever succeeds: the mapping
  is private and the kernel never sends one; `WRITE` is answered with EROFS.
- When the server dies, the kernel aborts the connection: a page fault on an uncached page then raises SIGBUS in the
  reader. Nothing can hang on a dead server.

Layout of every request: `fuse_in_header` (40 bytes: len u32, opcode u32, unique u64, nodeid u64, uid, gid, pid u32,
total_extlen u16, padding u16), then the operation's own struct. Answers: `fuse_out_header` (16 bytes: len u32,
error i32, unique u64), then the payload.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

from mvm.linux.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, mount

ROOT_NODE = 1
READ_MAX = 128 * 1024
# The kernel demands room for its largest request, header included, or the read fails with EINVAL.
REQUEST_MAX = READ_MAX + 4096 * 2

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_READ_IN = struct.Struct("<QQII")
_ATTR_OUT = struct.Struct("<QII" + "QQQQQQIIIIIIIIII")
_OPEN_OUT = struct.Struct("<QII")
_STORE_OUT = struct.Struct("<QQII")

FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 2, 3, 4, 14, 15, 16, 17, 18
INIT, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 26, 36, 38, 42, 43
_NOTIFY_STORE = 4
_ASYNC_READ, _MAX_PAGES = 1 << 0, 1 << 22
_FOPEN_KEEP_CACHE = 1 << 1
_NO_ANSWER = frozenset({FORGET, INTERRUPT, BATCH_FORGET})
_NEVER_STALE = 1 << 40  # seconds the kernel may trust an attribute: nothing here ever changes


def mount_file(target: str | Path, *, uid: int, gid: int) -> int:
    """Mount a single-file FUSE file system over the regular file `target`; return the /dev/fuse descriptor.

    Only `uid` may open the file. Needs CAP_SYS_ADMIN. Raises OSError (ENOENT: no fuse in this kernel).
    """
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={device},rootmode=100600,user_id={uid},group_id={gid},max_read={READ_MAX}"
        mount("mvm-memory", target, "fuse.mvm-memory", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    except BaseException:
        os.close(device)
        raise
    return device


class FileServer:
    """Answers the kernel for one file of `size` bytes owned by `uid`:`gid`.

    `read(offset, size)` returns exactly the wanted bytes, as one buffer or a list of buffers; it is called from
    whichever thread runs `serve`. It may raise OSError, whose errno becomes the reader's (a failed page read is SIGBUS
    in a process that has the file mapped).
    """

    def __init__(
        self,
        device: int,
        size: int,
        uid: int,
        gid: int,
        read: Callable[[int, int], list[bytes | memoryview]],
    ) -> None:
        self.device = device
        self.size = size
        self._read = read
        times = (0, 0, 0, 0, 0, 0)
        self._attr = (ROOT_NODE, size, (size + 511) // 512, *times, 0o100600, 1, uid, gid, 0, 4096, 0)

    def serve(self) -> None:
        """Answer requests until the mount is gone. Several threads may call this at once."""
        request = bytearray(REQUEST_MAX)
        view = memoryview(request)
        while True:
            try:
                length = os.readv(self.device, [view])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue  # ENOENT: the request was interrupted before we picked it up
                if error.errno == errno.ENODEV:
                    return  # unmounted
                raise
            answer = self.answer(view[:length])
            if answer is None:
                continue
            try:
                os.writev(self.device, answer)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno != errno.ENOENT:  # ENOENT: the asker was killed meanwhile
                    raise

    def answer(self, request: memoryview) -> list[bytes | memoryview] | None:
        """The answer to one request, as buffers for one writev, or None where the protocol wants none."""
        if len(request) < _IN.size:
            raise OSError(errno.EPROTO, "short request from /dev/fuse")
        _, opcode, unique, *_ = _IN.unpack_from(request)
        if opcode in _NO_ANSWER:
            return None
        body = request[_IN.size :]
        try:
            payload = self._dispatch(opcode, body)
        except OSError as error:
            return [_OUT.pack(_OUT.size, -(error.errno or errno.EIO), unique)]
        except struct.error:  # a body too short for its operation
            return [_OUT.pack(_OUT.size, -errno.EPROTO, unique)]
        return [_OUT.pack(_OUT.size + sum(map(len, payload)), 0, unique), *payload]

    def _dispatch(self, opcode: int, body: memoryview) -> list[bytes | memoryview]:
        if opcode == READ:
            _, offset, size, _ = _READ_IN.unpack_from(body)
            if offset >= self.size:
                return []
            return self._read(offset, min(size, self.size - offset))
        if opcode == GETATTR:
            return [_ATTR_OUT.pack(_NEVER_STALE, 0, 0, *self._attr)]
        if opcode == OPEN:
            # KEEP_CACHE: opening must not drop the pages that were stored ahead.
            return [_OPEN_OUT.pack(0, _FOPEN_KEEP_CACHE, 0)]
        if opcode == INIT:
            major, minor, readahead, flags = _INIT_IN.unpack_from(body)
            if (major, minor) < (7, 31):
                raise OSError(errno.EPROTO, "this kernel's FUSE is older than 7.31")
            flags &= _ASYNC_READ | _MAX_PAGES
            return [
                _INIT_OUT.pack(
                    7, 31, min(readahead, READ_MAX), flags, 16, 12, READ_MAX, 1, READ_MAX // 4096, 0, 0
                )
            ]
        if opcode in (RELEASE, DESTROY):
            return []
        if opcode == STATFS:
            return [struct.pack("<QQQQQIIII24x", self.size // 4096, 0, 0, 1, 0, 4096, 255, 4096, 0)]
        if opcode == WRITE:
            raise OSError(errno.EROFS, "the memory image is never written")
        if opcode == SETATTR:
            raise OSError(errno.EPERM, "the memory image never changes")
        if opcode == FALLOCATE:
            raise OSError(errno.EOPNOTSUPP, "no holes can be punched")
        raise OSError(errno.ENOSYS, "not implemented")

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Place page-aligned `data` in the kernel's cache of the file, as if it had been read.

        Must not run on the only thread that serves: the kernel may wait for a page that a pending read holds.
        Raises OSError with ENODEV once unmounted.
        """
        header = _OUT.pack(_OUT.size + _STORE_OUT.size + len(data), _NOTIFY_STORE, 0)
        os.writev(self.device, [header, _STORE_OUT.pack(ROOT_NODE, offset, len(data), 0), data])
