"""What a guest has free it reports, by its balloon's driver: the host gets it back, and no first snapshot has it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.support.firecracker_world import FirecrackerWorld, count, firecracker_world

from mvm.core.plan import InstancePlan
from mvm.core.snapshot import SleepReceipt

pytestmark = pytest.mark.root
NOISE, FIRST = 4000, 20_000
"""Pages that the guest wrote and has free again; what is in them does not compress."""


def write_and_free(world: FirecrackerWorld, plan: InstancePlan) -> None:
    guest = world.guest(plan)
    try:
        guest.ask("noise", first=FIRST, count=NOISE)
        guest.ask("free", first=FIRST, count=NOISE)
    finally:
        guest.close()
    time.sleep(0.1)  # the driver reports a moment later


def page(world: FirecrackerWorld, plan: InstancePlan, number: int) -> bytes:
    guest = world.guest(plan)
    try:
        return bytes.fromhex(guest.ask("read", page=number)["data"])
    finally:
        guest.close()


def slept(world: FirecrackerWorld, plan: InstancePlan) -> SleepReceipt:
    world.host().sleep_instance(plan.instance)
    receipt = world.record(plan).last_receipt
    assert isinstance(receipt, SleepReceipt)
    return receipt


@pytest.mark.req("S5")
@pytest.mark.parametrize("balloon", [True, False])
def test_a_first_snapshot_has_nothing_of_what_the_guest_has_free(programs: Path, balloon: bool) -> None:
    """Where the flake gives it a balloon that reports; where not, the snapshot is larger."""
    with firecracker_world(programs, balloon=balloon) as world:
        plan = world.plan()
        world.host().create_instance(plan)
        write_and_free(world, plan)
        before = count(world, plan)
        assert (slept(world, plan).written_bytes < NOISE * 4096 // 2) == balloon
        world.host().wake_instance(plan)
        assert count(world, plan) >= before


@pytest.mark.req("S2", "S5")
def test_a_restored_guests_memory_with_holes_is_sealed_and_comes_back(world: FirecrackerWorld) -> None:
    """What it reports is taken out of the mapping of the snapshot's file; what it writes there afterwards is kept."""
    plan = world.plan()
    world.host().create_instance(plan)
    slept(world, plan)
    for turn in range(2):
        world.host().wake_instance(plan)
        before = count(world, plan)
        write_and_free(world, plan)
        guest = world.guest(plan)
        guest.ask("write", pages=[FIRST + 7, FIRST + NOISE + 9], fill=f"written in turn {turn}")
        guest.close()
        slept(world, plan)
        world.host().wake_instance(plan)
        for number in (FIRST + 7, FIRST + NOISE + 9):
            assert page(world, plan, number).startswith(f"written in turn {turn}".encode())
        assert count(world, plan) >= before
        slept(world, plan)
