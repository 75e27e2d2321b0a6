"""Frames of the guest protocol, guest side; the bytes are drawn in docs/formats/guest-protocol.md.

    frame := type:u8 (never 0) | length:u24 | request:u32 | body[length] | END:u8      (big endian)

Between frames, zero bytes are padding. A frame whose last byte is not END was cut off by a client that died:
its rest was filled with the zeros the next client sends, so it is discarded unseen. After any malformed byte
the decoder hunts: it drops everything until RESET_RUN zero bytes came in a row, which no undamaged stream
contains because a body holds at most MAX_FRAME of them. Constants are repeated in `mvm.wire.framing`; a test
keeps them equal.
"""

from __future__ import annotations

from struct import Struct

VERSION = 1
MAX_FRAME = 65536
END = 0xA5
RESET_RUN = MAX_FRAME + 16
HELLO_MAGIC = b"mvm:gst\x01"
STREAM_WINDOW = 262144
CHUNK = 32768
MAX_REQUESTS = 32
VSOCK_PORT = 5252

# host to guest
HELLO = 0x01
STATUS = 0x02
EXEC = 0x03
DATA = 0x04
EOF = 0x05
CREDIT = 0x06
SIGNAL = 0x07
RESIZE = 0x08
CANCEL = 0x09
COPY_IN = 0x0A
COPY_OUT = 0x0B
PREPARE_SLEEP = 0x0C
AFTER_WAKE = 0x0D
REFRESH_SECRETS = 0x0E
SHUTDOWN = 0x0F
PING = 0x10
# guest to host
HELLO_ACK = 0x81
STATUS_REPLY = 0x82
STARTED = 0x83
OUT_DATA = 0x84
OUT_EOF = 0x85
OUT_CREDIT = 0x86
EXIT = 0x87
DONE = 0x88
ERROR = 0x89
PONG = 0x8A

STDIN = 0
STDOUT = 1
STDERR = 2

# exec flags
EXEC_TTY = 1
EXEC_DETACH = 2
EXEC_STDIN = 4
# prepare_sleep flags
SLEEP_DROP_CACHES = 1
SLEEP_UNMOUNT_SECRETS = 2
# after_wake flags
WAKE_REMOUNT_SECRETS = 1
# shutdown modes
SHUTDOWN_POWEROFF = 0
SHUTDOWN_REBOOT = 1

# error codes
E_MALFORMED = 1
E_UNSUPPORTED = 2
E_NOT_FOUND = 3
E_DENIED = 4
E_FAILED = 5
E_TOO_LARGE = 6
E_CANCELLED = 7
E_BUSY = 8

# entries of a copied tree
TREE_FILE = 1
TREE_DIR = 2
TREE_LINK = 3
TREE_UP = 4
TREE_SKIPPED = 5
MAX_NAME = 255
MAX_TARGET = 4095
MAX_DEPTH = 64

HEADER = Struct(">II")
HELLO_BODY = Struct(">8sHH16s")
HELLO_ACK_BODY = Struct(">8s16sHI")
STATUS_BODY = Struct(">IIIHIQIII")
EXEC_HEAD = Struct(">BHHI")
STARTED_BODY = Struct(">I")
CREDIT_BODY = Struct(">BI")
EXIT_BODY = Struct(">BB")
RESIZE_BODY = Struct(">HH")
AFTER_WAKE_BODY = Struct(">BQ64s")
AFTER_WAKE_DONE = Struct(">BIII")
PREPARE_DONE = Struct(">BIIII")
COPY_DONE = Struct(">IQI")
SHUTDOWN_BODY = Struct(">BH")
TREE_HEAD = Struct(">BHH")
U16 = Struct(">H")
U32 = Struct(">I")

_HEADER_UNPACK = HEADER.unpack_from
_HEADER_PACK = HEADER.pack
_END = b"\xa5"


class Malformed(Exception):
    """The peer sent what the protocol does not allow; this connection starts over."""


def frame(kind: int, request: int, body: bytes = b"") -> bytes:
    """One frame as bytes. `body` is at most MAX_FRAME bytes."""
    return _HEADER_PACK(kind << 24 | len(body), request) + body + _END


class Decoder:
    """Bytes in, whole frames out. Holds at most one frame and one chunk. Never raises on any input."""

    __slots__ = ("_buf", "_zeros")

    def __init__(self) -> None:
        self._buf = bytearray()
        self._zeros = -1  # zero bytes seen in a row while hunting; -1 when in step

    @property
    def hunting(self) -> bool:
        return self._zeros >= 0

    @property
    def buffered(self) -> int:
        return len(self._buf)

    def reset(self) -> None:
        """A new connection on a transport that keeps its boundaries: the next byte begins a frame."""
        self._buf.clear()
        self._zeros = -1

    def hunt(self) -> None:
        """Lose step on purpose: nothing is a frame until the next attention run."""
        self._zeros = 0
        self._buf.clear()

    def push(self, data: bytes) -> None:
        """Take bytes in; at most CHUNK at a time keeps the bound."""
        if self._zeros >= 0:
            data = self._hunted(data)
        self._buf += data

    def pull(self) -> tuple[int, int, bytes] | None:
        """The next whole frame as (type, request, body), or None until more bytes come."""
        buf = self._buf
        if not buf:
            return None
        if not buf[0]:
            stripped = buf.lstrip(b"\0")
            buf[:] = stripped
        if len(buf) < 9:
            return None
        head, request = _HEADER_UNPACK(buf)
        size = head & 0xFFFFFF
        if size > MAX_FRAME:
            self._lose_step(0)
            return self.pull()
        end = 8 + size
        if len(buf) <= end:
            return None
        if buf[end] != END:
            self._lose_step(end + 1)
            return self.pull()
        body = bytes(buf[8:end])
        del buf[: end + 1]
        return head >> 24, request, body

    def _lose_step(self, skip: int) -> None:
        # Zeros that completed a cut frame belong to it; only those behind it count, so a client in doubt
        # sends two runs.
        rest = bytes(self._buf[skip:])
        self._buf.clear()
        self._zeros = 0
        self._buf += self._hunted(rest)

    def _hunted(self, data: bytes) -> bytes:
        """Drop bytes until the attention run; what follows it, or nothing."""
        at = 0
        size = len(data)
        while at < size:
            if data[at]:
                if self._zeros >= RESET_RUN:
                    self._zeros = -1
                    return data[at:]
                at = data.find(b"\0", at)
                self._zeros = 0
                if at < 0:
                    return b""
            rest = data[at:].lstrip(b"\0")
            self._zeros += size - at - len(rest)
            at = size - len(rest)
        return b""


class Reader:
    """Reads length-prefixed fields of a request body; Malformed when they overrun it."""

    __slots__ = ("_at", "_body")

    def __init__(self, body: bytes, at: int = 0) -> None:
        self._body = body
        self._at = at

    def text(self) -> bytes:
        """A field of u16 length."""
        body = self._body
        at = self._at + 2
        if at > len(body):
            raise Malformed
        end = at + (body[at - 2] << 8 | body[at - 1])
        if end > len(body):
            raise Malformed
        self._at = end
        return body[at:end]

    def texts(self) -> list[bytes]:
        """A u16 count, then that many fields."""
        at = self._at + 2
        body = self._body
        if at > len(body):
            raise Malformed
        self._at = at
        return [self.text() for _ in range(body[at - 2] << 8 | body[at - 1])]

    def end(self) -> None:
        if self._at != len(self._body):
            raise Malformed
