"""Which VMM is chosen, and why; and that what sleeps wakes under what it slept under."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.support.fake_firecracker import elf_kernel, install
from tests.support.firecracker_world import firecracker_world

from mvm.core.errors import MissingPrerequisite, VmmError
from mvm.core.lifecycle import State
from mvm.hostd import keeper
from mvm.hostd.__main__ import _sweep_probe
from mvm.hostd.log import Log
from mvm.hostd.resources import cgroup
from mvm.hostd.settings import parse
from mvm.hostd.vmm import probe_room
from mvm.hostd.vmm.choice import Choice, VmmSettings, choose
from mvm.hostd.vmm.driver import Machine
from mvm.hostd.vmm.firecracker.driver import FirecrackerDriver
from mvm.hostd.vmm.firecracker.vm import FirecrackerVm
from mvm.hostd.vmm.qemu.driver import QemuDriver
from mvm.hostd.vmm.qemu.probe import Acceleration
from mvm.linux.process import wait_readable

pytestmark = pytest.mark.root


def firecracker(
    tmp_path: Path, *, boots: bool = True, asked: str = "auto", version: str = "1.16.1"
) -> Choice:
    programs = install(tmp_path / "programs", version=version)
    made = choose(VmmSettings(driver=asked, directory=str(programs)), tmp_path / "cache")  # type: ignore[arg-type]
    if made._firecracker is not None:
        answer = Acceleration("kvm", "it boots") if boots else Acceleration("none", "no stock kernel boots")
        made._firecracker.acceleration = lambda kernel, initrd: answer  # type: ignore[method-assign]
    return made


def test_auto_is_firecracker_where_it_boots(tmp_path: Path) -> None:
    driver, why = firecracker(tmp_path).for_start(tmp_path, tmp_path)
    assert (driver.name, why) == ("firecracker", "it boots")


def test_auto_is_qemu_where_it_does_not_and_says_why(tmp_path: Path) -> None:
    driver, why = firecracker(tmp_path, boots=False).for_start(tmp_path, tmp_path)
    assert (driver.name, why) == ("qemu", "no stock kernel boots")


def test_auto_is_qemu_without_the_programs(tmp_path: Path) -> None:
    made = choose(VmmSettings(directory=str(tmp_path)), tmp_path / "cache")
    driver, why = made.for_start(tmp_path, tmp_path)
    assert driver.name == "qemu"
    assert "not installed" in why
    assert made.names == ("qemu",)


def test_what_is_asked_for_and_missing_is_an_error(tmp_path: Path) -> None:
    made = choose(VmmSettings(driver="firecracker", directory=str(tmp_path)), tmp_path / "cache")
    with pytest.raises(MissingPrerequisite):
        made.for_start(tmp_path, tmp_path)


def test_an_old_version_is_not_chosen(tmp_path: Path) -> None:
    programs = install(tmp_path / "programs", version="1.14.4")
    made = choose(VmmSettings(directory=str(programs)), tmp_path / "cache")
    driver, why = made.for_start(tmp_path, tmp_path)
    assert driver.name == "qemu"
    assert "too old" in why


@pytest.mark.req("S4")
def test_what_sleeps_wakes_under_the_same_vmm_whatever_is_asked_for_now(tmp_path: Path) -> None:
    programs = install(tmp_path / "programs")
    with firecracker_world(programs) as world:
        plan = world.plan()
        qemu = QemuDriver(tmp_path / "cache")
        world.host().create_instance(plan)
        world.host().sleep_instance(plan.instance)
        world.host(driver=Choice("qemu", qemu, world.driver)).wake_instance(plan)  # type: ignore[arg-type]
        vmm = world.record(plan).vmm
        assert vmm is not None
        assert vmm.driver == "firecracker"
        world.host().sleep_instance(plan.instance)
        gone = world.host(driver=Choice("auto", qemu, None, "Firecracker is not installed"))  # type: ignore[arg-type]
        with pytest.raises(MissingPrerequisite):
            gone.wake_instance(plan)
        assert world.record(plan).state is State.SLEEPING
        gone.stop_instance(plan.instance)
        assert world.record(plan).state is State.STOPPED


def test_settings_name_the_vmm() -> None:
    found = parse(
        f'[vmm]\ndriver = "firecracker"\ndirectory = "/opt/fc"\nsha256 = {{ firecracker = "{"a" * 64}" }}\n'
    )
    assert (found.vmm.driver, found.vmm.directory) == ("firecracker", "/opt/fc")
    assert parse("").vmm.driver == "auto"


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the guest's vmlinux and initrd, and with programs; the fake's guest says it boots."""
    monkeypatch.setattr("mvm.hostd.vmm.firecracker.probe.MARKER", b"the fake guest boots")
    monkeypatch.setattr("mvm.hostd.vmm.firecracker.probe.PROBE_S", 5.0)
    monkeypatch.setattr("mvm.hostd.vmm.qemu.probe.KVM", "/dev/null")  # there, whatever the host has
    (tmp_path / "vmlinux").write_bytes(elf_kernel())
    (tmp_path / "initrd").write_bytes(b"an initrd")
    for name in ("vmlinux", "initrd"):
        (tmp_path / name).chmod(0o444)
    install(tmp_path / "programs")
    return tmp_path


