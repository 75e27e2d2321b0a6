"""Reading an instance's console log piece by piece, while it is written and rotated.

The keeper renames console.log to console.log.1 at a fixed size and begins a new one. A reader's place is a file, by its
inode, and an offset in it: nothing is lost to one rotation between two looks, and nobody has to remember a reader. What
the guest wrote is passed on as it is; it is never interpreted here, only searched for line ends.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mvm.hostd.bounded_log import LOG_BYTES
from mvm.wire.hostd_api import CONSOLE_CHUNK, ConsoleAnswer, ConsolePlace

# No writer of ours, and no FIFO, link or device, makes whoever reads this wait or look elsewhere.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NOWHERE = ConsolePlace(0, 0)


def read_console(log: Path, lines: int | None, place: ConsolePlace | None) -> ConsoleAnswer:
    """The next piece: at `place`, or `lines` lines before the end, or (None) of all that is kept.

    A place in a file that is gone is as good as one before all that is kept, or, if another file has its inode by now,
    as the same place in that: a guest wrote more than two logs hold between two looks. A log that is not there is
    empty.
    """
    files = _opened(log)
    try:
        at = _start(files, lines) if place is None else place
        return _piece(files, at)
    finally:
        for fd, _, _ in files:
            os.close(fd)


def _opened(log: Path) -> list[tuple[int, int, int]]:
    """(descriptor, inode, size) of the older and the newer log, as far as they are there."""
    found: list[tuple[int, int, int]] = []
    # The newer first: what is renamed meanwhile is then seen twice, not missed.
    for path in (log, log.with_name(f"{log.name}.1")):
        try:
            fd = os.open(path, _READ)
        except OSError:
            continue
        seen = os.fstat(fd)
        if stat.S_ISREG(seen.st_mode) and all(inode != seen.st_ino for _, inode, _ in found):
            found.insert(0, (fd, seen.st_ino, seen.st_size))
        else:
            os.close(fd)
    return found


def _start(files: list[tuple[int, int, int]], lines: int | None) -> ConsolePlace:
    if not files:
        return _NOWHERE
    if lines is None:
        return ConsolePlace(files[0][1], 0)
    # No further back than a log is long.
    wanted = lines
    for fd, inode, size in reversed(files):
        base = max(0, size - LOG_BYTES)
        text = os.pread(fd, size - base, base)
        newest = inode == files[-1][1]
        if lines == 0:
            return ConsolePlace(inode, base + len(text))
        at = len(text) - 1 if newest and text.endswith(b"\n") else len(text)
        there = text.count(b"\n", 0, at)
        if there >= wanted:
            return ConsolePlace(inode, base + _line_start(text, wanted, at))
        wanted -= there
    return ConsolePlace(files[0][1], 0)


def _line_start(text: bytes, count: int, end: int) -> int:
    """Behind the `count`th line end (there are so many) before `end`. By halves: a guest may write line ends only."""
    begin = 0
    while end - begin > 4096:
        middle = (begin + end) // 2
        behind = text.count(b"\n", middle, end)
        if behind >= count:
            begin = middle
        else:
            count -= behind
            end = middle
    for _ in range(count):
        end = text.rfind(b"\n", begin, end)
    return end + 1


def _piece(files: list[tuple[int, int, int]], place: ConsolePlace) -> ConsoleAnswer:
    if all(inode != place.file for _, inode, _ in files):
        place = ConsolePlace(files[0][1], 0) if files else _NOWHERE
    data = b""
    here = False
    for fd, inode, size in files:
        if inode == place.file:
            here = True
        elif here:
            place = ConsolePlace(inode, 0)
        else:
            continue
        # A file that is shorter than it was is another one of the same inode.
        offset = place.offset if place.offset <= size else 0
        got = os.pread(fd, min(CONSOLE_CHUNK - len(data), max(0, size - offset)), offset)
        data += got
        place = ConsolePlace(inode, offset + len(got))
        if offset + len(got) < size:
            return ConsoleAnswer(data, place, more=bool(got))
        if len(data) == CONSOLE_CHUNK:
            break
    more = bool(files) and place.file != files[-1][1]
    return ConsoleAnswer(data, place, more=more)
