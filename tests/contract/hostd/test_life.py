"""The whole life of an instance through `Host`, what every step leaves behind, and what is refused."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.fake_driver import FakeDriver
from tests.support.fake_world import FakeWorld

from mvm.core.errors import Busy, Conflict, IntegrityError, NotFound, ResourceExhausted, VmmError
from mvm.core.ids import RevisionId
from mvm.core.lifecycle import TRANSITIONS, Action, Forbidden, NoOp, State
from mvm.core.plan import InstancePlan
from mvm.core.record import InstanceRecord
from mvm.hostd import assembly
from mvm.hostd.host import Host
from mvm.hostd.pager import WINDOW_S
from mvm.hostd.resources import volume
from mvm.linux.files import locked
from mvm.linux.pidfd import is_alive
from mvm.wire.hostd_api import Purpose

pytestmark = pytest.mark.root

ACT: dict[Action, Callable[[Host, InstancePlan], object]] = {
    Action.RUN: lambda host, plan: host.create_instance(plan),
    Action.SLEEP: lambda host, plan: host.sleep_instance(plan.instance),
    Action.WAKE: lambda host, plan: host.wake_instance(plan),
    Action.STOP: lambda host, plan: host.stop_instance(plan.instance),
    Action.DESTROY: lambda host, plan: host.destroy_instance(plan.instance, wipe_volumes=True),
}


def bring_to(world: FakeWorld, plan: InstancePlan, state: State) -> None:
    host = world.host()
    if state is State.CREATED:
        # As a start that was killed before anything happened leaves it.
        assert world.killed_at("intent", lambda h: h.create_instance(plan))
        assert host.inspect_instance(plan.instance).state is State.CREATED
        return
    host.create_instance(plan)
    if state is State.SLEEPING:
        host.sleep_instance(plan.instance)
    elif state is State.STOPPED:
        host.stop_instance(plan.instance)
    elif state is State.FAILED:
        world.end_vmm(plan, 3)
        assert host.inspect_instance(plan.instance).state is State.FAILED


@pytest.mark.req("L3", "L7", "S1", "S2")
def test_a_whole_life_leaves_nothing(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    record = host.create_instance(plan)
    assert record.state is State.RUNNING
    world.assert_runs(plan)
    world.mark(plan, "remember me ")
    for turn in range(3):
        before = world.count(plan)
        serial = world.ask(plan, "status")["serial"]
        assert record.process is not None
        slept = host.sleep_instance(plan.instance)
        assert slept.state is State.SLEEPING
        assert slept.process is None
        assert not is_alive(record.process)
        world.assert_nothing_runs(plan, sleeping=True)
        record = host.wake_instance(plan)
        assert record.state is State.RUNNING
        world.assert_runs(plan)
        # Where it left off: memory, what was counted since, and the devices' state.
        assert world.count(plan) >= before
        assert world.marked(plan, "remember me "), f"after wake {turn}"
        assert world.ask(plan, "status")["serial"] == serial
        assert bytes.fromhex(world.ask(plan, "read", page=17)["data"]).startswith(b"booted from cold")
    assert host.stop_instance(plan.instance).state is State.STOPPED
    world.assert_nothing_runs(plan)
    host.destroy_instance(plan.instance, wipe_volumes=True)
    assert not world.paths(plan).base.exists()
    assert world.links() == set()
    assert world.processes() == {}


@pytest.mark.req("S7")
def test_a_wake_leaves_the_list_of_what_it_touched_for_the_next(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    host.sleep_instance(plan.instance)
    written = world.paths(plan).latest / "working-set"
    assert not written.exists()
    host.wake_instance(plan)
    until = time.monotonic() + 2 * WINDOW_S
    while not written.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert written.exists()


@pytest.mark.req("S1", "S5", "S7")
def test_receipts_say_what_was_measured(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    world.ask(plan, "write", pages=list(range(5000, 7000)), fill="0123456789")
    host.sleep_instance(plan.instance)
    first = world.sleep_receipt(plan)
    host.wake_instance(plan)
    woken = world.wake_receipt(plan)
    assert [phase.name for phase in woken.phases] == [
        "open snapshot", "start VMM", "verify snapshot", "load devices", "resume", "guest answers",
    ]  # fmt: skip
    assert 0 < sum(phase.ns for phase in woken.phases) <= woken.total_ns
    assert woken.chunks_total == 128 * 8
    host.sleep_instance(plan.instance)
    second = world.sleep_receipt(plan)
    assert first.dirty_bytes is not None
    assert second.dirty_bytes is not None
    assert first.dirty_bytes >= 2000 * 4096
    assert second.dirty_bytes < 100 * 4096, "only what the second life wrote"
    assert second.written_bytes < first.written_bytes


@pytest.mark.req("L3", "L5")
@pytest.mark.parametrize("state", [s for s in State if s is not State.DESTROYED])
def test_every_action_in_every_state_does_what_the_table_says(world: FakeWorld, state: State) -> None:
    plan, host = world.plan(), world.host()
    for action, act in ACT.items():
        bring_to(world, plan, state)
        rule = TRANSITIONS[(state, action)]
        before = world.paths(plan).state.read_bytes()
        if isinstance(rule, Forbidden):
            with pytest.raises(Conflict) as caught:
                act(host, plan)
            assert "mvm " in caught.value.resolution
            assert world.paths(plan).state.read_bytes() == before
        elif isinstance(rule, NoOp):
            act(host, plan)
            assert world.paths(plan).state.read_bytes() == before
        elif rule.success is State.DESTROYED:
            act(host, plan)
            with pytest.raises(NotFound):
                host.inspect_instance(plan.instance)
        else:
            answer = act(host, plan)
            assert isinstance(answer, InstanceRecord)
            assert answer.state is rule.success
            assert answer.pending is None
        host.destroy_instance(plan.instance, wipe_volumes=True)
        assert world.links() == set()
        assert world.processes() == {}


@pytest.mark.req("L5")
def test_what_is_already_so_needs_no_memory_and_no_revision(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    monkeypatch.setattr(assembly, "memory_available", lambda: 0)
    assert host.create_instance(plan).state is State.RUNNING
    assert host.wake_instance(plan).state is State.RUNNING
    host.sleep_instance(plan.instance)
    with pytest.raises(ResourceExhausted, match="not enough memory"):
        host.wake_instance(plan)
    assert host.inspect_instance(plan.instance).state is State.SLEEPING


@pytest.mark.req("L3")
def test_an_unknown_revision_is_refused_before_anything_is_there(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    world.revision = RevisionId("ab" * 32)
    with pytest.raises(NotFound, match="not on this node") as caught:
        host.create_instance(world.plan())
    assert "mvm tenant build acme" in caught.value.resolution
    assert host.inspect_instance(plan.instance).state is State.CREATED
    world.assert_nothing_runs(plan)


@pytest.mark.req("N1")
def test_a_plan_with_another_address_is_refused(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    world._indices["acme"] = 7
    with pytest.raises(Conflict, match="another address") as caught:
        host.create_instance(world.plan())
    assert "destroy acme/default-0" in caught.value.resolution
    world.assert_runs(plan)


@pytest.mark.req("L5")
def test_verbs_on_what_is_not_there(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    for act in (host.inspect_instance, host.sleep_instance, host.stop_instance):
        with pytest.raises(NotFound):
            act(plan.instance)
    with pytest.raises(NotFound):
        host.wake_instance(plan)
    host.destroy_instance(plan.instance, wipe_volumes=False)
    assert not world.paths(plan).base.exists()


@pytest.mark.req("K1", "L7")
def test_a_destroy_keeps_the_data_disk_unless_told(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    disk, key = world.paths(plan).data_disk, volume.key_path(world.paths(plan).data_disk)
    image, sealed = disk.read_bytes(), key.read_bytes()
    host.destroy_instance(plan.instance, wipe_volumes=False)
    assert world.files(plan) == {"lock", "volumes/data.img", "volumes/data.key"}
    assert (disk.read_bytes(), key.read_bytes()) == (image, sealed)
    host.create_instance(plan)
    assert key.read_bytes() == sealed
    host.destroy_instance(plan.instance, wipe_volumes=False)
    # The instance is gone already; what is left of it can still be wiped.
    host.destroy_instance(plan.instance, wipe_volumes=True)
    assert not world.paths(plan).base.exists()


@pytest.mark.req("L7")
def test_a_vmm_that_ignores_sigterm_and_a_guest_that_hangs_are_stopped(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mvm.hostd.operations import stop

    monkeypatch.setattr(stop, "GUEST_S", 0.2)
    monkeypatch.setattr(stop, "TERM_S", 0.2)
    monkeypatch.setattr(stop, "AGREE_S", 0.2)
    plan, host = world.plan(), world.host(driver=FakeDriver(ignore_sigterm=True))
    host.create_instance(plan)
    world.ask(plan, "silence", on=True)
    assert host.stop_instance(plan.instance).state is State.STOPPED
    world.assert_nothing_runs(plan)


@pytest.mark.req("L7")
def test_a_guest_that_agrees_ends_its_vmm_itself(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    seen: list[str] = []
    host.stop_instance(plan.instance, seen.append)
    assert seen == ["shut guest down", "end VMM", "release"]


@pytest.mark.req("L3")
@pytest.mark.parametrize(("code", "state"), [(0, State.STOPPED), (3, State.FAILED)])
def test_a_vmm_that_ended_by_itself_is_noticed(world: FakeWorld, code: int, state: State) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    host.sleep_instance(plan.instance)
    host.wake_instance(plan)
    world.end_vmm(plan, code)
    record = host.inspect_instance(plan.instance)
    assert record.state is state
    assert bool(record.last_error) is (state is State.FAILED)
    world.assert_nothing_runs(plan)
    assert host.create_instance(plan).state is State.RUNNING


@pytest.mark.req("L7")
def test_a_panic_is_a_failure_with_its_reason(world: FakeWorld) -> None:
    """To the VMM it is a restart in good order; the kernel's last words tell."""
    plan, host = world.plan(), world.host()
    for words, state, says in (
        (b"[   1.0] Kernel panic - not syncing: out of \x1b[2J luck\r\n", State.FAILED, "out of ?[2J luck"),
        (b"[   9.0] reboot: Restarting system\r\n", State.STOPPED, ""),  # the panic before was another life's
    ):
        host.create_instance(plan)
        with world.paths(plan).console_log.open("ab") as log:
            log.write(words)
        world.end_vmm(plan, 0)
        record = host.inspect_instance(plan.instance)
        assert record.state is state
        assert (record.last_error or "") == (says and f"its kernel panicked: {says}")


