"""What a member of the daemon's group sees through it, and how much of the daemon one user can take."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tests.daemons.test_hostd import as_member
from tests.support.hostd_daemon import DaemonWorld, daemon_world

from mvm.core.errors import Busy, Conflict, ResourceExhausted
from mvm.core.ids import PoolId
from mvm.core.plan import InstancePlan
from mvm.core.spec import EgressRule, PoolSpec, changed
from mvm.hostd.resources import audit
from mvm.linux.files import locked
from mvm.standalone.facade import Standalone
from mvm.wire.hostd_api import (
    CONSOLE_CHUNK,
    MAX_ANSWER,
    VERBS,
    ChannelRequest,
    ConsolePlace,
    PlanRequest,
    Purpose,
    TenantRequest,
)
from mvm.wire.hostd_client import HostdClient
from mvm.wire.hostd_frames import FrameReader, decode_message, encode_request

pytestmark = [pytest.mark.root, pytest.mark.req("H2")]


@pytest.fixture
def open_world(world: DaemonWorld, monkeypatch: pytest.MonkeyPatch) -> DaemonWorld:
    os.chmod(world.daemon.socket.parents[1], 0o711)  # the temporary directory; /run/mvm is open to look into
    monkeypatch.setenv("MVM_HOSTD", str(world.daemon.socket))
    return world


def cli(world: DaemonWorld, *words: str, gid: int = 60) -> subprocess.CompletedProcess[str]:
    """`mvm`, as uid 4711 of the group."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "mvm.cli", "--root", str(world.store.root), *words],
        env={**os.environ, "MVM_HOSTD": str(world.daemon.socket), "HOME": "/nonexistent"},
        cwd="/",
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        user=4711,
        group=gid,
        extra_groups=[gid],
        timeout=60,
    )


def entries(world: DaemonWorld, plan: InstancePlan) -> list[dict[str, object]]:
    path = world.store.tenant_dir(plan.instance.tenant) / audit.LOG_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.req("L5")
def test_a_member_reads_consoles_and_that_is_audited(open_world: DaemonWorld) -> None:
    world = open_world
    plan = world.plan()
    world.client.attach_drives(plan)
    log = world.paths(plan).console_log
    log.write_bytes(b"one\n" + b"x" * (3 * CONSOLE_CHUNK) + b"\nlast \x1b[2J words\n")

    def read() -> None:
        node = Standalone.open(world.store.root)
        with node.console(plan.instance) as piece:
            first = piece(None, None)
            assert first.more
            assert len(first.data) == CONSOLE_CHUNK
            found, place = first.data, first.place
            while True:
                answer = piece(None, place)
                found, place = found + answer.data, answer.place
                if not answer.more:
                    break
            assert found.startswith(b"one\nxxx")
            assert found.endswith(b"\nlast \x1b[2J words\n")
            assert piece(None, place).data == b""
            # A place that is nobody's file is no way to any other.
            assert piece(None, ConsolePlace(os.stat("/etc/passwd").st_ino, 0)).data.startswith(b"one\nxxx")

    assert as_member(read) == 0
    assert [(e["action"], e["command"]) for e in entries(world, plan)] == [
        ("instance.logs", ["mvm-hostd", "uid=4711"])
    ]
    shown = cli(world, "tenant", "logs", "acme", "-n", "1")
    assert (shown.returncode, shown.stdout) == (0, "last \x1b[2J words\n")
    nothing = cli(world, "instance", "logs", "acme/default-7")
    assert nothing.returncode == 10
    assert nothing.stderr.startswith("error: there is no instance acme/default-7")


@pytest.mark.req("L5")
def test_following_goes_on_after_the_daemon_was_restarted(open_world: DaemonWorld) -> None:
    world = open_world
    plan = world.plan()
    world.client.attach_drives(plan)
    log = world.paths(plan).console_log
    log.write_bytes(b"before\n")
    with world.client.console(plan.instance) as console:
        seen = console.read(None, None)
        assert seen.data == b"before\n"
        world.daemon.stop()
        world.daemon.start()
        with log.open("ab") as file:
            file.write(b"after\n")
        assert console.read(None, seen.place).data == b"after\n"


