"""A disk that can lose its power: a directory in memory, and a record of what of it was synced.

`Disk.fsync` stands where os.fsync does and remembers what the call makes durable: a file's content as it is, or a
directory's names as they are. `lose_power` then rebuilds the directory as a disk may come back: every file and every
directory, each by the throw of a coin, as it was at its last sync or as it was when the power went; a file that was
never synced is empty, cut off, or whole. That is less than any file system promises, so what survives it
survives them. What is remembered lies in files, because the process that syncs is a child that dies.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any

# What the disk itself does is no effect of hostd's, before which it could be killed: these are patched in it.
_ftruncate = os.ftruncate


class Disk:
    """`root`: the directory, on tmpfs, whose inode numbers are not reused. `shadow`: where it is remembered."""

    def __init__(self, root: Path, shadow: Path) -> None:
        self.root = root
        self._shadow = shadow
        shadow.mkdir()

    def fsync(self, fd: int) -> None:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            self._keep_names(fd, found.st_ino)
        elif stat.S_ISREG(found.st_mode):
            self._keep_content(f"/proc/self/fd/{fd}", found.st_ino)

    def sync(self) -> None:
        """All that is there is durable, and nothing else is known any more."""
        shutil.rmtree(self._shadow)
        self._shadow.mkdir()
        for folder, _, names in os.walk(self.root):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            self.fsync(fd)
            os.close(fd)
            for name in names:
                found = os.lstat(f"{folder}/{name}")
                if stat.S_ISREG(found.st_mode):
                    self._keep_content(f"{folder}/{name}", found.st_ino)

    def lose_power(self, rng: random.Random) -> None:
        """Come back as a disk might. Nothing may be open in it."""
        now: dict[int, str] = {}
        for folder, names, files in os.walk(self.root):
            now[os.lstat(folder).st_ino] = folder
            for name in (*names, *files):
                now.setdefault(os.lstat(f"{folder}/{name}").st_ino, f"{folder}/{name}")
        after = self.root.with_name(self.root.name + ".after")
        shutil.rmtree(after, ignore_errors=True)
        self._rebuild(os.lstat(self.root).st_ino, after, now, {}, {}, rng)
        shutil.rmtree(self.root)
        after.rename(self.root)
        self.sync()

    def _rebuild(
        self,
        inode: int,
        target: Path,
        now: dict[int, str],
        made: dict[int, Path],
        coins: dict[int, bool],
        rng: random.Random,
    ) -> None:
        target.mkdir(mode=0o700)
        kept = self._names(inode)
        if inode in now and (rng.random() < 0.5 or (kept is None and rng.random() < 0.5)):
            fd = os.open(now[inode], os.O_RDONLY | os.O_DIRECTORY)
            kept = _listing(fd)
            os.close(fd)
        for name, (child, mode) in (kept or {}).items():
            if stat.S_ISDIR(mode):
                # A directory has one name; two may be left of it where a rename was not synced.
                if child not in made:
                    made[child] = target / name
                    self._rebuild(child, target / name, now, made, coins, rng)
            elif child in made:
                os.link(made[child], target / name)
            elif stat.S_ISREG(mode):
                made[child] = target / name
                self._restore(child, target / name, now.get(child), rng)
                os.chmod(target / name, stat.S_IMODE(mode))
            else:
                os.mknod(target / name, mode)

    def _restore(self, inode: int, target: Path, current: str | None, rng: random.Random) -> None:
        kept = self._shadow / f"f{inode}"
        if kept.exists() and (current is None or rng.random() < 0.5):
            _copy(kept, target)
        elif current is not None:
            _copy(current, target)
            if not kept.exists():
                size = target.stat().st_size
                os.truncate(target, rng.choice([0, size // 2, size]))
        else:
            target.touch()

    # What is remembered.

    def _keep_content(self, path: str, inode: int) -> None:
        _copy(path, self._shadow / f"f{inode}")

    def _keep_names(self, fd: int, inode: int) -> None:
        (self._shadow / f"d{inode}").write_text(json.dumps(_listing(fd)))

    def _names(self, inode: int) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._shadow / f"d{inode}").read_text())
        except FileNotFoundError:
            return None
        return found


def _listing(fd: int) -> dict[str, tuple[int, int]]:
    found = {}
    for name in os.listdir(fd):
        entry = os.stat(name, dir_fd=fd, follow_symlinks=False)
        found[name] = (entry.st_ino, entry.st_mode)
    return found


def _copy(source: str | Path, target: str | Path) -> None:
    """A file's content, its holes left holes."""
    origin = os.open(source, os.O_RDONLY)
    copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        size = os.fstat(origin).st_size
        _ftruncate(copy, size)
        at = 0
        while at < size:
            try:
                begin = os.lseek(origin, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole is left
                break
            at = os.lseek(origin, begin, os.SEEK_HOLE)
            os.pwrite(copy, os.pread(origin, at - begin, begin), begin)
    finally:
        os.close(origin)
        os.close(copy)
