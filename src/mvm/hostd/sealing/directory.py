"""Make a finished snapshot the instance's own, remove the one it replaces, and put right what a crash left.

A `snapshots` directory holds `latest` and, only while something is under way, `.new-<snapshot id>` (being
written, or just replaced) and `.old-<snapshot id>` (moved aside). `commit` has one step that counts:

    1  renameat2(.new-x, latest, EXCHANGE)     `latest` is the new snapshot; `.new-x` is now the old one
       without an old one: rename(.new-x, latest)
    2  fsync(snapshots)

Where the file system cannot exchange: rename(latest, .old-x), fsync, rename(.new-x, latest), fsync. A crash
between those renames leaves no `latest`; `recover` then moves `.old-x` back, which is the state before. In
every other case whatever is not `latest` is garbage, whichever of the two it is, and `recover` destroys it.

Which snapshot an instance may wake from is decided by its record (snapshot id and digest), not by this
directory; after a crash `peek` on `latest` says which one is there.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from mvm.core.errors import Conflict
from mvm.hostd.sealing.layout import KEY_NAME
from mvm.linux.files import TEMPORARY_PREFIX, fsync_dir, raise_if_full, remove_tree, wipe

if TYPE_CHECKING:
    from pathlib import Path

LATEST = "latest"
NEW_PREFIX = ".new-"
OLD_PREFIX = ".old-"

_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def commit(new: Path, latest: Path) -> Path | None:
    """Put the finished snapshot `new` in the place of `latest`; both are in one directory.

    Returns where the snapshot it replaced is now, if there was one: `destroy` that once nothing reads from it
    any more (a guest restored lazily from it may until its VMM is gone). After an exception `latest` is
    what it was, except after a failed fsync, when either may be found after a crash.
    """
    if new.parent != latest.parent or not new.name.startswith(NEW_PREFIX):
        raise Conflict(
            "a snapshot is committed from beside the one it replaces", details=f"{new} to {latest}"
        )
    try:
        if not os.path.lexists(latest):
            os.rename(new, latest)
            fsync_dir(latest.parent)
            return None
        return _replace(new, latest)
    except OSError as error:
        raise_if_full(error, latest)
        raise


def recover(folder: Path) -> list[str]:
    """Undo or finish what a crash interrupted in a `snapshots` directory; names of what was removed.

    Nobody else may be writing there, nor a guest run from anything but `latest`. Afterwards the directory
    holds `latest` or nothing.
    """
    latest = folder / LATEST
    aside = sorted(name for name in os.listdir(folder) if name.startswith(OLD_PREFIX))
    if aside and not os.path.lexists(latest):
        os.rename(folder / aside[0], latest)
        fsync_dir(folder)
    if os.path.lexists(latest):
        for name in os.listdir(latest):
            if name.startswith(TEMPORARY_PREFIX):
                wipe(latest / name)  # of a rotation cut short: the key, wrapped
    removed = sorted(name for name in os.listdir(folder) if name != LATEST)
    for name in removed:
        destroy(folder / name)
    return removed


def destroy(directory: Path) -> None:
    """Remove a snapshot for good: its key first, overwritten and synced, then the rest. Absent is done.

    Segments that another snapshot links to are only unlinked; the others are overwritten, best effort, also
    under an image that is still open: the guest that reads from it must be gone. An
    interrupted call can be repeated. What is not a snapshot is removed like any tree.
    """
    if directory.is_symlink() or not directory.is_dir():
        remove_tree(directory)
        return
    names = os.listdir(directory)
    # A rotation cut short can have left a second copy of the key under a temporary name.
    keys = [name for name in names if name == KEY_NAME or name.startswith(TEMPORARY_PREFIX)]
    for name in keys + [name for name in names if name not in keys]:
        path = directory / name
        found = os.lstat(path)
        if found.st_nlink == 1 and not stat.S_ISDIR(found.st_mode):
            wipe(path)
        else:
            remove_tree(path)
    remove_tree(directory)
    fsync_dir(directory.parent)


def bytes_on_disk(directory: Path) -> int:
    """Bytes allocated for the files of a snapshot, 0 if there is none; what two share counts in both."""
    total = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
    except FileNotFoundError:  # a commit or a removal is under way
        pass
    return total


def _replace(new: Path, latest: Path) -> Path:
    try:
        _exchange(new, latest)
    except OSError as error:
        if error.errno not in _CANNOT_EXCHANGE:
            raise
        return _replace_aside(new, latest)
    fsync_dir(latest.parent)
    return new


def _replace_aside(new: Path, latest: Path) -> Path:
    old = latest.with_name(OLD_PREFIX + new.name.removeprefix(NEW_PREFIX))
    os.rename(latest, old)
    try:
        fsync_dir(latest.parent)
        os.rename(new, latest)
    except OSError:
        os.rename(old, latest)
        raise
    fsync_dir(latest.parent)
    return old


def _exchange(new: Path, latest: Path) -> None:
    """rename(2) will not replace a directory that is not empty; renameat2 swaps the two names at once."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd = -100
    paths = os.fsencode(new), os.fsencode(latest)
    if libc.renameat2(at_fdcwd, paths[0], at_fdcwd, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(new), None, str(latest))
