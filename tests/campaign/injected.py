"""Random lives of several instances on the simulated node, with a crash injected before any effect.

One turn: a guest may write; one operation begins, hostd is killed before a random effect of it (or the whole node loses
its power at that moment); hostd starts again, and may be killed in its recovery any number of times; then everything is
looked at (`Lives.check`). The numbers of a seed are the same on every machine.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable

from tests.campaign.kernel import read_disk
from tests.campaign.simulated import Node, simulated_node

from mvm.core.errors import NotFound
from mvm.core.ledger import Lacks
from mvm.core.lifecycle import TRANSITIONS, Action, Forbidden, State, Step
from mvm.core.plan import InstancePlan
from mvm.core.record import InstanceRecord, reachable
from mvm.hostd.admission import all_instances
from mvm.hostd.host import Host
from mvm.hostd.ledger import recover_node, survey

TENANTS = ("acme", "beta", "a-b")
RECOVERY_KILLS = 3
_LOST_WITH_POWER = {State.RUNNING: frozenset({State.FAILED, State.STOPPED})}


class Truth:
    """What must be true of one instance. `synced`: the last text its guest synced; `written`: the last it wrote;
    `memory`: what it has in memory, None if that may be lost."""

    def __init__(self, plan: InstancePlan) -> None:
        self.plan = plan
        self.state: State | None = None
        self.synced = 0
        self.written = 0
        self.memory: str | None = None


class Lives:
    def __init__(self, node: Node, rng: random.Random) -> None:
        self.node = node
        self.rng = rng
        self.truths = [Truth(node.plan(name)) for name in TENANTS]
        node.disk.sync()
        self.counts: Counter[str] = Counter()
        self._texts = 0

    @property
    def crashes(self) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith(("killed", "power lost")))

    def turn(self) -> None:
        truth = self.rng.choice(self.truths)
        if truth.state is State.RUNNING and self.rng.random() < 0.6:
            self.guest_writes(truth, sync=self.rng.random() < 0.5)
        self.act(truth, self._choose(truth), self.rng.random())

    def act(self, truth: Truth, action: Action, where: float, *, power: bool | None = None) -> None:
        """Do it, crash at `where` of its effects (0 to 1; past nine tenths perhaps not at all), recover, check."""
        wipe = action is Action.DESTROY and self.rng.random() < 0.5
        # The same action has more to do in one state than in another; how much is learnt from those that finish.
        known = self.node.effects.get(f"{action} from {truth.state}", 0)
        kill_at = 1 + int(where * known * 1.1) if known else None
        lost = self.rng.random() < 0.15 if power is None else power
        self.crash(truth, action, kill_at, power=lost, wipe=wipe)

    def crash(
        self, truth: Truth, action: Action, kill_at: int | None, *, power: bool = False, wipe: bool = False
    ) -> bool:
        """Do it, and kill hostd (or with `power` the node) before effect `kill_at`. Whether it came to that."""
        verb = _verb(truth.plan, action, wipe)
        killed = self.node.hostd(verb, kill_at, f"{action} from {truth.state}")
        power_lost = killed and power
        if power_lost:
            self.node.lose_power(self.rng)
        if killed:
            self.counts[f"power lost in {action}" if power_lost else f"killed in {action}"] += 1
        else:
            self.counts[f"done {action}"] += 1
        power_lost |= self._recover()
        self.check(truth, action, killed=killed, power_lost=power_lost, wipe=wipe)
        return killed

    def lose_power(self) -> None:
        """The node loses its power while nobody does anything."""
        self.node.lose_power(self.rng)
        self._recover()
        self.check(None, None, killed=False, power_lost=True)

    def _recover(self) -> bool:
        """hostd starts, and is killed at it a few times; at the last it is not. Whether the power went as well."""
        lost = False
        for _ in range(self.rng.choice([0, 0, 1, RECOVERY_KILLS])):
            known = self.node.effects.get("recovery", 20)
            if not self.node.hostd(_start_up, self.rng.randint(1, known + 1), "recovery"):
                break
            if self.rng.random() < 0.15:
                self.node.lose_power(self.rng)
                lost = True
                self.counts["power lost in recovery"] += 1
            else:
                self.counts["killed in recovery"] += 1
        self.node.hostd(_start_up, None, "recovery")
        return lost

    def _choose(self, truth: Truth) -> Action:
        state = truth.state or State.CREATED
        steps = [
            a
            for a in Action
            if isinstance(TRANSITIONS[state, a], Step) and a not in (Action.EXIT, Action.LOSE)
        ]
        weights = [3 if a in (Action.SLEEP, Action.WAKE, Action.RUN) else 1 for a in steps]
        return self.rng.choices(steps, weights)[0]

    def guest_writes(self, truth: Truth, *, sync: bool) -> None:
        self._texts += 1
        truth.written, truth.memory = self._texts, f"in memory {self._texts}"
        runtime = self.node.paths(truth.plan).runtime
        path = self.node.kernel.guest_writes(runtime, self._texts, memory=truth.memory)
        if sync:
            fd = os.open(path, os.O_RDWR)
            self.node.disk.fsync(fd)
            os.close(fd)
            truth.synced = self._texts

    # What must be true after every recovery.

    def check(
        self,
        acted: Truth | None,
        action: Action | None,
        *,
        killed: bool,
        power_lost: bool,
        wipe: bool = False,
    ) -> None:
        for truth in self.truths:
            record = self._record(truth.plan)
            found = None if record is None else record.state
            mine = truth is acted
            self._check_state(truth, found, action if mine else None, killed, power_lost)
            if mine and action is not None:
                fresh = action is Action.RUN or found not in (State.RUNNING, State.SLEEPING)
                if fresh and (found is not truth.state or not killed):
                    truth.memory = None
            if power_lost and found is not State.SLEEPING:
                truth.memory = None
            truth.state = found
            self._check_disk(truth, may_be_gone=mine and wipe)
            if found is State.RUNNING and truth.memory is not None:
                vm = self.node.kernel.vm(self.node.paths(truth.plan).runtime)
                assert vm is not None
                assert vm["memory"]["text"] == truth.memory, (truth.plan.instance, vm, truth.memory)
        self._check_host()

    def _record(self, plan: InstancePlan) -> InstanceRecord | None:
        if not self.node.paths(plan).state.exists():
            return None
        record = self.node.record(plan)
        assert record.pending is None, record
        assert bool(record.holds) == (record.state is State.RUNNING), record
        return record

    def _check_state(
        self, truth: Truth, found: State | None, action: Action | None, killed: bool, power_lost: bool
    ) -> None:
        allowed: set[State | None] = {truth.state}
        if action is not None:
            rule = TRANSITIONS[truth.state or State.CREATED, action]
            assert not isinstance(rule, Forbidden)
            assert isinstance(rule, Step)
            done: set[State | None] = {rule.success}
            allowed = allowed | reachable(rule) | {State.CREATED} if killed else done
            if truth.state is not None and State.CREATED is not truth.state:
                allowed.discard(State.CREATED)
            if action is Action.DESTROY:
                allowed.add(None)
        if power_lost:
            for state, lost in _LOST_WITH_POWER.items():
                if state in allowed:
                    allowed |= lost
            if truth.state is State.CREATED:
                # Its command was killed before it had synced the first record, and nobody was told of one.
                allowed.add(None)
        assert found in allowed, (
            f"{truth.plan.instance}: {truth.state} -{action}-> {found}, not one of {allowed}"
        )
        assert found is not State.DESTROYED
        assert not (power_lost and found is State.RUNNING)

    def _check_disk(self, truth: Truth, *, may_be_gone: bool) -> None:
        path = self.node.paths(truth.plan).data_disk
        if path.exists():
            text = read_disk(str(path))["text"]
            assert truth.synced <= text <= truth.written, (
                f"{truth.plan.instance}: synced {truth.synced}, found {text}"
            )
            truth.written = max(text, truth.synced)
            if truth.state is State.RUNNING:
                truth.written = max(truth.written, text)
        else:
            assert may_be_gone or not truth.synced, f"{truth.plan.instance} lost a disk that was synced"
            truth.synced = truth.written = 0

    def _check_host(self) -> None:
        node = self.node
        wanted: set[tuple[str, str]] = set()
        for truth in self.truths:
            if truth.state is State.RUNNING:
                net = truth.plan.network
                runtime = os.path.relpath(node.paths(truth.plan).runtime, node.store.root)
                wanted |= {("vm", runtime), ("tun", net.tap), ("bridge", net.bridge)}
        assert node.objects() == wanted, node.objects() ^ wanted
        kernel = node.kernel.state()
        assert kernel["broken"] == []
        with_record = {t.plan.network.tap for t in self.truths if t.state is not None}
        running = {t.plan.network.tap for t in self.truths if t.state is State.RUNNING}
        assert running <= set(kernel["rules"]) <= with_record, (kernel["rules"], running, with_record)
        self._check_files()

    def _check_files(self) -> None:
        root = self.node.store.root
        for path in root.rglob("*"):
            assert not path.name.startswith((".tmp-", ".new-", ".old-")), path
        for truth in self.truths:
            paths = self.node.paths(truth.plan)
            names = sorted(os.listdir(paths.snapshots)) if paths.snapshots.is_dir() else []
            if truth.state is State.SLEEPING:
                assert names == ["latest"], (truth.plan.instance, names)
            elif truth.state is not State.RUNNING:  # one that was woken keeps what its memory is mapped from
                assert names == [], (truth.plan.instance, truth.state, names)
            if truth.state is not State.RUNNING and paths.runtime.is_dir():
                assert set(os.listdir(paths.runtime)) <= {"logs", "metrics", "fc.final.json"}
            if truth.state is None:
                kept = {str(p.relative_to(paths.base)) for p in paths.base.rglob("*") if not p.is_dir()}
                assert kept in (set(), {"lock", "volumes/data.img", "volumes/data.key"}), kept


def _verb(plan: InstancePlan, action: Action, wipe: bool) -> Callable[[Node, Host], object]:
    match action:
        case Action.RUN:
            return lambda node, host: host.create_instance(plan)
        case Action.WAKE:
            return lambda node, host: host.wake_instance(plan)
        case Action.SLEEP:
            return lambda node, host: host.sleep_instance(plan.instance)
        case Action.STOP:
            return lambda node, host: host.stop_instance(plan.instance)
        case Action.DESTROY:
            return lambda node, host: host.destroy_instance(plan.instance, wipe_volumes=wipe)
    raise AssertionError(action)


def _start_up(node: Node, host: Host) -> None:
    """What mvm-hostd does before it says that it is ready; and then there is nothing left to do."""
    report = recover_node(node.store)
    assert not report.failed, report.failed
    for instance in all_instances(node.store):
        try:
            host.inspect_instance(instance)
        except NotFound:
            continue  # its destroy was finished
    host_left, blind = survey(node.store)
    assert [a for a in host_left if not isinstance(a, Lacks)] == [], host_left
    assert blind == [], blind


def campaign(crashes: int, seed: int, tell: Callable[[int, float], None] = lambda n, s: None) -> Counter[str]:
    """At least so many injected crashes. Returns what was done, by name. AssertionError names the seed and turn."""
    rng, began = random.Random(seed), time.monotonic()
    with simulated_node() as node:
        lives = Lives(node, rng)
        turn = 0
        while lives.crashes < crashes:
            turn += 1
            try:
                lives.turn()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, turn {turn}, {lives.crashes} crashes: {error}") from error
            if turn % 100 == 0:
                tell(lives.crashes, time.monotonic() - began)
    return lives.counts
