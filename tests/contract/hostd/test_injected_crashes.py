"""Crashes before any effect of any operation and of recovery itself, on a simulated node (tests/campaign/injected.py).

MVM_INJECTED and MVM_INJECTED_SEED say how many and which.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from tests.campaign.injected import Lives, campaign
from tests.campaign.simulated import simulated_node

from mvm.core.lifecycle import TRANSITIONS, Action, State, Step

pytestmark = pytest.mark.root

CRASHES = int(os.environ.get("MVM_INJECTED", "1000"))
SEED = int(os.environ.get("MVM_INJECTED_SEED", "1"))


@pytest.mark.req("L3", "L7", "S1", "S2", "K1")
def test_a_thousand_crashes_leave_nothing_behind() -> None:
    counts = campaign(CRASHES, SEED)
    kinds = {name for name in counts if not name.startswith("done")}
    actions = {"run", "sleep", "wake", "stop", "destroy", "recovery"}
    assert {name.removeprefix("killed in ") for name in kinds if name.startswith("killed")} == actions
    assert any(name.startswith("power lost") for name in kinds)


class AnyLives(RuleBasedStateMachine):
    """The same, chosen and made small by hypothesis where it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = simulated_node()
        self.lives = Lives(self.manager.__enter__(), random.Random(0))

    def teardown(self) -> None:
        self.manager.__exit__(None, None, None)

    @rule(
        who=st.integers(0, 2),
        action=st.sampled_from([Action.RUN, Action.SLEEP, Action.WAKE, Action.STOP, Action.DESTROY]),
        where=st.floats(0, 1.2),
        power=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def act(self, who: int, action: Action, where: float, power: bool, seed: int) -> None:
        truth = self.lives.truths[who]
        if isinstance(TRANSITIONS[truth.state or State.CREATED, action], Step):
            self.lives.rng.seed(seed)
            self.lives.act(truth, action, where, power=power)
            note(f"{truth.plan.instance} {action} at {where:.2f}: {truth.state}")

    @precondition(lambda self: any(t.state is State.RUNNING for t in self.lives.truths))
    @rule(sync=st.booleans())
    def write(self, sync: bool) -> None:
        for truth in self.lives.truths:
            if truth.state is State.RUNNING:
                self.lives.guest_writes(truth, sync=sync)


@pytest.mark.req("L3", "L7", "S1", "S2", "K1")
class TestAnyLives(AnyLives.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(
        max_examples=15,
        stateful_step_count=12,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
