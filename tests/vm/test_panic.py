"""A guest whose kernel panics has failed, one that restarts has stopped: to its VMM both are a restart."""

from __future__ import annotations

import time

import pytest
from tests.support.qemu_world import QemuWorld, qemu_world

from mvm.builder.model import Artifacts
from mvm.core.errors import MvmError
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan
from mvm.core.record import InstanceRecord

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.req("L3", "L7")]


def after(world: QemuWorld, plan: InstancePlan, script: str) -> InstanceRecord:
    """The instance once its VMM has ended by itself, which `script` in the guest makes it do."""
    try:
        with world.session(plan) as channel:
            channel.exec(["/bin/sh", "-c", script], timeout=60)
    except MvmError:
        pass  # the guest ended before it could answer
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        record = world.host().inspect_instance(plan.instance)
        if record.state is not State.RUNNING:
            return record
        time.sleep(0.2)
    raise AssertionError("the guest runs on")


def test_a_panic_is_a_failure_and_a_restart_is_none(artifacts: Artifacts) -> None:
    with qemu_world(artifacts) as world:
        plan = world.plan()
        host = world.host()
        host.create_instance(plan)
        failed = after(world, plan, "echo c > /proc/sysrq-trigger")
        assert failed.state is State.FAILED
        assert failed.last_error == "its kernel panicked: sysrq triggered crash"
        world.assert_nothing_runs(plan)
        host.create_instance(plan)
        stopped = after(world, plan, "reboot")
        assert stopped.state is State.STOPPED
        assert not stopped.last_error
        world.assert_nothing_runs(plan)
