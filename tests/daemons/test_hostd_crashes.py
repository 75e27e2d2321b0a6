"""The daemon killed at random moments of operations, and started again: one side or the other, and nothing left over.

MVM_HOSTD_KILLS sets how often; the number is small by default.
"""

from __future__ import annotations

import os
import random
import threading
import time

import pytest
from tests.support.hostd_daemon import DaemonWorld

from mvm.core.errors import Busy, Conflict, MissingPrerequisite, MvmError, NotFound
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("MVM_HOSTD_KILLS", "10"))


def act(world: DaemonWorld, plan: InstancePlan, verb: str, unexpected: list[MvmError]) -> None:
    client = world.client
    try:
        if verb in ("create", "wake", "attach"):
            names = {"create": "create_instance", "wake": "wake_instance", "attach": "attach_drives"}
            getattr(client, names[verb])(plan)
        elif verb == "destroy":
            client.destroy_instance(plan.instance, wipe_volumes=False)
        else:
            getattr(client, f"{verb}_instance")(plan.instance)
    except (Busy, Conflict, NotFound, MissingPrerequisite):
        return  # the daemon went away, or the state of the moment forbids it
    except MvmError as error:
        unexpected.append(error)


def settled(world: DaemonWorld, plan: InstancePlan) -> State | None:
    """What the restarted daemon says of it, after checking that the host agrees."""
    try:
        record = world.client.inspect_instance(plan.instance)
    except NotFound:
        assert not world.paths(plan).state.exists()
        return None
    assert record.pending is None
    assert record.state is not State.DESTROYED
    if record.state is State.RUNNING:
        assert world.count(plan) >= 0
    else:
        names = {plan.network.bridge, plan.network.tap}
        assert world.links() & names == set()
    return record.state


@pytest.mark.req("H2", "L3", "S3")
def test_killed_in_the_middle_of_operations(world: DaemonWorld) -> None:
    rng = random.Random(int(os.environ.get("MVM_HOSTD_SEED", "7")))
    plans = [world.plan(name) for name in ("acme", "beta")]
    unexpected: list[MvmError] = []
    states: dict[InstancePlan, State | None] = dict.fromkeys(plans)
    interrupted = 0
    following = {
        None: ["create", "attach"],
        State.CREATED: ["create"],
        State.RUNNING: ["sleep", "sleep", "stop", "destroy"],
        State.SLEEPING: ["wake", "wake", "wake", "stop"],
        State.STOPPED: ["create", "destroy"],
        State.FAILED: ["create", "stop"],
    }
    for _ in range(KILLS):
        threads = []
        for plan in plans:
            verb = rng.choice(following[states[plan]])
            threads.append(threading.Thread(target=act, args=(world, plan, verb, unexpected)))
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.002, 0.15))
        began, done = len(world.daemon.lines("operation")), len(world.daemon.lines("done"))
        interrupted += began > done
        world.daemon.kill()
        for thread in threads:
            thread.join(60)
        world.daemon.start()
        states = {plan: settled(world, plan) for plan in plans}
        running = [plan for plan in plans if states[plan] is State.RUNNING]
        # A keeper and a VMM for each that runs, the daemon itself, and nobody else.
        assert world.daemon.process is not None
        there = {pid: name for pid, name in world.processes().items() if pid != world.daemon.process.pid}
        assert sorted(there.values()).count("mvm-keeper") == len(running), there
        assert len(there) == 2 * len(running), there
        assert world.mounts() == []
        leftovers = [
            p for p in world.store.tenants_dir.rglob("*") if p.name.startswith((".tmp-", ".new-", ".old-"))
        ]
        assert leftovers == []
    assert unexpected == []
    assert interrupted > KILLS // 4
    for plan in plans:
        world.client.destroy_instance(plan.instance, wipe_volumes=True)
        assert not world.paths(plan).base.exists()
    assert world.links() == set()


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
