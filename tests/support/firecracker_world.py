"""A node whose VMM is Firecracker: the driver as it is, but for a data disk that needs no dm-crypt.

`programs` is a directory with firecracker and jailer, real or fake (`tests.support.fake_firecracker`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from tests.support.fake_firecracker import Probe, elf_kernel, install
from tests.support.world import FAKE_FILES, World, network_namespace

from mvm.core import revision as revisions
from mvm.core.plan import InstancePlan
from mvm.hostd import jailed_run
from mvm.hostd.vmm.driver import GuestMemory, Machine, Vm
from mvm.hostd.vmm.firecracker.driver import FirecrackerDriver
from mvm.hostd.vmm.firecracker.vm import FirecrackerVm

MEM_MIB = 128


class PlainDiskDriver(FirecrackerDriver):
    """Gives the VMM a file of zeros for the encrypted data disk, which only a kernel with dm-crypt opens."""

    disks: Path

    def _plain(self, machine: Machine) -> Machine:
        drives = []
        for drive in machine.drives:
            if drive.id == "data" and not drive.device:
                path = self.disks / f"{machine.name}.img"
                if not path.exists():
                    with path.open("wb") as file:
                        file.truncate(1 << 20)
                os.chown(path, machine.uid, machine.gid)
                drive = msgspec.structs.replace(drive, path=str(path), key_fd=None)
            drives.append(drive)
        return msgspec.structs.replace(machine, drives=tuple(drives))

    def start(self, machine: Machine) -> FirecrackerVm:
        return super().start(self._plain(machine))

    def restore(self, machine: Machine, memory: GuestMemory) -> FirecrackerVm:
        return super().restore(self._plain(machine), memory)


class FirecrackerWorld(World):
    driver: PlainDiskDriver

    def guest(self, plan: InstancePlan) -> Probe:
        """What a test does inside the guest of the fake."""
        place = jailed_run.find(self.paths(plan).runtime)
        assert place is not None
        return Probe(Path(f"/proc/{place.process.pid}/root/run/vsock.sock"))


class GuestProbe:
    """Implements `tests.support.driver_contract.Probe` for the fake's guest."""

    def __init__(self, world: FirecrackerWorld, plan: InstancePlan) -> None:
        self._world, self._plan = world, plan

    def begin(self, vm: Vm) -> None:
        while self.count(vm) < 5:
            pass

    def count(self, vm: Vm) -> int:
        return count(self._world, self._plan)

    def write(self, vm: Vm, text: str) -> None:
        guest = self._world.guest(self._plan)
        try:
            guest.ask("write", pages=[5000, 5001, 9000], fill=text)
        finally:
            guest.close()


def count(world: FirecrackerWorld, plan: InstancePlan) -> int:
    """How far the worker in the guest has come."""
    guest = world.guest(plan)
    try:
        return guest.count()
    finally:
        guest.close()


def break_with(programs: Path, *faults: str, version: str = "1.16.1") -> None:
    """From the next start on."""
    install(programs, faults=faults, version=version)


@contextmanager
def firecracker_world(
    programs: Path, *, balloon: bool = True, **options: object
) -> Iterator[FirecrackerWorld]:
    """`balloon`: whether guests report what they have free. `options`: for the driver."""
    base = json.loads(FAKE_FILES[revisions.FC_BASE])
    if balloon:
        base["balloon"] = {"amount_mib": 0, "deflate_on_oom": True, "free_page_reporting": True}
    files: dict[str, bytes | Path] = {
        **FAKE_FILES,
        revisions.KERNEL: elf_kernel(),
        revisions.FC_BASE: json.dumps(base).encode(),
    }
    with tempfile.TemporaryDirectory(prefix="mvm-test-") as folder, network_namespace():
        driver = PlainDiskDriver(Path(folder) / "cache", programs, **options)  # type: ignore[arg-type]
        driver.disks = Path(folder) / "disks"
        driver.disks.mkdir()
        world = FirecrackerWorld(Path(folder) / "root", driver, files, mem_mib=MEM_MIB)
        try:
            yield world
        finally:
            world.destroy_all()
