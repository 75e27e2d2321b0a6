"""One client's session with a guest, without I/O: which requests are open, what each may still receive, who has credit.

Rules, each violation by the guest being a GuestError after which the session is dead:
- the guest speaks only of requests that are open, in the kinds and streams their verb allows, STARTED once;
- it sends no byte without credit, and grants no more than one window;
- after EXIT, DONE, STATUS_REPLY or ERROR a request is closed and its number is never used again.

Memory: unsent output is at most one window per request and its control frames; incoming data is handed over at once,
and what the caller has not yet passed on is bounded by the window it has not given back with `consumed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from mvm.core.errors import GuestError
from mvm.wire import framing, guest_api
from mvm.wire.framing import FrameReader


class Data(NamedTuple):
    number: int
    stream: int
    payload: bytes


class StreamEnd(NamedTuple):
    number: int
    stream: int


class Started(NamedTuple):
    number: int
    pid: int


class Credit(NamedTuple):
    """More standard input may be sent."""

    number: int


class Ended(NamedTuple):
    """The request is over: `result` is the verb's typed value or the guest's refusal."""

    number: int
    result: Any


Event = Data | StreamEnd | Started | Credit | Ended


class Verb(NamedTuple):
    """What one verb may receive."""

    kind: int
    final: int
    decode: Callable[[bytes], Any]
    streams: frozenset[int] = frozenset()
    takes_data: bool = False
    starts: bool = False


_OUTPUT = frozenset({guest_api.STDOUT, guest_api.STDERR})
STATUS = Verb(framing.STATUS, framing.STATUS_REPLY, guest_api.decode_status)
EXEC = Verb(framing.EXEC, framing.EXIT, guest_api.decode_exit, _OUTPUT, takes_data=True, starts=True)
COPY_IN = Verb(framing.COPY_IN, framing.DONE, guest_api.decode_copy, takes_data=True)
COPY_OUT = Verb(framing.COPY_OUT, framing.DONE, guest_api.decode_copy, frozenset({guest_api.STDOUT}))
PREPARE_SLEEP = Verb(framing.PREPARE_SLEEP, framing.DONE, guest_api.decode_prepare_sleep)
AFTER_WAKE = Verb(framing.AFTER_WAKE, framing.DONE, guest_api.decode_after_wake)
REFRESH_SECRETS = Verb(framing.REFRESH_SECRETS, framing.DONE, guest_api.decode_copy, takes_data=True)
SHUTDOWN = Verb(framing.SHUTDOWN, framing.DONE, guest_api.decode_nothing)


class _Open:
    """The state of one open request."""

    def __init__(self, verb: Verb, serial: int, window: int) -> None:
        self.verb = verb
        self.serial = serial
        self.started = False
        self.send_credit = framing.STREAM_WINDOW
        self.eof_sent = False
        self.receive = dict.fromkeys(verb.streams, window)
        self.owed = dict.fromkeys(verb.streams, 0)
        self.ended = set[int]()


class ClientSession:
    """`nonce`: 16 random bytes for this connection only. `resync`: the port's last client did not close cleanly."""

    def __init__(self, nonce: bytes, *, resync: bool, window: int = framing.STREAM_WINDOW) -> None:
        self._reader = FrameReader(nonce)
        self._window = window
        self._open: dict[int, _Open] = {}
        self._last = 0
        self._sent = 0  # frames sent so far
        self._known = 0  # of these, how many the guest is known to have read
        self._ping = 0  # value of _sent when the unanswered ping left, 0 if none
        self._version_seen = False
        self._dead = False
        self.output = bytearray(framing.greeting(nonce, resync=resync))

    @property
    def greeted(self) -> bool:
        return self._reader.greeted

    @property
    def buffered(self) -> int:
        """Incoming bytes held."""
        return self._reader.buffered

    @property
    def window(self) -> int:
        return self._window

    @property
    def settled(self) -> bool:
        """Whether the guest has read everything and owes nothing: only then may the port be left without a resync."""
        return (
            not (self._dead or self._open or self.output)
            and self._reader.greeted
            and self._known == self._sent
        )

    @property
    def ping_pending(self) -> bool:
        return self._ping != 0

    def open(self, verb: Verb, body: bytes) -> int:
        """Queue a request; its number."""
        self._last += 1
        self._queue(verb.kind, self._last, body)
        self._open[self._last] = _Open(verb, self._sent, self._window)
        return self._last

    def is_open(self, number: int) -> bool:
        return number in self._open

    def room(self, number: int) -> int:
        """How many bytes `send_data` would take now."""
        state = self._open.get(number)
        if state is None or not state.verb.takes_data or state.eof_sent:
            return 0
        return state.send_credit

    def send_data(self, number: int, payload: bytes) -> int:
        """Queue as much of `payload` as there is credit for; how many bytes that was."""
        take = min(self.room(number), len(payload))
        for at in range(0, take, framing.CHUNK):
            chunk = payload[at : min(at + framing.CHUNK, take)]
            self._queue(framing.DATA, number, b"\x00" + chunk)
        if take:
            self._open[number].send_credit -= take
        return take

    def send_eof(self, number: int) -> None:
        state = self._open.get(number)
        if state is not None and state.verb.takes_data and not state.eof_sent:
            state.eof_sent = True
            self._queue(framing.EOF, number, b"\x00")

    def send_signal(self, number: int, signal: int) -> None:
        if number in self._open:
            self._queue(framing.SIGNAL, number, bytes([signal]))

    def resize(self, number: int, rows: int, columns: int) -> None:
        if number in self._open:
            self._queue(framing.RESIZE, number, guest_api.resize_body(rows, columns))

    def cancel(self, number: int) -> None:
        """Ask the guest to end it; the request stays open until the guest says so."""
        if number in self._open:
            self._queue(framing.CANCEL, number, b"")

    def ping(self) -> None:
        """Ask for a sign of life; no effect while one is under way."""
        if not self._ping:
            self._queue(framing.PING, 0, b"")
            self._ping = self._sent

    def consumed(self, number: int, stream: int, size: int) -> None:
        """The caller passed `size` bytes on; once half a window is owed, the guest gets it as credit."""
        state = self._open.get(number)
        if state is None or stream in state.ended:
            return
        state.owed[stream] += size
        owed = state.owed[stream]
        if owed * 2 >= self._window:
            state.owed[stream] = 0
            state.receive[stream] += owed
            self._queue(framing.CREDIT, number, guest_api.CREDIT_BODY.pack(stream, owed))

    def feed(self, untrusted: bytes) -> list[Event]:
        """Take bytes from the guest. GuestError: the session is dead, its port must be left unclean."""
        if self._dead:
            raise GuestError("the guest's connection is already broken")
        try:
            events: list[Event] = []
            for kind, number, body in self._reader.feed(untrusted):
                event = self._frame(kind, number, body)
                if event is not None:
                    events.append(event)
            return events
        except GuestError:
            self._dead = True
            self._open.clear()
            raise

    def _queue(self, kind: int, number: int, body: bytes) -> None:
        self._sent += 1
        self.output += framing.encode(kind, number, body)

    def _frame(self, kind: int, number: int, body: bytes) -> Event | None:
        if kind == framing.HELLO_ACK:
            self._hello_ack(number, body)
            return None
        if number == 0:
            if kind == framing.PONG and self._ping and not body:
                self._known = max(self._known, self._ping)
                self._ping = 0
                return None
            if kind == framing.ERROR:
                raise GuestError(
                    "the guest dropped the connection", details=str(guest_api.decode_error(body).brief)
                )
            self._violation("unasked frame", kind)
        state = self._open.get(number)
        if state is None:
            self._violation(f"frame for request {number}, which is not open", kind)
        return self._request_frame(state, kind, number, body)

    def _request_frame(self, state: _Open, kind: int, number: int, body: bytes) -> Event | None:
        verb = state.verb
        if kind == framing.OUT_DATA:
            if len(body) < 2:
                self._violation("empty data", kind)
            stream = body[0]
            size = len(body) - 1
            if stream not in state.receive or stream in state.ended:
                self._violation(f"data for stream {stream}", kind)
            if size > state.receive[stream]:
                self._violation(f"{size} bytes with credit for {state.receive[stream]}", kind)
            state.receive[stream] -= size
            return Data(number, stream, body[1:])
        if kind == verb.final:
            result = verb.decode(body)
            return self._ended(state, number, result)
        if kind == framing.ERROR:
            return self._ended(state, number, guest_api.decode_error(body))
        if kind == framing.OUT_CREDIT and verb.takes_data:
            stream, amount = guest_api.decode_credit(body)
            if stream != guest_api.STDIN or state.send_credit + amount > framing.STREAM_WINDOW:
                self._violation(f"credit of {amount} for stream {stream}", kind)
            state.send_credit += amount
            return Credit(number)
        if kind == framing.OUT_EOF and verb.starts:
            if len(body) != 1 or body[0] not in state.receive or body[0] in state.ended:
                self._violation("end of a stream that is not open", kind)
            state.ended.add(body[0])
            return StreamEnd(number, body[0])
        if kind == framing.STARTED and verb.starts and not state.started:
            state.started = True
            return Started(number, guest_api.decode_started(body))
        self._violation(f"not an answer to request type {verb.kind:#x}", kind)

    def _ended(self, state: _Open, number: int, result: Any) -> Ended:
        del self._open[number]
        self._known = max(self._known, state.serial)
        return Ended(number, result)

    def _hello_ack(self, number: int, body: bytes) -> None:
        if number or len(body) != framing.HELLO_ACK_BODY.size or self._version_seen:
            self._violation("second greeting", framing.HELLO_ACK)
        version = framing.HELLO_ACK_BODY.unpack(body)[2]
        self._version_seen = True
        if version != framing.VERSION:
            raise GuestError(
                "the guest's agent speaks another protocol version",
                details=f"guest {version}, host {framing.VERSION}",
                resolution="build the guest again and start it cold",
            )

    def _violation(self, what: str, kind: int) -> NoReturn:
        raise GuestError(
            "the guest broke the protocol",
            details=f"{what} (frame type {kind:#x})",
            resolution="stop the instance and start it again; its agent is broken or hostile",
        )
