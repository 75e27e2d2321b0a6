"""The fake driver keeps the contract of drivers, and what only a fake can be made to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.driver_contract import DriverContract, Origin, answers, make_origin, page
from tests.support.fake_driver import FakeDriver, FakeVm
from tests.support.fake_world import fake_world

from mvm.core.errors import VmmError
from mvm.hostd import keeper
from mvm.hostd.bounded_log import LOG_BYTES
from mvm.hostd.vmm.driver import Driver, Vm

pytestmark = pytest.mark.root


def fake(vm: Vm) -> FakeVm:
    assert isinstance(vm, FakeVm)
    return vm


class FakeProbe:
    def begin(self, vm: Vm) -> None:
        while self.count(vm) < 5:
            pass

    def count(self, vm: Vm) -> int:
        return int(fake(vm).ask("status")["count"])

    def write(self, vm: Vm, text: str) -> None:
        fake(vm).ask("write", pages=[300, 301, 9000], fill=text)


@pytest.fixture(scope="class")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    with fake_world() as world:
        plan = world.plan()
        folder = tmp_path_factory.mktemp("origin", numbered=True)
        yield make_origin(world, plan, FakeProbe(), folder, 20)


class TestFakeDriver(DriverContract):
    def test_it_is_a_driver(self) -> None:
        driver: Driver = FakeDriver()
        assert driver.version() == "1.0"

    @pytest.mark.req("S5")
    def test_exactly_the_written_pages_are_named(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = restored()
        with vm.memory() as memory:
            assert list(memory.dirty_runs()) == []
        fake(vm).ask("write", pages=[0, 300, 301, 9000, (128 << 8) - 1], fill="x")
        with vm.memory() as memory:
            assert list(memory.dirty_runs()) == [(0, 1), (300, 2), (9000, 1), ((128 << 8) - 1, 1)]
            assert page(memory, 9000) == b"x" * 4096

    @pytest.mark.req("S1")
    def test_a_guest_that_is_paused_does_nothing(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = restored()
        before = fake(vm).ask("status")
        assert fake(vm).ask("status") == before
        with pytest.raises(AssertionError):
            answers(origin.world, origin.plan, vm, 0.1)
        vm.resume()
        answers(origin.world, origin.plan, vm, 20)

    @pytest.mark.req("L3")
    def test_a_monitor_that_hangs_is_an_error(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = fake(restored())
        vm._timeout = 0.2
        vm.close()
        with pytest.raises(VmmError):
            vm.ask("hang")

    @pytest.mark.req("L1")
    def test_the_console_log_is_bounded(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = restored()
        fake(vm).ask("console", bytes=10_000_000)
        vm.stop(0)
        logs = origin.world.paths(origin.plan).logs
        sizes = {p.name: p.stat().st_size for p in logs.glob("console.log*")}
        assert set(sizes) == {"console.log", "console.log.1"}
        assert all(size <= LOG_BYTES for size in sizes.values())
        assert logs.joinpath("console.log").read_bytes().endswith(b"x" * 99 + b"\n"), (
            "the end is what is kept"
        )

    @pytest.mark.req("L3")
    def test_a_second_vmm_in_one_place_is_refused(
        self, origin: Origin, restored: Callable[..., Vm], tmp_path: Path
    ) -> None:
        import socket

        from mvm.core.errors import Conflict

        vm = restored()
        ours, theirs = socket.socketpair()
        program = keeper.Program(["/bin/true"], {}, origin.plan.uid, origin.plan.gid, ())
        with ours, theirs, pytest.raises(Conflict, match="there already"):
            keeper.launch(
                program,
                runtime=origin.world.paths(origin.plan).runtime,
                console=ours,
                errors=tmp_path / "errors",
            )
        assert vm.is_alive()
