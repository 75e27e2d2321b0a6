"""A node whose VMM is the fake one, and a look behind everybody's back at what its guests have in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_driver import FakeDriver
from tests.support.world import World, network_namespace

from mvm.core.errors import VmmError
from mvm.core.plan import InstancePlan
from mvm.core.snapshot import SleepReceipt, WakeReceipt
from mvm.linux.process import wait_readable

PAGE = 4096
MARKED_PAGE = 1000
MEM_MIB = 128


class FakeWorld(World):
    driver: FakeDriver

    def ask(self, plan: InstancePlan, command: str, **arguments: object) -> dict[str, Any]:
        record = self.record(plan)
        assert record.process is not None, f"{plan.instance} is {record.state}"
        vm = self.driver.adopt(record.process, plan.instance.vm_name, self.mem_mib, self.paths(plan).runtime)
        try:
            return vm.ask(command, **arguments)
        finally:
            vm.close()

    def count(self, plan: InstancePlan) -> int:
        """How far the guest's worker has counted; it is in guest memory and nowhere else."""
        return int(self.ask(plan, "status")["count"])

    def end_vmm(self, plan: InstancePlan, code: int) -> None:
        """The VMM exits by itself. Returns the moment it is gone, which is before its keeper has noticed."""
        process = self.record(plan).process
        assert process is not None
        handle = os.pidfd_open(process.pid)
        try:
            with pytest.raises(VmmError):
                self.ask(plan, "exit", code=code)
            assert wait_readable(handle, 10)
        finally:
            os.close(handle)

    def mark(self, plan: InstancePlan, text: str) -> None:
        self.ask(plan, "write", pages=[MARKED_PAGE, MARKED_PAGE + 77], fill=text)

    def marked(self, plan: InstancePlan, text: str) -> bool:
        found = [
            bytes.fromhex(self.ask(plan, "read", page=p)["data"]) for p in (MARKED_PAGE, MARKED_PAGE + 77)
        ]
        wanted = (text.encode() * PAGE)[:PAGE]
        return all(page == wanted for page in found)

    def sleep_receipt(self, plan: InstancePlan) -> SleepReceipt:
        receipt = self.record(plan).last_receipt
        assert isinstance(receipt, SleepReceipt)
        return receipt

    def wake_receipt(self, plan: InstancePlan) -> WakeReceipt:
        receipt = self.record(plan).last_receipt
        assert isinstance(receipt, WakeReceipt)
        return receipt


@contextmanager
def fake_world(driver: FakeDriver | None = None) -> Iterator[FakeWorld]:
    """In a network namespace of its own; whatever still runs at the end is ended."""
    with tempfile.TemporaryDirectory(prefix="mvm-test-") as folder, network_namespace():
        world = FakeWorld(Path(folder) / "root", driver or FakeDriver(), mem_mib=MEM_MIB)
        try:
            yield world
        finally:
            world.destroy_all()
