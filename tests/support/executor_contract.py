"""What every `Executor` must do, whoever implements it. Subclasses give `executor` and `world` as fixtures."""

from __future__ import annotations

import pytest
from tests.support.hostd_daemon import DaemonWorld

from mvm.core.errors import Conflict, IntegrityError, InvalidInput, NotFound
from mvm.core.ids import InstanceId
from mvm.core.lifecycle import State
from mvm.core.snapshot import SleepReceipt, WakeReceipt
from mvm.wire.executor import Executor


class ExecutorContract:
    @pytest.mark.req("L3", "L7", "S1", "S2", "H2")
    def test_a_whole_life(self, executor: Executor, world: DaemonWorld) -> None:
        plan, phases = world.plan(), list[str]()
        assert executor.create_instance(plan, phases.append).state is State.RUNNING
        assert "boot guest" in phases
        world.mark(plan, "mine ")
        slept = executor.sleep_instance(plan.instance)
        assert slept.state is State.SLEEPING
        assert isinstance(slept.last_receipt, SleepReceipt)
        woken = executor.wake_instance(plan, phases.append)
        assert isinstance(woken.last_receipt, WakeReceipt)
        assert "guest answers" in phases
        assert world.marked(plan, "mine ")
        assert executor.inspect_instance(plan.instance) == woken
        assert executor.stop_instance(plan.instance).state is State.STOPPED
        executor.destroy_instance(plan.instance, wipe_volumes=True)
        assert not world.paths(plan).base.exists()

    @pytest.mark.req("L5")
    def test_again_changes_nothing(self, executor: Executor, world: DaemonWorld) -> None:
        plan = world.plan()
        once = executor.create_instance(plan)
        assert executor.create_instance(plan) == once
        stopped = executor.stop_instance(plan.instance)
        assert executor.stop_instance(plan.instance) == stopped
        executor.destroy_instance(plan.instance, wipe_volumes=True)
        executor.destroy_instance(plan.instance, wipe_volumes=True)

    def test_the_volume_stays_unless_it_is_to_be_wiped(self, executor: Executor, world: DaemonWorld) -> None:
        plan = world.plan()
        executor.create_instance(plan)
        executor.destroy_instance(plan.instance, wipe_volumes=False)
        assert world.paths(plan).data_disk.exists()
        executor.destroy_instance(plan.instance, wipe_volumes=True)
        assert not world.paths(plan).data_disk.exists()

    def test_what_is_not_there(self, executor: Executor, world: DaemonWorld) -> None:
        nobody = InstanceId.parse("nobody/default-0")
        for verb in (executor.inspect_instance, executor.stop_instance, executor.sleep_instance):
            with pytest.raises(NotFound) as caught:
                verb(nobody)
            assert caught.value.resolution

    def test_what_the_state_forbids(self, executor: Executor, world: DaemonWorld) -> None:
        plan = world.plan()
        executor.create_instance(plan)
        executor.stop_instance(plan.instance)
        with pytest.raises(Conflict) as caught:
            executor.wake_instance(plan)
        assert "mvm " in caught.value.resolution

    @pytest.mark.req("S4")
    def test_damage_is_refused_as_damage(self, executor: Executor, world: DaemonWorld) -> None:
        plan = world.plan()
        executor.create_instance(plan)
        executor.sleep_instance(plan.instance)
        state = world.paths(plan).latest / "state"
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
        with pytest.raises(IntegrityError):
            executor.wake_instance(plan)
        assert executor.inspect_instance(plan.instance).state is State.SLEEPING

    @pytest.mark.req("H2")
    def test_a_plan_that_disagrees_with_itself_is_refused(
        self, executor: Executor, world: DaemonWorld
    ) -> None:
        import msgspec

        plan = world.plan()
        for change in ({"uid": plan.uid + 1}, {"boot_args": plan.boot_args + " init=/bin/sh"}):
            with pytest.raises(InvalidInput):
                executor.create_instance(msgspec.structs.replace(plan, **change))
        assert not world.paths(plan).state.exists()
