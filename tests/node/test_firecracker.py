"""Firecracker's own programs in the node (nested KVM): the contract of drivers, and a tenant's life, by a command that
does the work itself and by the installed mvm-hostd. Opt-in: $MVM_FIRECRACKER names the directory of firecracker and
jailer on this computer.

The programs are where packaging puts them, and only while this module's tests run: other tests' VMM is QEMU.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.node import carried
from tests.node.conftest import Rig
from tests.node.guests import Guests, state

from mvm.hostd.install import units
from mvm.hostd.vmm.choice import PROGRAMS as PLACE

PROGRAMS = os.environ.get("MVM_FIRECRACKER", "")
pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(not PROGRAMS, reason="MVM_FIRECRACKER names no directory of Firecracker's programs"),
]
CONTRACT_S = 1800
STEP_S = 600
# As a command without daemon: it does the work in its own process.
ALONE = "export MVM_HOSTD= MVM_VMM=firecracker; "
# A way out, so that `mvm net verify` can see that what may leave does.
UPLINK = "ip link add up0 type dummy; ip link set up0 up; ip route add default dev up0"
WORKER = """
import os, sys, time
n = 0
while True:
    n += 1
    with open("/run/count.new", "w") as out: out.write(f"{n} {sys.argv[1]}")
    os.replace("/run/count.new", "/run/count")
    time.sleep(0.05)
