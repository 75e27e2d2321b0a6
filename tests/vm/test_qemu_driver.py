"""QEMU keeps the contract of drivers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.driver_contract import DriverContract, Origin, answers, make_origin
from tests.support.qemu_world import BOOT_S, CACHE, QemuProbe, qemu_world

from mvm.builder.model import Artifacts
from mvm.core.errors import VmmError
from mvm.hostd.vmm.driver import Driver, Vm
from mvm.hostd.vmm.qemu.driver import QemuDriver, QemuVm

pytestmark = [pytest.mark.root, pytest.mark.vm]


@pytest.fixture(scope="class")
def origin(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    with qemu_world(artifacts) as world:
        plan = world.plan(data_disk_mib=32)
        yield make_origin(world, plan, QemuProbe(world, plan), tmp_path_factory.mktemp("origin"), BOOT_S)


class TestQemuDriver(DriverContract):
    def test_it_is_a_driver(self) -> None:
        driver: Driver = QemuDriver(CACHE)
        assert driver.version()[0].isdigit()

    @pytest.mark.req("H6")
    def test_every_thread_of_qemu_is_under_its_seccomp_filter(
        self, origin: Origin, restored: Callable[..., Vm]
    ) -> None:
        vm = restored()
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)
        tasks = list(Path(f"/proc/{vm.identity.pid}/task").iterdir())
        assert len(tasks) > 1
        for task in tasks:
            assert "\nSeccomp:\t2\n" in (task / "status").read_text(), task.name

    @pytest.mark.req("S1")
    def test_a_save_that_failed_does_not_spoil_the_next(
        self, origin: Origin, restored: Callable[..., Vm], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vm = restored()
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)
        vm.pause()
        real = QemuVm._call

        def cut_short(self: QemuVm, command: str, **arguments: object) -> object:
            if command in ("xen-save-devices-state", "remove-fd"):
                raise VmmError("on purpose")
            return real(self, command, **arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(QemuVm, "_call", cut_short)
        with pytest.raises(VmmError, match="on purpose"):
            vm.save_state()
        monkeypatch.undo()
        # As after a kill: another connection, and QEMU still has the descriptor of the save that was cut short.
        vm.close()
        assert len(vm.save_state()) > 1000
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)
        vm.pause()
        assert len(vm.save_state()) > 1000

    @pytest.mark.req("H4", "H2")
    def test_it_is_in_a_jail(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        """Its program, libraries, firmware and devices; no other process; no network, for a tap is a descriptor."""
        before = Path("/proc/self/mountinfo").read_text()
        vm = restored()
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)
        assert Path("/proc/self/mountinfo").read_text() == before
        process = Path(f"/proc/{vm.identity.pid}")
        for kind in ("mnt", "net", "pid"):
            assert os.readlink(process / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}"), kind
        assert sorted(os.listdir(process / "root" / "dev")) in (
            ["null", "urandom"],
            ["kvm", "null", "urandom"],
        )
        assert set(os.listdir(process / "root")) <= {"dev", "etc", "lib", "lib64", "proc", "usr"}
        assert os.listdir(process / "root" / "etc") == ["ld.so.cache"]
        assert [name for name in os.listdir(process / "root" / "proc") if name.isdecimal()] == ["1"]
        mounts = parse_mounts((process / "mounts").read_text())
        assert {place for place, options in mounts.items() if "rw" in options} <= {
            "/proc", "/dev/kvm", "/dev/null", "/dev/urandom",
        }  # fmt: skip
        assert all("nosuid" in options for options in mounts.values())
        links = (process / "net" / "dev").read_text()
        assert origin.plan.network.tap not in links
        assert len(links.splitlines()) == 3, "two of heading, and lo"
        assert origin.plan.network.tap in origin.world.links()


def parse_mounts(text: str) -> dict[str, list[str]]:
    """Mount point -> options."""
    return {line.split()[1]: line.split()[3].split(",") for line in text.splitlines()}
