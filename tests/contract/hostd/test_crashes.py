"""Every operation killed at every step it names: the next command finds one side or the other, and nothing else.

The operation runs in a child that gets SIGKILL; a fresh `Host` then does what any command does first.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.fake_world import FakeWorld

from mvm.core.lifecycle import TRANSITIONS, Action, State, Step, settle
from mvm.core.plan import InstancePlan
from mvm.hostd.host import Host
from mvm.hostd.resources import volume
from mvm.wire.hostd_api import Purpose

pytestmark = pytest.mark.root

Act = Callable[[Host, InstancePlan], object]
ACT: dict[Action, Act] = {
    Action.RUN: lambda host, plan: host.create_instance(plan),
    Action.SLEEP: lambda host, plan: host.sleep_instance(plan.instance),
    Action.WAKE: lambda host, plan: host.wake_instance(plan),
    Action.STOP: lambda host, plan: host.stop_instance(plan.instance),
    Action.DESTROY: lambda host, plan: host.destroy_instance(plan.instance, wipe_volumes=False),
}
# How the table says an interrupted step ends, by where it was killed. `committed` is when the record says so.
BEFORE, AFTER = False, True
STEPS: dict[Action, dict[str, bool]] = {
    Action.RUN: {"intent": BEFORE, "started": BEFORE, "committed": AFTER, "before end": AFTER},
    Action.SLEEP: {
        "intent": BEFORE, "quiesced": BEFORE, "paused": BEFORE, "pages written": BEFORE, "sealed": BEFORE,
        "renamed": AFTER, "committed": AFTER, "before end": AFTER,
    },
    Action.WAKE: {
        "intent": BEFORE, "started": BEFORE, "loaded": BEFORE, "committed": AFTER, "resumed": AFTER,
        "before end": AFTER,
    },
    Action.STOP: {"intent": BEFORE, "before end": BEFORE},
    Action.DESTROY: {"intent": BEFORE, "before end": BEFORE},
}  # fmt: skip


def bring_to(world: FakeWorld, plan: InstancePlan, state: State, lives: int) -> None:
    host = world.host()
    host.create_instance(plan)
    world.mark(plan, "survivor ")
    for _ in range(lives):
        host.sleep_instance(plan.instance)
        host.wake_instance(plan)
    if state is State.SLEEPING:
        host.sleep_instance(plan.instance)
    elif state is State.STOPPED:
        host.stop_instance(plan.instance)
    elif state is State.FAILED:
        world.end_vmm(plan, 3)
        host.inspect_instance(plan.instance)


CASES = [
    (source, action, step, lives)
    for source in (State.RUNNING, State.SLEEPING, State.STOPPED, State.FAILED)
    for action in STEPS
    if isinstance(TRANSITIONS[(source, action)], Step)
    for step in STEPS[action]
    for lives in ((0, 1) if action in (Action.SLEEP, Action.WAKE) else (0,))
]


@pytest.mark.req("L3", "S1", "S2", "S3")
@pytest.mark.parametrize(("source", "action", "step", "lives"), CASES)
def test_killed_at_a_step(world: FakeWorld, source: State, action: Action, step: str, lives: int) -> None:
    plan = world.plan()
    bring_to(world, plan, source, lives)
    before = world.count(plan) if source is State.RUNNING else 0
    assert world.killed_at(step, lambda host: ACT[action](host, plan)), "it came to that step"
    rule = TRANSITIONS[(source, action)]
    assert isinstance(rule, Step)
    expected = settle(rule, committed=STEPS[action][step], alive=True)
    if expected is State.DESTROYED:
        assert not is_there(world, plan)
        assert world.files(plan) == {"lock", "volumes/data.img", "volumes/data.key"}
        assert (world.processes(), world.mounts(), world.links()) == ({}, [], set())
    else:
        record = world.host().inspect_instance(plan.instance)
        assert (record.state, record.pending) == (expected, None)
        if expected is State.RUNNING:
            world.assert_runs(plan)
            with world.host().channel(plan.instance, Purpose.EXEC) as channel:
                channel.status()
        else:
            world.assert_nothing_runs(plan, sleeping=expected is State.SLEEPING)
    # And it is as good as one that was never interrupted.
    if expected is State.SLEEPING:
        world.host().wake_instance(plan)
    if expected in (State.RUNNING, State.SLEEPING) and action is not Action.RUN:
        assert world.marked(plan, "survivor ")
        assert world.count(plan) >= before
        world.host().sleep_instance(plan.instance)
        world.host().wake_instance(plan)
        assert world.marked(plan, "survivor ")
        assert world.count(plan) > before
    elif expected not in (State.RUNNING, State.SLEEPING):
        assert world.host().create_instance(plan).state is State.RUNNING
    world.host().destroy_instance(plan.instance, wipe_volumes=True)
    assert not world.paths(plan).base.exists()
    assert (world.processes(), world.mounts(), world.links()) == ({}, [], set())


def is_there(world: FakeWorld, plan: InstancePlan) -> bool:
    from mvm.core.errors import NotFound

    try:
        world.host().inspect_instance(plan.instance)
    except NotFound:
        return False
    return True


@pytest.mark.req("L3")
def test_the_list_of_steps_is_complete(world: FakeWorld) -> None:
    plan, seen = world.plan(), list[str]()
    host = world.host(fault=seen.append)
    host.create_instance(plan)
    for action in (Action.SLEEP, Action.WAKE, Action.STOP, Action.RUN, Action.DESTROY):
        seen.clear()
        ACT[action](host, plan)
        assert seen == list(STEPS[action]), action


@pytest.mark.req("L3")
@pytest.mark.parametrize("step", ["intent", "started", "committed", "before end"])
def test_the_first_start_killed_at_a_step(world: FakeWorld, step: str) -> None:
    plan = world.plan()
    assert world.killed_at(step, lambda host: host.create_instance(plan))
    record = world.host().inspect_instance(plan.instance)
    assert record.state is (State.CREATED if step in ("intent", "started") else State.RUNNING)
    if record.state is State.CREATED:
        world.assert_nothing_runs(plan)
        world.host().create_instance(plan)
    world.assert_runs(plan)


@pytest.mark.req("L3", "L7")
@pytest.mark.parametrize("point", ["key gone", "image gone", "record only", "all but the folder"])
def test_a_wipe_cut_short_is_finished(world: FakeWorld, point: str) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    assert world.killed_at("before end", lambda h: h.destroy_instance(plan.instance, wipe_volumes=False))
    disk = world.paths(plan).data_disk
    disk.with_name(volume.WIPING_NAME).touch()
    volume.key_path(disk).unlink()
    if point != "key gone":
        disk.unlink()
    if point in ("record only", "all but the folder"):
        disk.with_name(volume.WIPING_NAME).unlink()
        disk.parent.rmdir()
    if point == "all but the folder":
        world.paths(plan).state.unlink()
    assert not is_there(world, plan)
    if point != "all but the folder":
        assert not world.paths(plan).base.exists()
    assert world.host().create_instance(plan).state is State.RUNNING
    world.assert_runs(plan)


@pytest.mark.req("L3", "L7")
def test_a_start_after_a_destroy_that_was_killed_is_a_first_start(world: FakeWorld) -> None:
    plan = world.plan()
    for step in ("intent", "before end"):
        world.host().create_instance(plan)
        assert world.killed_at(step, lambda h: h.destroy_instance(plan.instance, wipe_volumes=True))
        assert world.host().create_instance(plan).state is State.RUNNING
        world.assert_runs(plan)


@pytest.mark.req("L3")
def test_a_vm_that_ends_while_nobody_is_there_to_finish(world: FakeWorld) -> None:
    """The command dies after the guest was paused, and then the VMM dies as well."""
    plan = world.plan()
    world.host().create_instance(plan)
    assert world.killed_at("paused", lambda h: h.sleep_instance(plan.instance))
    world.destroy_all_processes()
    assert world.host().inspect_instance(plan.instance).state is State.FAILED
    world.assert_nothing_runs(plan)


@pytest.mark.req("L3", "S1")
def test_a_dead_vmm_after_the_rename_does_not_matter(world: FakeWorld) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    world.mark(plan, "survivor ")
    assert world.killed_at("renamed", lambda h: h.sleep_instance(plan.instance))
    world.destroy_all_processes()
    assert world.host().inspect_instance(plan.instance).state is State.SLEEPING
    world.assert_nothing_runs(plan, sleeping=True)
    world.host().wake_instance(plan)
    assert world.marked(plan, "survivor ")


@pytest.mark.req("L3", "S4")
def test_a_guest_that_may_have_run_on_is_never_restored_again(world: FakeWorld) -> None:
    """After the resume its disk can be newer than the snapshot: lost then means cold, not asleep."""
    plan = world.plan()
    world.host().create_instance(plan)
    world.host().sleep_instance(plan.instance)
    for step in ("committed", "resumed"):
        assert world.killed_at(step, lambda h: h.wake_instance(plan))
        world.destroy_all_processes()
        assert world.host().inspect_instance(plan.instance).state is State.FAILED
        world.assert_nothing_runs(plan)
        world.host().create_instance(plan)
        world.host().sleep_instance(plan.instance)


@pytest.mark.req("L3")
def test_a_recovery_that_is_killed_is_done_again(world: FakeWorld) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    world.mark(plan, "survivor ")
    assert world.killed_at("sealed", lambda h: h.sleep_instance(plan.instance))
    for seconds in (0.001, 0.004, 0.008, 0.012):
        world.killed_after(seconds, lambda h: h.inspect_instance(plan.instance))
    assert world.host().inspect_instance(plan.instance).state is State.RUNNING
    assert world.marked(plan, "survivor ")
    world.assert_runs(plan)
