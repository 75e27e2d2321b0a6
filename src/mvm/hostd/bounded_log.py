"""Logs of what somebody hostile may write without end: two files, each of bounded size."""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from pathlib import Path

LOG_BYTES = 1 << 20
"""Size at which a log becomes `<name>.1`; the two together are at most twice this."""


class BoundedLog:
    """Appends to `path`. A full or broken disk costs lines, never an exception: logs must not end what they tell of."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self._path = path
        self._fd = self._open(os.O_TRUNC if fresh else 0)
        self._size = os.fstat(self._fd).st_size

    def _open(self, flags: int) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | flags, 0o600)

    def fileno(self) -> int:
        return self._fd

    def write(self, data: bytes) -> None:
        try:
            if self._size + len(data) > LOG_BYTES:
                os.rename(self._path, f"{self._path}.1")
                fresh = self._open(os.O_TRUNC)
                os.close(self._fd)
                self._fd, self._size = fresh, 0
            self._size += os.write(self._fd, data)
        except OSError:
            pass


def drain(logs: Mapping[int, BoundedLog], pidfd: int) -> None:
    """Copy each descriptor to its log until the process of `pidfd` has ended and all of them are dry."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    for fd in logs:
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLIN)
    waiting = dict(logs)
    ended = False
    while True:
        ended = ended or any(fd == pidfd for fd, _ in poll.poll(None))
        dry = True
        for fd, log in list(waiting.items()):
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if data:
                log.write(data)
                dry = False
            else:
                poll.unregister(fd)  # its other end was closed, and the process may still run
                del waiting[fd]
        if ended and dry:
            return


def tail(path: Path, size: int = 2000) -> str:
    """The last `size` bytes of a log as text; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read(size).decode("utf-8", "replace").strip()
    except OSError:
        return ""
