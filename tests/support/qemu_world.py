"""A node with QEMU, a guest built from the embedded flake, and a worker in it whose state is in memory only."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.world import World, network_namespace

from mvm.builder.host import HostNixBuilder
from mvm.builder.model import Artifacts, BuildRequest
from mvm.core import revision as revisions
from mvm.core.plan import InstancePlan
from mvm.hostd.guest_channel import GuestChannel, acquire_session_port, connect
from mvm.hostd.vmm.driver import Vm
from mvm.hostd.vmm.qemu.driver import QemuDriver

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path("/var/cache/mvm")
"""Where mvm itself keeps what it found out about this host; a probe of /dev/kvm takes many seconds."""
MEM_MIB = 192
BOOT_S = 180

# Counts in a variable; the file it writes is in a RAM file system. The marker is its argument, so it is in memory only.
WORKER = """
import sys, time
marker, n = sys.argv[1], 0
while True:
    n += 1
    with open("/run/count.new", "w") as out:
        out.write(f"{n} {marker}")
    import os
    os.replace("/run/count.new", "/run/count")
    time.sleep(0.05)
"""


def build() -> Artifacts:
    """The minimal guest; the nix store makes every build but the first a matter of a second."""
    return HostNixBuilder(cwd=ROOT).build(BuildRequest(flake_ref="nix/embedded", profile="minimal"))


class QemuWorld(World):
    driver: QemuDriver

    @contextmanager
    def session(self, plan: InstancePlan) -> Iterator[GuestChannel]:
        """A channel past `Host`, which would recover the instance first."""
        lease = acquire_session_port(self.paths(plan).runtime)
        with connect(lease.socket, lease=lease, deadline=time.monotonic() + 30) as channel:
            yield channel

    def run(self, plan: InstancePlan, *argv: str) -> str:
        """Standard output of a program in the guest, which must succeed."""
        out, err = bytearray(), bytearray()
        with self.session(plan) as channel:
            status = channel.exec(argv, stdout=out.extend, stderr=err.extend, timeout=60)
        assert status.code == 0, (argv, bytes(out), bytes(err))
        return out.decode()

    def start_worker(self, plan: InstancePlan, marker: str) -> None:
        with self.session(plan) as channel:
            channel.spawn(["python3", "-c", WORKER, marker])
        until = time.monotonic() + 60
        while "yes" not in self.run(plan, "sh", "-c", "test -e /run/count && echo yes; true"):
            assert time.monotonic() < until
            time.sleep(0.1)

    def count(self, plan: InstancePlan, marker: str) -> int:
        number, found = self.run(plan, "cat", "/run/count").split()
        assert found == marker, "the same worker"
        return int(number)


class QemuProbe:
    """Implements `tests.support.driver_contract.Probe`."""

    MARKER = "contract-worker"

    def __init__(self, world: QemuWorld, plan: InstancePlan) -> None:
        self._world, self._plan = world, plan

    def begin(self, vm: Vm) -> None:
        self._world.start_worker(self._plan, self.MARKER)

    def count(self, vm: Vm) -> int:
        return self._world.count(self._plan, self.MARKER)

    def write(self, vm: Vm, text: str) -> None:
        self._world.run(self._plan, "sh", "-c", 'printf "%s" "$0" > /run/written', text)


@contextmanager
def qemu_world(artifacts: Artifacts) -> Iterator[QemuWorld]:
    files: dict[str, bytes | Path] = {
        revisions.KERNEL: artifacts.kernel,
        revisions.INITRD: artifacts.initrd,
        revisions.ROOTFS: artifacts.rootfs,
        revisions.FC_BASE: artifacts.fc_base,
    }
    with tempfile.TemporaryDirectory(prefix="mvm-test-") as folder, network_namespace():
        world = QemuWorld(Path(folder) / "root", QemuDriver(CACHE), files, mem_mib=MEM_MIB)
        try:
            yield world
        finally:
            world.destroy_all()