@pytest.mark.req("S1")
def test_a_guest_that_does_not_answer_is_not_put_to_sleep(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mvm.core.errors import GuestError
    from mvm.hostd.operations import context, sleep

    monkeypatch.setattr(sleep, "QUIESCE_S", 0.3)
    monkeypatch.setattr(context, "ANSWER_S", 0.3)
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    world.ask(plan, "silence", on=True)
    with pytest.raises(GuestError):
        host.sleep_instance(plan.instance)
    # It was running before, and a guest too busy to answer is not one to end.
    record = host.inspect_instance(plan.instance)
    assert record.state is State.RUNNING
    assert "did not answer" in record.last_error
    world.assert_runs(plan)
    world.ask(plan, "silence", on=False)
    assert host.sleep_instance(plan.instance).state is State.SLEEPING


@pytest.mark.req("S2")
def test_a_guest_that_never_answers_after_its_wake(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvm.core.errors import GuestError
    from mvm.hostd.operations import context, wake

    monkeypatch.setattr(context, "ANSWER_S", 0.3)
    monkeypatch.setattr(wake, "AWAKE_S", 0.3)
    plan = world.plan()
    world.host().create_instance(plan)
    world.host().sleep_instance(plan.instance)

    def silence(step: str) -> None:
        if step == "committed":
            # The record says that it is committed, and only then does the guest go on.
            assert world.ask(plan, "status")["status"] == "paused"
            world.ask(plan, "silence", on=True)

    with pytest.raises(GuestError):
        world.host(fault=silence).wake_instance(plan)
    # It may have run on and written to its disk: this memory is not restored again, and `running` it never was.
    assert world.host().inspect_instance(plan.instance).state is State.FAILED
    world.assert_nothing_runs(plan)


@pytest.mark.req("L3")
def test_a_guest_that_never_answers_at_its_start(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvm.core.errors import GuestError
    from mvm.hostd.operations import start

    class Silent(FakeDriver):
        def start(self, machine):  # type: ignore[no-untyped-def]
            vm = super().start(machine)
            vm.ask("silence", on=True)
            return vm

    monkeypatch.setattr(start, "BOOT_S", 0.3)
    plan = world.plan()
    with pytest.raises(GuestError, match="does not answer") as caught:
        world.host(driver=Silent()).create_instance(plan)
    assert "console.log" in caught.value.resolution
    assert world.host().inspect_instance(plan.instance).state is State.FAILED
    world.assert_nothing_runs(plan)


@pytest.mark.req("L3")
@pytest.mark.parametrize("step", ["started", "quiesced", "paused", "pages written", "sealed"])
def test_a_vmm_that_dies_in_the_middle_is_an_error_and_no_hang(world: FakeWorld, step: str) -> None:
    plan = world.plan()

    def die(name: str) -> None:
        if name == step:
            for pid, command in world.processes().items():
                if command != "mvm-keeper":
                    os.kill(pid, 9)

    host = world.host(fault=die)
    if step == "started":
        with pytest.raises(VmmError):
            host.create_instance(plan)
        assert host.inspect_instance(plan.instance).state is State.FAILED
        world.assert_nothing_runs(plan)
        return
    world.host().create_instance(plan)
    if step in ("pages written", "sealed"):
        # Everything was sealed by then: the guest is not needed any more.
        assert host.sleep_instance(plan.instance).state is State.SLEEPING
        world.assert_nothing_runs(plan, sleeping=True)
        assert host.wake_instance(plan).state is State.RUNNING
        return
    with pytest.raises((VmmError, OSError)):
        host.sleep_instance(plan.instance)
    assert host.inspect_instance(plan.instance).state is State.FAILED
    world.assert_nothing_runs(plan)


@pytest.mark.req("L3", "S2")
@pytest.mark.parametrize("step", ["started", "loaded", "resumed"])
def test_a_vmm_that_dies_while_it_wakes(world: FakeWorld, step: str) -> None:
    plan = world.plan()

    def die(name: str) -> None:
        if name == step:
            for pid, command in world.processes().items():
                if command != "mvm-keeper":
                    os.kill(pid, 9)

    world.host().create_instance(plan)
    world.mark(plan, "kept ")
    world.host().sleep_instance(plan.instance)
    with pytest.raises(Exception, match=r"."):
        world.host(fault=die).wake_instance(plan)
    record = world.host().inspect_instance(plan.instance)
    if step == "started":
        assert record.state is State.SLEEPING
        world.assert_nothing_runs(plan, sleeping=True)
        world.host().wake_instance(plan)
        assert world.marked(plan, "kept ")
    else:
        # From the resume on its disk may be newer than its memory. (A dead VMM is noticed only by resuming it.)
        assert record.state is State.FAILED
        world.assert_nothing_runs(plan)


@pytest.mark.req("S1")
@pytest.mark.parametrize("step", ["intent", "quiesced", "paused", "pages written", "sealed"])
def test_a_sleep_that_fails_before_its_rename_leaves_the_guest_running(world: FakeWorld, step: str) -> None:
    plan = world.plan()

    def fail(name: str) -> None:
        if name == step:
            raise KeyboardInterrupt if step == "paused" else OSError(28, "on purpose")

    world.host().create_instance(plan)
    world.mark(plan, "still here ")
    with pytest.raises((OSError, KeyboardInterrupt)):
        world.host(fault=fail).sleep_instance(plan.instance)
    before = world.count(plan)
    assert world.host().inspect_instance(plan.instance).state is State.RUNNING
    world.assert_runs(plan)
    assert world.marked(plan, "still here ")
    until = time.monotonic() + 10
    while world.count(plan) == before:
        assert time.monotonic() < until, "its worker goes on"
    world.host().sleep_instance(plan.instance)
    world.host().wake_instance(plan)
    assert world.marked(plan, "still here ")


@pytest.mark.req("S1")
@pytest.mark.parametrize("lives", [1, 2])
def test_an_interrupt_after_the_rename_leaves_it_sleeping(world: FakeWorld, lives: int) -> None:
    plan = world.plan()

    def interrupt(name: str) -> None:
        if name == "renamed":
            raise KeyboardInterrupt

    world.host().create_instance(plan)
    for _ in range(lives - 1):
        world.host().sleep_instance(plan.instance)
        world.host().wake_instance(plan)
    world.mark(plan, "kept ")
    with pytest.raises(KeyboardInterrupt):
        world.host(fault=interrupt).sleep_instance(plan.instance)
    assert world.record(plan).state is State.SLEEPING
    world.assert_nothing_runs(plan, sleeping=True)
    world.host().wake_instance(plan)
    assert world.marked(plan, "kept ")


@pytest.mark.req("L5")
def test_two_commands_at_once_follow_each_other(world: FakeWorld) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    reached, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "quiesced":
            reached.set()
            assert go_on.wait(20)

    first = threading.Thread(target=lambda: world.host(fault=hold).sleep_instance(plan.instance))
    first.start()
    try:
        assert reached.wait(20)
        with pytest.raises(Busy) as caught:
            world.host(lock_wait_s=0.05).inspect_instance(plan.instance)
        assert str(os.getpid()) in caught.value.details
        answers: list[InstanceRecord] = []
        second = threading.Thread(target=lambda: answers.append(world.host().sleep_instance(plan.instance)))
        second.start()
    finally:
        go_on.set()
        first.join()
    second.join()
    assert [record.state for record in answers] == [State.SLEEPING]


@pytest.mark.req("L5")
def test_only_a_running_guest_can_be_talked_to(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    with host.channel(plan.instance, Purpose.EXEC) as channel:
        assert channel.status().sessions == 0
    host.sleep_instance(plan.instance)
    with pytest.raises(Conflict, match="sleeping") as caught, host.channel(plan.instance, Purpose.EXEC):
        pass
    assert "mvm instance wake acme/default-0" in caught.value.resolution


@pytest.mark.req("K1", "S4")
def test_a_sleeping_instance_without_its_disk_is_not_given_an_empty_one(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    host.sleep_instance(plan.instance)
    disk = world.paths(plan).data_disk
    aside: Path = disk.with_name("aside")
    disk.rename(aside)
    with pytest.raises(IntegrityError, match="no data disk"):
        host.wake_instance(plan)
    assert not disk.exists()
    assert host.inspect_instance(plan.instance).state is State.SLEEPING
    aside.rename(disk)
    assert host.wake_instance(plan).state is State.RUNNING


@pytest.mark.req("L3")
def test_the_lock_file_of_a_removed_instance_does_not_stay_a_lock(world: FakeWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    host.destroy_instance(plan.instance, wipe_volumes=True)
    host.create_instance(plan)
    with locked(world.paths(plan).lock, wait=0.1):
        with pytest.raises(Busy):
            world.host(lock_wait_s=0.05).inspect_instance(plan.instance)
