from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import VmmError
from mvm.hostd.vmm.firecracker.http import BODY_MAX, HEAD_MAX, Reader, Response, render
from mvm.hostd.vmm.firecracker.requests import GET_INSTANCE, SetState

OK = b"HTTP/1.1 200 \r\nServer: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
NONE = b"HTTP/1.1 204 \r\nServer: x\r\nConnection: keep-alive\r\n\r\n"


def test_requests_are_rendered() -> None:
    assert render(GET_INSTANCE) == b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"
    assert render(SetState("Paused").call()).endswith(b'Content-Length: 18\r\n\r\n{"state":"Paused"}')


@given(st.lists(st.sampled_from([OK, NONE]), min_size=1, max_size=4), st.integers(1, 7))
def test_however_bytes_arrive_the_responses_are_the_same(sent: list[bytes], step: int) -> None:
    reader, stream, seen = Reader(), b"".join(sent), []
    for at in range(0, len(stream), step):
        found = reader.feed(stream[at : at + step])
        while found is not None:
            seen.append(found.status)
            found = reader.feed(b"")
    assert seen == [200 if one is OK else 204 for one in sent]


@given(st.binary(max_size=400))
def test_whatever_it_sends_is_a_response_or_an_error(data: bytes) -> None:
    reader = Reader()
    try:
        found = reader.feed(data)
    except VmmError:
        return
    assert found is None or 0 <= found.status <= 999


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: %d\r\n\r\n" % (BODY_MAX + 1),
        b"x" * (HEAD_MAX + 1),
    ],
)
def test_garbage_is_an_error(garbage: bytes) -> None:
    with pytest.raises(VmmError):
        Reader().feed(garbage)


def test_messages_are_found_also_where_they_are_no_json() -> None:
    assert Response(400, b'{"fault_message":"no such drive"}').message() == "no such drive"
    broken = b'{ "error": "Invalid request.\nBody: "x"" }'
    assert "Invalid request." in Response(400, broken).message()
    assert Response(503, b"").message() == "status 503"
    assert len(Response(400, b"x" * 5000).message()) == 1000
