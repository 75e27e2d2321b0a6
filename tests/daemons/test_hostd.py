"""mvm-hostd as an executor: the same contract as the in-process one, and what only a daemon has."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import msgspec
import pytest
from tests.support.executor_contract import ExecutorContract
from tests.support.hostd_daemon import DaemonWorld, daemon_world

from mvm.core.errors import (
    Busy,
    Conflict,
    InvalidInput,
    MissingPrerequisite,
    MvmError,
    NotFound,
    Refused,
    ResourceExhausted,
)
from mvm.core.ids import RevisionId
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan
from mvm.hostd import confine
from mvm.hostd.resources import audit, cgroup
from mvm.linux import capabilities
from mvm.linux.files import locked
from mvm.standalone.facade import Standalone
from mvm.standalone.remote import SocketHost
from mvm.wire.executor import Executor
from mvm.wire.hostd_api import Purpose

pytestmark = pytest.mark.root


class TestInProcess(ExecutorContract):
    @pytest.fixture
    def executor(self, world: DaemonWorld) -> Executor:
        return world.host()


class TestOverTheSocket(ExecutorContract):
    @pytest.fixture
    def executor(self, world: DaemonWorld) -> Executor:
        return world.client


@pytest.mark.req("H2", "H3")
def test_what_it_may_is_what_the_documentation_says(world: DaemonWorld) -> None:
    assert world.daemon.process is not None
    held = capabilities.status(world.daemon.process.pid)
    documented = frozenset(confine.CAPABILITIES)
    assert (held.effective, held.permitted, held.bounding) == (documented, documented, documented)
    assert held.inheritable == held.ambient == frozenset()
    assert held.no_new_privs
    assert held.seccomp == 2
    plan = world.plan()
    record = world.client.create_instance(plan)
    assert record.process is not None
    vmm = capabilities.status(record.process.pid)
    assert vmm.effective == vmm.permitted == vmm.ambient == frozenset()
    assert vmm.bounding == documented
    assert vmm.no_new_privs
    assert vmm.seccomp == 2


@pytest.mark.req("H2")
def test_ping_and_lists(world: DaemonWorld) -> None:
    node = world.client.ping()
    assert node.node == world.store.node_id()
    assert world.daemon.process is not None
    assert (node.pid, node.driver, node.operations) == (world.daemon.process.pid, "fake", 0)
    plans = [world.plan(name) for name in ("acme", "beta")]
    for plan in plans:
        world.client.attach_drives(plan)
    lines = world.client.list_instances()
    assert [(line.instance, line.state) for line in lines] == [(p.instance, "created") for p in plans]
    assert [line.instance for line in world.client.list_instances(plans[1].instance.tenant)] == [
        plans[1].instance
    ]
    seen = world.client.inspect_tenant(plans[0].instance.tenant)
    assert seen.index == plans[0].network.index
    assert seen.spec == world.store.load_spec(plans[0].instance.tenant)
    with pytest.raises(NotFound):
        world.client.inspect_tenant(type(plans[0].instance.tenant).parse("nobody"))


@pytest.mark.req("H2", "K1")
def test_drives_are_there_before_the_first_start(world: DaemonWorld) -> None:
    plan = world.plan()
    assert world.client.attach_drives(plan).state is State.CREATED
    made = world.paths(plan).data_disk.stat()
    assert world.client.attach_drives(plan).state is State.CREATED
    world.assert_nothing_runs(plan)
    world.client.create_instance(plan)
    assert world.paths(plan).data_disk.stat().st_ino == made.st_ino
    world.client.attach_drives(plan)


@pytest.mark.req("H2", "N1")
def test_a_network_that_was_meddled_with_is_put_back(world: DaemonWorld) -> None:
    import subprocess

    plan = world.plan()
    with pytest.raises(NotFound):
        world.client.stop_instance(plan.instance)
    world.client.create_instance(plan)
    for command in (f"link set {plan.network.tap} nomaster down", f"address flush dev {plan.network.bridge}"):
        subprocess.run(["ip", *command.split()], check=True)
    world.client.setup_network(plan)
    shown = subprocess.run(["ip", "-d", "address"], check=True, capture_output=True, text=True).stdout
    assert f"inet {plan.network.gateway}/24" in shown
    assert f"master {plan.network.bridge}" in shown
    assert "isolated on" in shown
    world.client.stop_instance(plan.instance)
    with pytest.raises(Conflict):
        world.client.setup_network(plan)


CHANGES: list[tuple[Callable[[InstancePlan], dict[str, object]], type[MvmError]]] = [
    (lambda p: {"mem_mib": p.mem_mib * 2}, Refused),
    (lambda p: {"vcpus": 31}, Refused),
    (lambda p: {"data_disk_mib": 64}, Refused),
    (lambda p: {"egress": ()}, Refused),
    (lambda p: {"revision": RevisionId("ab" * 32)}, Refused),
    (lambda p: {"metadata": not p.metadata}, Refused),
    (lambda p: {"network": msgspec.structs.replace(p.network, mac="02:00:00:00:00:01")}, Refused),
    (lambda p: {"gid": 0}, InvalidInput),
]


@pytest.mark.req("H2", "N2")
@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_plan_that_the_specification_does_not_give(world: DaemonWorld, number: int) -> None:
    """A client that may ask for anything gets nothing that the tenant's specification does not say."""
    plan = world.plan()
    change, expected = CHANGES[number]
    with pytest.raises(expected):
        world.client.create_instance(msgspec.structs.replace(plan, **change(plan)))
    assert not world.paths(plan).base.exists()
    assert world.links() == set()


