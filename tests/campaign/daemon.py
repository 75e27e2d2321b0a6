"""Kills of a real mvm-hostd with the fake VMM, at random moments of random operations on two tenants at once.

Everything but the VMM is the real thing: the daemon as a process, keepers, taps, bridges, rules, encrypted disks,
sealed memory. After each kill the daemon starts again, and the host is compared with what it says.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable

from tests.support.hostd_daemon import DaemonWorld

from mvm.core.errors import Busy, Conflict, MissingPrerequisite, MvmError, NotFound
from mvm.core.ledger import Lacks
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan
from mvm.hostd.ledger import survey

FOLLOWING = {
    None: ["create", "attach"],
    State.CREATED: ["create"],
    State.RUNNING: ["sleep", "sleep", "stop", "destroy"],
    State.SLEEPING: ["wake", "wake", "wake", "stop"],
    State.STOPPED: ["create", "destroy"],
    State.FAILED: ["create", "stop"],
}


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
    assert bool(record.holds) == (record.state is State.RUNNING)
    if record.state is State.RUNNING:
        assert world.count(plan) >= 0
    else:
        names = {plan.network.bridge, plan.network.tap}
        assert world.links() & names == set()
    return record.state


def check_host(world: DaemonWorld, running: int) -> None:
    """A keeper and a VMM for each that runs, the daemon itself, and nobody and nothing else."""
    assert world.daemon.process is not None
    there = {pid: name for pid, name in world.processes().items() if pid != world.daemon.process.pid}
    assert sorted(there.values()).count("mvm-keeper") == running, there
    assert len(there) == 2 * running, there
    assert world.mounts() == []
    half = [p for p in world.store.tenants_dir.rglob("*") if p.name.startswith((".tmp-", ".new-", ".old-"))]
    assert half == []
    actions, blind = survey(world.store)
    assert [a for a in actions if not isinstance(a, Lacks)] == []
    assert actions == []
    assert blind == []


def kill_campaign(
    world: DaemonWorld, kills: int, seed: int, tell: Callable[[int], None] = lambda n: None
) -> Counter[str]:
    """Kill it so many times, on a world whose daemon is ready. Counts by name; AssertionError says which kill."""
    rng = random.Random(seed)
    plans = [world.plan(name) for name in ("acme", "beta")]
    unexpected: list[MvmError] = []
    states: dict[InstancePlan, State | None] = dict.fromkeys(plans)
    counts: Counter[str] = Counter()
    for kill in range(1, kills + 1):
        try:
            states = _one(world, plans, states, rng, unexpected, counts)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, kill {kill}: {error}") from error
        tell(kill)
    assert unexpected == [], [(e.brief, e.details, e.resolution) for e in unexpected]
    for plan in plans:
        world.client.destroy_instance(plan.instance, wipe_volumes=True)
        assert not world.paths(plan).base.exists()
    assert world.links() == set()
    return counts


def _one(
    world: DaemonWorld,
    plans: list[InstancePlan],
    states: dict[InstancePlan, State | None],
    rng: random.Random,
    unexpected: list[MvmError],
    counts: Counter[str],
) -> dict[InstancePlan, State | None]:
    # Undisturbed first, on one of them: where every life is cut short in its first start, nothing else is ever tried.
    calm = rng.choice(plans)
    verb = rng.choice(FOLLOWING[states[calm]])
    began = time.monotonic()
    act(world, calm, verb, unexpected)
    counts[f"done {verb}"] += 1
    longest = max(0.15, time.monotonic() - began)
    states = {**states, calm: settled(world, calm)}
    threads = []
    for plan in plans:
        verb = rng.choice(FOLLOWING[states[plan]])
        counts[f"begun {verb}"] += 1
        threads.append(threading.Thread(target=act, args=(world, plan, verb, unexpected)))
    for thread in threads:
        thread.start()
    time.sleep(rng.uniform(0.002, longest))
    under_way = len(world.daemon.lines("operation")) - len(world.daemon.lines("done"))
    counts["killed amid an operation" if under_way > 0 else "killed idle"] += 1
    world.daemon.kill()
    for thread in threads:
        thread.join(60)
    world.daemon.start()
    after = {plan: settled(world, plan) for plan in plans}
    for state in after.values():
        counts[f"then {state or 'gone'}"] += 1
    check_host(world, sum(state is State.RUNNING for state in after.values()))
    return after
