"""Reading an instance's console log while it is written and rotated: console.log, and console.log.1 before it.

The keeper renames console.log to console.log.1 at a fixed size and begins a new one. A follower keeps the file it
has open until that is read to its end, so nothing is lost to one rotation between two looks. What a guest writes
is hostile: `visible` makes it safe for a terminal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.2
_CHUNK = 1 << 16
_LINE_MAX = 1 << 16
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class ConsoleLog:
    """`path`: console.log; it need not exist yet. Owns a descriptor from `tail` to the end of `follow`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def tail(self, lines: int | None) -> Iterator[bytes]:
        """The last `lines` lines, or all that is kept, in pieces. `follow` goes on where this ends."""
        self._fd = _opened(self._path)
        if lines == 0:
            if self._fd >= 0:
                os.lseek(self._fd, 0, os.SEEK_END)
            return
        older = _all_of(self._path.with_name(self._path.name + ".1"))
        newer = b"".join(self._rest())
        text = older + newer
        if lines is not None:
            text = _last_lines(text, lines)
        for at in range(0, len(text), _CHUNK):
            yield text[at : at + _CHUNK]

    def follow(self, wait: float = POLL_S) -> Iterator[bytes]:
        """What is added, as it comes, for as long as the caller goes on asking."""
        while True:
            yield from self._rest()
            if self._rotated():
                # Written between our last read and the rename.
                yield from self._rest()
                if self._fd >= 0:
                    os.close(self._fd)
                self._fd = _opened(self._path)
                if self._fd >= 0:
                    continue
            time.sleep(wait)

    def _rest(self) -> Iterator[bytes]:
        while self._fd >= 0 and (chunk := os.read(self._fd, _CHUNK)):
            yield chunk

    def _rotated(self) -> bool:
        try:
            found = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if self._fd < 0:
            return True
        mine = os.fstat(self._fd)
        return (mine.st_ino, mine.st_dev) != (found.st_ino, found.st_dev)


def _opened(path: Path) -> int:
    try:
        return os.open(path, _READ)
    except FileNotFoundError:
        return -1


def _all_of(path: Path) -> bytes:
    fd = _opened(path)
    if fd < 0:
        return b""
    with open(fd, "rb") as file:
        return file.read()


def _last_lines(text: bytes, count: int) -> bytes:
    at = len(text) - 1 if text.endswith(b"\n") else len(text)
    for _ in range(count):
        at = text.rfind(b"\n", 0, at)
        if at < 0:
            return text
    return text[at + 1 :]


class LineSplitter:
    """Pieces in, lines out, without their ends; an empty piece gives the unfinished last one."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        if not chunk:
            last, self._held = self._held, b""
            return [last.rstrip(b"\r")] if last else []
        *lines, self._held = (self._held + chunk).split(b"\n")
        if len(self._held) > _LINE_MAX:
            # A guest that never ends its line must not make us keep it all.
            lines.append(self._held)
            self._held = b""
        return [line.rstrip(b"\r") for line in lines]


def visible(line: bytes) -> str:
    """Text without anything a terminal would obey."""
    return "".join(
        c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in _stripped(line)
    )


def _stripped(line: bytes) -> str:
    """Without colours and the like, which are common and harmless to lose, so that they do not litter the text."""
    import re

    text = line.decode("utf-8", "replace")
    return re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])", "", text)
