"""What every request has in common on the host's side: it belongs to a channel, gets its events, ends with a result."""

from __future__ import annotations

import time
from typing import Any

from mvm.core.errors import MvmError
from mvm.wire.guest_session import ClientSession, Ended, Event


class Operation:
    """One open request. The channel calls `produce` before it waits, `ready` for descriptors from `polls`, and `event`.

    None of these may block on the guest; `event` may raise GuestError, which ends the channel.
    """

    def __init__(self, session: ClientSession, number: int, name: str) -> None:
        self.session = session
        self.number = number
        self.name = name
        self._ended = False
        self._value: Any = None
        self._error: BaseException | None = None
        self.abandoned_at: float | None = None  # time.monotonic()

    @property
    def done(self) -> bool:
        return self._ended

    @property
    def answered(self) -> bool:
        """Whether the guest has reacted at all."""
        return self._ended

    def result(self) -> Any:
        """The verb's value; raises what went wrong."""
        if self._error is not None:
            raise self._error
        return self._value

    def produce(self) -> None:
        """Queue what may be sent now."""

    def polls(self) -> list[tuple[int, int]]:
        """Descriptors to wait for besides the socket: (descriptor, poll events)."""
        return []

    def ready(self, fd: int, events: int) -> None:
        """One of `polls` is ready."""

    def event(self, event: Event) -> None:
        if isinstance(event, Ended):
            self._end(event.result)

    def abandon(self, error: BaseException) -> None:
        """A failure on this side: the guest is asked to stop, `error` is raised once it did."""
        if self._error is None:
            self._error = error
            self.abandoned_at = time.monotonic()
            self.session.cancel(self.number)

    def give_reason(self) -> None:
        """Raise what this side gave up for, though the guest never confirmed."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """The channel is going away, the request may be unfinished."""

    def _end(self, result: Any) -> None:
        self._ended = True
        if self._error is None:
            if isinstance(result, MvmError):
                self._error = result
            else:
                self._value = result