"""


@pytest.fixture(scope="module", autouse=True)
def programs(rig: Rig) -> Iterator[None]:
    """Firecracker installed in the node, and the daemon told."""
    rig.sh(f"mkdir -p -m 755 {Path(PLACE).parent} {PLACE}")
    for name in ("firecracker", "jailer"):
        data = (Path(PROGRAMS) / name).read_bytes()
        rig.sh(f"cat >{PLACE}/{name}; chmod 755 {PLACE}/{name}", stdin=data)
    rig.sh("mvm bootstrap", timeout=STEP_S)
    yield
    rig.sh(f"rm -r {PLACE}; mvm bootstrap", timeout=STEP_S)


@pytest.fixture
def uplink(rig: Rig) -> Iterator[None]:
    rig.sh(UPLINK)
    yield
    rig.sh("ip link del up0")


@pytest.mark.req("O4", "S1", "S2", "L7", "H4", "H6")
def test_the_contract_of_drivers(rig: Rig, guests: Guests) -> None:
    """`tests/vm/test_firecracker_driver.py`, in the node: nothing skipped, nothing failed."""
    revision = carried.carry(rig, guests.revision)
    done = rig.mvm(
        "shell", "--cwd", carried.PLACE, "--env", f"PYTHONPATH={carried.LIBRARY}", "--env", f"MVM_FIRECRACKER={PLACE}",
        "--env", f"MVM_ARTIFACTS={revision}", "--env", "PYTHONDONTWRITEBYTECODE=1", "--",
        "/opt/mvm/bin/python", "-m", "pytest", "-p", "no:cacheprovider", "tests/vm/test_firecracker_driver.py",
        code=None, timeout=CONTRACT_S,
    )  # fmt: skip
    said = done.stdout.decode()
    assert done.returncode == 0, said[-8000:]
    passed = re.search(r"=+ (\d+) passed in ", said)  # and none skipped, which would be named beside
    assert passed, said[-2000:]
    assert int(passed[1]) >= 30


def count(mvm: Callable[[str], str], tenant: str) -> int:
    number, marker = mvm(f"tenant exec {tenant} -- cat /run/count").split()
    assert marker == "in-memory-only"
    return int(number)


@pytest.mark.req("O4", "L5", "L7", "S1", "S2", "H4", "H6", "K1", "K2", "N2")
@pytest.mark.parametrize("way", ["alone", "daemon"])
def test_a_life(rig: Rig, guests: Guests, uplink: None, way: str) -> None:
    tenant = guests.create("flint" if way == "alone" else "quartz")
    prefix = ALONE if way == "alone" else ""

    def mvm(command: str, stdin: bytes = b"") -> str:
        return rig.sh(f"{prefix}mvm {command}", stdin=stdin, timeout=STEP_S).strip()

    def secret(verb: str, value: str) -> None:
        rig.sh(f"mkdir -p -m 700 /run/given; printf {value} >/run/given/token")
        mvm(f"tenant secrets {verb} {tenant} --from-file /run/given")
        rig.sh("rm -r /run/given")

    def token() -> str:
        return mvm(f"tenant exec {tenant} -- cat /run/secrets/token")

    secret("set", "first")
    mvm(f"tenant run {tenant}")
    pid = rig.sh("pgrep -x firecracker").strip()
    group = f"/sys/fs/cgroup{rig.sh(f'cat /proc/{pid}/cgroup').strip().removeprefix('0::')}"
    assert group.startswith("/sys/fs/cgroup/mvm.slice/mvm-instances/")
    assert rig.sh(f"cat {group}/memory.swap.max").strip() == "0"
    threads = rig.sh(f"grep -h -e ^Seccomp: -e ^NoNewPrivs: /proc/{pid}/task/*/status").split()
    assert set(threads[1::2]) <= {"1", "2"}
    vmm = json.loads(rig.sh(f"{prefix}mvm node info --output json"))["vmm"]
    assert vmm["driver"] == "firecracker"
    assert vmm["why"]

    assert token() == "first"
    rig.sh("head -c 3000000 /dev/urandom >/srv/sent")
    mvm(f"tenant cp /srv/sent {tenant}:/data/kept")
    mvm(f"tenant exec {tenant} -- sync")
    rig.sh("cat >/srv/worker.py", stdin=WORKER.encode())
    mvm(f"tenant cp /srv/worker.py {tenant}:/run/worker.py")
    mvm(
        f"tenant exec {tenant} -- sh -c 'python3 /run/worker.py in-memory-only </dev/null >/dev/null 2>&1 & sleep 3'"
    )
    for turn in ("second", "third"):
        before = count(mvm, tenant)
        mvm(f"tenant sleep {tenant}")
        assert state(rig, tenant) == "sleeping"
        assert rig.sh("pgrep -x firecracker || true") == ""
        assert rig.sh("cat /sys/block/dm-*/dm/name 2>/dev/null || true") == ""
        secret("set", turn)
        mvm(f"tenant wake {tenant}")
        assert token() == turn
        assert before <= count(mvm, tenant)
        guest, node = int(mvm(f"tenant exec {tenant} -- date +%s")), int(rig.sh("date +%s"))
        assert abs(node - guest) < 60, "the clock was set after the wake"
    secret("rotate", "fourth")
    assert token() == "fourth"

    mvm(f"tenant cp {tenant}:/data/kept /srv/received")
    rig.sh("cmp /srv/sent /srv/received; rm /srv/sent /srv/received /srv/worker.py")
    assert "probes as they must be" in mvm("net verify --active")
    assert "mvm-guest: data disk formatted" in mvm(f"tenant logs {tenant}")
    mvm(f"tenant stop {tenant}")
    mvm(f"tenant destroy {tenant} --wipe-volumes --yes")
    assert rig.sh("pgrep -x firecracker || true") == ""
    assert rig.sh("ls /sys/class/net").split() == ["lo", "up0"]
    assert rig.sh("ls -d /sys/fs/cgroup/mvm.slice/mvm-instances/*/ 2>/dev/null || true") == ""
    assert rig.sh(f"grep {PLACE} /proc/self/mountinfo || true") == ""


@pytest.mark.req("O4", "H7")
def test_bootstrap_gave_the_daemon_what_the_jailer_needs(rig: Rig) -> None:
    assert rig.sh(f"cat {units.FIRECRACKER}").encode() == units.load()[units.FIRECRACKER]
    held = rig.sh(f"systemctl show --property=CapabilityBoundingSet --value {units.SERVICE}").split()
    assert {"cap_chown", "cap_dac_override", "cap_mknod"} <= set(held)


@pytest.mark.req("O4")
def test_node_info_says_which_vmm_and_why(rig: Rig) -> None:
    found = json.loads(rig.sh("mvm node info --output json"))["vmm"]
    assert found["driver"] == "firecracker"
    assert "boots with it" in found["why"], "this host was asked, by booting a guest"
    asked = json.loads(rig.sh("MVM_HOSTD= MVM_VMM=qemu mvm node info --output json"))["vmm"]
    assert (asked["driver"], asked["why"]) == ("qemu", "the settings say so")
