"""One control connection: a transport descriptor, the frames on it, the requests they carry.

Rules:
- A connection lives as long as its descriptor. For a virtio-serial port that is for ever: clients come and go
  on it, and HELLO is the only reliable sign of a new one. HELLO aborts every request of the client before.
- Malformed input costs that client its connection: requests are aborted, a socket is closed, a port hunts for
  the next attention run.
- Output is bounded by the credit the host granted plus control replies; while more than HIGH_WATER waits, no
  further request is read.

The descriptor is watched edge-triggered. A virtio-serial port without a host client reports hang-up for as
long as that lasts; level-triggered polling would spin on it.
"""

from __future__ import annotations

import os
from struct import error as StructError

from mvm.guest import log, proto
from mvm.guest.loop import EDGE, IN, OUT, Loop
from mvm.guest.proto import Decoder, Malformed, frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Handler = Callable[["Connection", int, bytes], None]

HIGH_WATER = 524288
# How long a port must stay without a client before its requests are given up. A port's data and the news that a client
# came or went reach the kernel by different queues, so a new client's first request can be read while the port still
# counts as closed; answers wait for the news.
GONE_S = 1.0
READS_PER_TURN = 32

_ACK_UNPACK = proto.HELLO_BODY.unpack
_ACK_PACK = proto.HELLO_ACK_BODY.pack


class Refusal(Exception):
    """A request this guest answers with ERROR."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def refusal_of(error: OSError) -> Refusal:
    """The protocol's error for a failed system call."""
    name = error.filename
    shown = os.fsdecode(name) if isinstance(name, (str, bytes)) else ""
    text = f"{shown}: {error.strerror}" if shown else str(error.strerror)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return Refusal(proto.E_NOT_FOUND, text)
    if isinstance(error, PermissionError):
        return Refusal(proto.E_DENIED, text)
    return Refusal(proto.E_FAILED, text)


class Request:
    """Something a connection has open under a request number. Subclasses override what they accept."""

    def __init__(self, conn: Connection, number: int) -> None:
        self.conn = conn
        self.number = number

    def data(self, stream: int, payload: bytes) -> None:
        raise Malformed

    def eof(self, stream: int) -> None:
        raise Malformed

    def credit(self, stream: int, amount: int) -> None:
        raise Malformed

    def signal(self, number: int) -> None:
        raise Malformed

    def resize(self, rows: int, columns: int) -> None:
        raise Malformed

    def pump(self) -> None:
        """Output drained: produce more if credit allows."""

    def cancel(self) -> None:
        """The host wants no more of this; the request still answers, with EXIT, DONE or ERROR."""
        self.abort()
        self.fail(Refusal(proto.E_CANCELLED, "cancelled"))

    def abort(self) -> None:
        """The client is gone: release everything, answer nothing."""

    def send(self, kind: int, body: bytes) -> None:
        self.conn.send(frame(kind, self.number, body))

    def finish(self, kind: int, body: bytes) -> None:
        """The final frame; the number is free from here on."""
        self.conn.requests.pop(self.number, None)
        self.conn.send(frame(kind, self.number, body))

    def fail(self, refusal: Refusal) -> None:
        self.finish(proto.ERROR, error_body(refusal))


def error_body(refusal: Refusal) -> bytes:
    return proto.U16.pack(refusal.code) + refusal.message.encode("utf-8", "replace")[:1024]


