"""An instance's life with a control group, and what baseline mode does not start without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.fake_world import FakeWorld
from tests.support.mounts import read_only

from mvm.core.errors import MissingPrerequisite, VmmError
from mvm.core.ledger import Kind
from mvm.core.lifecycle import State
from mvm.hostd import jail, keeper
from mvm.hostd.host import Host
from mvm.hostd.ledger import recover_node
from mvm.hostd.operations import confinement
from mvm.hostd.resources import cgroup, dm_crypt
from mvm.hostd.resources.cgroup import SLICE, Groups, Limits
from mvm.hostd.vmm.driver import Capabilities
from mvm.linux.machine import cgroup_version

pytestmark = pytest.mark.root


class WithoutControllers(Groups):
    """Real groups that processes are in, on a hierarchy that has nothing to limit them by."""

    limits: Limits | None = None

    def available(self) -> str:
        return ""

    def apply(self, vm_name: str, wanted: Limits) -> Path:
        self.remove(vm_name)
        self.leaf(vm_name).mkdir(parents=True)
        self.limits = wanted
        return self.leaf(vm_name)

    def read(self, vm_name: str) -> Limits:
        assert self.limits is not None
        return self.limits


@pytest.fixture
def groups(world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> Iterator[WithoutControllers]:
    mount = cgroup_version()[1]
    if not mount:
        pytest.skip("needs a cgroup v2 mount")
    there = [(Path(mount, name), Path(mount, name).exists()) for name in (SLICE, "mvm.slice")]
    made = WithoutControllers(world.store.root, mount)
    try:
        made.leaf("mvm-test-probe").mkdir(parents=True)
        made.remove("mvm-test-probe")
    except OSError as error:
        pytest.skip(f"no group can be made: {error}")
    monkeypatch.setattr(cgroup, "groups", lambda root: made)
    yield made
    for folder, before in there:
        if not before and folder.exists():
            folder.rmdir()


@pytest.mark.req("H5", "L3")
def test_a_group_for_as_long_as_there_is_a_vm(world: FakeWorld, groups: WithoutControllers) -> None:
    plan, host = world.plan(), world.host()
    leaf = groups.leaf(plan.instance.vm_name)

    def inside() -> bool:
        process = world.record(plan).process
        return process is not None and str(process.pid) in (leaf / "cgroup.procs").read_text().split()

    host.create_instance(plan)
    assert inside()
    assert groups.limits == cgroup.limits(mem_mib=plan.mem_mib, vcpus=plan.vcpus)
    host.sleep_instance(plan.instance)
    assert not leaf.exists()
    host.wake_instance(plan)
    assert inside()
    host.stop_instance(plan.instance)
    assert not leaf.exists()
    host.create_instance(plan)
    host.destroy_instance(plan.instance, wipe_volumes=True)
    assert not leaf.exists()


@pytest.mark.req("H5", "L3")
@pytest.mark.parametrize("step", ["started", "committed"])
def test_recovery_removes_the_group(world: FakeWorld, groups: WithoutControllers, step: str) -> None:
    plan = world.plan()
    assert world.killed_at(step, lambda host: host.create_instance(plan))
    leaf = groups.leaf(plan.instance.vm_name)
    assert leaf.exists()
    if world.host().inspect_instance(plan.instance).state is State.RUNNING:
        world.host().stop_instance(plan.instance)
    assert not leaf.exists()


@pytest.mark.req("H5", "L3")
def test_another_state_roots_group_is_nobodys_business(
    world: FakeWorld, groups: WithoutControllers, tmp_path: Path
) -> None:
    """Two state roots on one host have a tenant of the same name each."""
    plan = world.plan()
    theirs = Groups(tmp_path, cgroup_version()[1]).leaf(plan.instance.vm_name)
    theirs.mkdir()
    try:
        world.host().create_instance(plan)
        world.host().stop_instance(plan.instance)
        report = recover_node(world.store)
        assert theirs.exists()
        assert [left.name for left in report.foreign if left.kind is Kind.CGROUP] == [
            f"{SLICE}/{theirs.name}"
        ]
    finally:
        theirs.rmdir()


@pytest.mark.req("H5")
def test_a_vmm_that_is_elsewhere_is_ended(
    world: FakeWorld, groups: WithoutControllers, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = world.plan()
    real = groups.verify

    def moved(vm_name: str, pid: int) -> None:
        (groups.leaf(vm_name).parent.parent.parent / "cgroup.procs").write_text(str(pid))
        real(vm_name, pid)

    monkeypatch.setattr(groups, "verify", moved)
    with pytest.raises(VmmError, match="not in its control group"):
        world.host().create_instance(plan)
    assert world.record(plan).state is State.FAILED
    world.assert_nothing_runs(plan)
    assert not groups.leaf(plan.instance.vm_name).exists()


@pytest.mark.req("H4", "H5", "K1")
@pytest.mark.parametrize("lacking", ["jail", "groups", "dm-crypt", "kvm"])
def test_baseline_starts_nothing_on_a_host_that_lacks_something(
    world: FakeWorld, groups: WithoutControllers, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    @contextmanager
    def refused() -> Iterator[None]:
        with monkeypatch.context() as host:
            for name, where, asked in (
                ("jail", jail, "unavailable"),
                ("dm-crypt", dm_crypt, "unavailable"),
                ("groups", groups, "available"),
            ):
                host.setattr(where, asked, lambda name=name: f"no {name} today" if name == lacking else "")
            if lacking == "kvm":
                emulated = Capabilities(incremental=True, accel="tcg", accel_reason="no kvm today")
                host.setattr(world.driver, "capabilities", lambda kernel, initrd: emulated)
            with pytest.raises(MissingPrerequisite, match="baseline mode") as caught:
                yield
        assert caught.value.details.endswith(f": no {lacking} today")

    plan = world.plan()
    baseline = Host(world.store, world.keys, world.driver, baseline=True)
    with refused():
        baseline.create_instance(plan)
    assert world.record(plan).state is State.CREATED
    world.assert_nothing_runs(plan)
    world.host().create_instance(plan)  # development mode does with what there is
    world.host().sleep_instance(plan.instance)
    with refused():
        baseline.wake_instance(plan)
    assert world.record(plan).state is State.SLEEPING


@pytest.mark.req("H4", "H5")
def test_development_mode_does_with_what_there_is_and_says_so(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here: a hierarchy that shows its controllers and is read-only, as a container's is."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("\n")
    plan = world.plan()
    with read_only(tmp_path) as mount:
        groups = Groups(world.store.root, str(mount))
        assert groups.available() == ""
        monkeypatch.setattr(cgroup, "groups", lambda root: groups)
        world.host().create_instance(plan)
        [without] = world.record(plan).unconfined
        assert without.startswith("without limits on memory, CPU and threads: ")
        assert "Read-only file system" in without
        world.host().sleep_instance(plan.instance)
        assert world.record(plan).unconfined == ()
        monkeypatch.setattr(keeper, "unjailed", lambda runtime: "unshare: Operation not permitted")
        found = world.host().wake_instance(plan).unconfined
        assert found == (without, "without a jail: unshare: Operation not permitted")
        world.host().stop_instance(plan.instance)
        assert world.record(plan).unconfined == ()
        monkeypatch.setattr(confinement, "require", lambda context, plan: None)
        with pytest.raises(MissingPrerequisite, match="no control group"):
            Host(world.store, world.keys, world.driver, baseline=True).create_instance(plan)
        world.assert_nothing_runs(plan)


@pytest.mark.req("H4")
def test_this_kernel_says_whether_it_has_jails() -> None:
    assert jail.unavailable() == ""
    assert "not permitted" in _without_rights()


def _without_rights() -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(12345, 12345, 12345)
            os.write(writer, jail.unavailable().encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    try:
        return os.read(reader, 1000).decode()
    finally:
        os.close(reader)
