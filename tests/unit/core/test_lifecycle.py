from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from mvm.core.errors import Conflict
from mvm.core.ids import InstanceId, TenantId
from mvm.core.lifecycle import (
    MEANING,
    TRANSITIONS,
    Action,
    Forbidden,
    NoOp,
    State,
    Step,
    after_failure,
    plan_transition,
    render_diagram,
    render_page,
    settle,
)
from mvm.core.record import reachable

ACME = TenantId("acme")
ROOT = Path(__file__).resolve().parents[3]
STEPS = [rule for rule in TRANSITIONS.values() if isinstance(rule, Step)]


@pytest.mark.req("L3")
@pytest.mark.parametrize(("state", "action"), list(product(State, Action)))
def test_every_state_and_action_has_one_answer(state: State, action: Action) -> None:
    rule = TRANSITIONS[(state, action)]
    assert (rule.source, rule.action) == (state, action)
    if isinstance(rule, Forbidden):
        with pytest.raises(Conflict) as caught:
            plan_transition(state, action, ACME)
        assert "mvm tenant" in caught.value.resolution
        assert (rule.instead is None) != (rule.advice == "")
        if rule.instead is not None:
            assert not isinstance(TRANSITIONS[(state, rule.instead)], Forbidden), "the advice must be legal"
    else:
        assert plan_transition(state, action, ACME) is rule


@pytest.mark.req("L3")
def test_the_table_is_no_larger_than_its_states_and_actions() -> None:
    assert set(TRANSITIONS) == set(product(State, Action))
    assert len(TRANSITIONS) == len(State) * len(Action)
    assert set(MEANING) == set(State)


@pytest.mark.req("L3")
def test_no_state_is_a_dead_end_and_destroyed_is_the_only_end() -> None:
    edges = {state: {rule.success for rule in STEPS if rule.source is state} for state in State}
    assert edges[State.DESTROYED] == set()
    for state in set(State) - {State.DESTROYED}:
        seen, todo = {state}, [state]
        while todo:
            todo += [nxt for nxt in edges[todo.pop()] if nxt not in seen and not seen.add(nxt)]  # type: ignore[func-returns-value]
        assert State.DESTROYED in seen
        assert State.RUNNING in seen
    reached = {end for rule in STEPS for end in reachable(rule)}
    assert reached | {State.CREATED} == set(State)


@pytest.mark.req("L3")
@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s.source}-{s.action}")
def test_an_interrupted_step_ends_on_one_side_or_says_that_it_failed(step: Step) -> None:
    for committed, alive in product((False, True), repeat=2):
        end = settle(step, committed=committed, alive=alive)
        assert end in {step.source, step.success, State.FAILED}
        failed = after_failure(step, committed=committed, alive=alive)
        assert failed in {step.source, step.success, State.FAILED}
        if not alive:
            assert State.RUNNING not in (end, failed), "a dead guest is never said to run"
    if step.action in (Action.RUN, Action.SLEEP, Action.WAKE):
        assert settle(step, committed=True, alive=True) is step.success


@pytest.mark.req("S1", "L3")
def test_sleep_is_undone_before_its_commit_and_finished_after_it() -> None:
    step = plan_transition(State.RUNNING, Action.SLEEP, ACME)
    assert isinstance(step, Step)
    assert settle(step, committed=False, alive=True) is State.RUNNING
    assert settle(step, committed=True, alive=True) is State.SLEEPING
    assert settle(step, committed=True, alive=False) is State.SLEEPING
    assert after_failure(step, committed=False, alive=True) is State.RUNNING
    assert after_failure(step, committed=False, alive=False) is State.FAILED


@pytest.mark.req("S4", "L3")
def test_a_refused_snapshot_leaves_the_instance_sleeping_and_a_used_one_is_never_used_again() -> None:
    step = plan_transition(State.SLEEPING, Action.WAKE, ACME)
    assert isinstance(step, Step)
    assert after_failure(step, committed=False, alive=False) is State.SLEEPING
    assert settle(step, committed=False, alive=True) is State.SLEEPING
    assert settle(step, committed=True, alive=True) is State.RUNNING
    assert settle(step, committed=True, alive=False) is State.FAILED


@pytest.mark.req("L5")
@pytest.mark.parametrize(
    ("state", "action"),
    [
        (State.RUNNING, Action.RUN),
        (State.RUNNING, Action.WAKE),
        (State.SLEEPING, Action.SLEEP),
        (State.STOPPED, Action.STOP),
        (State.DESTROYED, Action.DESTROY),
    ],
)
def test_asking_again_changes_nothing(state: State, action: Action) -> None:
    rule = plan_transition(state, action, ACME)
    assert isinstance(rule, NoOp)
    assert rule.note
    assert rule.success is state


@pytest.mark.req("L5")
@pytest.mark.parametrize(
    ("state", "action", "brief", "resolution"),
    [
        (State.SLEEPING, Action.RUN, "acme is sleeping", "Wake it with: mvm tenant wake acme"),
        (State.CREATED, Action.WAKE, "acme never slept", "Start it with: mvm tenant run acme"),
        (State.STOPPED, Action.SLEEP, "acme is stopped", "Start it with: mvm tenant run acme"),
        (State.DESTROYED, Action.RUN, "acme is destroyed", "mvm tenant create"),
    ],
)
def test_a_refusal_says_what_to_do(state: State, action: Action, brief: str, resolution: str) -> None:
    with pytest.raises(Conflict) as caught:
        plan_transition(state, action, ACME)
    assert caught.value.brief.startswith(brief)
    assert resolution in caught.value.resolution


def test_a_refusal_speaks_the_language_of_the_command_it_answers() -> None:
    with pytest.raises(Conflict) as caught:
        plan_transition(State.STOPPED, Action.WAKE, InstanceId.parse("acme/web-2"))
    assert caught.value.resolution == "Start it with: mvm instance start acme/web-2"


@pytest.mark.req("L3")
def test_the_diagram_has_every_step_and_nothing_else() -> None:
    lines = set(render_diagram().splitlines())
    for step in STEPS:
        assert f"    {step.source} --> {step.success}: {step.action}" in lines
    drawn = [line for line in lines if "fails" not in line and ": " in line]
    assert len(drawn) == len(STEPS)


@pytest.mark.req("L3")
def test_the_documented_table_is_this_one() -> None:
    page = (ROOT / "docs" / "lifecycle.md").read_text(encoding="utf-8")
    assert page == render_page(), "run: python -m mvm.core.lifecycle > docs/lifecycle.md"
