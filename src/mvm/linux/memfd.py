"""Files that exist only in memory, and that nobody can change any more once sealed.

A memfd lives as long as a descriptor or mapping of it. Its pages are not on any file system, but the kernel
may swap them: a node that keeps secrets runs without swap, or with encrypted swap. All descriptors made
here are close-on-exec; `process.run` and `process.start` pass on those they are told to.
"""

from __future__ import annotations

import fcntl
import os

from mvm.linux.files import write_all

SEAL_ALL = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
SEAL_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def create(name: str, size: int = 0) -> int:
    """An owned descriptor of `size` zero bytes that can be sealed; `name` shows in /proc only."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if size:
        os.ftruncate(fd, size)
    return fd


def of_bytes(name: str, data: bytes | bytearray | memoryview, *, sealed: bool = True) -> int:
    """An owned descriptor holding `data`, at offset 0, by default immutable."""
    fd = create(name)
    try:
        write_all(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        if sealed:
            seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int, seals: int = SEAL_ALL) -> None:
    """Forbid changes for good. OSError(EBUSY) while a writable mapping exists."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def seals(fd: int) -> int:
    """The seals in force, as F_SEAL_* bits."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


def proc_path(fd: int) -> str:
    """A path under which a child that inherits `fd` can open it: afresh, with an offset of its own."""
    return f"/proc/self/fd/{fd}"
