"""Showing that something is going on: a spinner on a terminal, plain lines elsewhere, nothing for what is quick.

No thread draws: a VM's keeper is forked from this process, and a fork takes only the thread that calls it. The
spinner is drawn by a timer signal instead, which runs in the main thread between two of its steps and does not
survive a fork.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from mvm.cli.app import printable, to_json

if TYPE_CHECKING:
    from mvm.cli.app import App

SPINNER_AFTER_S: Final = 0.3
LINES_AFTER_S: Final = 1.0
_TICK_S: Final = 0.1
_FRAMES: Final = "|/-\\"


class Progress:
    """`phase` and `step` are told what is being done; what is shown of it depends on where it would go.

    On a terminal: one line that is redrawn from SPINNER_AFTER_S on, and gone afterwards. Elsewhere: a line for each
    phase, from LINES_AFTER_S on. With --quiet: nothing. `line`: one line of a log; shown as it is with --verbose,
    else the last one is part of the spinner.
    """

    def __init__(self, app: App, title: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._clock = clock
        self._quiet = app.quiet
        self._verbose = app.verbose
        self._json = app.json
        self._fd = _stderr()
        self._draws = not app.quiet and not app.verbose and self._fd >= 0 and _terminal(self._fd)
        self._began = 0.0
        self._phase = ""
        self._said = ""
        self._log = ""
        self._fraction: float | None = None
        self._ticks = 0
        self._drawn = False
        self._owner = os.getpid()
        self._old: Any = None
        self._timed = False

    def __enter__(self) -> Progress:
        self._began = self._clock()
        if not self._quiet and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGALRM, self._tick)
            self._timed = True
            first, again = (SPINNER_AFTER_S, _TICK_S) if self._draws else (LINES_AFTER_S, 0.0)
            signal.setitimer(signal.ITIMER_REAL, first, again)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timed:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, self._old)
        if self._drawn:
            self._write("\r\x1b[K")

    def phase(self, name: str) -> None:
        """A new phase began."""
        self._phase, self._fraction, self._log = name, None, ""
        if not self._draws and self._clock() - self._began >= LINES_AFTER_S:
            self._say()

    def step(self, name: str, fraction: float | None) -> None:
        """A phase with the part of it that is done, 0 to 1."""
        if name != self._phase:
            self.phase(name)
        self._fraction = fraction

    def line(self, text: str) -> None:
        if self._verbose and not self._quiet:
            self._write((to_json({"log": text}) if self._json else printable(text)) + "\n")
        else:
            self._log = text

    def _tick(self, _number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        if self._draws:
            self._draw()
        elif self._phase:
            self._say()
        else:
            self._say(self._title)

    def _say(self, text: str = "") -> None:
        text = text or f"{self._title}: {self._phase}"
        if text != self._said and not self._quiet:
            self._said = text
            self._write((to_json({"progress": text}) if self._json else printable(text)) + "\n")

    def _draw(self) -> None:
        self._ticks += 1
        self._drawn = True
        done = "" if self._fraction is None else f" {100 * self._fraction:.0f} %"
        text = f"{_FRAMES[self._ticks % 4]} {self._title}"
        text += f": {self._phase}{done}" if self._phase else ""
        text += f" ({self._clock() - self._began:.0f} s)"
        text += f"  {self._log}" if self._log else ""
        try:
            width = os.get_terminal_size(self._fd).columns
        except OSError:
            width = 80
        self._write("\r\x1b[K" + printable(text)[: max(width - 1, 10)])

    def _write(self, text: str) -> None:
        # Not through sys.stderr: its buffer may be half way through a write that the timer interrupted.
        if self._fd < 0:
            sys.stderr.write(text)
            return
        try:
            os.write(self._fd, text.encode("utf-8", "replace"))
        except OSError:
            self._draws = False


def _stderr() -> int:
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return -1


def _terminal(fd: int) -> bool:
    return os.isatty(fd) and os.environ.get("TERM") not in ("dumb", None)
