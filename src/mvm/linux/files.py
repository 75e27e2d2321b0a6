"""Files that survive a crash, locks that say who holds them, and removal that cannot be led astray.

Rules. A file is either written in full and durable or not there: `write_atomic` syncs the file before the
rename and the directory after it. What a crash can leave is a temporary `.tmp-*` beside the target;
`sweep_temporaries` removes those. Removal works through directory descriptors and never follows a symbolic
link or enters another mount. OSErrors pass through unchanged, except a full disk, which is
ResourceExhausted.

Locks are flock(2) on a file of their own. They die with their holder and with the programs that it runs meanwhile
(`held`): what a program of a killed command still does to the host, it does before anybody else has the lock. The file
stays and holds the pid of the last exclusive holder, for the message only, never for a decision.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mvm.core.errors import Busy, Conflict, InvalidInput, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
_held: dict[int, tuple[int, int]] = {}
"""Descriptor of a lock -> (device, inode) of its file."""
_MAX_DEPTH = 256
_WIPE_BLOCK = 1 << 20


def write_atomic(path: Path, data: bytes | bytearray | memoryview, mode: int = 0o600) -> None:
    """Replace `path` with `data`: a reader, or a crash, sees the old bytes or the new, never a mixture."""
    temporary = temporary_beside(path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, mode)
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise_if_full(error, path)
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def temporary_beside(path: Path) -> Path:
    """A fresh name in the directory of `path` that `sweep_temporaries` recognises; nothing is created."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.urandom(6).hex()}")


def sweep_temporaries(folder: Path) -> list[str]:
    """Remove what interrupted writers left in `folder`; the caller holds the lock that keeps writers out."""
    swept = [name for name in os.listdir(folder) if name.startswith(TEMPORARY_PREFIX)]
    for name in swept:
        remove_tree(folder / name)
    return swept


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte: write(2) may take fewer (at a full disk, at a signal, above 2 GiB)."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def read_bounded(path: Path, limit: int) -> bytes:
    """The whole of a regular file, `limit` bytes at most; more, or anything but a file, is InvalidInput."""
    # O_NONBLOCK: opening a FIFO somebody left under this name must not hang.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput(f"{path} is not a regular file")
        parts = bytearray()
        while chunk := os.read(fd, min(limit + 1 - len(parts), 1 << 20)):
            parts += chunk
            if len(parts) > limit:
                raise InvalidInput(f"{path} is larger than {limit} bytes")
        return bytes(parts)
    finally:
        os.close(fd)


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def ensure_dir(path: Path, mode: int = 0o700) -> None:
    """Make `path` a directory of exactly `mode`, creating missing parents with the same mode.

    A symbolic link or a file under that name is Conflict: whoever put it there is not us.
    """
    try:
        os.mkdir(path, mode)
    except FileNotFoundError:
        if path.parent == path:
            raise
        ensure_dir(path.parent, mode)
        os.mkdir(path, mode)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            raise Conflict(f"{path} is in the way", details="it is not a directory") from None
        if stat.S_IMODE(found.st_mode) != mode:
            os.chmod(path, mode)
        return
    os.chmod(path, mode)  # mkdir's mode went through the umask
    fsync_dir(path.parent)


