"""A sample of tests/campaign/then_power.py, spread over each operation; `scripts/campaign` tries every effect."""

from __future__ import annotations

import pytest
from tests.campaign.then_power import LIVES, effects_of, try_effects

pytestmark = pytest.mark.root

SAMPLE = 16


@pytest.mark.req("L3", "K1", "S1")
@pytest.mark.parametrize("name", LIVES)
def test_nothing_relies_on_what_was_not_synced(name: str) -> None:
    life = LIVES[name]
    total = effects_of(life)
    assert total > SAMPLE
    chosen = sorted({1 + i * (total - 1) // (SAMPLE - 1) for i in range(SAMPLE)})
    assert (chosen[0], chosen[-1], len(chosen)) == (1, total, SAMPLE)
    assert try_effects(life, chosen) == SAMPLE
