"""HTTP/1.1 as Firecracker's API server speaks it: requests to bytes, bytes to responses. Pure.

The server sends no chunked bodies and no header the client has to act on but Content-Length; it answers 204 without
one. Everything it sends is bounded here: a VMM that was taken over must not be able to fill our memory.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mvm.core.errors import VmmError
from mvm.hostd.vmm.firecracker.requests import Call

HEAD_MAX: Final = 8 << 10
BODY_MAX: Final = 1 << 20
_MESSAGE_MAX: Final = 1000


class Response(msgspec.Struct, frozen=True):
    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status in (200, 204)

    def message(self) -> str:
        """What the server says is wrong, as text of at most 1000 characters.

        `{"fault_message": ...}` where an action failed. Where the request itself was not understood the server sends
        `{"error": "..."}` with line ends and quotes as they are, which is no JSON: then its text as it came.
        """
        try:
            found = msgspec.json.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = None
        if isinstance(found, dict):
            for key in ("fault_message", "error"):
                if isinstance(found.get(key), str):
                    return str(found[key])[:_MESSAGE_MAX]
        return self.body.decode("utf-8", "replace").strip()[:_MESSAGE_MAX] or f"status {self.status}"


def render(call: Call) -> bytes:
    head = f"{call.method} {call.path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    if call.body is None:
        return f"{head}\r\n".encode()
    head += f"Content-Type: application/json\r\nContent-Length: {len(call.body)}\r\n\r\n"
    return head.encode() + call.body


class Reader:
    """Bytes in, one response out at a time. VmmError for anything that is not a response."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, untrusted: bytes) -> Response | None:
        """The next response once it is complete, else None."""
        self._buffer += untrusted
        head, separator, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        if not separator:
            if len(self._buffer) > HEAD_MAX:
                raise _garbled("a response without an end of its head", self._buffer)
            return None
        status, length = _parse_head(head)
        if len(rest) < length:
            return None
        self._buffer = bytearray(rest[length:])
        return Response(status, rest[:length])


def _parse_head(head: bytes) -> tuple[int, int]:
    """(status, body length)."""
    lines = head.split(b"\r\n")
    first = lines[0].split(b" ", 2)
    if len(first) < 2 or not first[0].startswith(b"HTTP/1.") or not _is_number(first[1], 3):
        raise _garbled("a status line that is none", head)
    length = 0
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            if not _is_number(value.strip(), 9) or int(value) > BODY_MAX:
                raise _garbled("a body of impossible length", head)
            length = int(value)
    return int(first[1]), length


def _is_number(text: bytes, digits: int) -> bool:
    return text.isdigit() and len(text) <= digits


def _garbled(what: str, seen: bytes | bytearray) -> VmmError:
    return VmmError(f"Firecracker's API sent {what}", details=repr(bytes(seen[:200])))
