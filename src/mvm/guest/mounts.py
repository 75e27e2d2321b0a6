"""mount(2) and umount2(2) without starting a program.

Starting one costs more than half of a wake under software emulation, so they are called through ctypes, loaded when the
agent starts (before the guest ever sleeps). A Python without ctypes falls back to the `mount` and `umount` programs.
"""

from __future__ import annotations

import os

from mvm.guest import process

try:
    import ctypes

    _libc: ctypes.CDLL | None = ctypes.CDLL(None, use_errno=True)
except (ImportError, OSError):
    _libc = None

_TIMEOUT = 30.0
_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8}
_MNT_DETACH = 2


def mounted(where: str) -> bool:
    """Whether anything is mounted exactly there."""
    wanted = where.encode()
    with open("/proc/self/mounts", "rb") as mounts:
        return any(line.split(b" ", 2)[1] == wanted for line in mounts)


def mount(device: str, where: str, fstype: str, *options: str) -> str:
    """Mount; "" or what went wrong. `options`: of ro, nosuid, nodev, noexec."""
    if _libc is None:
        argv = ["mount", "-t", fstype, *(("-o", ",".join(options)) if options else ()), device, where]
        code, output = process.run(argv, _TIMEOUT)
        return f"mount exits {code}: {output.decode(errors='replace')}" if code else ""
    flags = 0
    for option in options:
        flags |= _FLAGS[option]
    if _libc.mount(device.encode(), where.encode(), fstype.encode(), ctypes.c_ulong(flags), None):
        return os.strerror(ctypes.get_errno())
    return ""


def unmount(where: str) -> bool:
    """Unmount everything stacked on `where`, lazily if it is in use; True when nothing is mounted there any more."""
    for _ in range(8):
        if not mounted(where):
            return True
        if _libc is None:
            if process.run(["umount", where], _TIMEOUT)[0]:
                process.run(["umount", "-l", where], _TIMEOUT)
        elif _libc.umount2(where.encode(), 0):
            _libc.umount2(where.encode(), _MNT_DETACH)
    return not mounted(where)
