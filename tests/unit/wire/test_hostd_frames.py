"""The hostd protocol's bytes: whatever they are, a typed value or InvalidInput."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core import codec, errors
from mvm.core.errors import Busy, Conflict, IntegrityError, InvalidInput, MvmError
from mvm.core.ids import InstanceId
from mvm.wire import hostd_api, hostd_frames
from mvm.wire.hostd_api import MAX_REQUEST, VERBS, DestroyRequest, Nothing
from mvm.wire.hostd_frames import FrameReader, decode_message, decode_request, encode_request, frame

WHO = InstanceId.parse("acme/default-0")


@pytest.mark.req("H2")
def test_a_request_comes_back() -> None:
    for verb, request in ((VERBS["ping"], Nothing()), (VERBS["destroy_instance"], DestroyRequest(WHO, True))):
        (body,) = FrameReader(MAX_REQUEST).feed(encode_request(verb, request))
        assert decode_request(body) == (verb, request)


@given(st.binary(max_size=4000), st.lists(st.integers(1, 50)))
def test_any_bytes_in_any_pieces(untrusted: bytes, cuts: list[int]) -> None:
    reader = FrameReader(MAX_REQUEST)
    try:
        for cut in [*cuts, 4000]:
            piece, untrusted = untrusted[:cut], untrusted[cut:]
            for body in reader.feed(piece):
                with pytest.raises(InvalidInput):
                    decode_request(body)
    except InvalidInput:
        return


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=5), st.integers(1, 64))
def test_frames_survive_being_cut(bodies: list[bytes], size: int) -> None:
    stream = b"".join(frame(body, MAX_REQUEST) for body in bodies)
    reader = FrameReader(MAX_REQUEST)
    found: list[bytes] = []
    for at in range(0, len(stream), size):
        found += reader.feed(stream[at : at + size])
    assert found == bodies
    assert not reader.started


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.req("H2")
@given(st.sampled_from(sorted(VERBS)), JSON)
def test_any_arguments(verb: str, args: object) -> None:
    try:
        found, request = decode_request(codec.encode_line({"v": 1, "verb": verb, "args": args}))
    except InvalidInput:
        return
    assert isinstance(request, found.request)


@pytest.mark.req("H2")
@pytest.mark.parametrize("body", [
    b"", b"[]", b"{}", b'{"v":1,"verb":"ping"}', b'{"v":true,"verb":"ping","args":{}}', b'{"v":1,"verb":"P","args":{}}',
    b'{"v":1,"verb":"ping","args":{},"extra":1}', b'{"v":1,"verb":"ping","args":null}', b"\xff" * 40, b"[" * 60_000,
])  # fmt: skip
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_request(body)


@pytest.mark.req("H2")
def test_too_large_never_leaves() -> None:
    with pytest.raises(InvalidInput):
        frame(b"x" * (MAX_REQUEST + 1), MAX_REQUEST)


@pytest.mark.req("H2")
@pytest.mark.parametrize(
    "kind",
    sorted({v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, MvmError)}, key=str),
)
def test_every_error_arrives_as_what_it_was(kind: type[MvmError]) -> None:
    message = decode_message(hostd_frames.encode_error(kind("b", details="d\udcff", resolution="r")))
    assert message.error is not None
    again = hostd_frames.rebuilt(message.error)
    assert type(again) is kind
    assert (again.brief, again.details, again.resolution) == ("b", "d?", "r")


def test_an_error_of_a_kind_of_its_own_is_its_familys() -> None:
    class Mismatch(IntegrityError):
        pass

    message = decode_message(hostd_frames.encode_error(Mismatch("no")))
    assert message.error is not None
    assert type(hostd_frames.rebuilt(message.error)) is IntegrityError
    unknown = hostd_frames.Failure("from-the-future", "brief")
    assert type(hostd_frames.rebuilt(unknown)) is MvmError


@pytest.mark.parametrize("body", [b"{}", b'{"progress":"a","answer":{}}', b'{"error":{"kind":"x"}}'])
def test_messages_that_are_none(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_message(body)


@pytest.mark.req("H2")
def test_no_verb_takes_a_path_or_a_command() -> None:
    """What a client may choose freely is listed here, on purpose: anything new has to be added knowingly."""
    free = {name: sorted(verb.request.__struct_fields__) for name, verb in VERBS.items()}
    assert free == {
        "create_instance": ["plan"],
        "stop_instance": ["instance"],
        "sleep_instance": ["instance"],
        "wake_instance": ["plan"],
        "attach_drives": ["plan"],
        "setup_network": ["plan"],
        "destroy_instance": ["instance", "wipe_volumes"],
        "inspect_instance": ["instance"],
        "list_instances": ["after", "tenant"],
        "inspect_tenant": ["tenant"],
        "list_tenants": ["after"],
        "read_console": ["instance", "lines", "place"],
        "verify_network": [],
        "open_channel": ["instance", "program", "purpose"],
        "close_channel": ["clean"],
        "ping": [],
    }


class FakeTransport:
    """Plays the daemon: `answers` are bodies, sent one a call."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = [frame(body, hostd_api.MAX_ANSWER) for body in answers]
        self.sent = b""
        self.closed = False

    def send(self, data: bytes) -> None:
        self.sent += data

    def receive(self, size: int, timeout: float) -> tuple[bytes, list[int]]:
        return (self.answers.pop(0) if self.answers else b""), []

    def close(self) -> None:
        self.closed = True


def test_the_client_tells_progress_and_raises_what_was_raised() -> None:
    from mvm.wire.hostd_client import HostdClient

    refusal = hostd_frames.encode_error(Conflict("it sleeps", resolution="wake it"))
    wire = FakeTransport(hostd_frames.encode_progress("boot"), refusal)
    phases: list[str] = []
    with pytest.raises(Conflict, match="it sleeps"):
        HostdClient(lambda: wire).stop_instance(WHO, phases.append)
    assert phases == ["boot"]
    assert wire.closed
    assert msgspec.json.decode(wire.sent[4:])["verb"] == "stop_instance"


def test_a_daemon_that_goes_away_is_worth_another_try() -> None:
    from mvm.wire.hostd_client import HostdClient

    with pytest.raises(Busy, match="went away"):
        HostdClient(lambda: FakeTransport()).ping()
