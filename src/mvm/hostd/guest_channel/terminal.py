"""A program in the guest on the caller's own terminal or pipes: window size and signals follow along.

The caller owns the terminal's mode: it puts it into raw mode before and restores it after (Ctrl-C then travels as a
byte). Signals this process receives meanwhile go to the program in the guest. Main thread only: handlers are global.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from mvm.hostd.guest_channel.channel import GuestChannel
from mvm.hostd.guest_channel.exec_operation import ExecOperation
from mvm.wire.guest_api import ExitStatus

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def pump(
    channel: GuestChannel,
    argv: Sequence[str | bytes],
    stdin_fd: int,
    stdout_fd: int,
    stderr_fd: int,
    *,
    tty: bool,
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    user: str = "",
) -> ExitStatus:
    """Run `argv` in the guest on these descriptors until it ends. With `tty` it gets a terminal of our size."""
    size = window_size(stdin_fd, stdout_fd) if tty else None
    with _Signals() as signals:
        operation = channel.start_exec(
            argv,
            stdin=stdin_fd,
            stdout=stdout_fd,
            stderr=stderr_fd,
            env=env,
            cwd=cwd,
            user=user,
            tty=size,
        )
        operation.attach(signals.fd, lambda: _forward(operation, signals, stdin_fd, stdout_fd, tty))
        status: ExitStatus = channel.wait(operation)
        return status


def window_size(*fds: int) -> tuple[int, int]:
    """(rows, columns) of the first of `fds` that is a terminal, else 24 by 80."""
    for fd in fds:
        try:
            size = os.get_terminal_size(fd)
        except OSError:
            continue
        if size.lines and size.columns:
            return size.lines, size.columns
    return 24, 80


def _forward(operation: ExecOperation, signals: _Signals, stdin_fd: int, stdout_fd: int, tty: bool) -> None:
    for number in signals.drain():
        if number == signal.SIGWINCH:
            if tty:
                operation.resize(*window_size(stdin_fd, stdout_fd))
        elif number in FORWARDED:
            operation.signal(number)


class _Signals:
    """Turns signals into bytes on a descriptor for as long as it is entered."""

    def __init__(self) -> None:
        self.fd = -1
        self._write = -1
        self._old: dict[int, Any] = {}
        self._old_wakeup = -1

    def __enter__(self) -> _Signals:
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*FORWARDED, signal.SIGWINCH):
            self._old[number] = signal.signal(number, _nothing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self.fd)
        os.close(self._write)

    def drain(self) -> bytes:
        try:
            return os.read(self.fd, 64)
        except BlockingIOError:
            return b""


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """A handler must exist for the wake-up descriptor to be written."""
