"""Firecracker's own programs keep the contract of drivers, and carry a tenant's life. Opt-in: $MVM_FIRECRACKER names
the directory of firecracker and jailer, on a host with a KVM that boots guests and with dm-crypt.

`tests/node/test_firecracker.py` runs this file in the development node, where nothing can be built; $MVM_ARTIFACTS then
names the directory of a revision.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.driver_contract import DriverContract, Origin, answers, make_origin
from tests.support.qemu_world import BOOT_S, CACHE, MEM_MIB, QemuProbe, QemuWorld, build
from tests.support.world import network_namespace

from mvm.builder.model import Artifacts
from mvm.core import revision as revisions
from mvm.hostd.resources import dm_crypt
from mvm.hostd.vmm.driver import Vm
from mvm.hostd.vmm.firecracker.driver import FirecrackerDriver
from mvm.hostd.vmm.firecracker.vm import UNFILTERED_FILE
from mvm.linux.capabilities import parse_status

PROGRAMS = os.environ.get("MVM_FIRECRACKER", "")
REVISION = os.environ.get("MVM_ARTIFACTS", "")
pytestmark = [
    pytest.mark.root,
    pytest.mark.vm,
    pytest.mark.skipif(not PROGRAMS, reason="MVM_FIRECRACKER names no directory of Firecracker's programs"),
]


@pytest.fixture(scope="session")
def artifacts() -> Artifacts:
    if not REVISION:
        return build()
    folder = Path(REVISION)
    return Artifacts(
        kernel=folder / revisions.KERNEL,
        initrd=folder / revisions.INITRD,
        rootfs=folder / revisions.ROOTFS,
        fc_base=folder / revisions.FC_BASE,
        store_paths=(),
        flake_ref="nix/embedded",
        profile="minimal",
        lock_hash="",
    )


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
    def test_every_thread_is_under_its_filter(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        """Or it is said that it is not: a build against glibc may have none inside."""
        vm = restored()
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)
        note = origin.world.paths(origin.plan).runtime / UNFILTERED_FILE
        texts = [path.read_text() for path in Path(f"/proc/{vm.identity.pid}/task").glob("*/status")]
        assert {"fc_api", "fc_vcpu 0"} <= {text.split("\n")[0].removeprefix("Name:\t") for text in texts}
        statuses = [parse_status(text) for text in texts]
        assert all(status.no_new_privs for status in statuses)
        assert note.exists() == any(status.filters == 0 for status in statuses)


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
