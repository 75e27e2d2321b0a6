"""The event loop: descriptors, child processes and timers, one thread, one epoll.

Children are watched through pidfds, so no signal handler runs between two bytecodes. `deferred` callbacks run
once after each batch of events: replies of a batch leave in one write.
"""

from __future__ import annotations

import os
import select
from time import monotonic

from mvm.guest import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IN = select.EPOLLIN
OUT = select.EPOLLOUT
EDGE = select.EPOLLET


class Loop:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self.deferred: list[Callable[[], None]] = []
        self.stopping = False

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` when `fd` is ready; replaces an earlier watch of the same descriptor."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Stop watching; must come before close(fd), else a reused number keeps the old handler."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def child(self, pid: int, on_exit: Callable[[int], None]) -> None:
        """Call `on_exit(waitstatus)` once `pid`, a child of this process, has ended and is reaped."""
        fd = os.pidfd_open(pid)

        def ended(_events: int) -> None:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.forget(fd)
                os.close(fd)
                on_exit(status)

        self.watch(fd, IN, ended)

    def after(self, seconds: float, call: Callable[[], None]) -> int:
        """Call once later; the number cancels it."""
        self._serial += 1
        self._timers.append((monotonic() + seconds, self._serial, call))
        self._timers.sort(key=_when)
        return self._serial

    def cancel(self, timer: int) -> None:
        self._timers = [entry for entry in self._timers if entry[1] != timer]

    def run(self) -> None:
        poll = self._epoll.poll
        handlers = self._handlers
        deferred = self.deferred
        while not self.stopping:
            if deferred:
                calls = deferred[:]
                deferred.clear()
                for call in calls:
                    call()
            if deferred:
                timeout = 0.0
            else:
                timeout = max(0.0, self._timers[0][0] - monotonic()) if self._timers else -1
            for fd, events in poll(timeout):
                handler = handlers.get(fd)
                if handler is not None:
                    try:
                        handler(events)
                    except Exception as error:  # the agent is the only way in: one bad event must not end it
                        log.failure("event handler", error)
                        self.forget(fd)
            while self._timers and self._timers[0][0] <= monotonic():
                _, _, call = self._timers.pop(0)
                call()


def _when(entry: tuple[float, int, object]) -> tuple[float, int]:
    return entry[0], entry[1]
