"""The guest's decoder on a port without boundaries: any rest of any earlier session, then a new session, works."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mvm.guest import proto
from mvm.guest.proto import Decoder
from mvm.wire import framing

NONCE = b"n" * 16
HELLO_BODY = framing.HELLO_BODY.pack(framing.HELLO_MAGIC, framing.VERSION, 0, NONCE)
NEW = [(framing.HELLO, 0, HELLO_BODY), (framing.STATUS, 7, b"")]
NEW_BYTES = framing.encode(framing.STATUS, 7)

bodies = st.one_of(
    st.binary(max_size=100),
    st.integers(0, framing.MAX_FRAME).map(bytes),
    st.binary(min_size=1, max_size=9).map(lambda unit: (unit * framing.MAX_FRAME)[: framing.MAX_FRAME]),
)
sessions = st.lists(st.tuples(st.integers(1, 255), st.integers(0, 0xFFFFFFFF), bodies), max_size=4)
steps = st.integers(1, 70000)


def run(stream: bytes, step: int) -> list[tuple[int, int, bytes]]:
    decoder = Decoder()
    got = []
    for at in range(0, len(stream), step):
        decoder.push(stream[at : at + step])
        while (frame := decoder.pull()) is not None:
            got.append(frame)
        assert decoder.buffered <= proto.MAX_FRAME + 9 + step
    return got


@pytest.mark.req("L6")
@settings(max_examples=200, deadline=None)
@given(sessions, st.integers(0, 1 << 20), steps)
@example([(4, 1, bytes(65536))], 65544, 65552)
@example([(4, 1, bytes(65536))], 2, 1000)
@example([(255, 0xFF000000, bytes(65536))], 9, 65551)
def test_any_prefix_of_any_session_then_a_new_session(
    before: list[tuple[int, int, bytes]], cut: int, step: int
) -> None:
    frames = [framing.encode(*frame) for frame in before]
    stream = b"".join(frames)
    stream = stream[: cut % (len(stream) + 1)]
    whole = 0
    size = 0
    for frame in frames:
        size += len(frame)
        whole += size <= len(stream)
    got = run(stream + framing.greeting(NONCE, resync=True) + NEW_BYTES, max(step, 100))
    # Exactly the frames that arrived whole, never one that was cut, then the new session.
    assert got == before[:whole] + NEW


@pytest.mark.req("L6")
@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=3000), st.binary(max_size=40).map(lambda b: b * 500)), steps)
def test_any_garbage_then_a_new_session(garbage: bytes, step: int) -> None:
    got = run(garbage + framing.greeting(NONCE, resync=True) + NEW_BYTES, max(step, 100))
    assert got[-2:] == NEW


@pytest.mark.req("L6")
@given(sessions, steps)
@settings(deadline=None)
def test_a_clean_predecessor_needs_no_resync(before: list[tuple[int, int, bytes]], step: int) -> None:
    stream = b"".join(framing.encode(*frame) for frame in before)
    got = run(stream + framing.greeting(NONCE, resync=False) + NEW_BYTES, max(step, 100))
    assert got == before + NEW


@pytest.mark.req("L6")
@given(st.integers(0, 0xFF000000), st.binary(max_size=100))
def test_no_undamaged_frame_contains_the_attention_run(request: int, body: bytes) -> None:
    padded = body[:1] + bytes(framing.MAX_FRAME - len(body[:1]))
    frame = framing.encode(framing.DATA, request, padded)
    assert bytes(framing.RESET_RUN) not in frame + frame


@pytest.mark.req("L6")
@given(st.binary(max_size=300))
def test_request_fields_are_whole_or_malformed(body: bytes) -> None:
    reader = proto.Reader(body)
    try:
        argv = reader.texts()
        reader.text()
        reader.end()
    except proto.Malformed:
        return
    assert sum(map(len, argv)) <= len(body)
