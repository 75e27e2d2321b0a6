"""A VMM's bounds as the node's kernel keeps them: its control group, its jail, and the rights its keeper has left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.node.conftest import Rig
from tests.node.guests import Guests, state

from mvm.hostd.resources.cgroup import Groups, limits, parse

pytestmark = [pytest.mark.node]
MOUNT = "/sys/fs/cgroup"


@pytest.fixture(scope="module")
def tenant(guests: Guests) -> str:
    return guests.create("bounded")


def leaf(tenant: str) -> str:
    return str(Groups(Path("/var/lib/mvm"), MOUNT).leaf(f"{tenant}--default-0"))


def held(rig: Rig) -> dict[str, str]:
    rows = [json.loads(line) for line in rig.sh("mvm posture --output json").splitlines()]
    return {row["id"]: row["status"] for row in rows if "id" in row}


@pytest.mark.req("H5", "H4")
def test_a_vmm_is_in_its_control_group_and_its_jail(rig: Rig, tenant: str) -> None:
    rig.sh(f"mvm tenant run {tenant}", timeout=240)
    pid = rig.sh("pgrep qemu-system").strip()
    assert rig.sh(f"cat /proc/{pid}/cgroup").strip() == f"0::{leaf(tenant).removeprefix(MOUNT)}"
    names = ("memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max")
    files = {name: rig.sh(f"cat {leaf(tenant)}/{name}").strip() for name in names}
    document = f"/var/lib/mvm/tenants/{tenant}/instances/default-0/runtime/fc.final.json"
    size = json.loads(rig.sh(f"cat {document}"))["machine-config"]
    assert parse(files) == limits(mem_mib=size["mem_size_mib"], vcpus=size["vcpu_count"])
    # KVM's own helper, a thread of the kernel (which has no arguments), is put where its VM is.
    others = f"for p in $(cat {leaf(tenant)}/cgroup.procs); do tr -d '\\0' </proc/$p/cmdline | grep -c . || true; done"
    assert rig.sh(others).split().count("1") == 1, "the VMM, and no other program"
    for kind in ("mnt", "net", "pid"):
        assert rig.sh(f"readlink /proc/{pid}/ns/{kind}") != rig.sh(f"readlink /proc/1/ns/{kind}"), kind
    assert rig.sh(f"ls /proc/{pid}/root/").split() == ["dev", "etc", "lib", "lib64", "proc", "usr"]
    assert rig.sh(f"ls /proc/{pid}/root/dev").split() == ["kvm", "null", "urandom"]
    assert "mvm-jail" not in rig.sh("cat /proc/1/mounts")
    found = held(rig)
    assert found["vmm-jail"] == found["vmm-limits"] == "held"


@pytest.mark.req("H3")
def test_a_keeper_has_no_right_left(rig: Rig, tenant: str) -> None:
    rig.sh(f"mvm tenant run {tenant}", timeout=240)
    rig.sh(f"mvm tenant sleep {tenant}")
    rig.sh(f"mvm tenant wake {tenant}")
    status = rig.sh("for t in /proc/$(pgrep mvm-keeper)/task/*; do cat $t/status; done")
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        values = {line.split()[1] for line in status.splitlines() if line.startswith(kind)}
        assert values == {"0" * 16}, kind


@pytest.mark.req("H5", "L3")
def test_the_kernel_ends_a_vmm_that_takes_more(rig: Rig, tenant: str) -> None:
    """All of it at once; the next command finds out, and the group goes with what was in it."""
    rig.sh(f"mvm tenant run {tenant}", timeout=240)
    rig.sh(f"echo 16M > {leaf(tenant)}/memory.max; sleep 1; ! pgrep qemu-system")
    assert state(rig, tenant) == "failed"
    rig.sh(f"! test -e {leaf(tenant)}")


@pytest.mark.req("H5", "L3")
def test_no_group_is_left(rig: Rig, tenant: str) -> None:
    for verbs in (("run", "sleep"), ("wake", "stop"), ("run", "destroy --wipe-volumes --yes")):
        for verb in verbs:
            name, _, options = verb.partition(" ")
            rig.sh(f"mvm tenant {name} {tenant} {options}", timeout=240)
        rig.sh(f"! test -e {leaf(tenant)}")
