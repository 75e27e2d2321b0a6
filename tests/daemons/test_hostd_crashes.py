"""The daemon killed at random moments of operations, and started again: one side or the other, and nothing left over.

MVM_HOSTD_KILLS sets how often; the number is small by default.
"""

from __future__ import annotations

import os
import threading
import time

import pytest
from tests.campaign.daemon import kill_campaign
from tests.support.hostd_daemon import DaemonWorld

from mvm.core.errors import Busy, MvmError
from mvm.core.lifecycle import State

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("MVM_HOSTD_KILLS", "10"))
SEED = int(os.environ.get("MVM_HOSTD_SEED", "7"))


@pytest.mark.req("H2", "L3", "S3")
def test_killed_in_the_middle_of_operations(world: DaemonWorld) -> None:
    counts = kill_campaign(world, KILLS, SEED)
    assert counts["killed amid an operation"] > KILLS // 4, counts


@pytest.mark.req("H2")
def test_a_killed_operation_is_said_to_be_and_recovered(world: DaemonWorld) -> None:
    """The crash of one operation is nobody else's."""
    import signal

    from mvm.linux.files import locked

    plan, other = world.plan(), world.plan("beta")
    world.client.create_instance(other)
    world.client.create_instance(plan)
    errors: list[MvmError] = []

    def sleep() -> None:
        try:
            world.client.sleep_instance(plan.instance)
        except MvmError as error:
            errors.append(error)

    with locked(world.paths(plan).lock, wait=5):
        thread = threading.Thread(target=sleep)
        thread.start()
        while not (begun := [x for x in world.daemon.lines("operation") if x["verb"] == "sleep_instance"]):
            time.sleep(0.01)
        os.kill(begun[0]["child"], signal.SIGKILL)
        thread.join(20)
    assert [type(error) for error in errors] == [Busy]
    assert "recovered" in errors[0].resolution
    assert world.client.inspect_instance(plan.instance).state is State.RUNNING
    assert world.client.inspect_instance(other.instance).state is State.RUNNING
    assert [line["how"] for line in world.daemon.lines("operation died")] == ["signal 9"]
