"""Exec on the host's side: local descriptors or callbacks on one end, a program in the guest on the other.

Bytes wait here only for a local descriptor that is not ready, at most one window per stream: credit goes back to the
guest when bytes were passed on, so a slow reader here stops the program there. Local descriptors stay in blocking
mode (they may be shared with a shell); after POLLOUT a write of at most PIPE_BUF bytes does not block.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from mvm.hostd.guest_channel.operation import Operation
from mvm.wire import framing, guest_api
from mvm.wire.guest_session import ClientSession, Data, Event, Started

Sink = Callable[[bytes], object] | int | None
Source = bytes | int | None

_PIPE_BUF = 4096
_SIGPIPE = 13


class ExecOperation(Operation):
    """`stdin`: bytes, a descriptor, or None for /dev/null. Sinks: a callback, a descriptor, or None to discard."""

    def __init__(
        self, session: ClientSession, number: int, name: str, stdin: Source, stdout: Sink, stderr: Sink
    ) -> None:
        super().__init__(session, number, name)
        self._source_fd = stdin if isinstance(stdin, int) else -1
        self._source = memoryview(stdin if isinstance(stdin, bytes) else b"")
        self._eof = stdin is None
        self._sinks: dict[int, Sink] = {guest_api.STDOUT: stdout, guest_api.STDERR: stderr}
        self._waiting = {guest_api.STDOUT: bytearray(), guest_api.STDERR: bytearray()}
        self._started = False
        self._attached: tuple[int, Callable[[], object]] | None = None
        self.pid = 0

    @property
    def done(self) -> bool:
        return self._ended and not any(self._waiting.values())

    @property
    def answered(self) -> bool:
        return self._started or self._ended

    @property
    def pending(self) -> int:
        """Bytes held for local descriptors."""
        return sum(map(len, self._waiting.values()))

    def signal(self, number: int) -> None:
        """Send a signal to the program's process group in the guest."""
        self.session.send_signal(self.number, number)

    def resize(self, rows: int, columns: int) -> None:
        self.session.resize(self.number, rows, columns)

    def attach(self, fd: int, call: Callable[[], object]) -> None:
        """Call back whenever `fd` is readable while the program runs."""
        self._attached = (fd, call)

    def produce(self) -> None:
        if self._eof or self._ended or self._source_fd >= 0:
            return
        taken = self.session.send_data(self.number, bytes(self._source[: self.session.room(self.number)]))
        self._source = self._source[taken:]
        if not self._source:
            self._eof = True
            self.session.send_eof(self.number)

    def polls(self) -> list[tuple[int, int]]:
        wanted = [
            (sink, select.POLLOUT)
            for stream, sink in self._sinks.items()
            if isinstance(sink, int) and self._waiting[stream]
        ]
        if self._source_fd >= 0 and not self._eof and not self._ended and self.session.room(self.number) > 0:
            wanted.append((self._source_fd, select.POLLIN))
        if self._attached is not None:
            wanted.append((self._attached[0], select.POLLIN))
        return wanted

    def ready(self, fd: int, events: int) -> None:
        if self._attached is not None and fd == self._attached[0]:
            self._attached[1]()
            return
        # One terminal may be all three: each direction looks at its own bits.
        if (
            fd == self._source_fd
            and not self._eof
            and events & (select.POLLIN | select.POLLHUP | select.POLLERR)
        ):
            self._read_source()
        for stream, sink in self._sinks.items():
            if sink == fd and self._waiting[stream] and events & ~select.POLLIN:
                self._write(stream, fd)

    def event(self, event: Event) -> None:
        if isinstance(event, Data):
            sink = self._sinks[event.stream]
            if isinstance(sink, int):
                self._waiting[event.stream] += event.payload
                return
            if sink is not None:
                try:
                    sink(event.payload)
                except Exception as error:  # the caller's own failure comes back to the caller
                    self._sinks[event.stream] = None
                    self.abandon(error)
            self.session.consumed(self.number, event.stream, len(event.payload))
        elif isinstance(event, Started):
            self._started = True
            self.pid = event.pid
        else:
            super().event(event)

    def _read_source(self) -> None:
        size = min(self.session.room(self.number), framing.CHUNK)
        if size <= 0:
            return
        try:
            chunk = os.read(self._source_fd, size)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""  # a terminal that hung up
        if chunk:
            self.session.send_data(self.number, chunk)
        else:
            self._eof = True
            self.session.send_eof(self.number)

    def _write(self, stream: int, fd: int) -> None:
        waiting = self._waiting[stream]
        try:
            sent = os.write(fd, waiting[:_PIPE_BUF])
        except BlockingIOError:
            return
        except OSError:
            # Nobody reads here any more; the program learns it the way it would from a pipe of its own.
            sent = len(waiting)
            self._sinks[stream] = None
            self.signal(_SIGPIPE)
        del waiting[:sent]
        self.session.consumed(self.number, stream, sent)
