"""One JSON object a line on standard error: what journald or a file keeps of a daemon.

Fields come first from the line itself (`time`, `level`, `event`), then from the caller. Nobody hands this a payload, a
key or a secret: ids, names, numbers and briefs of errors only. What a client chose is escaped by JSON and cut here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

_LONGEST = 500


class Log:
    """`write` takes one line, newline included; by default it goes to descriptor 2 in one write(2)."""

    def __init__(self, write: Callable[[bytes], object] | None = None) -> None:
        self._write = write or (lambda line: os.write(2, line))

    def info(self, event: str, **fields: object) -> None:
        self._line("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._line("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._line("error", event, fields)

    def _line(self, level: str, event: str, fields: dict[str, object]) -> None:
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
        shown = {name: _shown(value) for name, value in fields.items() if value is not None}
        line = json.dumps({"time": stamp, "level": level, "event": event, **shown}) + "\n"
        try:
            self._write(line.encode())
        except OSError:
            return  # a log nobody reads must not stop the work


def _shown(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)[:_LONGEST]
