"""A port whose data arrives before the news that a client opened it: the answer waits, and is not thrown away.

Seen after a wake: the guest read the new client's first request, found the port closed (as it was when it fell asleep),
gave the request up, and the client waited for ever.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mvm.guest import proto
from mvm.guest.conn import GONE_S, Connection
from mvm.wire import framing


class Loop:
    """Timers and deferred calls, run by hand."""

    def __init__(self) -> None:
        self.deferred: list[Callable[[], None]] = []
        self.timers: dict[int, tuple[float, Callable[[], None]]] = {}

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self.handler = handler

    def after(self, seconds: float, call: Callable[[], None]) -> int:
        self.timers[len(self.timers) + 1] = (seconds, call)
        return len(self.timers)

    def cancel(self, timer: int) -> None:
        del self.timers[timer]

    def edge(self) -> None:
        self.handler(0)
        while self.deferred:
            self.deferred.pop(0)()


class Port:
    """What the kernel gives: queued data, then end of file while closed, EAGAIN while open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = False
        self.incoming = bytearray()
        self.outgoing = bytearray()
        monkeypatch.setattr("mvm.guest.conn.os.set_blocking", lambda *_: None)
        monkeypatch.setattr("mvm.guest.conn.os.read", self.read)
        monkeypatch.setattr("mvm.guest.conn.os.write", self.write)

    def read(self, _fd: int, size: int) -> bytes:
        if self.incoming:
            data = bytes(self.incoming[:size])
            del self.incoming[:size]
            return data
        if self.open:
            raise BlockingIOError
        return b""

    def write(self, _fd: int, data: bytes) -> int:
        if not self.open:
            raise BlockingIOError
        self.outgoing += data
        return len(data)


NONCE = b"n" * framing.NONCE_SIZE


def greeting_and_ping() -> bytes:
    return framing.greeting(NONCE, resync=False) + framing.encode(proto.PING, 7, b"")


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Port:
    return Port(monkeypatch)


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def connection(loop: Loop, port: Port) -> Connection:
    return Connection(loop, 3, {}, port=True, name="mvm.0")  # type: ignore[arg-type]


@pytest.mark.req("S2", "L6")
def test_a_request_that_overtakes_the_news_is_answered(
    connection: Connection, loop: Loop, port: Port
) -> None:
    port.incoming += greeting_and_ping()
    loop.edge()
    assert not port.outgoing
    assert [seconds for seconds, _ in loop.timers.values()] == [GONE_S]
    port.open = True
    loop.edge()
    answers = framing.FrameReader(NONCE).feed(bytes(port.outgoing))
    assert [(frame.kind, frame.request) for frame in answers][-1] == (proto.PONG, 7)
    assert not loop.timers


@pytest.mark.req("L6")
def test_a_client_that_stays_away_is_given_up(connection: Connection, loop: Loop, port: Port) -> None:
    port.incoming += greeting_and_ping()
    loop.edge()
    loop.edge()
    ((_, give_up),) = loop.timers.values()
    give_up()
    assert connection.pending_out == 0
    port.open = True
    loop.edge()
    assert not port.outgoing