def wipe(path: Path) -> None:
    """Overwrite what is stored of a file (holes stay holes), then unlink it; absent is done.

    Best effort: a copy-on-write file system or a flash drive may keep the old blocks. What must be beyond
    recovery is encrypted, and its key is wiped first.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        fd = -1
    try:
        if fd >= 0 and stat.S_ISREG(os.fstat(fd).st_mode):
            _overwrite(fd)
    finally:
        if fd >= 0:
            os.close(fd)
    os.unlink(path)
    fsync_dir(path.parent)


def _overwrite(fd: int) -> None:
    size = os.fstat(fd).st_size
    zeros = memoryview(bytes(min(_WIPE_BLOCK, size)))
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after `at`
                break
            raise
        while at < end:
            written = os.pwrite(fd, zeros[: end - at], at)
            at += written
    os.fsync(fd)


def remove_tree(path: Path) -> None:
    """Remove a file, link or directory with all in it, however deep; absent is done. Conflict if a mount is inside."""
    try:
        parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        try:
            found = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        _remove_entry(parent, path.name, found, os.fstat(parent).st_dev, path, 0)
    finally:
        os.close(parent)


def _remove_entry(
    parent: int, name: str, found: os.stat_result, device: int, shown: Path, depth: int, top: int = -1
) -> None:
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    if found.st_dev != device:
        raise Conflict(f"{shown} is a mount point", resolution=f"unmount it: umount {shown}")
    if depth >= _MAX_DEPTH:
        # Its turn comes from up there: every level that is entered costs a descriptor and a frame.
        os.rename(name, f".deep-{os.urandom(8).hex()}", src_dir_fd=parent, dst_dir_fd=top)
        return
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        top = fd if depth == 0 else top
        while entries := os.listdir(fd):
            for entry in entries:
                # One that goes by itself meanwhile, as a temporary that its writer renames, is what was wanted.
                with suppress(FileNotFoundError):
                    child = os.stat(entry, dir_fd=fd, follow_symlinks=False)
                    _remove_entry(fd, entry, child, device, shown / entry, depth + 1, top)
            if depth > 0:
                break  # only at the top there may be new ones
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


@contextmanager
def locked(path: Path, *, wait: float, shared: bool = False) -> Iterator[int]:
    """Hold the lock at `path` (created 0600 in an existing directory); yields its descriptor.

    Raises Busy after `wait` seconds, naming the exclusive holder. The unlock is explicit, so a forked child
    that inherited the descriptor does not keep the lock.
    """
    fd = _acquire(path, wait, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    seen = os.fstat(fd)
    _held[fd] = (seen.st_dev, seen.st_ino)
    try:
        if not shared:
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield fd
    finally:
        del _held[fd]
        if not shared:
            os.ftruncate(fd, 0)
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def held() -> tuple[int, ...]:
    """Descriptors of the locks that this process holds, for programs whose effects the locks guard."""
    return tuple(fd for fd, file in list(_held.items()) if _is(fd, file))


def _is(fd: int, file: tuple[int, int]) -> bool:
    # A child that was forked meanwhile may have closed it, and the number be another file's.
    try:
        seen = os.fstat(fd)
    except OSError:
        return False
    return (seen.st_dev, seen.st_ino) == file


def _acquire(path: Path, wait: float, how: int) -> int:
    deadline = time.monotonic() + wait
    pause = 0.001
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            left = deadline - time.monotonic()
            if left <= 0:
                gone = holder and not os.path.exists(f"/proc/{holder}")
                who = f"a program of process {holder}, which has ended," if gone else f"process {holder}"
                raise Busy(
                    f"another command holds {path.name}",
                    details=f"{who} holds {path}" if holder else f"{path} is locked",
                    resolution=f"wait for it to finish, then try again; to see who it is: fuser -v {path}",
                ) from None
            # flock has no time-out of its own, and an alarm would need the main thread.
            time.sleep(min(pause, left))
            pause = min(pause * 2, 0.05)
            continue
        except BaseException:
            os.close(fd)
            raise
        # The file may have been removed and made anew while we waited: a lock on an unlinked file excludes
        # nobody.
        try:
            current = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            os.close(fd)
            continue
        mine = os.fstat(fd)
        if (current.st_ino, current.st_dev) == (mine.st_ino, mine.st_dev):
            return fd
        os.close(fd)


def raise_if_full(error: OSError, path: Path) -> None:
    """Turn a full disk or quota into ResourceExhausted; any other error is left to the caller to re-raise."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ResourceExhausted(
            f"no space left to write {path.name}",
            details=f"{path}: {error.strerror}",
            resolution=f"free space on the file system of {path.parent}",
        ) from error
