"""Opening and reading the files of a snapshot directory: by descriptor, regular files only, sizes bounded.

Names are resolved below an open directory, so that a rename of the directory (commit) in between cannot mix
two snapshots. A file that is missing, is a link or a FIFO, or cannot be read is IntegrityError.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from mvm.core.errors import NotFound
from mvm.hostd.sealing.faults import damaged, raise_if_unusable

if TYPE_CHECKING:
    from pathlib import Path


def open_directory(path: Path) -> int:
    """A descriptor of the directory. NotFound if nothing has that name."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound("there is no snapshot", details=f"{path} does not exist") from None
    except OSError as error:
        raise_if_unusable(error, "the snapshot's directory")
        raise


def open_file(directory: int, name: str, what: str, flags: int = os.O_RDONLY) -> int:
    try:
        # O_NONBLOCK: a FIFO under this name must not hang us.
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    except OSError as error:
        raise_if_unusable(error, what)
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise damaged(f"{what} is not a regular file")
    return fd


def read_at(fd: int, size: int, offset: int, what: str) -> bytes:
    """Exactly `size` bytes at `offset`."""
    try:
        data = os.pread(fd, size, offset)
        while len(data) < size:  # above 2 GiB, or interrupted
            more = os.pread(fd, size - len(data), offset + len(data))
            if not more:
                raise damaged(f"{what} is truncated", f"it ends at byte {offset + len(data)}")
            data += more
    except OSError as error:
        raise_if_unusable(error, what)
        raise
    return data


def read_all(directory: int, name: str, limit: int, what: str) -> bytes:
    fd = open_file(directory, name, what)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise damaged(f"{what} is damaged", f"{size} bytes is more than it can have")
        return read_at(fd, size, 0, what)
    finally:
        os.close(fd)


def read_start(directory: int, name: str, limit: int, what: str) -> bytes:
    """The first `limit` bytes, or all if there are fewer."""
    fd = open_file(directory, name, what)
    try:
        return read_at(fd, min(limit, os.fstat(fd).st_size), 0, what)
    finally:
        os.close(fd)
