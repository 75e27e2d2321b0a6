"""A small campaign of kills and power losses in the node; `scripts/campaign` runs the full one."""

from __future__ import annotations

import os

import pytest
from tests.campaign.node import node_campaign
from tests.node.conftest import Rig
from tests.node.guests import Guests

pytestmark = [pytest.mark.node]

KILLS = int(os.environ.get("MVM_NODE_KILLS", "10"))
POWER_LOSSES = int(os.environ.get("MVM_POWER_LOSSES", "2"))


@pytest.mark.req("L3", "L7", "K1", "H2")
def test_kills_and_power_losses_leave_nothing_behind(rig: Rig, guests: Guests) -> None:
    tenants = [guests.create(name) for name in ("fate", "luck")]
    counts = node_campaign(rig, tenants, kills=KILLS, power_losses=POWER_LOSSES, seed=1)
    assert (
        sum(n for name, n in counts.items() if name.startswith(("hostd killed", "power lost")))
        == KILLS + POWER_LOSSES
    )
    for tenant in tenants:
        rig.sh(f"mvm tenant destroy {tenant} --wipe-volumes --yes")
