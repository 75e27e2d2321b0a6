"""The host's frame reader: whatever a guest sends is frames or GuestError, in bounded memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import GuestError
from mvm.wire import framing
from mvm.wire.framing import Frame, FrameReader, encode

NONCE = bytes(range(16))
ACK_BODY = framing.HELLO_ACK_BODY.pack(framing.HELLO_MAGIC, NONCE, framing.VERSION, framing.STREAM_WINDOW)
ACK = encode(framing.HELLO_ACK, 0, ACK_BODY)
GREETED = Frame(framing.HELLO_ACK, 0, ACK_BODY)

frames = st.lists(
    st.builds(
        Frame,
        st.integers(framing.HELLO_ACK, framing.PONG),
        st.integers(0, 0xFFFFFFFF),
        st.binary(max_size=200),
    ),
    max_size=8,
)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    at = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(at)]


@pytest.mark.req("L6")
@given(frames, st.lists(st.integers(0, 10**6), max_size=20), st.binary(max_size=300))
def test_frames_survive_any_chunking_and_what_a_former_session_left(
    sent: list[Frame], cuts: list[int], stale: bytes
) -> None:
    stream = stale + ACK + b"".join(encode(*frame) for frame in sent)
    reader = FrameReader(NONCE)
    got = [frame for chunk in split(stream, cuts) for frame in reader.feed(chunk)]
    assert got == [GREETED, *sent]
    assert reader.discarded == len(stale)
    assert reader.buffered == 0


@pytest.mark.req("L6")
@given(st.lists(st.binary(max_size=2000), max_size=30))
def test_arbitrary_bytes_are_dropped_until_the_greeting(chunks: list[bytes]) -> None:
    reader = FrameReader(NONCE)
    for chunk in chunks:
        assert reader.feed(chunk) == []
        assert reader.buffered < len(ACK)
    assert not reader.greeted


@pytest.mark.req("L6")
@given(st.binary(max_size=400), st.integers(1, 50))
def test_arbitrary_bytes_behind_the_greeting_are_frames_or_an_error(noise: bytes, step: int) -> None:
    reader = FrameReader(NONCE)
    reader.feed(ACK)
    try:
        for at in range(0, len(noise), step):
            reader.feed(noise[at : at + step])
            assert reader.buffered <= framing.MAX_FRAME + 9 + step
    except GuestError:
        with pytest.raises(GuestError):
            reader.feed(b"")
        assert reader.buffered == 0


@pytest.mark.req("L6")
@given(frames.filter(bool), st.data())
def test_a_mutated_stream_is_frames_or_an_error(sent: list[Frame], data: st.DataObject) -> None:
    stream = bytearray(b"".join(encode(*frame) for frame in sent))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    reader = FrameReader(NONCE)
    reader.feed(ACK)
    try:
        for frame in reader.feed(bytes(stream)):
            assert len(frame.body) <= framing.MAX_FRAME
    except GuestError:
        pass
    assert reader.buffered <= len(stream)


@pytest.mark.req("L6")
@pytest.mark.parametrize(
    "bad",
    [
        framing.HEADER.pack(framing.DONE << 24 | framing.MAX_FRAME + 1, 1),
        framing.HEADER.pack(framing.DONE << 24 | 0xFFFFFF, 1),
        framing.HEADER.pack(framing.EXEC << 24, 1),
        framing.HEADER.pack(0, 0),
        encode(framing.DONE, 1, b"x")[:-1] + b"\0",
    ],
    ids=["too long", "longest", "a host's type", "zeros", "no end mark"],
)
def test_what_is_no_frame_is_refused_before_it_is_buffered(bad: bytes) -> None:
    reader = FrameReader(NONCE)
    reader.feed(ACK)
    with pytest.raises(GuestError):
        reader.feed(bad)
    assert reader.buffered == 0


def test_a_body_over_the_limit_cannot_be_encoded() -> None:
    assert len(encode(framing.DATA, 1, bytes(framing.MAX_FRAME))) == framing.MAX_FRAME + 9
    with pytest.raises(ValueError, match="65537"):
        encode(framing.DATA, 1, bytes(framing.MAX_FRAME + 1))
