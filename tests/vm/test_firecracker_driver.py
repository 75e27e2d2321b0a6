"""Firecracker's own programs keep the contract of drivers, and carry a tenant's life. Opt-in: $MVM_FIRECRACKER names
the directory of firecracker and jailer, on a host with a KVM that boots guests and with dm-crypt.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.driver_contract import DriverContract, Origin, make_origin
from tests.support.qemu_world import BOOT_S, CACHE, MEM_MIB, QemuProbe, QemuWorld
from tests.support.world import network_namespace

from mvm.builder.model import Artifacts
from mvm.core import revision as revisions
from mvm.hostd.resources import dm_crypt
from mvm.hostd.vmm.firecracker.driver import FirecrackerDriver

PROGRAMS = os.environ.get("MVM_FIRECRACKER", "")
pytestmark = [
    pytest.mark.root,
    pytest.mark.vm,
    pytest.mark.skipif(not PROGRAMS, reason="MVM_FIRECRACKER names no directory of Firecracker's programs"),
]


@contextmanager
def real_world(artifacts: Artifacts) -> Iterator[QemuWorld]:
    """Skips where this host cannot."""
    driver = FirecrackerDriver(CACHE, Path(PROGRAMS))
    found = driver.acceleration(artifacts.kernel, artifacts.initrd)
    if found.accel != "kvm":
        pytest.skip(found.reason)
    if why := dm_crypt.unavailable():
        pytest.skip(f"no dm-crypt: {why}")
    files: dict[str, bytes | Path] = {
        revisions.KERNEL: artifacts.kernel,
        revisions.INITRD: artifacts.initrd,
        revisions.ROOTFS: artifacts.rootfs,
        revisions.FC_BASE: artifacts.fc_base,
    }
    with tempfile.TemporaryDirectory(prefix="mvm-test-") as folder, network_namespace():
        world = QemuWorld(Path(folder) / "root", driver, files, mem_mib=MEM_MIB)
        try:
            yield world
        finally:
            world.destroy_all()


@pytest.fixture(scope="class")
def origin(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    with real_world(artifacts) as world:
        plan = world.plan(data_disk_mib=32)
        yield make_origin(world, plan, QemuProbe(world, plan), tmp_path_factory.mktemp("origin"), BOOT_S)


class TestFirecracker(DriverContract):
    @pytest.mark.req("H6")
    def test_every_thread_is_under_its_filter(self, origin: Origin) -> None:
        assert not (origin.world.paths(origin.plan).runtime / "unfiltered").exists()


@pytest.mark.req("L1", "S1", "S2")
def test_a_life(artifacts: Artifacts) -> None:
    with real_world(artifacts) as world:
        plan, host = world.plan(data_disk_mib=32), world.host()
        host.create_instance(plan)
        world.start_worker(plan, "life")
        for _ in range(2):
            before = world.count(plan, "life")
            host.sleep_instance(plan.instance)
            world.assert_nothing_runs(plan, sleeping=True)
            host.wake_instance(plan)
            assert world.count(plan, "life") >= before
        host.stop_instance(plan.instance)
        world.assert_nothing_runs(plan)
