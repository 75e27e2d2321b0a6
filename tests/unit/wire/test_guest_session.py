"""The host's session: a guest that keeps to the rules is served in full, one that breaks any is a GuestError."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mvm.core.errors import GuestError
from mvm.guest.proto import Decoder
from mvm.wire import framing, guest_api, guest_session
from mvm.wire.framing import encode
from mvm.wire.guest_api import ExitStatus, GuestRefusal
from mvm.wire.guest_session import ClientSession, Credit, Data, Ended, Started, StreamEnd

NONCE = b"\x5a" * 16
WINDOW = 1000
EXEC_BODY = guest_api.exec_body(
    ["true"], env={}, cwd="", user="", tty=None, detach=False, stdin=True, window=WINDOW
)


def ack(version: int = framing.VERSION) -> bytes:
    body = framing.HELLO_ACK_BODY.pack(framing.HELLO_MAGIC, NONCE, version, framing.STREAM_WINDOW)
    return encode(framing.HELLO_ACK, 0, body)


def greeted() -> ClientSession:
    session = ClientSession(NONCE, resync=False, window=WINDOW)
    session.feed(ack())
    return session


def sent(session: ClientSession) -> list[tuple[int, int, bytes]]:
    """What the session queued, as the guest would read it."""
    decoder = Decoder()
    decoder.push(bytes(session.output))
    session.output.clear()
    got = []
    while (frame := decoder.pull()) is not None:
        got.append(frame)
    return got


@pytest.mark.req("L6")
def test_the_greeting_and_the_first_request_leave_together() -> None:
    session = ClientSession(NONCE, resync=False)
    number = session.open(guest_session.STATUS, b"")
    assert [frame[:2] for frame in sent(session)] == [(framing.HELLO, 0), (framing.STATUS, number)]


@pytest.mark.req("L6")
def test_an_exec_from_start_to_exit() -> None:
    session = greeted()
    number = session.open(guest_session.EXEC, EXEC_BODY)
    assert session.room(number) == framing.STREAM_WINDOW
    stream = (
        encode(framing.STARTED, number, (77).to_bytes(4))
        + encode(framing.OUT_DATA, number, b"\x01out")
        + encode(framing.OUT_DATA, number, b"\x02err")
        + encode(framing.OUT_EOF, number, b"\x02")
        + encode(framing.EXIT, number, b"\x00\x09")
    )
    assert session.feed(stream) == [
        Started(number, 77),
        Data(number, 1, b"out"),
        Data(number, 2, b"err"),
        StreamEnd(number, 2),
        Ended(number, ExitStatus(0, 9)),
    ]
    assert ExitStatus(0, 9).shell_code == 137
    session.output.clear()
    assert session.settled


@pytest.mark.req("L6")
def test_only_an_acknowledged_session_is_settled() -> None:
    session = greeted()
    number = session.open(guest_session.EXEC, EXEC_BODY)
    session.send_data(number, b"never read")
    sent(session)
    session.feed(encode(framing.EXIT, number, b"\x00\x00"))
    assert not session.settled
    session.ping()
    sent(session)
    assert not session.settled
    session.feed(encode(framing.PONG, 0))
    assert session.settled


@pytest.mark.req("L6")
def test_input_stops_at_the_credit_and_goes_on_with_more() -> None:
    session = greeted()
    number = session.open(guest_session.EXEC, EXEC_BODY)
    assert session.send_data(number, bytes(framing.STREAM_WINDOW + 5)) == framing.STREAM_WINDOW
    assert session.send_data(number, b"x") == 0
    assert session.feed(encode(framing.OUT_CREDIT, number, b"\0" + (3).to_bytes(4))) == [Credit(number)]
    assert session.send_data(number, b"abcdef") == 3


@pytest.mark.req("L6")
def test_a_refusal_is_shown_without_control_characters() -> None:
    session = greeted()
    number = session.open(guest_session.STATUS, b"")
    [event] = session.feed(encode(framing.ERROR, number, b"\0\x03" + b"\x1b[2J\r\nbad\xff" + b"x" * 5000))
    assert isinstance(event, Ended)
    assert isinstance(event.result, GuestRefusal)
    assert event.result.brief.isprintable()
    assert len(event.result.brief) < 600


def hostile_frames(number: int) -> list[bytes]:
    other = number + 1
    return [
        ack(),
        encode(framing.PONG, 0),
        encode(framing.ERROR, 0, b"\0\1malformed"),
        encode(framing.DONE, other, b""),
        encode(framing.STATUS_REPLY, number, bytes(38)),
        encode(framing.DONE, number, b""),
        encode(framing.EXIT, number, b"\0"),
        encode(framing.EXIT, number, b"\1\1"),
        encode(framing.EXIT, number, b"\0\xff"),
        encode(framing.ERROR, number, b"\0"),
        encode(framing.OUT_DATA, number, b"\1" + bytes(WINDOW + 1)),
        encode(framing.OUT_DATA, number, b"\1"),
        encode(framing.OUT_DATA, number, b""),
        encode(framing.OUT_DATA, number, b"\0x"),
        encode(framing.OUT_DATA, number, b"\3x"),
        encode(framing.OUT_EOF, number, b"\0"),
        encode(framing.OUT_EOF, number, b"\1") * 2,
        encode(framing.OUT_EOF, number, b"\1") + encode(framing.OUT_DATA, number, b"\1x"),
        encode(framing.OUT_CREDIT, number, b"\0\0\0\0\1"),
        encode(framing.OUT_CREDIT, number, b"\1\0\0\0\1"),
        encode(framing.OUT_CREDIT, number, b"\0\0\0"),
        encode(framing.STARTED, number, b""),
        encode(framing.STARTED, number, bytes(4)) * 2,
        encode(framing.EXIT, number, b"\0\0") * 2,
    ]


@pytest.mark.req("L6")
@pytest.mark.parametrize("index", range(len(hostile_frames(1))))
def test_every_breach_is_an_error_and_ends_the_session(index: int) -> None:
    session = greeted()
    number = session.open(guest_session.EXEC, EXEC_BODY)
    with pytest.raises(GuestError):
        session.feed(hostile_frames(number)[index])
    with pytest.raises(GuestError):
        session.feed(b"")
    assert not session.settled


@pytest.mark.req("L6")
def test_another_version_is_named() -> None:
    session = ClientSession(NONCE, resync=False)
    with pytest.raises(GuestError, match="another protocol version"):
        session.feed(ack(version=2))


@pytest.mark.req("L6")
@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.builds(
                encode,
                st.integers(framing.HELLO_ACK, framing.PONG),
                st.integers(0, 5),
                st.binary(max_size=90),
            ),
        ),
        max_size=12,
    )
)
def test_any_guest_yields_events_or_guest_errors(chunks: list[bytes]) -> None:
    session = greeted()
    numbers = [
        session.open(verb, b"")
        for verb in (
            guest_session.EXEC,
            guest_session.COPY_IN,
            guest_session.COPY_OUT,
            guest_session.STATUS,
            guest_session.AFTER_WAKE,
        )
    ]
    received = 0
    try:
        for chunk in chunks:
            for event in session.feed(chunk):
                assert event.number in numbers
                received += len(event.payload) if isinstance(event, Data) else 0
    except GuestError:
        pass
    assert received <= 3 * WINDOW  # exec has two streams, copy_out one; nothing was given back
    assert session.buffered <= framing.MAX_FRAME + 9


class Session(RuleBasedStateMachine):
    """An honest guest with its own book-keeping of credit beside the session's."""

    def __init__(self) -> None:
        super().__init__()
        self.session = greeted()
        self.credit: dict[tuple[int, int], int] = {}
        self.unread: dict[tuple[int, int], int] = {}
        self.stdin: dict[int, int] = {}
        self.pinged = False

    @initialize()
    def begin(self) -> None:
        self.absorb()

    def absorb(self) -> None:
        for kind, number, body in sent(self.session):
            if kind == framing.EXEC:
                self.credit[number, 1] = self.credit[number, 2] = WINDOW
                self.unread[number, 1] = self.unread[number, 2] = 0
                self.stdin[number] = 0
            elif kind == framing.CREDIT and number in self.stdin:
                stream, amount = guest_api.decode_credit(body)
                self.credit[number, stream] += amount
            elif kind == framing.DATA and number in self.stdin:
                self.stdin[number] += len(body) - 1
            elif kind == framing.PING:
                self.pinged = True

    @precondition(lambda self: len(self.stdin) < 4)
    @rule()
    def open(self) -> None:
        self.session.open(guest_session.EXEC, EXEC_BODY)
        self.absorb()

    @precondition(lambda self: self.stdin)
    @rule(data=st.data(), stream=st.sampled_from([1, 2]), size=st.integers(1, WINDOW))
    def guest_writes(self, data: Any, stream: int, size: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.stdin)))
        size = min(size, self.credit[number, stream])
        if size:
            payload = bytes(size)
            frame = encode(framing.OUT_DATA, number, bytes([stream]) + payload)
            assert self.session.feed(frame) == [Data(number, stream, payload)]
            self.credit[number, stream] -= size
            self.unread[number, stream] += size

    @precondition(lambda self: self.stdin)
    @rule(data=st.data(), stream=st.sampled_from([1, 2]), size=st.integers(1, WINDOW))
    def host_passes_on(self, data: Any, stream: int, size: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.stdin)))
        size = min(size, self.unread[number, stream])
        self.unread[number, stream] -= size
        self.session.consumed(number, stream, size)
        self.absorb()

    @precondition(lambda self: self.stdin)
    @rule(data=st.data(), size=st.integers(0, framing.STREAM_WINDOW * 2))
    def host_writes(self, data: Any, size: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.stdin)))
        before = self.stdin[number]
        took = self.session.send_data(number, bytes(size))
        self.absorb()
        assert self.stdin[number] == before + took

    @precondition(lambda self: self.stdin)
    @rule(data=st.data())
    def guest_reads(self, data: Any) -> None:
        number = data.draw(st.sampled_from(sorted(self.stdin)))
        if amount := self.stdin[number]:
            body = guest_api.CREDIT_BODY.pack(0, amount)
            assert self.session.feed(encode(framing.OUT_CREDIT, number, body)) == [Credit(number)]
            self.stdin[number] = 0

    @precondition(lambda self: self.stdin)
    @rule(data=st.data())
    def program_ends(self, data: Any) -> None:
        number = data.draw(st.sampled_from(sorted(self.stdin)))
        assert self.session.feed(encode(framing.EXIT, number, b"\0\0")) == [Ended(number, ExitStatus(0))]
        del self.stdin[number]
        assert self.session.room(number) == 0

    @rule()
    def ping_pong(self) -> None:
        self.session.ping()
        self.absorb()
        assert self.pinged
        self.session.feed(encode(framing.PONG, 0))
        self.pinged = False
        assert self.session.settled is (not self.stdin)

    @invariant()
    def within_windows(self) -> None:
        for (number, stream), credit in self.credit.items():
            if number in self.stdin:
                assert 0 <= credit <= WINDOW
                assert credit + self.unread[number, stream] <= WINDOW
        for unread in self.stdin.values():
            assert unread <= framing.STREAM_WINDOW
        assert self.session.buffered == 0


TestSession = Session.TestCase
TestSession.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
