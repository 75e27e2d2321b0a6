"""hostd killed before every single effect of an operation, recovered, and then the node's power lost.

What a killed process renamed or removed and had not synced yet is there for its successor to see, and gone after the
power loss: a successor that relies on it must sync it first. The disk that comes back here is the worst there is: it
has what was synced and nothing else.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from tests.campaign.injected import Lives
from tests.campaign.simulated import simulated_node

from mvm.core.lifecycle import Action, State

pytestmark = pytest.mark.root

A = Action
LIVES: dict[str, tuple[list[Action], Action, bool]] = {
    "first start": ([], A.RUN, False),
    "second sleep": ([A.RUN, A.SLEEP, A.WAKE], A.SLEEP, False),
    "stop": ([A.RUN, A.SLEEP], A.STOP, False),
    "wipe": ([A.RUN], A.DESTROY, True),
}
"""What came before, the operation, and whether it wipes the volume. `scripts/campaign` does all others at random."""


class Worst(random.Random):
    """Every coin falls so that nothing is kept but what was synced."""

    def random(self) -> float:
        return 0.99

    def choice(self, seq: Any) -> Any:
        return seq[0]


@pytest.mark.req("L3", "K1", "S1")
@pytest.mark.parametrize("name", LIVES)
def test_nothing_relies_on_what_was_not_synced(name: str) -> None:
    before, action, wipe = LIVES[name]
    effects = 0
    while True:
        effects += 1
        with simulated_node() as node:
            lives = Lives(node, Worst())
            truth = lives.truths[0]
            for earlier in before:
                lives.crash(truth, earlier, None)
                if earlier is Action.RUN:
                    lives.guest_writes(truth, sync=True)
            killed = lives.crash(truth, action, effects, wipe=wipe)
            if truth.state not in (State.RUNNING, State.SLEEPING):
                lives.lose_power()
                lives.crash(truth, Action.RUN, None)
            if truth.state is State.RUNNING:
                lives.guest_writes(truth, sync=True)
            lives.lose_power()
        if not killed:
            break
    assert effects > 5


@pytest.mark.req("L3", "K1")
def test_a_disk_made_by_a_killed_predecessor_keeps_what_its_guest_synced() -> None:
    """As above without a power loss in between: the successor starts on what it finds."""
    effects = 0
    while True:
        effects += 1
        with simulated_node() as node:
            lives = Lives(node, Worst())
            truth = lives.truths[0]
            killed = lives.crash(truth, Action.RUN, effects)
            if truth.state is not State.RUNNING:
                lives.crash(truth, Action.RUN, None)
            lives.guest_writes(truth, sync=True)
            lives.lose_power()
        if not killed:
            break
