"""mount(2) and umount2(2), which Python does not wrap.

Both act on the caller's mount namespace and need CAP_SYS_ADMIN. Errors are OSError with the path, as os.* would raise.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MNT_DETACH = 0x2

_libc = ctypes.CDLL(None, use_errno=True)
_MOUNTINFO_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}


def mount(source: str, target: str | Path, fstype: str, flags: int, options: str) -> None:
    """Mount `fstype` on `target` with the comma-separated `options`. Raises OSError."""
    result = _libc.mount(
        source.encode(), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags), options.encode()
    )
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(target))


def detach(target: str | Path) -> bool:
    """Take the topmost mount at `target` out of the tree; it goes away with its last user.

    Returns False where nothing is mounted there. Raises OSError for anything else.
    """
    if _libc.umount2(os.fsencode(target), MNT_DETACH) == 0:
        return True
    error = ctypes.get_errno()
    if error in (22, 2):  # EINVAL: not a mount point. ENOENT: not even a path.
        return False
    raise OSError(error, os.strerror(error), str(target))


def parse_mountinfo(text: str) -> list[tuple[str, str]]:
    """Parse /proc/<pid>/mountinfo into (mount point, file system type) pairs, in mount order."""
    mounts = []
    for line in text.split("\n"):  # not splitlines: a mount point may hold what Unicode calls a line end
        left, separator, right = line.partition(" - ")
        fields = left.split(" ")
        if not separator or len(fields) < 6:
            continue
        point = fields[4]
        for escaped, plain in _MOUNTINFO_ESCAPES.items():
            point = point.replace(escaped, plain)
        mounts.append((point, right.split(" ", 1)[0]))
    return mounts


def mounts_below(directory: str | Path) -> list[str]:
    """Mount points at or below `directory`, deepest last mounted first, so that they can be detached in order."""
    prefix = os.path.realpath(directory).rstrip("/")  # the kernel names mounts by resolved paths
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [point for point, _ in parse_mountinfo(file.read())]
    return [p for p in reversed(points) if p == prefix or p.startswith(prefix + "/")]