class Connection:
    """`port` tells a virtio-serial port (kept open, hunts) from a socket (closed on any trouble)."""

    def __init__(self, loop: Loop, fd: int, verbs: Mapping[int, Handler], *, port: bool, name: str) -> None:
        self.loop = loop
        self.fd = fd
        self.name = name
        self.requests: dict[int, Request] = {}
        self._verbs = verbs
        self._port = port
        self._decoder = Decoder()
        self._out = bytearray()
        self._greeted = False
        self._closing = False
        self._turn_queued = False
        self._pumping = False
        self._gone = 0
        os.set_blocking(fd, False)
        loop.watch(fd, IN | OUT | EDGE, self._ready)

    @property
    def pending_out(self) -> int:
        return len(self._out)

    def send(self, data: bytes) -> None:
        self._out += data
        self._turn_later()

    def _ready(self, _events: int) -> None:
        # Whatever the edge was, both directions may have moved; reading and writing until EAGAIN re-arms it.
        self._turn()

    def _turn_later(self) -> None:
        if not self._turn_queued:
            self._turn_queued = True
            self.loop.deferred.append(self._deferred_turn)

    def _deferred_turn(self) -> None:
        self._turn_queued = False
        if self.fd >= 0:
            self._turn()

    def _turn(self) -> None:
        for _ in range(READS_PER_TURN):
            if self._out:
                self._flush()
                if len(self._out) > HIGH_WATER:
                    return  # the descriptor's next OUT edge continues here
            try:
                data = os.read(self.fd, proto.CHUNK)
            except BlockingIOError:
                self._present()
                return
            except OSError:
                data = b""
            if not data:
                self._hang_up()
                return
            self._present()
            self._decoder.push(data)
            self._dispatch()
            if self.fd < 0:
                return
        self._turn_later()

    def _dispatch(self) -> None:
        pull = self._decoder.pull
        while (got := pull()) is not None:
            kind, number, body = got
            try:
                if kind == proto.HELLO:
                    self._hello(body)
                elif not self._greeted:
                    raise Malformed
                else:
                    verb = self._verbs.get(kind)
                    if verb is not None:
                        self._open(verb, number, body)
                    else:
                        self._route(kind, number, body)
            except Malformed:
                self._misbehaved()
                return
        if self._decoder.hunting and self._greeted:
            self._misbehaved()

    def _hello(self, body: bytes) -> None:
        if len(body) != proto.HELLO_BODY.size:
            raise Malformed
        magic, version, _flags, nonce = _ACK_UNPACK(body)
        if magic != proto.HELLO_MAGIC:
            raise Malformed
        if self.requests:
            self._abort_all()
        self._out.clear()
        self._greeted = version == proto.VERSION
        self._out += frame(proto.HELLO_ACK, 0, _ACK_PACK(magic, nonce, proto.VERSION, proto.STREAM_WINDOW))
        if not self._greeted:
            # The host reads our version in the acknowledgement and gives up; what it sent behind HELLO is not
            # for us.
            self._decoder.hunt()

    def _open(self, verb: Handler, number: int, body: bytes) -> None:
        if number == 0 or number in self.requests:
            raise Malformed
        if len(self.requests) >= proto.MAX_REQUESTS:
            refusal = Refusal(proto.E_BUSY, "too many requests on this connection")
        else:
            try:
                verb(self, number, body)
                return
            except Refusal as error:
                refusal = error
            except OSError as error:
                refusal = refusal_of(error)
        self.requests.pop(number, None)
        self.send(frame(proto.ERROR, number, error_body(refusal)))

    def _route(self, kind: int, number: int, body: bytes) -> None:
        if kind == proto.PING:
            self.send(frame(proto.PONG, number, body))
            return
        request = self.requests.get(number)
        if request is None:
            if kind in _ROUTED and number:
                return  # the request ended while this frame was on its way
            raise Malformed
        try:
            _ROUTED[kind](request, body)
        except (KeyError, IndexError, StructError):
            raise Malformed from None
        except OSError as error:
            request.abort()
            request.fail(refusal_of(error))
        except Refusal as refusal:
            request.abort()
            request.fail(refusal)

    def _flush(self) -> None:
        out = self._out
        try:
            while out:
                sent = os.write(self.fd, out)
                del out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            out.clear()  # the reader is gone; the next read says so
        if len(out) < HIGH_WATER and self.requests and not self._pumping:
            self._pumping = True
            for request in list(self.requests.values()):
                request.pump()
            self._pumping = False

    def _abort_all(self) -> None:
        requests = list(self.requests.values())
        self.requests.clear()
        for request in requests:
            try:
                request.abort()
            except OSError as error:
                log.failure(f"{self.name}: abort", error)

    def _misbehaved(self) -> None:
        self._abort_all()
        self._out.clear()
        self._greeted = False
        self._out += frame(proto.ERROR, 0, error_body(Refusal(proto.E_MALFORMED, "malformed frame")))
        if self._port:
            if not self._decoder.hunting:
                self._decoder.hunt()
            self._flush()
        else:
            self._flush()
            self._close()

    def _present(self) -> None:
        """Whoever seemed gone is back, or somebody else is."""
        if self._gone:
            self.loop.cancel(self._gone)
            self._gone = 0

    def _hang_up(self) -> None:
        if not self._port:
            self._give_up()
            self._close()
        elif not self._gone:
            self._gone = self.loop.after(GONE_S, self._give_up)

    def _give_up(self) -> None:
        # The decoder stays as it is, mid-frame included: bytes of the dead client may still be on their way to us.
        self._gone = 0
        self._abort_all()
        self._out.clear()
        self._greeted = False

    def _close(self) -> None:
        self.loop.forget(self.fd)
        os.close(self.fd)
        self.fd = -1


def _data(request: Request, body: bytes) -> None:
    request.data(body[0], body[1:])


def _eof(request: Request, body: bytes) -> None:
    request.eof(body[0])


def _credit(request: Request, body: bytes) -> None:
    request.credit(*proto.CREDIT_BODY.unpack(body))


def _signal(request: Request, body: bytes) -> None:
    request.signal(body[0])


def _resize(request: Request, body: bytes) -> None:
    request.resize(*proto.RESIZE_BODY.unpack(body))


def _cancel(request: Request, _body: bytes) -> None:
    request.cancel()


_ROUTED: dict[int, Callable[[Request, bytes], None]] = {
    proto.DATA: _data,
    proto.EOF: _eof,
    proto.CREDIT: _credit,
    proto.SIGNAL: _signal,
    proto.RESIZE: _resize,
    proto.CANCEL: _cancel,
}
