"""The QMP client against a server that follows a script, however badly behaved."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mvm.core.errors import VmmError
from mvm.core.record import ProcessIdentity
from mvm.hostd.vmm.qemu.driver import QMP_SOCKET, QemuVm
from mvm.hostd.vmm.qemu.qmp import Qmp
from mvm.linux.pidfd import identify
from mvm.linux.sockets import listen_unix

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'
OK = b'{"return": {}}\n'
EVENT = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\n'
Script = Callable[[socket.socket], None]


class Server:
    """Serves one client after the other, each by the next script."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scripts: list[Script] = []
        self.requests: list[dict[str, Any]] = []
        self.listener = listen_unix(path)
        self.release = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.thread.start()

    def _run(self) -> None:
        for script in self.scripts:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client:
                client.settimeout(10)
                try:
                    script(client)
                except OSError:
                    continue  # the client had enough

    def request(self, client: socket.socket) -> dict[str, Any]:
        line = b""
        while not line.endswith(b"\n"):
            data = client.recv(4096)
            if not data:
                raise ConnectionResetError
            line += data
        self.requests.append(json.loads(line))
        return self.requests[-1]

    def greet(self, client: socket.socket) -> None:
        client.sendall(GREETING)
        assert self.request(client)["execute"] == "qmp_capabilities"
        client.sendall(OK)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / QMP_SOCKET)
    try:
        yield made
    finally:
        made.release.set()
        made.listener.close()


def answering(server: Server, *answers: bytes) -> Script:
    def script(client: socket.socket) -> None:
        server.greet(client)
        for answer in answers:
            server.request(client)
            client.sendall(answer)
        server.release.wait(10)

    return script


def test_a_request_and_its_answer(server: Server) -> None:
    server.start(answering(server, b'{"return": {"status": "running"}}\n'))
    qmp = Qmp(server.path, timeout=5)
    assert qmp.call("query-x", timeout=5, some_name=1, other=[True]) == {"status": "running"}
    assert server.requests[-1] == {"execute": "query-x", "arguments": {"some-name": 1, "other": [True]}}
    qmp.close()


def test_events_in_between_are_not_answers(server: Server) -> None:
    server.start(answering(server, EVENT * 50 + OK + EVENT, EVENT + b'{"return": 5}\n'))
    qmp = Qmp(server.path, timeout=5)
    assert qmp.call("a", timeout=5) == {}
    assert qmp.call("b", timeout=5) == 5
    qmp.close()


def test_a_refusal_says_why_and_the_connection_goes_on(server: Server) -> None:
    server.start(answering(server, b'{"error": {"class": "GenericError", "desc": "no such thing"}}\n', OK))
    qmp = Qmp(server.path, timeout=5)
    with pytest.raises(VmmError, match="refused stop") as caught:
        qmp.call("stop", timeout=5)
    assert caught.value.details == "no such thing"
    assert not qmp.broken
    assert qmp.call("cont", timeout=5) == {}
    qmp.close()


def test_descriptors_travel_with_the_request(server: Server) -> None:
    got: list[int] = []

    def script(client: socket.socket) -> None:
        server.greet(client)
        data, fds, _, _ = socket.recv_fds(client, 4096, 4)
        got.extend(fds)
        server.requests.append(json.loads(data))
        client.sendall(OK)

    server.start(script)
    qmp = Qmp(server.path, timeout=5)
    reader, writer = os.pipe()
    qmp.call("getfd", fds=(writer,), fdname="state", timeout=5)
    os.write(got[0], b"same pipe")
    assert os.read(reader, 100) == b"same pipe"
    for fd in (reader, writer, *got):
        os.close(fd)
    qmp.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\n", "not JSON"),
        (b"hello\n", "not JSON"),
        (b"\xff\xfe\x00\n", "not JSON"),
        (b"[" * 200_000 + b"\n", "not JSON"),
        (b"[1, 2]\n", "not an object"),
        (b'"return"\n', "not an object"),
        (b'{"return": ' + b"1" * 5000 + b"}\n", "not JSON"),
        (b"x" * (3 << 20), "does not answer"),
        (b"", "gone"),
    ],
    ids=["empty", "text", "bytes", "nested", "list", "string", "long number", "endless line", "nothing"],
)
@pytest.mark.req("L3")
def test_hostile_answers_are_errors(server: Server, line: bytes, message: str) -> None:
    def script(client: socket.socket) -> None:
        server.greet(client)
        server.request(client)
        client.sendall(line)

    server.start(script)
    qmp = Qmp(server.path, timeout=5)
    with pytest.raises(VmmError, match=message):
        qmp.call("a", timeout=5)
    assert qmp.broken
    qmp.close()


@pytest.mark.parametrize("greeting", [b'{"hello": 1}\n', b"nonsense\n", b""])
def test_a_server_that_does_not_greet_is_refused(server: Server, greeting: bytes) -> None:
    server.start(lambda client: client.sendall(greeting))
    with pytest.raises(VmmError):
        Qmp(server.path, timeout=2)


@pytest.mark.req("L3")
def test_silence_is_an_error_after_the_time_allowed(server: Server) -> None:
    server.start(answering(server))
    qmp = Qmp(server.path, timeout=5)
    with pytest.raises(VmmError, match="does not answer"):
        qmp.call("a", timeout=0.1)
    qmp.close()


def test_endless_events_are_no_answer_either(server: Server) -> None:
    def script(client: socket.socket) -> None:
        server.greet(client)
        while not server.release.is_set():
            client.sendall(EVENT * 100)

    server.start(script)
    qmp = Qmp(server.path, timeout=5)
    with pytest.raises(VmmError, match="does not answer"):
        qmp.call("a", timeout=0.3)
    qmp.close()


def test_nobody_listening_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="cannot be reached"):
        Qmp(tmp_path / "none.sock", timeout=1)


@pytest.mark.req("L3")
def test_a_late_answer_is_not_taken_for_the_next(server: Server) -> None:
    """A call that timed out leaves its answer on the way; the next call must not get that one."""
    late = threading.Event()

    def slow(client: socket.socket) -> None:
        server.greet(client)
        server.request(client)
        late.wait(10)
        client.sendall(b'{"return": "too late"}\n')

    server.start(slow, answering(server, b'{"return": "in time"}\n'))
    me = identify(os.getpid())
    assert isinstance(me, ProcessIdentity)
    vm = QemuVm(me, None, 4096, server.path.parent)
    with pytest.raises(VmmError, match="does not answer"):
        vm._call("a", timeout=0.1)
    late.set()
    assert vm._call("b", timeout=5) == "in time"
    vm.close()


@pytest.mark.parametrize(
    "told",
    ["", "Host virtual address for 0x0 is (nil)", "is 0x7", "is 0x" + "f" * 40, "is 0xdeadbeef"],
)
@pytest.mark.req("L3")
def test_an_impossible_address_of_memory_is_an_error(server: Server, told: str) -> None:
    server.start(answering(server, json.dumps({"return": told}).encode() + b"\n"))
    me = identify(os.getpid())
    assert me is not None
    vm = QemuVm(me, None, 4096, server.path.parent)
    with pytest.raises(VmmError), vm.memory() as memory:
        memory.read_into(0, memoryview(bytearray(16)))
    vm.close()
