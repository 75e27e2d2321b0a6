"""A tenant's life on Firecracker's own programs, jailed, in the node (nested KVM). Opt-in: $MVM_FIRECRACKER names the
directory of firecracker and jailer on this computer.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.node.conftest import Rig
from tests.node.guests import Guests

PROGRAMS = os.environ.get("MVM_FIRECRACKER", "")
pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(not PROGRAMS, reason="MVM_FIRECRACKER names no directory of Firecracker's programs"),
]
# In the command's own process, so that the daemon of the other tests stays as it is.
WITH = "export MVM_HOSTD= MVM_VMM=firecracker MVM_FIRECRACKER=/opt/firecracker; "


@pytest.mark.req("O4", "L5", "L7", "S1", "S2", "H4", "H6", "K1")
def test_a_life_on_firecracker(rig: Rig, guests: Guests) -> None:
    for name in ("firecracker", "jailer"):
        path = f"/opt/firecracker/{name}"
        program = (Path(PROGRAMS) / name).read_bytes()
        rig.sh(f"mkdir -p /opt/firecracker; cat >{path}; chmod 755 {path}", stdin=program)
    guests.create("flint")

    def mvm(command: str) -> str:
        return rig.sh(f"{WITH} mvm {command}", timeout=300).strip()

    mvm("tenant run flint")
    pid = rig.sh("pgrep -x firecracker").strip()
    assert rig.sh(f"cat /proc/{pid}/cgroup").startswith("0::/mvm.slice/mvm-instances/flint--default-0.")
    threads = rig.sh(f"grep -h -e ^Seccomp: -e ^NoNewPrivs: /proc/{pid}/task/*/status").split()
    assert set(threads[1::2]) <= {"1", "2"}
    mvm("tenant exec flint -- sh -c 'echo kept in memory >/run/memory'")
    for _ in range(2):
        mvm("tenant sleep flint")
        assert rig.sh("pgrep -x firecracker || true") == ""
        assert rig.sh("ls /sys/block | grep dm- || true") == ""
        mvm("tenant wake flint")
        assert mvm("tenant exec flint -- cat /run/memory") == "kept in memory"
        guest, node = int(mvm("tenant exec flint -- date +%s")), int(rig.sh("date +%s"))
        assert abs(node - guest) < 60, "the clock was set after the wake"
    mvm("tenant stop flint")
    mvm("tenant destroy flint --wipe-volumes --yes")
    assert rig.sh("pgrep -x firecracker || true") == ""
    assert rig.sh("ls /sys/class/net").split() == ["lo"]
    assert rig.sh("ls -d /sys/fs/cgroup/mvm.slice/mvm-instances/* 2>/dev/null || true") == ""
