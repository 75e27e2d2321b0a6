"""Frames of the guest protocol, host side; docs/formats/guest-protocol.md draws the bytes.

    frame := type:u8 (never 0) | length:u24 | request:u32 | body[length] | END:u8      (big endian)

Rules:
- What comes from the guest is dropped until the HELLO_ACK frame that echoes this connection's nonce: a guest may still
  be writing to the client before.
- From there on every byte must be a frame; anything else raises GuestError, and the reader is dead.
- The reader holds at most one frame and what one `feed` brought.

The guest may not import this module, so `mvm.guest.proto` repeats the constants; a test keeps them equal.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple, NoReturn

from mvm.core.errors import GuestError

VERSION = 1
MAX_FRAME = 65536
END = 0xA5
RESET_RUN = MAX_FRAME + 16
HELLO_MAGIC = b"mvm:gst\x01"
NONCE_SIZE = 16
STREAM_WINDOW = 262144
CHUNK = 32768
MAX_REQUESTS = 32
VSOCK_PORT = 5252

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

HEADER = Struct(">II")
HELLO_BODY = Struct(">8sHH16s")
HELLO_ACK_BODY = Struct(">8s16sHI")
_OVERHEAD = HEADER.size + 1
_END = bytes([END])


class Frame(NamedTuple):
    kind: int
    request: int
    body: bytes


def encode(kind: int, request: int, body: bytes = b"") -> bytes:
    """One frame as bytes. ValueError if `body` exceeds MAX_FRAME: callers bound what they send."""
    if len(body) > MAX_FRAME:
        raise ValueError(f"frame body of {len(body)} bytes")
    return HEADER.pack(kind << 24 | len(body), request) + body + _END


def greeting(nonce: bytes, *, resync: bool) -> bytes:
    """What a client sends first. `resync`: the port's last client did not close cleanly, so the guest may be anywhere
    inside a frame; one run of zeros completes that frame (and spoils its END), the second ends the guest's hunt."""
    hello = encode(HELLO, 0, HELLO_BODY.pack(HELLO_MAGIC, VERSION, 0, nonce))
    return bytes(2 * RESET_RUN) + hello if resync else hello


class FrameReader:
    """Bytes from the guest in, frames out."""

    def __init__(self, nonce: bytes) -> None:
        if len(nonce) != NONCE_SIZE:
            raise ValueError("nonce must be 16 bytes")
        self._wanted = HEADER.pack(HELLO_ACK << 24 | HELLO_ACK_BODY.size, 0) + HELLO_MAGIC + nonce
        self._buf = bytearray()
        self._greeted = False
        self._dead = False
        self.discarded = 0

    @property
    def greeted(self) -> bool:
        """Whether the acknowledgement was found."""
        return self._greeted

    @property
    def buffered(self) -> int:
        return len(self._buf)

    def feed(self, untrusted: bytes) -> list[Frame]:
        """The whole frames now there, HELLO_ACK being the first ever. GuestError on anything else."""
        if self._dead:
            raise GuestError("the guest's connection is already broken")
        buf = self._buf
        buf += untrusted
        if not self._greeted and not self._find_greeting():
            return []
        frames: list[Frame] = []
        at = 0
        size = len(buf)
        while size - at >= HEADER.size:
            head, request = HEADER.unpack_from(buf, at)
            length = head & 0xFFFFFF
            kind = head >> 24
            if length > MAX_FRAME or kind < HELLO_ACK or kind > PONG:
                self._fail(f"frame of type {kind:#x} and {length} bytes")
            end = at + HEADER.size + length
            if end >= size:
                break
            if buf[end] != END:
                self._fail(f"frame of type {kind:#x} without its end mark")
            frames.append(Frame(kind, request, bytes(buf[at + HEADER.size : end])))
            at = end + 1
        del buf[:at]
        return frames

    def _find_greeting(self) -> bool:
        buf = self._buf
        found = buf.find(self._wanted)
        if found < 0:
            drop = max(0, len(buf) - len(self._wanted) + 1)
            self.discarded += drop
            del buf[:drop]
            return False
        self.discarded += found
        del buf[:found]
        self._greeted = True
        return True

    def _fail(self, what: str) -> NoReturn:
        self._dead = True
        self._buf.clear()
        raise GuestError(
            "the guest sent something that is not the protocol",
            details=what,
            resolution="stop the instance and start it again; its agent is broken or hostile",
        )
