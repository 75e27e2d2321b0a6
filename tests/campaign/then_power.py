"""hostd killed before one effect of an operation, recovered, and then the node's power lost: for every effect there is.

What a killed process renamed or removed and had not synced yet is there for its successor to see, and gone after the
power loss: a successor that relies on it must sync it first. The disk that comes back here is the worst there is: it
has what was synced and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tests.campaign.injected import Lives
from tests.campaign.simulated import simulated_node

from mvm.core.lifecycle import Action, State

A = Action


class Life(NamedTuple):
    """`before`: what came before; `action`: the one that is killed; `wipe`: whether it wipes the volume; `at_once`: the
    successor starts on what it finds, without a power loss in between."""

    before: tuple[Action, ...]
    action: Action
    wipe: bool = False
    at_once: bool = False


LIVES = {
    "first start": Life((), A.RUN),
    "first start, and another at once": Life((), A.RUN, at_once=True),
    "second sleep": Life((A.RUN, A.SLEEP, A.WAKE), A.SLEEP),
    "stop": Life((A.RUN, A.SLEEP), A.STOP),
    "wipe": Life((A.RUN,), A.DESTROY, wipe=True),
}
"""`tests.campaign.injected` does all others at random."""


class Worst(random.Random):
    """Every coin falls so that nothing is kept but what was synced."""

    def random(self) -> float:
        return 0.99

    def choice(self, seq: Any) -> Any:
        return seq[0]


def effects_of(life: Life) -> int:
    """How many effects the operation has where nobody kills it."""
    return _lived(life, None)


def try_effects(life: Life, effects: Iterable[int], tell: Callable[[int], None] = lambda n: None) -> int:
    """Kill it before each of these (from 1) and lose the power. How many were; AssertionError says which went wrong."""
    done = 0
    for effect in effects:
        try:
            _lived(life, effect)
        except AssertionError as error:
            raise AssertionError(f"killed before effect {effect}: {error}") from error
        done += 1
        tell(done)
    return done


def _lived(life: Life, kill_at: int | None) -> int:
    with simulated_node() as node:
        lives = Lives(node, Worst())
        truth = lives.truths[0]
        for earlier in life.before:
            lives.crash(truth, earlier, None)
            if earlier is Action.RUN:
                lives.guest_writes(truth, sync=True)
        what = f"{life.action} from {truth.state}"
        killed = lives.crash(truth, life.action, kill_at, wipe=life.wipe)
        assert killed == (kill_at is not None), f"the operation has fewer than {kill_at} effects"
        count = node.effects.get(what, 0)
        if truth.state not in (State.RUNNING, State.SLEEPING):
            if not life.at_once:
                lives.lose_power()
            lives.crash(truth, Action.RUN, None)
        if truth.state is State.RUNNING:
            lives.guest_writes(truth, sync=True)
        lives.lose_power()
    return count


def every_effect(tell: Callable[[str], None]) -> dict[str, int]:
    """All effects of all lives: how many, by life."""
    found = {}
    for name, life in LIVES.items():
        total = effects_of(life)
        try:
            found[name] = try_effects(life, range(1, total + 1))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        tell(f"then power: {name}, {total} effects")
    return found
