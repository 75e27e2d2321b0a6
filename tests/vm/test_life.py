"""The life of a real guest through `Host`: what it has in memory survives sleeps and crashes, and reaches no file.

One guest boots for the module. Its worker's counter and marker exist in its memory only.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.contract.hostd.test_crashes import STEPS
from tests.contract.hostd.test_refusals import holders
from tests.support.driver_contract import whole
from tests.support.qemu_world import QemuWorld, qemu_world

from mvm.builder.model import Artifacts
from mvm.core.errors import IntegrityError
from mvm.core.lifecycle import TRANSITIONS, Action, State, Step, settle
from mvm.core.plan import InstancePlan
from mvm.core.snapshot import SleepReceipt, WakeReceipt
from mvm.hostd.host import Host
from mvm.hostd.resources import secrets_store
from mvm.linux.process import wait_readable
from mvm.linux.secret import SecretBytes

pytestmark = [pytest.mark.root, pytest.mark.vm]

MARKER = "marker-" + os.urandom(12).hex()
ACT: dict[Action, Callable[[Host, InstancePlan], object]] = {
    Action.SLEEP: lambda host, plan: host.sleep_instance(plan.instance),
    Action.WAKE: lambda host, plan: host.wake_instance(plan),
}


class Life:
    """The module's guest. `awake` and `asleep` bring it there by the shortest way."""

    def __init__(self, world: QemuWorld) -> None:
        self.world = world
        self.plan = world.plan(data_disk_mib=32)

    def count(self) -> int:
        return self.world.count(self.plan, MARKER)

    def boot(self) -> None:
        assert self.world.host().create_instance(self.plan).state is State.RUNNING
        self.world.start_worker(self.plan, MARKER)

    def awake(self) -> None:
        try:
            state = self.world.host().inspect_instance(self.plan.instance).state
        except Exception:
            state = State.CREATED
        if state is State.SLEEPING:
            self.world.host().wake_instance(self.plan)
        elif state is not State.RUNNING:
            self.boot()

    def asleep(self) -> None:
        self.awake()
        assert self.world.host().sleep_instance(self.plan.instance).state is State.SLEEPING

    def run(self, *argv: str) -> str:
        return self.world.run(self.plan, *argv)


@pytest.fixture(scope="module")
def node(artifacts: Artifacts) -> Iterator[Life]:
    with qemu_world(artifacts) as world:
        yield Life(world)


@pytest.fixture
def life(node: Life) -> Life:
    node.awake()
    return node


@pytest.mark.req("S1", "S2", "S7")
def test_it_goes_on_where_it_left_off(life: Life) -> None:
    world, plan = life.world, life.plan
    world.assert_runs(plan)
    for _ in range(3):
        before = life.count()
        slept = world.host().sleep_instance(plan.instance)
        assert isinstance(slept.last_receipt, SleepReceipt)
        world.assert_nothing_runs(plan, sleeping=True)
        woken = world.host().wake_instance(plan)
        assert isinstance(woken.last_receipt, WakeReceipt)
        assert woken.last_receipt.chunks_read < woken.last_receipt.chunks_total, "as touched"
        world.assert_runs(plan)
        after = life.count()
        assert before <= after
    # The clock is the host's, not that of the sleep.
    assert abs(int(life.run("date", "+%s")) - int(time.time())) <= 2


@pytest.mark.req("S3")
def test_memory_reaches_no_file(life: Life) -> None:
    world, plan, needle = life.world, life.plan, MARKER.encode()
    record = world.record(plan)
    assert record.process is not None
    vm = world.driver.adopt(record.process, "x", plan.mem_mib, world.paths(plan).runtime)
    with vm.memory() as memory:
        assert needle in whole(memory), "it is in memory, so looking for it proves something"
    vm.close()
    places = [world.store.root, Path("/dev/shm"), Path("/run")]
    assert [p for place in places for p in holders(place, needle)] == []
    world.host().sleep_instance(plan.instance)
    assert [p for place in places for p in holders(place, needle)] == []
    assert world.processes() == {}
    assert world.mounts() == []
    assert not any("mvm-memory" in line for line in Path("/proc/self/mountinfo").read_text().splitlines())
    world.host().wake_instance(plan)
    assert [p for place in places for p in holders(place, needle)] == []


@pytest.mark.req("S2", "K3")
def test_secrets_are_new_after_a_wake(life: Life) -> None:
    world, plan = life.world, life.plan
    sealed = world.store.tenant_dir(plan.instance.tenant) / "secrets.sealed"

    def put(value: bytes) -> None:
        with SecretBytes(len(value)) as secret:
            secret.view()[:] = value
            secrets_store.save(sealed, world.keys, plan.instance.tenant, {"token": secret})

    for value in (b"first-secret", b"second-secret"):
        life.asleep()
        put(value)
        world.host().wake_instance(plan)
        assert life.run("cat", "/run/secrets/token") == value.decode()
        assert holders(world.store.root, value) == []
        mount = next(line for line in life.run("cat", "/proc/mounts").splitlines() if "/run/secrets" in line)
        assert {"ro", "noexec", "nodev", "nosuid"} <= set(mount.split()[3].split(","))


