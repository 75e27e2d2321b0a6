"""Bytes of the hostd protocol: frames, requests and messages, in both directions.

    frame   := length:u32 (big endian, 1 to the receiver's limit) | body[length]
    body    := one JSON object, UTF-8

A client sends requests, one at a time; the server answers each with any number of progress messages and then exactly
one answer or error. Text that a message shows comes from the privileged side and is bounded there.
"""

from __future__ import annotations

from struct import Struct
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from mvm.core import codec, errors, limits
from mvm.core.errors import InvalidInput, MvmError
from mvm.wire.hostd_api import MAX_ANSWER, MAX_REQUEST, VERBS, VERSION, Verb

HEADER: Final = Struct(">I")
_MISSING: Final = msgspec.Raw(b"")
_ASK: Final = "Use the client and the daemon of the same version of mvm."


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request before its verb is known."""

    v: int
    verb: Annotated[str, Meta(max_length=64)]
    args: msgspec.Raw


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An `MvmError` on its way."""

    kind: Annotated[str, Meta(max_length=64)]
    brief: str
    details: str = ""
    resolution: str = ""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one of the three."""

    progress: str | None = None
    error: Failure | None = None
    answer: msgspec.Raw = _MISSING


class FrameReader:
    """Bytes in, bodies out. Holds at most one frame and what one `feed` brought."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    @property
    def started(self) -> bool:
        """Whether part of a frame is there."""
        return bool(self._buffer)

    def feed(self, untrusted: bytes) -> list[bytes]:
        """The whole bodies now there. InvalidInput for a length that no frame has; the stream is lost then."""
        buffer = self._buffer
        buffer += untrusted
        bodies: list[bytes] = []
        while len(buffer) >= HEADER.size:
            length = HEADER.unpack_from(buffer)[0]
            if not 1 <= length <= self._limit:
                buffer.clear()
                raise InvalidInput(
                    "that is not a frame of the hostd protocol",
                    details=f"length {length}, at most {self._limit}",
                    resolution=_ASK,
                )
            if len(buffer) < HEADER.size + length:
                break
            bodies.append(bytes(buffer[HEADER.size : HEADER.size + length]))
            del buffer[: HEADER.size + length]
        return bodies


def frame(body: bytes, limit: int) -> bytes:
    """InvalidInput if `body` is more than the other side reads."""
    if not 1 <= len(body) <= limit:
        raise InvalidInput("a message is too large", details=f"{len(body)} bytes, at most {limit}")
    return HEADER.pack(len(body)) + body


def encode_request(verb: Verb, request: Any) -> bytes:
    """The whole frame."""
    args = msgspec.Raw(codec.encode_line(request))
    return frame(codec.encode_line(Envelope(VERSION, verb.name, args)), MAX_REQUEST)


def decode_request(untrusted: bytes) -> tuple[Verb, Any]:
    """The verb and a value of its request type. Raises InvalidInput, and nothing else, whatever the bytes."""
    envelope = codec.decode(untrusted, Envelope, limit=MAX_REQUEST, what="the request", resolution=_ASK)
    if envelope.v != VERSION:
        raise InvalidInput(
            f"the request is of version {envelope.v}", details=f"This is {VERSION}.", resolution=_ASK
        )
    verb = VERBS.get(envelope.verb)
    if verb is None:
        raise InvalidInput(
            "there is no such verb", details=_printable(envelope.verb), resolution="See docs/privileges.md."
        )
    request = codec.decode(
        bytes(envelope.args),
        verb.request,
        limit=MAX_REQUEST,
        what=f"the request {verb.name}",
        resolution=_ASK,
    )
    return verb, request


def encode_progress(phase: str) -> bytes:
    return codec.encode_line(Message(progress=phase[:200]))


def encode_answer(answer: Any) -> bytes:
    return codec.encode_line(Message(answer=msgspec.Raw(codec.encode_line(answer))))


def encode_error(error: MvmError) -> bytes:
    """What an operator may see of `error`: never a traceback."""
    texts = (error.brief, error.details, error.resolution)
    brief, details, resolution = (_clean(text) for text in texts)
    return codec.encode_line(Message(error=Failure(error.kind, brief, details, resolution)))


def decode_message(untrusted: bytes) -> Message:
    """Raises InvalidInput, and nothing else."""
    message = codec.decode(untrusted, Message, limit=MAX_ANSWER, what="hostd's answer", resolution=_ASK)
    given = (message.progress is not None) + (message.error is not None) + bool(bytes(message.answer))
    if given != 1:
        raise InvalidInput("hostd's answer is not valid", details=f"{given} of its fields are set")
    return message


def decode_answer(message: Message, verb: Verb) -> Any:
    return codec.decode(
        bytes(message.answer),
        verb.answer,
        limit=MAX_ANSWER,
        what=f"hostd's answer to {verb.name}",
        resolution=_ASK,
    )


def rebuilt(failure: Failure) -> MvmError:
    """The error that was raised on the other side; one of a kind unknown here is its family's base."""
    kind = _KINDS.get(failure.kind, MvmError)
    return kind(failure.brief, details=failure.details, resolution=failure.resolution)


def _kinds() -> dict[str, type[MvmError]]:
    found = {MvmError.kind: MvmError}
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, MvmError):
            found[value.kind] = value
    return found


_KINDS: Final = _kinds()


def _clean(text: str) -> str:
    # Details may quote a program's output, which is bytes to us.
    return text[: limits.MESSAGE_MAX].encode("utf-8", "replace").decode()


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:64])
