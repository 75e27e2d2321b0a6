"""The Firecracker driver keeps the contract of drivers; shown on a strict fake of Firecracker and its jailer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.driver_contract import DriverContract, Origin, make_origin
from tests.support.fake_firecracker import install
from tests.support.firecracker_world import FirecrackerWorld, GuestProbe, firecracker_world

from mvm.hostd.vmm.driver import Driver

pytestmark = pytest.mark.root


@pytest.fixture(scope="class")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    programs = install(tmp_path_factory.mktemp("programs", numbered=True))
    with firecracker_world(programs) as world:
        plan = world.plan()
        folder = tmp_path_factory.mktemp("origin", numbered=True)
        yield make_origin(world, plan, GuestProbe(world, plan), folder, 20)


class TestFirecrackerDriver(DriverContract):
    def test_it_is_a_driver(self, origin: Origin) -> None:
        world = origin.world
        assert isinstance(world, FirecrackerWorld)
        driver: Driver = world.driver
        assert driver.version() == "1.16.1"