@pytest.mark.req("L3", "S1", "S2")
@pytest.mark.parametrize(("action", "step"), [(action, step) for action in ACT for step in STEPS[action]])
def test_killed_at_a_step(life: Life, action: Action, step: str) -> None:
    world, plan = life.world, life.plan
    before = life.count()
    if action is Action.WAKE:
        life.asleep()
    assert world.killed_at(step, lambda host: ACT[action](host, plan)), "it came to that step"
    source = State.RUNNING if action is Action.SLEEP else State.SLEEPING
    rule = TRANSITIONS[(source, action)]
    assert isinstance(rule, Step)
    expected = settle(rule, committed=STEPS[action][step], alive=True)
    record = world.host().inspect_instance(plan.instance)
    assert (record.state, record.pending) == (expected, None)
    if expected is State.RUNNING:
        world.assert_runs(plan)
    else:
        world.assert_nothing_runs(plan, sleeping=True)
        world.host().wake_instance(plan)
    assert life.count() >= before


@pytest.mark.req("L3", "S1", "S2")
def test_killed_at_any_moment(life: Life) -> None:
    world, plan, rng = life.world, life.plan, random.Random(11)
    for _ in range(8):
        before = life.count()
        killed = world.killed_after(rng.uniform(0.01, 0.3), lambda h: ACT[Action.SLEEP](h, plan))
        record = world.host().inspect_instance(plan.instance)
        assert record.state in ((State.RUNNING, State.SLEEPING) if killed else (State.SLEEPING,))
        if record.state is State.RUNNING:
            world.assert_runs(plan)
            assert life.count() >= before
            world.host().sleep_instance(plan.instance)
        world.assert_nothing_runs(plan, sleeping=True)
        world.killed_after(rng.uniform(0.01, 0.3), lambda h: ACT[Action.WAKE](h, plan))
        if world.host().inspect_instance(plan.instance).state is State.SLEEPING:
            world.assert_nothing_runs(plan, sleeping=True)
            world.host().wake_instance(plan)
        world.assert_runs(plan)
        assert life.count() >= before


@pytest.mark.req("S4")
def test_a_damaged_snapshot_leaves_it_sleeping(life: Life) -> None:
    world, plan = life.world, life.plan
    before = life.count()
    life.asleep()
    latest = world.paths(plan).latest
    # An older segment also has records that later sleeps replaced; nobody reads those, so nobody misses them.
    largest = max(latest.glob("segment-*"), key=lambda path: path.stat().st_size)
    for path in (latest / "manifest", latest / "key", latest / "state", largest):
        whole_file = path.read_bytes()
        damaged = bytearray(whole_file)
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="cannot be woken"):
            world.host().wake_instance(plan)
        assert world.host().inspect_instance(plan.instance).state is State.SLEEPING
        world.assert_nothing_runs(plan, sleeping=True)
        path.write_bytes(whole_file)
    world.host().wake_instance(plan)
    assert life.count() >= before


@pytest.mark.req("K1", "L7")
def test_a_stop_is_graceful_and_the_data_disk_is_kept_encrypted(life: Life) -> None:
    world, plan = life.world, life.plan
    content = "data-" + os.urandom(12).hex()
    life.run("sh", "-c", 'printf "%s" "$0" > /data/kept', content)
    seen: list[str] = []
    assert world.host().stop_instance(plan.instance, seen.append).state is State.STOPPED
    world.assert_nothing_runs(plan)
    assert world.paths(plan).data_disk.read_bytes()[:4] == b"LUKS"
    assert holders(world.store.root, content.encode()) == []
    life.awake()
    assert life.run("cat", "/data/kept") == content


@pytest.mark.req("L3")
def test_a_guest_that_powers_off_is_stopped(life: Life) -> None:
    world, plan = life.world, life.plan
    process = world.record(plan).process
    assert process is not None
    handle = os.pidfd_open(process.pid)
    with world.session(plan) as channel:
        channel.shutdown(reboot=True)
    assert wait_readable(handle, 60)
    os.close(handle)
    assert world.host().inspect_instance(plan.instance).state is State.STOPPED
    world.assert_nothing_runs(plan)


@pytest.mark.req("L7")
def test_destroy_leaves_nothing(life: Life) -> None:
    world, plan = life.world, life.plan
    world.host().destroy_instance(plan.instance, wipe_volumes=True)
    assert not world.paths(plan).base.exists()
    assert (world.processes(), world.mounts(), world.links()) == ({}, [], set())
