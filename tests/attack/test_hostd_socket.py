"""A hostile client of the daemon's socket: everything is refused and logged, and the daemon is as well as ever."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time

import msgspec
import pytest
from tests.daemons.test_hostd import as_member
from tests.daemons.test_members import as_user
from tests.support.hostd_daemon import DaemonWorld

from mvm.core import codec
from mvm.core.errors import MissingPrerequisite, Refused
from mvm.wire.hostd_api import MAX_ANSWER, MAX_REQUEST, VERBS
from mvm.wire.hostd_frames import FrameReader, Message, decode_message, frame

pytestmark = pytest.mark.root

PATHS = [
    "../../etc/shadow", "/etc/shadow", "acme/../../x-0", "a\0b", "acme/default-0/../..", "%2e%2e", ".", "..", "~",
    "acme/default-0\n", "$(id)", "`id`", ";reboot", "--help", "\N{FULLWIDTH SOLIDUS}etc", "a" * 5000, "",
]  # fmt: skip


def read_answer(sock: socket.socket) -> Message | None:
    """The next message, or None if the daemon hung up."""
    reader = FrameReader(MAX_ANSWER)
    while True:
        try:
            data = sock.recv(65536)
        except ConnectionResetError:
            return None
        if not data:
            return None
        for body in reader.feed(data):
            return decode_message(body)


def ask(world: DaemonWorld, body: bytes) -> Message | None:
    with world.daemon.raw() as sock:
        sock.sendall(frame(body, MAX_REQUEST))
        return read_answer(sock)


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def unharmed(world: DaemonWorld) -> None:
    assert world.daemon.process is not None
    assert world.daemon.process.poll() is None
    node = world.client.ping()
    assert node.operations == 0
    assert node.pid == world.daemon.process.pid
    descriptors = os.listdir(f"/proc/{node.pid}/fd")
    assert len(descriptors) < 16
    assert world.links() == set()
    assert list(world.store.tenants_dir.iterdir()) == []
    assert not [line for line in world.daemon.lines() if line["event"] in ("defect", "operation died")]


@pytest.mark.req("H2")
def test_ten_thousand_random_frames(world: DaemonWorld) -> None:
    rng = random.Random(20_241)
    assert world.daemon.process is not None
    before = resident(world.daemon.process.pid)
    words: list[object] = [
        *VERBS,
        "args",
        "verb",
        "v",
        "plan",
        "instance",
        "acme/default-0",
        1,
        -1,
        None,
        True,
        {},
        [],
    ]
    sent = 0
    while sent < 10_000:
        kind = rng.randrange(4)
        if kind == 0:
            body = rng.randbytes(rng.randrange(1, 300))
        elif kind == 1:
            body = msgspec.json.encode(
                {str(rng.choice(words)): rng.choice(words) for _ in range(rng.randrange(6))}
            )
        elif kind == 2:
            verb = rng.choice(list(VERBS))
            args = {str(rng.choice(words)): rng.choice(words) for _ in range(rng.randrange(4))}
            body = msgspec.json.encode({"v": rng.choice([1, 1, 2]), "verb": verb, "args": args})
        else:
            bent = bytearray(msgspec.json.encode({"v": 1, "verb": "list_instances", "args": {}}))
            bent[rng.randrange(len(bent))] ^= 1 << rng.randrange(8)
            body = bytes(bent)
        with world.daemon.raw() as sock:
            if rng.randrange(10) == 0:
                sock.sendall(rng.randbytes(rng.randrange(1, 64)))
                sock.shutdown(socket.SHUT_WR)
            else:
                sock.sendall(frame(body, MAX_REQUEST))
            if rng.randrange(4):
                read_answer(sock)
        sent += 1
    while world.client.ping().operations:  # a frame may have asked for what needs no arguments
        time.sleep(0.01)
    unharmed(world)
    assert len(world.daemon.lines("malformed")) > 1000
    assert resident(world.daemon.process.pid) - before < 16 << 20


@pytest.mark.req("H2")
@pytest.mark.parametrize("length", [0, MAX_REQUEST + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_lengths_no_frame_has(world: DaemonWorld, length: int) -> None:
    with world.daemon.raw() as sock:
        sock.sendall(struct.pack(">I", length) + b"x" * 100)
        answer = read_answer(sock)
        assert answer is not None
        assert answer.error is not None
        assert answer.error.kind == "invalid-input"
        assert read_answer(sock) is None
    unharmed(world)


@pytest.mark.req("H2")
def test_truncated_and_hung_up(world: DaemonWorld) -> None:
    whole = frame(codec.encode_line({"v": 1, "verb": "ping", "args": {}}), MAX_REQUEST)
    for cut in range(len(whole)):
        with world.daemon.raw() as sock:
            sock.sendall(whole[:cut])
    unharmed(world)


@pytest.mark.req("H2")
def test_a_frame_byte_by_byte_is_cut_off(world: DaemonWorld) -> None:
    """Slow loris: bytes keep coming, the request never does."""
    with world.daemon.raw() as slow:
        slow.sendall(struct.pack(">I", 60_000))
        deadline = time.monotonic() + 20
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < deadline:
                slow.sendall(b" ")
                world.client.ping()
                time.sleep(0.05)
    assert world.daemon.lines("client too slow")
    unharmed(world)


@pytest.mark.req("H2")
def test_a_client_that_never_reads_stalls_nobody(world: DaemonWorld) -> None:
    request = frame(codec.encode_line({"v": 1, "verb": "ping", "args": {}}), MAX_REQUEST)
    assert world.daemon.process is not None
    before = resident(world.daemon.process.pid)
    with world.daemon.raw() as greedy:
        greedy.setblocking(False)
        for _ in range(20_000):
            try:
                greedy.send(request)
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError):
                break
        for _ in range(20):
            world.client.ping()
        assert resident(world.daemon.process.pid) - before < 16 << 20
    unharmed(world)


@pytest.mark.req("H2")
@pytest.mark.parametrize("trick", range(len(PATHS)))
def test_path_tricks_in_every_field(world: DaemonWorld, trick: int) -> None:
    bad = PATHS[trick]
    plan = world.plan()
    good = msgspec.json.decode(codec.encode_line(plan))
    world.store.tenant_dir(plan.instance.tenant).rename(world.store.root / "aside")
    bodies = [{"v": 1, "verb": bad, "args": {}}]
    for field in ("instance", "revision", "profile", "boot_args"):
        for verb in ("create_instance", "wake_instance", "attach_drives", "setup_network"):
            bodies.append({"v": 1, "verb": verb, "args": {"plan": {**good, field: bad}}})
    for field in ("bridge", "tap", "gateway", "ip", "mac"):
        network = {**good["network"], field: bad}
        bodies.append({"v": 1, "verb": "create_instance", "args": {"plan": {**good, "network": network}}})
    for verb in ("stop_instance", "sleep_instance", "inspect_instance"):
        bodies.append({"v": 1, "verb": verb, "args": {"instance": bad}})
    bodies.append({"v": 1, "verb": "destroy_instance", "args": {"instance": bad, "wipe_volumes": True}})
    bodies.append({"v": 1, "verb": "open_channel", "args": {"instance": bad, "purpose": "exec"}})
    bodies.append({"v": 1, "verb": "open_channel", "args": {"instance": "acme/default-0", "purpose": bad}})
    bodies.append({"v": 1, "verb": "inspect_tenant", "args": {"tenant": bad}})
    bodies.append({"v": 1, "verb": "list_instances", "args": {"tenant": bad}})
    bodies.append({"v": 1, "verb": "list_instances", "args": {"after": bad}})
    for body in bodies:
        answer = ask(world, msgspec.json.encode(body))
        assert answer is not None, body
        assert answer.error is not None, body
        assert answer.error.kind in ("invalid-input", "not-found"), (body, answer.error)
    unharmed(world)


@pytest.mark.req("H2")
def test_fields_nobody_declared_and_other_versions(world: DaemonWorld) -> None:
    for body in (
        {"v": 1, "verb": "ping", "args": {}, "as": "root"},
        {"v": 1, "verb": "ping", "args": {"path": "/"}},
        {"v": 2, "verb": "ping", "args": {}},
        {"v": 1, "verb": "stop_instance", "args": {"instance": "acme/default-0", "force": True}},
        {"v": 1, "verb": "destroy_instance", "args": {"instance": "acme/default-0", "wipe_volumes": "yes"}},
        {"v": 1, "verb": "__init__", "args": {}},
        {"v": 1, "verb": "exec", "args": {"argv": ["/bin/sh"]}},
    ):
        answer = ask(world, msgspec.json.encode(body))
        assert answer is not None
        assert answer.error is not None
        assert answer.error.kind == "invalid-input"
    deep = b'{"v":1,"verb":"ping","args":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    answer = ask(world, deep)
    assert answer is not None
    assert answer.error is not None
    unharmed(world)


@pytest.mark.req("H2")
def test_somebody_elses_uid(world: DaemonWorld) -> None:
    path = world.daemon.socket
    os.chmod(path.parents[1], 0o711)
    # The socket's mode keeps them out already...
    assert as_member(world.client.ping, gid=9999) == MissingPrerequisite.exit_code
    # ... and the kernel's word on who connected does where the mode does not.
    os.chmod(path, 0o666)
    assert as_member(world.client.ping, gid=9999) == Refused.exit_code
    assert as_member(world.client.ping) == 0
    refused = world.daemon.lines("refused")
    assert [(line["uid"], line["gid"]) for line in refused] == [(4711, 4711)]
    unharmed(world)


@pytest.mark.req("H2")
def test_a_group_cannot_lock_root_out(world: DaemonWorld) -> None:
    """Its connections end before root's do, whoever of it holds them."""
    os.chmod(world.daemon.socket.parents[1], 0o711)

    told, tell = os.pipe()
    wait, let_go = os.pipe()

    def half() -> None:
        kept = [world.daemon.raw() for _ in range(240)]
        os.write(tell, b"half")
        os.read(wait, 1)
        del kept

    def flood() -> None:
        kept = [world.daemon.raw() for _ in range(240)]
        with world.daemon.raw() as last:
            answer = read_answer(last)
            assert answer is not None
            assert answer.error is not None
            assert answer.error.kind == "resources"
        os.write(tell, b"full")
        os.read(wait, 1)
        for sock in kept:
            sock.close()

    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(as_user(half, 4712)))]
    threads[0].start()
    assert os.read(told, 4) == b"half"
    threads.append(threading.Thread(target=lambda: codes.append(as_member(flood))))
    threads[1].start()
    assert os.read(told, 4) == b"full"
    assert world.client.ping().operations == 0
    os.write(let_go, b"..")
    for thread in threads:
        thread.join(20)
    for fd in (told, tell, wait, let_go):
        os.close(fd)
    assert codes == [0, 0]
    unharmed(world)