def chosen(guest: Path) -> FirecrackerDriver:
    made = choose(VmmSettings(directory=str(guest / "programs")), guest / "cache")._firecracker
    assert made is not None
    return made


@pytest.mark.req("L3")
def test_a_start_that_failed_says_nothing_of_the_host_for_ever(
    guest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = chosen(guest)
    kernel, initrd = guest / "vmlinux", guest / "initrd"

    def fail(machine: object) -> FirecrackerVm:
        raise VmmError("the jailer failed", details="mknod: Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(driver, "start", fail)
        found = driver.acceleration(kernel, initrd)
    assert found.accel == "none"
    assert "not permitted" in found.reason
    assert driver.known(kernel) is None
    assert driver.acceleration(kernel, initrd).accel == "kvm"
    assert not (guest / "cache/probe").exists()


@pytest.mark.req("L3")
def test_a_probe_that_somebody_ended_says_nothing_of_the_host(
    guest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = chosen(guest)
    start = driver.start

    def end(machine: Machine) -> FirecrackerVm:
        vm = start(machine)
        os.kill(vm.identity.pid, signal.SIGKILL)
        return vm

    monkeypatch.setattr("mvm.hostd.vmm.firecracker.probe.MARKER", b"never said")
    monkeypatch.setattr(driver, "start", end)
    assert driver.acceleration(guest / "vmlinux", guest / "initrd").accel == "none"
    assert driver.known(guest / "vmlinux") is None


@pytest.mark.req("H4")
def test_a_probes_vmm_has_a_control_group_of_its_own(guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (guest / "hierarchy").mkdir()
    groups = FakeGroups(guest / "hierarchy")
    monkeypatch.setattr("mvm.hostd.resources.cgroup.groups", lambda root: groups)
    driver = chosen(guest)
    seen = []

    def look(machine: Machine) -> FirecrackerVm:
        seen.append((machine.cgroup, dict(groups.there)))
        raise VmmError("seen enough")

    monkeypatch.setattr(driver, "start", look)
    driver.acceleration(guest / "vmlinux", guest / "initrd")
    leaf = groups.leaf("mvm-probe")
    assert seen == [(leaf, {"mvm-probe": cgroup.limits(mem_mib=256, vcpus=1)})]
    assert groups.there == {}


@pytest.mark.req("L3", "L7")
def test_what_a_killed_probe_leaves_is_found_and_removed(
    guest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = guest / "cache"
    driver = chosen(guest)
    start = driver.start
    begun = os.eventfd(0)

    def tell(machine: Machine) -> FirecrackerVm:
        vm = start(machine)
        os.eventfd_write(begun, 1)
        return vm

    monkeypatch.setattr("mvm.hostd.vmm.firecracker.probe.MARKER", b"never said")
    monkeypatch.setattr("mvm.hostd.vmm.firecracker.probe.PROBE_S", 100.0)
    monkeypatch.setattr(driver, "start", tell)
    child = os.fork()
    if child == 0:
        driver.acceleration(guest / "vmlinux", guest / "initrd")
        os._exit(1)
    os.eventfd_read(begun)
    assert not probe_room.sweep(cache), "it is under way"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    runtime = cache / "probe/runtime"
    left = keeper.anything_left(runtime)
    assert left
    its_keeper = os.pidfd_open(left)
    _sweep_probe(cache, Log())
    assert not runtime.exists()
    assert wait_readable(its_keeper, 5.0), "it has ended"
    os.close(its_keeper)
    assert not probe_room.sweep(cache)
    os.close(begun)


class FakeGroups(cgroup.Groups):
    """A hierarchy that lets everybody."""

    def __init__(self, mount: Path) -> None:
        super().__init__(mount, str(mount))
        self.there: dict[str, cgroup.Limits] = {}

    def available(self) -> str:
        return ""

    def apply(self, vm_name: str, wanted: cgroup.Limits) -> Path:
        self.there[vm_name] = wanted
        return self.leaf(vm_name)

    def remove(self, vm_name: str) -> None:
        self.there.pop(vm_name, None)


@pytest.mark.parametrize(("marker", "accel"), [(b"the fake guest boots", "kvm"), (b"never said", "none")])
def test_whether_a_guest_boots_is_found_out_by_booting_one_in_a_jail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: bytes, accel: str
) -> None:
    monkeypatch.setattr("mvm.hostd.vmm.firecracker.probe.MARKER", marker)
    monkeypatch.setattr("mvm.hostd.vmm.firecracker.probe.PROBE_S", 5.0 if accel == "kvm" else 0.5)
    monkeypatch.setattr("mvm.hostd.vmm.qemu.probe.KVM", "/dev/null")  # there, whatever the host has
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd"
    kernel.write_bytes(elf_kernel())
    initrd.write_bytes(b"an initrd")
    for path in (kernel, initrd):
        path.chmod(0o444)
    programs = install(tmp_path / "programs")
    made = choose(VmmSettings(directory=str(programs)), tmp_path / "cache")
    assert made.known(kernel) is None
    driver, why = made.for_start(kernel, initrd)
    assert driver.name == ("firecracker" if accel == "kvm" else "qemu"), why
    again = made.known(kernel)
    assert again is not None
    assert again[0].name == driver.name
