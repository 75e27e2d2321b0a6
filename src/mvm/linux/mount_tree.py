"""Mounts as descriptors: open_tree(2), mount_setattr(2), move_mount(2) and pivot_root(2), which no library wraps.

A tree that was opened is mounted nowhere, is seen by nobody, and is gone with its descriptor. So its attributes can be
set before anybody can use it, and it names the object that was opened, whatever becomes of the path it came from.
Linux 5.12. The numbers are the same on every architecture but pivot_root's. All need CAP_SYS_ADMIN; errors are OSError.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, 0o2000000
_MOVE_MOUNT_F_EMPTY_PATH = 4
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
RDONLY, NOSUID, NODEV, NOEXEC = 0x1, 0x2, 0x4, 0x8

_libc = ctypes.CDLL(None, use_errno=True)


def open_tree(path: str, fd: int = _AT_FDCWD) -> int:
    """A copy of the mount at `path`, or of the file that `fd` is open on if `path` is empty: an owned descriptor.

    One mount only, not those below it. EINVAL where the descriptor's mount is not one of this namespace.
    """
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (0 if path else _AT_EMPTY_PATH)
    return _call(path or f"descriptor {fd}", _OPEN_TREE, fd, os.fsencode(path), flags)


def set_attributes(tree: int, attributes: int, where: str = "") -> None:
    """Add RDONLY, NOSUID, NODEV, NOEXEC to the mount `tree`."""
    wanted = struct.pack(
        "=QQQQ", attributes, 0, 0, 0
    )  # struct mount_attr: set, clear, propagation, userns_fd
    _call(where, _MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, len(wanted))


def attach(tree: int, target: str) -> None:
    """Mount `tree` on `target`, which is a directory if and only if the tree's root is."""
    _call(target, _MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)


def pivot_root(new: str, old: str) -> None:
    """Make the mount at `new` this process's root, and put the old one at `old`."""
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(38, f"no number of pivot_root is known for {platform.machine()}", new)
    _call(new, number, os.fsencode(new), os.fsencode(old))


def _call(where: str, number: int, *arguments: int | bytes) -> int:
    words = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), where)
    return result
