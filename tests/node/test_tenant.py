"""A tenant's life by the installed mvm in the node, with KVM; and what a loss of power leaves of it."""

from __future__ import annotations

import json

import pytest
from tests.node.conftest import Rig
from tests.node.guests import Guests, state

pytestmark = [pytest.mark.node]


@pytest.fixture(scope="module")
def tenant(guests: Guests) -> str:
    """Built and not running, in the node."""
    return guests.create("acme")


def open_disks(rig: Rig) -> list[str]:
    """Data disks that the kernel has open, without the marks of their directories."""
    names = rig.sh("cat /sys/block/dm-*/dm/name 2>/dev/null || true").split()
    return [name.partition(".")[0] for name in names]


@pytest.mark.req("O4", "L5", "S1", "S2", "K1")
def test_a_life_with_kvm(rig: Rig, tenant: str) -> None:
    rig.sh(f"mvm tenant run {tenant}", timeout=240)
    info = json.loads(rig.sh("mvm node info --output json"))
    assert info["vmm"]["accel"] == "kvm", "the node's own probe boots a kernel with it"
    assert "-accel kvm" in rig.sh("ps -eo args | grep '[q]emu-system'")
    assert open_disks(rig) == [f"mvm-{tenant}--default-0"]
    rig.sh(f"mvm tenant exec {tenant} -- sh -c 'echo kept in memory >/run/memory'")
    rig.sh(f"mvm tenant sleep {tenant}")
    assert state(rig, tenant) == "sleeping"
    assert open_disks(rig) == []
    assert rig.sh("ps -eo args | grep -c '[q]emu-system' || true").strip() == "0"
    rig.sh(f"mvm tenant wake {tenant}")
    assert rig.sh(f"mvm tenant exec {tenant} -- cat /run/memory").strip() == "kept in memory"
    assert open_disks(rig) == [f"mvm-{tenant}--default-0"]


@pytest.mark.req("K1", "L7")
def test_a_lost_vmm_leaves_no_disk_open_before_anybody_looks(rig: Rig, tenant: str) -> None:
    rig.sh(f"mvm tenant run {tenant}", timeout=240)
    assert open_disks(rig) != []
    rig.sh("kill -9 $(pgrep qemu-system)")
    rig.sh("for i in $(seq 100); do ls /sys/block | grep -q dm- || exit 0; sleep 0.1; done; exit 1")
    rig.sh(f"mvm tenant run {tenant}", timeout=240)
    rig.sh(f"mvm tenant stop {tenant}", timeout=240)
    assert open_disks(rig) == []


@pytest.mark.req("O4", "L3", "K1")
def test_power_loss_keeps_what_was_synced(rig: Rig, tenant: str) -> None:
    """In the node, and in the volume of the guest that ran at that moment."""
    write = "import os; f = open('/state/mark', 'w'); f.write('synced'); f.flush(); os.fsync(f.fileno())"
    rig.mvm("shell", "--", "python3", "-c", write + "; d = os.open('/state', os.O_RDONLY); os.fsync(d)")
    rig.sh(f"mvm tenant run {tenant}", timeout=240)
    rig.sh(f"mvm tenant exec {tenant} -- sh -c 'echo precious >/data/file; sync'")
    identity = rig.sh("cat /etc/machine-id /var/lib/mvm/node-id")
    boot = rig.sh("cat /proc/sys/kernel/random/boot_id")

    rig.node.power_loss()
    assert json.loads(rig.mvm("status", "--output", "json").stdout)["node"]["state"] == "stopped"
    rig.mvm("shell", "--", "true", code=125)
    rig.mvm("start")

    assert rig.sh("cat /proc/sys/kernel/random/boot_id") != boot
    assert rig.sh("cat /state/mark") == "synced"
    assert rig.sh("cat /etc/machine-id /var/lib/mvm/node-id") == identity
    rig.sh(f"mvm tenant run {tenant}", timeout=240)
    assert rig.sh(f"mvm tenant exec {tenant} -- cat /data/file").strip() == "precious"
    rig.sh(f"mvm tenant destroy {tenant} --wipe-volumes --yes")
    assert rig.sh("ls /sys/class/net").split() == ["lo"]
    assert rig.sh("ps -eo args | grep -c '[q]emu-system' || true").strip() == "0"
