"""Random lives with random crashes at named steps, and crashes by the clock, against what must be true after each.

The model is the life-cycle table and one text in guest memory: it survives every sleep, every crash before a commit
point, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.contract.hostd.test_crashes import ACT, STEPS
from tests.support.fake_world import FakeWorld, fake_world

from mvm.core.errors import NotFound
from mvm.core.lifecycle import TRANSITIONS, Action, State, Step
from mvm.core.record import reachable

ALL_STEPS = sorted({step for steps in STEPS.values() for step in steps})
ACTIONS = st.sampled_from(sorted(a for a in ACT if a is not Action.DESTROY))


class RandomLife(RuleBasedStateMachine):
    """`text`: what the guest's memory must hold, None if it may have been lost."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        self.world: FakeWorld = self.cleanup.enter_context(fake_world())
        self.plan = self.world.plan()
        self.state: State | None = None
        self.text: str | None = None
        self.written = 0

    def teardown(self) -> None:
        try:
            if self.state is not None:
                self.world.host().destroy_instance(self.plan.instance, wipe_volumes=True)
                assert not self.world.paths(self.plan).base.exists()
                assert (self.world.processes(), self.world.links()) == ({}, set())
        finally:
            self.cleanup.close()

    def legal(self, action: Action) -> Step | None:
        found = TRANSITIONS[(self.state or State.CREATED, action)]
        return found if isinstance(found, Step) else None

    def settle(self, step: Step | None, crashed: bool) -> None:
        """Compare with the host, after whatever happened."""
        if self.state is None and step is None:
            return
        record = self.world.host().inspect_instance(self.plan.instance)
        note(f"{self.state} -> {record.state}")
        assert record.pending is None
        if step is not None:
            assert record.state in (reachable(step) if crashed else {step.success})
            if not crashed or record.state is not step.source:
                fresh = step.action is Action.RUN
                lost = record.state not in (State.RUNNING, State.SLEEPING)
                if fresh or lost:
                    self.text = None
        self.state = record.state

    @rule(action=ACTIONS)
    def act(self, action: Action) -> None:
        step = self.legal(action)
        if self.state is None and step is None:
            return
        if step is not None:
            ACT[action](self.world.host(), self.plan)
        self.settle(step, crashed=False)

    @rule(action=ACTIONS, at=st.sampled_from(ALL_STEPS))
    def crash(self, action: Action, at: str) -> None:
        step = self.legal(action)
        if step is not None and at in STEPS[action]:
            assert self.world.killed_at(at, lambda host: ACT[action](host, self.plan))
            self.settle(step, crashed=True)

    @precondition(lambda self: self.state is State.RUNNING)
    @rule()
    def write(self) -> None:
        self.written += 1
        self.text = f"text number {self.written} "
        self.world.mark(self.plan, self.text)

    @precondition(lambda self: self.state is State.RUNNING)
    @rule(code=st.sampled_from([0, 3]))
    def lose(self, code: int) -> None:
        self.world.end_vmm(self.plan, code)
        record = self.world.host().inspect_instance(self.plan.instance)
        assert record.state is (State.FAILED if code else State.STOPPED)
        self.state, self.text = record.state, None

    @invariant()
    def the_host_has_what_the_state_has_and_nothing_else(self) -> None:
        if self.state is State.RUNNING:
            self.world.assert_runs(self.plan)
            if self.text is not None:
                assert self.world.marked(self.plan, self.text)
        elif self.state is not None:
            self.world.assert_nothing_runs(self.plan, sleeping=self.state is State.SLEEPING)


@pytest.mark.root
@pytest.mark.req("L3", "S1", "S2")
class TestRandomLife(RandomLife.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(
        max_examples=20,
        stateful_step_count=14,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@pytest.fixture
def asleep_or_awake() -> Iterator[FakeWorld]:
    with fake_world() as world:
        yield world


@pytest.mark.root
@pytest.mark.req("L3", "S1", "S2")
def test_sleeps_and_wakes_killed_at_any_moment(asleep_or_awake: FakeWorld) -> None:
    """Not at a named step but anywhere, many times over on one guest, whose memory must never be wrong."""
    world, rng = asleep_or_awake, random.Random(7)
    plan = world.plan()
    world.host().create_instance(plan)
    for turn in range(40):
        text = f"turn {turn} "
        world.mark(plan, text)
        killed = world.killed_after(rng.uniform(0, 0.07), lambda h: ACT[Action.SLEEP](h, plan))
        record = world.host().inspect_instance(plan.instance)
        assert record.state in ((State.RUNNING, State.SLEEPING) if killed else (State.SLEEPING,))
        if record.state is State.RUNNING:
            world.assert_runs(plan)
            assert world.marked(plan, text)
            world.host().sleep_instance(plan.instance)
        world.assert_nothing_runs(plan, sleeping=True)
        world.killed_after(rng.uniform(0, 0.06), lambda h: ACT[Action.WAKE](h, plan))
        record = world.host().inspect_instance(plan.instance)
        assert record.state in (State.SLEEPING, State.RUNNING)
        if record.state is State.SLEEPING:
            world.assert_nothing_runs(plan, sleeping=True)
            world.host().wake_instance(plan)
        world.assert_runs(plan)
        assert world.marked(plan, text)


@pytest.mark.root
@pytest.mark.req("L3", "L7")
@pytest.mark.parametrize("wipe", [True, False])
def test_starts_stops_and_ends_killed_at_any_moment(asleep_or_awake: FakeWorld, wipe: bool) -> None:
    world, rng = asleep_or_awake, random.Random(19)
    plan = world.plan()

    def state() -> State | None:
        try:
            return world.host().inspect_instance(plan.instance).state
        except NotFound:
            return None

    for _ in range(20):
        world.killed_after(rng.uniform(0, 0.1), lambda h: h.create_instance(plan))
        found = state()
        assert found in (None, State.CREATED, State.STOPPED, State.RUNNING)
        if found is State.RUNNING:
            world.assert_runs(plan)
        else:
            world.assert_nothing_runs(plan)
        assert world.host().create_instance(plan).state is State.RUNNING
        world.assert_runs(plan)
        if rng.random() < 0.5:
            world.killed_after(rng.uniform(0, 0.1), lambda h: h.stop_instance(plan.instance))
            found = state()
            assert found in (State.RUNNING, State.STOPPED)
            world.assert_runs(plan) if found is State.RUNNING else world.assert_nothing_runs(plan)
        world.killed_after(
            rng.uniform(0, 0.1), lambda h: h.destroy_instance(plan.instance, wipe_volumes=wipe)
        )
        found = state()
        assert found in (None, State.RUNNING, State.STOPPED)
        if found is not State.RUNNING:
            world.assert_nothing_runs(plan)
    world.host().destroy_instance(plan.instance, wipe_volumes=True)
    assert not world.paths(plan).base.exists()
    assert (world.processes(), world.mounts(), world.links()) == ({}, [], set())
