"""Showing an instance's console log: all of it or its end, then what is added, in pieces from whoever can read it.

Root reads the files; a member of mvm-hostd's group is read to. What a guest writes is hostile: `visible` makes it
safe for a terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvm.wire.hostd_api import ConsoleAnswer, ConsolePlace

    Read = Callable[[int | None, ConsolePlace | None], ConsoleAnswer]
    """As `mvm.hostd.console.read_console`, of one log."""

POLL_S = 0.2
_LINE_MAX = 1 << 16


class ConsoleLog:
    """Remembers the place up to which it has read."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._place: ConsolePlace | None = None

    def tail(self, lines: int | None) -> Iterator[bytes]:
        """The last `lines` lines, or all that is kept, in pieces. `follow` goes on where this ends."""
        more = True
        while more:
            answer = self._read(lines, self._place)
            self._place, more = answer.place, answer.more
            if answer.data:
                yield answer.data

    def follow(self, wait: float = POLL_S) -> Iterator[bytes]:
        """What is added, as it comes, for as long as the caller goes on asking."""
        while True:
            yield from self.tail(0)
            time.sleep(wait)


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
