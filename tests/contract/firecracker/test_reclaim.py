"""What a guest has free is in no first snapshot, and no guest keeps its sleep from coming about by that."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.firecracker_world import FirecrackerWorld, break_with, count

from mvm.core.plan import InstancePlan
from mvm.core.snapshot import SleepReceipt
from mvm.hostd.vmm.firecracker import vm as vms

pytestmark = pytest.mark.root
NOISE = 4000
"""Pages that the guest wrote and has free again; what is in them does not compress."""


def free_noise(world: FirecrackerWorld, plan: InstancePlan) -> None:
    guest = world.guest(plan)
    try:
        guest.ask("noise", first=20_000, count=NOISE)
        guest.ask("free", first=20_000, count=NOISE)
    finally:
        guest.close()


def slept(world: FirecrackerWorld, plan: InstancePlan) -> SleepReceipt:
    world.host().sleep_instance(plan.instance)
    receipt = world.record(plan).last_receipt
    assert isinstance(receipt, SleepReceipt)
    return receipt


@pytest.mark.req("S5")
@pytest.mark.parametrize("fault", [(), ("refuse PATCH /balloon/hinting/start",)])
def test_a_first_snapshot_has_nothing_of_what_the_guest_has_free(
    world: FirecrackerWorld, programs: Path, fault: tuple[str, ...]
) -> None:
    """Where the guest has a balloon that can tell; where it has none, the snapshot is larger."""
    break_with(programs, *fault)
    plan = world.plan()
    world.host().create_instance(plan)
    free_noise(world, plan)
    before = count(world, plan)
    assert (slept(world, plan).written_bytes < NOISE * 4096 // 2) == (not fault)
    world.host().wake_instance(plan)
    assert count(world, plan) >= before


@pytest.mark.req("S1", "S5")
def test_a_guest_that_never_has_named_its_free_memory_sleeps_all_the_same(
    world: FirecrackerWorld, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vms, "RECLAIM_S", 0.1)
    break_with(programs, "hinting without end")
    plan = world.plan()
    world.host().create_instance(plan)
    before = count(world, plan)
    slept(world, plan)
    world.host().wake_instance(plan)
    assert count(world, plan) >= before


@pytest.mark.req("S5")
def test_later_sleeps_write_what_changed_and_reclaim_nothing(
    world: FirecrackerWorld, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken out of a restored guest's memory, a page would be zero in the guest and not in the next snapshot."""
    plan = world.plan()
    world.host().create_instance(plan)
    slept(world, plan)
    facts = world.driver.facts()
    monkeypatch.setattr(world.driver, "facts", lambda: facts)
    break_with(programs, "exit 148 PATCH /balloon/hinting/start")
    world.host().wake_instance(plan)
    before = count(world, plan)
    slept(world, plan)
    world.host().wake_instance(plan)
    assert count(world, plan) >= before