@pytest.mark.req("L5")
def test_lists_are_the_ones_root_sees(open_world: DaemonWorld) -> None:
    world = open_world
    for name in ("acme", "beta"):
        world.client.attach_drives(world.plan(name))
    lone = world.plan("lone")
    world.store.save_spec(
        changed(world.store.load_spec(lone.instance.tenant), pools=(PoolSpec(PoolId("web"), count=2),))
    )
    for words in (
        ("tenant", "list"), ("instance", "list"), ("instance", "list", "beta"), ("pool", "list"),
        ("pool", "list", "lone"), ("pool", "show", "acme", "default"), ("tenant", "show", "acme"),
    ):  # fmt: skip
        mine = cli(world, *words, "--output", "json")
        assert mine.returncode == 0, mine.stderr
        roots = subprocess.run(
            [sys.executable, "-m", "mvm.cli", "--root", str(world.store.root), *words, "--output", "json"],
            env={**os.environ, "MVM_HOSTD": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert [msgspec.json.decode(line) for line in mine.stdout.splitlines()] == [
            msgspec.json.decode(line) for line in roots.stdout.splitlines()
        ]
    for words in (("instance", "list", "nobody"), ("pool", "list", "nobody"), ("tenant", "show", "nobody")):
        missing = cli(world, *words)
        assert (missing.returncode, missing.stdout) == (10, "")
        assert "there is no tenant nobody" in missing.stderr


@pytest.mark.req("N3")
def test_a_member_verifies_the_network(open_world: DaemonWorld) -> None:
    world = open_world
    plan = world.plan()
    world.client.create_instance(plan)
    sound = cli(world, "net", "verify", "--output", "json")
    assert sound.returncode == 0, sound.stderr
    assert json.loads(sound.stdout) == {
        "kind": "summary", "ok": True, "tenants": 1, "running": 1, "differences": 0, "probes": 0, "failed": 0,
    }  # fmt: skip
    subprocess.run(["ip", "link", "set", plan.network.tap, "nomaster"], check=True)
    broken = cli(world, "net", "verify")
    assert broken.returncode == 13
    assert plan.network.tap in broken.stdout
    active = cli(world, "net", "verify", "--active")
    assert active.returncode == 15
    assert "--active needs root" in active.stderr


@pytest.mark.req("L1", "L5")
def test_a_member_destroys_starts_again_and_wipes_what_was_kept(open_world: DaemonWorld) -> None:
    world = open_world
    plan = world.plan()
    world.client.create_instance(plan)
    disk = world.paths(plan).data_disk
    assert cli(world, "instance", "destroy", "acme/default-0", "--yes").returncode == 0
    assert disk.exists()
    again = cli(world, "tenant", "run", "acme")
    assert (again.returncode, again.stdout) == (0, "acme/default-0 is running at 10.240.1.2.\n"), again.stderr
    assert cli(world, "instance", "destroy", "acme/default-0", "--yes").returncode == 0
    # There is no record of it any more, and its volume is not a member's to see; the daemon finds it.
    assert cli(world, "instance", "destroy", "acme/default-0", "--yes", "--wipe-volumes").returncode == 0
    assert not disk.exists()
    slip = cli(world, "instance", "destroy", "acme/wbe-0", "--yes")
    assert slip.returncode == 10
    assert "acme has no pool wbe" in slip.stderr


@pytest.mark.req("O1")
def test_what_a_member_learns_of_the_node(open_world: DaemonWorld) -> None:
    world = open_world
    world.client.attach_drives(world.plan())
    told = cli(world, "node", "info", "--output", "json")
    assert told.returncode == 0, told.stderr
    node = json.loads(told.stdout)
    assert node["node_id"] == world.store.node_id()
    assert node["root"] == str(world.store.root)
    assert node["instances"] == {"created": 1}
    assert any("only root" in text for text in node["unseen"])
    stranger = json.loads(cli(world, "node", "info", "--output", "json", gid=9999).stdout)
    assert stranger["instances"] == {}
    assert any("does not talk to this user" in text for text in stranger["unseen"])
    lines = cli(world, "node", "info", gid=9999).stdout.splitlines()
    for row in ("node id", "instances"):
        assert [line.split()[-2:] for line in lines if line.startswith(row)] == [["not", "seen"]]
    probe = cli(world, "node", "info", "--probe")
    assert (probe.returncode, probe.stdout) == (15, "")
    assert "--probe needs root" in probe.stderr


@pytest.mark.parametrize("words", [
    ("tenant", "list"), ("tenant", "show", "acme"), ("tenant", "run", "acme"), ("tenant", "logs", "acme"),
    ("instance", "list"), ("pool", "list"), ("net", "verify"), ("audit", "verify"), ("tenant", "build", "acme"),
])  # fmt: skip
def test_a_stranger_is_told_so_and_nothing_else(open_world: DaemonWorld, words: tuple[str, ...]) -> None:
    done = cli(open_world, *words, gid=9999)
    assert (done.returncode, done.stdout) == (15, "")
    assert done.stderr.startswith("error: ")
    assert "sudo" in done.stderr
    assert "Traceback" not in done.stderr


# How much one user can take.


def answers(sock: socket.socket, count: int) -> list[str | None]:
    """The kinds of the next `count` errors (None: no error), fewer if the daemon hangs up."""
    reader = FrameReader(MAX_ANSWER)
    found: list[str | None] = []
    while len(found) < count:
        try:
            data = sock.recv(1 << 16)
        except ConnectionResetError:
            break
        if not data:
            break
        for body in reader.feed(data):
            message = decode_message(body)
            if message.progress is None:
                found.append(None if message.error is None else message.error.kind)
    return found


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_requests_whose_answers_nobody_takes_fill_no_memory(world: DaemonWorld) -> None:
    """A thousand small requests with large answers in one packet used to be answered all, in memory."""
    plan = world.plan()
    rules = tuple(EgressRule(f"10.{n}.0.0/16") for n in range(100))
    pools = tuple(PoolSpec(PoolId(f"p{n}")) for n in range(16))
    spec = changed(
        world.store.load_spec(plan.instance.tenant), egress=rules, pools=pools, flake_ref="x" * 1000
    )
    world.store.save_spec(spec)
    request = encode_request(VERBS["inspect_tenant"], TenantRequest(plan.instance.tenant))
    assert world.daemon.process is not None
    world.client.inspect_tenant(plan.instance.tenant)
    before = resident(world.daemon.process.pid)
    greedy = [world.daemon.raw() for _ in range(20)]
    try:
        for sock in greedy:
            sock.setblocking(False)
            for _ in range(50):
                try:
                    sock.send(request * 200)
                except OSError:
                    break
        for _ in range(10):
            world.client.ping()
        assert resident(world.daemon.process.pid) - before < 8 << 20
    finally:
        for sock in greedy:
            sock.close()
    assert world.client.ping().operations == 0


def test_one_member_leaves_the_others_connections(open_world: DaemonWorld) -> None:
    world = open_world

    def flood() -> None:
        kept = [world.daemon.raw() for _ in range(240)]
        with pytest.raises(ResourceExhausted):
            world.client.ping()
        for sock in kept:
            sock.close()

    assert as_member(flood) == 0
    told, tell = os.pipe()
    release, let_go = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:

            def hold() -> None:
                kept = [world.daemon.raw() for _ in range(240)]
                os.write(tell, b".")
                os.read(release, 1)
                del kept

            code = as_member(hold)
        finally:
            os._exit(code)
    try:
        assert os.read(told, 1) == b"."
        assert as_user(world.client.ping, 4712) == 0
    finally:
        os.write(let_go, b".")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        for fd in (told, tell, release, let_go):
            os.close(fd)


def as_user(act: Callable[[], object], uid: int) -> int:
    """As `as_member`, for another member."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setgroups([60])
            os.setresgid(60, 60, 60)
            os.setresuid(uid, uid, uid)
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_shells_limit_on_descriptors_is_not_the_daemons() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with daemon_world() as world:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
        try:
            world.daemon.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        kept = [world.daemon.raw() for _ in range(300)]
        assert world.client.ping().operations == 0
        for sock in kept:
            sock.close()
        assert not world.daemon.lines("accept failed")


def test_members_leave_an_operation_to_root() -> None:
    with daemon_world('group = "games"\noperations = 2\n') as world:
        world.daemon.start()
        os.chmod(world.daemon.socket.parents[1], 0o711)
        plan, other = world.plan(), world.plan("beta")
        world.client.attach_drives(plan)
        world.client.attach_drives(other)

        def two() -> None:
            first = world.daemon.raw()
            first.sendall(encode_request(VERBS["create_instance"], PlanRequest(plan)))
            while world.client.ping().operations == 0:
                time.sleep(0.01)
            world.client.stop_instance(other.instance)

        with locked(world.paths(plan).lock, wait=5):
            assert as_member(two) == Busy.exit_code
            assert world.client.inspect_instance(other.instance).id == other.instance
        while world.client.ping().operations:
            time.sleep(0.01)


def test_one_member_fills_no_log(open_world: DaemonWorld) -> None:
    """Neither a tenant's audit log, which is never cut, nor the daemon's own."""
    world = open_world
    plan = world.plan()
    world.client.attach_drives(plan)
    request = encode_request(VERBS["open_channel"], _channel(plan))

    def flood() -> None:
        kinds: list[str | None] = []
        with world.daemon.raw() as sock:
            for _ in range(1000):
                sock.sendall(request)
                kinds += answers(sock, 1)
        assert kinds.count("conflict") >= 200
        assert kinds.count("busy") >= 300
        for _ in range(500):
            with world.daemon.raw() as sock:
                sock.sendall(b"\0\0\0\1x")
                assert answers(sock, 1) == ["invalid-input"]

    began = time.monotonic()
    assert as_member(flood) == 0
    allowed = 250 + 25 * (time.monotonic() - began)
    assert len(entries(world, plan)) < allowed
    lines = world.daemon.lines("refused") + world.daemon.lines("malformed")
    assert len(lines) < allowed
    # Others are as well served as ever.
    assert as_user(lambda: _ask(world.client, plan), 4712) == 0


def _channel(plan: InstancePlan) -> ChannelRequest:
    return ChannelRequest(plan.instance, Purpose.EXEC, "x")


def _ask(client: HostdClient, plan: InstancePlan) -> None:
    with pytest.raises(Conflict):
        client.open_channel(plan.instance, Purpose.EXEC)


def test_a_session_that_could_not_be_audited_keeps_no_port(open_world: DaemonWorld) -> None:
    world = open_world
    plan = world.plan()
    world.client.create_instance(plan)
    log = world.store.tenant_dir(plan.instance.tenant) / audit.LOG_NAME
    log.unlink(missing_ok=True)
    log.mkdir()

    def ask() -> None:
        with world.daemon.raw() as sock:
            for _ in range(9):  # there are seven ports
                sock.sendall(encode_request(VERBS["open_channel"], _channel(plan)))
                (kind,) = answers(sock, 1)
                assert kind not in (None, "busy", "conflict"), kind

    assert as_member(ask) == 0
    assert world.client.ping().channels == 0
    log.rmdir()


def test_what_a_member_may_not(open_world: DaemonWorld) -> None:
    world = open_world
    plan = world.plan()
    world.client.attach_drives(plan)
    for words in (
        ("tenant", "create", "other", "--flake", "nix/embedded"), ("tenant", "build", "acme"),
        ("tenant", "destroy", "acme", "--yes"), ("pool", "scale", "acme", "default", "2"), ("audit", "verify"),
        ("audit", "verify", "acme"), ("net", "verify", "--active"),
    ):  # fmt: skip
        done = cli(world, *words)
        assert (done.returncode, done.stdout) == (15, ""), (words, done)
        assert done.stderr.startswith("error: ")
        assert "sudo" in done.stderr
        assert "Traceback" not in done.stderr