@pytest.mark.req("H2", "N2")
def test_nobody_gets_onto_another_tenants_bridge(world: DaemonWorld) -> None:
    from mvm.core.plan import plan_instance

    world.plan("beta")
    plan = world.plan("acme")
    other = world.plan("beta").network.index
    spec = world.store.load_spec(plan.instance.tenant)
    stolen = plan_instance(spec, plan.instance.pool, 0, plan.revision, other, 7)
    with pytest.raises(Refused, match="not the one"):
        world.client.create_instance(stolen)


@pytest.mark.req("H2")
def test_the_nodes_own_limits() -> None:
    settings = "[limits]\nmem_mib = 128\nrunning = 1\n"
    with daemon_world(settings) as world:
        world.daemon.start()
        first, second = world.plan("acme"), world.plan("beta")
        large = world.plan("large", mem_mib=256)
        with pytest.raises(Refused, match="mem_mib"):
            world.client.create_instance(large)
        world.client.create_instance(first)
        world.client.create_instance(first)
        with pytest.raises(ResourceExhausted):
            world.client.create_instance(second)
        world.client.sleep_instance(first.instance)
        world.client.create_instance(second)
        with pytest.raises(ResourceExhausted):
            world.client.wake_instance(first)


@pytest.mark.req("H2")
def test_settings_others_can_write_are_not_believed() -> None:
    with daemon_world() as world:
        os.chmod(world.daemon.settings, 0o666)
        world.daemon.launch()
        assert world.daemon.process is not None
        assert world.daemon.process.wait(20) == Refused.exit_code
        assert "written by others" in world.daemon.log.read_text()


@pytest.mark.req("H4", "H5")
def test_the_log_says_what_a_vmm_runs_without(world: DaemonWorld) -> None:
    plan = world.plan()
    record = world.client.create_instance(plan)
    limited = not cgroup.groups(world.store.root).available()
    unlimited = ["without limits on memory, CPU and threads"]
    assert [text.split(":")[0] for text in record.unconfined] == ([] if limited else unlimited)
    said = world.daemon.lines("unconfined")
    assert [line["vmm"] for line in said] == [f"runs {text}" for text in record.unconfined]
    assert all((line["level"], line["instance"]) == ("warning", str(plan.instance)) for line in said)


@pytest.mark.req("H2")
def test_instances_go_on_at_once_and_one_in_turn(world: DaemonWorld) -> None:
    plans = [world.plan(name) for name in ("acme", "beta")]
    failures: list[BaseException] = []

    def act(verb: Callable[[], object]) -> None:
        try:
            verb()
        except BaseException as error:
            failures.append(error)

    held = threading.Event()
    done = threading.Event()

    def hold() -> None:
        world.paths(plans[0]).make()
        with locked(world.paths(plans[0]).lock, wait=5):
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(5)
    # Two wait for acme's lock; beta does not wait for them.
    waiting = [
        threading.Thread(target=act, args=(lambda: world.daemon.client().create_instance(plans[0]),))
        for _ in range(2)
    ]
    for thread in waiting:
        thread.start()
    world.client.create_instance(plans[1])
    assert world.client.ping().operations == 2
    assert not world.paths(plans[0]).state.exists()
    done.set()
    for thread in (holder, *waiting):
        thread.join(60)
    assert failures == []
    assert world.record(plans[0]).state is State.RUNNING


