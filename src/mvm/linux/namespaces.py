"""Namespaces of the calling process: unshare(2) and setns(2), which Python wraps from 3.12 on."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from typing import Final

FLAGS: Final = {
    "mount": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(names: Collection[str]) -> None:
    """New ones of these kinds. `pid` is for the children of this process. OSError; KeyError for an unknown name."""
    flags = 0
    for name in names:
        flags |= FLAGS[name]
    if _libc.unshare(flags) != 0:
        raise _failed(f"unshare({', '.join(sorted(names))})")


def fork_into_pid_namespace() -> int:
    """As os.fork(), with the child the first process of a PID namespace of its own. Needs CAP_SYS_ADMIN; OSError.

    The caller stays where it is, its later children and threads too: a process whose children would be born
    elsewhere can start no thread.
    """
    own = os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(("pid",))
        try:
            pid = os.fork()
        except BaseException:
            enter(own, "pid")
            raise
        if pid != 0:
            enter(own, "pid")
        return pid
    finally:
        os.close(own)


def enter(fd: int, name: str) -> None:
    """Go into the namespace of this kind that `fd` is open on. OSError; KeyError for an unknown kind."""
    if _libc.setns(fd, FLAGS[name]) != 0:
        raise _failed(f"setns({name})")


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)
