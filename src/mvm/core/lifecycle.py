"""The life of an instance: the only place that says what is legal.

`TRANSITIONS` has a rule for every (state, action) pair. A rule is one of

  Step      something happens. `intent` is written to the record before the effect and cleared after it, so at
            any moment the record says where the instance was and where it was going.
  NoOp      the instance is already there; nothing happens, nothing is written.
  Forbidden refused as `Conflict`, with what to do instead.

A step has one **commit point**, the instant after which undoing it would lose or corrupt something. Whoever
carries it out sets `committed` in the persisted intent at that instant. Three things can then happen, each
with one answer:

  it succeeded: `success`;
  it failed, and whoever tried is alive to say so: `after_failure(step, committed=, alive=)`;
  whoever tried died (crash, SIGKILL, power): `settle(step, committed=, alive=)`.

`alive` means that the VMM runs *and* its guest answers; for a sleep that was broken off, that the VMM
runs: the guest was running before, and one too busy to answer is not one to end. Where the answer is not
`running`, whoever asked ends the VMM and releases what it held.

Why waking has its commit point at the resume of the vCPUs and not at its end: from then on the guest may
have written to its data disk, and memory older than the disk it caches must never be restored again. A wake
that is lost after that point therefore leaves `failed` (start it cold), never `sleeping`.

`LOSE` and `EXIT` are not requests. Recovery records with them that a VMM thought to be running is gone:
`EXIT` when the VMM ended in good order (the guest powered off or restarted, and not by a panic), else `LOSE`.

docs/lifecycle.md is `render_page()`; a test keeps it so.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from mvm.core.errors import Conflict
from mvm.core.ids import InstanceId, TenantId


class State(StrEnum):
    CREATED = "created"
    RUNNING = "running"
    SLEEPING = "sleeping"
    STOPPED = "stopped"
    FAILED = "failed"
    DESTROYED = "destroyed"


class Action(StrEnum):
    RUN = "run"
    SLEEP = "sleep"
    WAKE = "wake"
    STOP = "stop"
    DESTROY = "destroy"
    EXIT = "exit"
    LOSE = "lose"


class Intent(StrEnum):
    """What an instance is in the middle of."""

    STARTING = "starting"
    QUIESCING = "quiescing"
    WAKING = "waking"
    STOPPING = "stopping"
    DESTROYING = "destroying"
    RECORDING = "recording"


MEANING: Final[dict[State, str]] = {
    State.CREATED: "Known, never started. Holds an address and nothing else.",
    State.RUNNING: "The VMM runs and the guest has answered.",
    State.SLEEPING: "A sealed snapshot is kept; process, CPU and memory are released, the volume locked.",
    State.STOPPED: "No process and no snapshot; the data volume is kept, locked.",
    State.FAILED: "The VMM is gone without having been asked to go, or a step could not be finished.",
    State.DESTROYED: "Gone. Nothing leads out of here.",
}


class Settlement(msgspec.Struct, frozen=True):
    """Where a step that was cut short ends, by whether the guest is alive."""

    alive: State
    gone: State


class Step(msgspec.Struct, frozen=True):
    source: State
    action: Action
    intent: Intent
    commit_point: str
    success: State
    failure: State
    before_commit: Settlement
    after_commit: Settlement


class NoOp(msgspec.Struct, frozen=True):
    source: State
    action: Action
    note: str

    @property
    def success(self) -> State:
        return self.source


class Forbidden(msgspec.Struct, frozen=True):
    """`reason` completes "<who> ...", `instead` is an action that helps, or a whole sentence if `advice` is
    set."""

    source: State
    action: Action
    reason: str
    instead: Action | None = None
    advice: str = ""


Rule = Step | NoOp | Forbidden


def _always(state: State) -> Settlement:
    return Settlement(alive=state, gone=state)


def _run(source: State) -> Step:
    return Step(
        source, Action.RUN, Intent.STARTING, "the guest answers", State.RUNNING, State.FAILED,
        before_commit=_always(source),
        after_commit=Settlement(alive=State.RUNNING, gone=State.FAILED),
    )  # fmt: skip


def _stop(source: State) -> Step:
    # Asking to stop cannot be taken back: the guest may already be shutting down. Recovery finishes it.
    return Step(
        source, Action.STOP, Intent.STOPPING, "the request is recorded", State.STOPPED, State.FAILED,
        before_commit=_always(State.STOPPED),
        after_commit=_always(State.STOPPED),
    )  # fmt: skip


def _destroy(source: State) -> Step:
    return Step(
        source, Action.DESTROY, Intent.DESTROYING, "the request is recorded", State.DESTROYED, State.FAILED,
        before_commit=_always(State.DESTROYED),
        after_commit=_always(State.DESTROYED),
    )  # fmt: skip


def _record(action: Action, end: State) -> Step:
    return Step(
        State.RUNNING, action, Intent.RECORDING, "the loss is recorded", end, end,
        before_commit=_always(end),
        after_commit=_always(end),
    )  # fmt: skip


_SLEEP: Final = Step(
    State.RUNNING, Action.SLEEP, Intent.QUIESCING, "the snapshot is renamed to latest",
    State.SLEEPING, State.RUNNING,
    before_commit=Settlement(alive=State.RUNNING, gone=State.FAILED),
    after_commit=_always(State.SLEEPING),
)  # fmt: skip

_WAKE: Final = Step(
    State.SLEEPING, Action.WAKE, Intent.WAKING, "the vCPUs are resumed", State.RUNNING, State.SLEEPING,
    before_commit=_always(State.SLEEPING),
    after_commit=Settlement(alive=State.RUNNING, gone=State.FAILED),
)  # fmt: skip

_GONE: Final = "is destroyed"
_GONE_ADVICE: Final = "Create it again with: mvm tenant create"


def _rules() -> list[Rule]:
    S, A = State, Action
    return [
        _run(S.CREATED),
        Forbidden(S.CREATED, A.SLEEP, "was never started, so there is nothing to put to sleep", A.RUN),
        Forbidden(S.CREATED, A.WAKE, "never slept, so there is no snapshot to wake", A.RUN),
        NoOp(S.CREATED, A.STOP, "was never started; nothing to stop"),
        _destroy(S.CREATED),
        NoOp(S.RUNNING, A.RUN, "is already running"),
        _SLEEP,
        NoOp(S.RUNNING, A.WAKE, "is already awake"),
        _stop(S.RUNNING),
        _destroy(S.RUNNING),
        _record(A.EXIT, S.STOPPED),
        _record(A.LOSE, S.FAILED),
        # Running from the snapshot and discarding it are different wishes; neither is guessed.
        Forbidden(S.SLEEPING, A.RUN, "is sleeping", A.WAKE),
        NoOp(S.SLEEPING, A.SLEEP, "is already sleeping"),
        _WAKE,
        _stop(S.SLEEPING),
        _destroy(S.SLEEPING),
        _run(S.STOPPED),
        Forbidden(S.STOPPED, A.SLEEP, "is stopped, so there is nothing to put to sleep", A.RUN),
        Forbidden(S.STOPPED, A.WAKE, "is stopped and has no snapshot", A.RUN),
        NoOp(S.STOPPED, A.STOP, "is already stopped"),
        _destroy(S.STOPPED),
        _run(S.FAILED),
        Forbidden(S.FAILED, A.SLEEP, "has failed and is not running", A.RUN),
        Forbidden(S.FAILED, A.WAKE, "has failed and has no usable snapshot", A.RUN),
        _stop(S.FAILED),
        _destroy(S.FAILED),
        Forbidden(S.DESTROYED, A.RUN, _GONE, advice=_GONE_ADVICE),
        Forbidden(S.DESTROYED, A.SLEEP, _GONE, advice=_GONE_ADVICE),
        Forbidden(S.DESTROYED, A.WAKE, _GONE, advice=_GONE_ADVICE),
        Forbidden(S.DESTROYED, A.STOP, _GONE, advice=_GONE_ADVICE),
        NoOp(S.DESTROYED, A.DESTROY, "is already destroyed"),
        *(
            NoOp(state, action, "has no running VMM to lose")
            for state in State
            if state is not S.RUNNING
            for action in (A.EXIT, A.LOSE)
        ),
    ]


TRANSITIONS: Final[dict[tuple[State, Action], Rule]] = {(rule.source, rule.action): rule for rule in _rules()}

# `mvm tenant run` and `mvm instance start` are the same action.
_INSTANCE_VERBS: Final = {Action.RUN: "start"}


def command_for(action: Action, who: TenantId | InstanceId) -> str:
    """The command line that asks for `action`: `mvm tenant wake acme`, `mvm instance start
    acme/default-0`."""
    if isinstance(who, InstanceId):
        return f"mvm instance {_INSTANCE_VERBS.get(action, action.value)} {who}"
    return f"mvm tenant {action.value} {who}"


_TO_DO: Final = {Action.RUN: "start it with", Action.WAKE: "wake it with", Action.STOP: "stop it with"}


def plan_transition(state: State, action: Action, who: TenantId | InstanceId) -> Step | NoOp:
    """What `action` means in `state`. `who` is what the user named, for the message.

    Raises Conflict where the table forbids it; its resolution holds the command to use instead.
    """
    rule = TRANSITIONS[(state, action)]
    if not isinstance(rule, Forbidden):
        return rule
    resolution = rule.advice
    if rule.instead is not None:
        resolution = f"{_TO_DO[rule.instead].capitalize()}: {command_for(rule.instead, who)}"
    if state is State.SLEEPING:
        cold = f"{command_for(Action.STOP, who)} && {command_for(Action.RUN, who)}"
        resolution += f" (or discard its memory and start cold: {cold})"
    details = f"State {state}, asked to {action}."
    raise Conflict(f"{who} {rule.reason}", details=details, resolution=resolution)


def settle(step: Step, *, committed: bool, alive: bool) -> State:
    """Where a step that was cut short ends. `alive`: the VMM runs and its guest answers."""
    at = step.after_commit if committed else step.before_commit
    return at.alive if alive else at.gone


def after_failure(step: Step, *, committed: bool, alive: bool) -> State:
    """Where a step ends that failed in the hands of somebody who lived to clean up after it.

    Before the commit point that is `step.failure`, unless that says `running` of a guest that did not
    survive."""
    if committed or (step.failure is State.RUNNING and not alive):
        return settle(step, committed=committed, alive=alive)
    return step.failure


def render_diagram() -> str:
    """The table as a Mermaid state diagram: successes, and failures where they lead elsewhere."""
    lines = ["stateDiagram-v2", "    [*] --> created"]
    for rule in TRANSITIONS.values():
        if not isinstance(rule, Step):
            continue
        lines.append(f"    {rule.source} --> {rule.success}: {rule.action}")
        if rule.failure not in (rule.source, rule.success):
            lines.append(f"    {rule.source} --> {rule.failure}: {rule.action} fails")
    lines.append("    destroyed --> [*]")
    return "\n".join(lines) + "\n"


def render_page() -> str:
    """docs/lifecycle.md."""
    out = [
        "# The life of an instance\n",
        "Generated from `mvm.core.lifecycle.TRANSITIONS` by `python -m mvm.core.lifecycle`; do not edit.\n",
        "```mermaid\n" + render_diagram() + "```\n",
        "## States\n",
        "| state | meaning |\n|---|---|",
        *(f"| `{state}` | {text} |" for state, text in MEANING.items()),
        "\n## Steps\n",
        "A step is recorded as an intent before its effect and cleared after it. If it is cut short, "
        "recovery looks at whether its commit point was passed and whether the guest is alive (the VMM runs "
        "and the guest answers).\n",
        "| from | action | recorded as | commit point | success | failure | cut short before: alive / gone "
        "| cut short after: alive / gone |\n|---|---|---|---|---|---|---|---|",
    ]
    steps = [rule for rule in TRANSITIONS.values() if isinstance(rule, Step)]
    out += [
        f"| `{s.source}` | {s.action} | {s.intent} | {s.commit_point} | `{s.success}` | `{s.failure}` "
        f"| `{s.before_commit.alive}` / `{s.before_commit.gone}` "
        f"| `{s.after_commit.alive}` / `{s.after_commit.gone}` |"
        for s in steps
    ]
    out += ["\n## Already there\n", "| state | action | answer |\n|---|---|---|"]
    out += [f"| `{r.source}` | {r.action} | {r.note} |" for r in TRANSITIONS.values() if isinstance(r, NoOp)]
    out += ["\n## Refused\n", "| state | action | reason | instead |\n|---|---|---|---|"]
    out += [
        f"| `{r.source}` | {r.action} | {r.reason} | {r.instead or r.advice} |"
        for r in TRANSITIONS.values()
        if isinstance(r, Forbidden)
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    print(render_page(), end="")
