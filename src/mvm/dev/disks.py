"""A node's disks as files: the root disk, copied from an image, and the state disk, made once and kept.

Both are sparse. A file gets its name only when it is complete, so a start that was killed leaves no half disk.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from mvm.core.errors import ResourceExhausted
from mvm.linux.files import fsync_dir, raise_if_full, remove_tree, temporary_beside
from mvm.linux.process import run

STATE_FOLDERS: Final = {"mvm": 0o700, "nix": 0o755, "src": 0o755}
_FORMAT_S: Final = 300.0
_COPY: Final = 16 << 20
SPARE_BYTES: Final = 1 << 30


def require_space(folder: Path, needed: int) -> None:
    """ResourceExhausted unless `needed` bytes, and some to work with, are free below `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise ResourceExhausted(
            "too little disk space for a node",
            details=f"{free >> 20} MiB are free below {folder}; it needs {(needed + SPARE_BYTES) >> 20} MiB.",
            resolution=f"free space on the file system of {folder}",
        )


def allocated(path: Path) -> int:
    """Bytes a file takes on disk; 0 if it is not there."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file with its holes; `target` is complete and durable as soon as it is there."""
    temporary = temporary_beside(target)
    try:
        with open(source, "rb") as read, open(temporary, "xb") as write:
            os.fchmod(write.fileno(), 0o600)
            _copy_data(read.fileno(), write.fileno())
            os.fsync(write.fileno())
        os.rename(temporary, target)
    except OSError as error:
        raise_if_full(error, target)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(target.parent)


def _copy_data(read: int, write: int) -> None:
    size = os.fstat(read).st_size
    os.ftruncate(write, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(read, at, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole is left
        end = os.lseek(read, at, os.SEEK_HOLE)
        while at < end:
            # Where source and target share a file system that can, this copies references instead of bytes.
            count = os.copy_file_range(read, write, min(_COPY, end - at), at, at)
            if count == 0:
                return
            at += count


def make_state(target: Path, gib: int) -> None:
    """An ext4 file system with the directories that the node's fstab binds into place."""
    content = target.with_name("state.new")
    temporary = temporary_beside(target)
    remove_tree(content)
    try:
        for name, mode in STATE_FOLDERS.items():
            (content / name).mkdir(parents=True)
            (content / name).chmod(mode)
        content.chmod(0o755)
        argv = [
            "mke2fs", "-q", "-t", "ext4", "-L", "mvm-state", "-m", "0", "-d", str(content),
            "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0", str(temporary), f"{gib}G",
        ]  # fmt: skip
        run(argv, timeout=_FORMAT_S)
        os.chmod(temporary, 0o600)
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        remove_tree(content)
    fsync_dir(target.parent)