@pytest.mark.req("H2")
def test_too_much_at_once_is_said_to_be_so() -> None:
    with daemon_world("operations = 1\n") as world:
        world.daemon.start()
        plan, other = world.plan(), world.plan("beta")
        world.paths(plan).make()
        with locked(world.paths(plan).lock, wait=5):
            raw = world.daemon.raw()
            from mvm.wire.hostd_api import VERBS, PlanRequest
            from mvm.wire.hostd_frames import encode_request

            raw.sendall(encode_request(VERBS["create_instance"], PlanRequest(plan)))
            while world.client.ping().operations == 0:
                time.sleep(0.01)
            with pytest.raises(Busy):
                world.client.create_instance(other)
        # The client leaves, and what it asked for is done all the same.
        raw.close()
        while world.client.ping().operations:
            time.sleep(0.01)
        assert world.client.inspect_instance(plan.instance).state is State.RUNNING


@pytest.mark.req("L6")
def test_a_session_through_the_daemon(world: DaemonWorld) -> None:
    plan = world.plan()
    world.client.create_instance(plan)
    host = SocketHost(world.daemon.socket)
    with host.channel(plan.instance, Purpose.EXEC) as channel:
        assert channel.status().uptime_ms > 0
        assert world.client.ping().channels == 1
    assert world.client.ping().channels == 0
    # Left clean, so the next one needs no resynchronisation.
    assert (world.paths(plan).runtime / "guest-1.lock").read_bytes() == b"clean\n"
    opened = [world.client.open_channel(plan.instance, Purpose.EXEC) for _ in range(7)]
    assert sorted(one.port for one in opened) == list(range(1, 8))
    with pytest.raises(Busy):
        world.client.open_channel(plan.instance, Purpose.EXEC)
    for one in opened:
        os.close(one.fd)
        one.release(clean=False)
    with host.channel(plan.instance, Purpose.EXEC) as channel:
        assert channel.status().uptime_ms > 0


def as_member(act: Callable[[], object], gid: int = 60) -> int:
    """Run `act` in a child that is uid 4711 and of the group; 0 if it did not raise, else the error's exit code."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setgroups([gid])
            os.setresgid(4711, 4711, 4711)
            os.setresuid(4711, 4711, 4711)
            act()
            code = 0
        except MvmError as error:
            os.write(2, f"{error.brief}: {error.details}\n".encode())
            code = error.exit_code
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.req("H2", "L6", "O2")
def test_a_member_of_the_group_needs_no_root(world: DaemonWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvm.core.ids import TenantId
    from mvm.core.lifecycle import Action

    plan = world.plan()
    tenant = plan.instance.tenant
    world.client.attach_drives(plan)
    os.chmod(world.daemon.socket.parents[1], 0o711)  # the temporary directory; /run/mvm is open to look into
    monkeypatch.setenv("MVM_HOSTD", str(world.daemon.socket))

    def act() -> None:
        node = Standalone.open(world.store.root, ("mvm",))
        node.act(tenant, Action.RUN)
        node.act(tenant, Action.SLEEP)
        node.act(tenant, Action.WAKE)
        shown = ("mvm", "exec", str(plan.instance), "--", "/bin/echo")
        with node.session(plan.instance, "exec", shown) as channel:
            assert channel.status().uptime_ms > 0

    assert as_member(act) == 0
    assert world.record(plan).state is State.RUNNING
    log = (world.store.tenant_dir(TenantId("acme")) / audit.LOG_NAME).read_text()
    assert log.count('"uid=4711"') == 4
    assert '"action":"instance.exec"' in log
    assert as_member(lambda: Standalone.open(world.store.root).destroy(tenant, wipe_volumes=True)) == (
        MissingPrerequisite.exit_code
    )
    audit.verify(world.store.tenant_dir(tenant) / audit.LOG_NAME, tenant)


@pytest.mark.req("H2")
def test_sigterm_lets_operations_finish(world: DaemonWorld) -> None:
    plan = world.plan()
    world.paths(plan).make()
    result: list[object] = []
    with locked(world.paths(plan).lock, wait=5):
        thread = threading.Thread(target=lambda: result.append(world.client.create_instance(plan).state))
        thread.start()
        while world.client.ping().operations == 0:
            time.sleep(0.01)
        assert world.daemon.process is not None
        world.daemon.process.terminate()
        with pytest.raises((MissingPrerequisite, Busy)):
            for _ in range(500):
                world.client.ping()
                time.sleep(0.01)
    thread.join(30)
    assert result == [State.RUNNING]
    assert world.daemon.process.wait(20) == 0
    # Its VM goes on, and the next daemon takes it over.
    world.assert_runs(plan)
    before = world.count(plan)
    world.daemon.start()
    assert world.client.inspect_instance(plan.instance).state is State.RUNNING
    assert world.count(plan) >= before
    world.client.sleep_instance(plan.instance)
