"""What one instance's VMM does to a file that it shares with others is no matter to those. Nothing is booted."""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.hostd import keeper
from mvm.hostd.vmm.driver import Drive, GuestMemory, Machine
from mvm.hostd.vmm.qemu.driver import QemuDriver

pytestmark = [pytest.mark.root, pytest.mark.vm]
UID = 1_900_123_459
_F_OFD_SETLK = 37


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mvm-locks-") as folder:
        yield Path(folder)
        keeper.end_leftovers(Path(folder) / "runtime")


@pytest.mark.req("H4")
def test_a_root_file_system_that_somebody_has_locked_still_starts(place: Path) -> None:
    for name in ("runtime/logs", "jail", "cache"):
        (place / name).mkdir(parents=True)
    for name in ("vmlinux", "initrd"):
        (place / name).touch()
    rootfs = place / "rootfs"
    rootfs.write_bytes(bytes(1 << 20))
    data = place / "data"
    data.write_bytes(bytes(3 << 20))
    # All that a VMM can lock with the descriptor that it has, which is for reading.
    held = os.open(rootfs, os.O_RDONLY)
    fcntl.fcntl(held, _F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    memory = os.memfd_create("memory")
    os.truncate(memory, 64 << 20)
    machine = Machine(
        name="locks", vcpus=1, mem_mib=64, kernel=place / "vmlinux", initrd=place / "initrd", boot_args="",
        drives=(Drive("rootfs", str(rootfs), read_only=True), Drive("data", str(data), read_only=False)),
        nic=None, uid=UID, gid=UID, runtime=place / "runtime", jail=place / "jail",
    )  # fmt: skip
    os.fchown(memory, UID, UID)
    try:
        vm = QemuDriver(place / "cache").restore(
            machine, GuestMemory(memory, (), None, lambda: None, lambda: 0, lambda pid: None)
        )
        with vm.memory() as seen:
            assert seen.size == 64 << 20
        limits = Path(f"/proc/{vm.identity.pid}/limits").read_text()
        [size] = [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max file size")]
        assert size == [str(3 << 20)] * 2, "a data disk cannot be made larger than it is"
        vm.stop(0)
    finally:
        os.close(memory)
        os.close(held)
