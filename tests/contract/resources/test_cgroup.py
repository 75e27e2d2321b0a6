"""Control groups on whatever cgroup v2 hierarchy there is, with controllers or without, and on files in their place."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.mounts import read_only

from mvm.core.errors import MissingPrerequisite, VmmError
from mvm.hostd import keeper
from mvm.hostd.resources.cgroup import SLICE, Groups, limits
from mvm.linux.machine import cgroup_version
from mvm.linux.pidfd import is_alive

pytestmark = pytest.mark.req("H5")
UID = 1_900_123_458
NAME = f"mvm-test-{os.getpid()}"
ROOT = Path("/var/lib/mvm-test")


@pytest.fixture
def groups() -> Iterator[Groups]:
    """A hierarchy that processes can be moved in; what its controllers do is for the development node to show."""
    mount = cgroup_version()[1]
    if not mount or os.geteuid() != 0:
        pytest.skip("needs a cgroup v2 mount, and root")
    there = Path(mount, "mvm.slice").exists(), Path(mount, SLICE).exists()
    found = Groups(ROOT, mount)
    leaf = found.leaf(NAME)
    try:
        leaf.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no group can be made: {error}")
    yield found
    found.remove(NAME)
    for folder, before in ((leaf.parent, there[1]), (leaf.parent.parent, there[0])):
        if not before:
            folder.rmdir()


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "logs").mkdir()
    yield tmp_path
    keeper.end_leftovers(tmp_path)


@pytest.mark.root
def test_a_vmm_is_in_its_group_and_ends_with_it(groups: Groups, runtime: Path) -> None:
    ours, theirs = socket.socketpair()
    leaf = groups.leaf(NAME)
    with ours, theirs:
        program = keeper.Program(
            ["/bin/sh", "-c", "sleep 100 & exec sleep 100"], {4: theirs.fileno()}, UID, UID, (), cgroup=leaf
        )
        vmm, parent = keeper.launch(
            program, runtime=runtime, console=ours, errors=runtime / "logs" / "vmm.log"
        )
    members = (leaf / "cgroup.procs").read_text().split()
    assert str(vmm.pid) in members
    assert str(parent.pid) not in members, "it must be there to say how its VMM ended"
    with pytest.raises(VmmError, match="not in its control group"):
        groups.verify(NAME, os.getpid())
    groups.remove(NAME)
    assert not leaf.exists()
    assert keeper.await_end(runtime)
    assert (runtime / keeper.EXIT_FILE).read_text() == str(int(signal.SIGKILL))
    groups.remove(NAME)  # once more changes nothing


@pytest.mark.root
@pytest.mark.req("L3")
def test_another_state_roots_vm_of_the_same_name_lives(groups: Groups, runtime: Path, tmp_path: Path) -> None:
    mount = cgroup_version()[1]
    other = Groups(tmp_path, mount)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = keeper.Program(
            ["/bin/sleep", "100"], {4: theirs.fileno()}, UID, UID, (), cgroup=groups.leaf(NAME)
        )
        vmm, _ = keeper.launch(program, runtime=runtime, console=ours, errors=runtime / "logs" / "vmm.log")
    assert other.leaf(NAME) != groups.leaf(NAME)
    other.leaf(NAME).mkdir()
    other.remove(NAME)
    assert not other.leaf(NAME).exists()
    assert is_alive(vmm)
    assert str(vmm.pid) in (groups.leaf(NAME) / "cgroup.procs").read_text().split()
    groups.remove(NAME)
    assert keeper.await_end(runtime)


def test_a_groups_name_tells_its_state_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to("root")
    mine, linked, other = (Groups(tmp_path / name, "/m") for name in ("root", "link", "other"))
    leaf = mine.leaf("acme--default-0").name
    assert linked.leaf("acme--default-0").name == leaf, "one root, whatever it is called"
    assert linked.vm_name(leaf) == "acme--default-0"
    assert other.vm_name(leaf) == other.vm_name("acme--default-0") == ""


@pytest.mark.root
def test_a_vmm_is_not_started_outside_its_group(runtime: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = keeper.Program(
            ["/bin/sleep", "100"], {4: theirs.fileno()}, UID, UID, (), cgroup=runtime / "no-such-group"
        )
        with pytest.raises(VmmError, match="could not be started") as caught:
            keeper.launch(program, runtime=runtime, console=ours, errors=runtime / "logs" / "vmm.log")
    assert "no-such-group" in caught.value.details


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for folder in (tmp_path, tmp_path / "mvm.slice", tmp_path / SLICE):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.subtree_control").write_text("memory\n")
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    return tmp_path


def test_controllers_are_switched_on_all_the_way_down_and_limits_written(files: Path) -> None:
    groups = Groups(ROOT, str(files))
    assert groups.available() == ""
    leaf = groups.apply("acme-default-0", limits(mem_mib=256, vcpus=2))
    for folder in (files, files / "mvm.slice", files / SLICE):
        assert (folder / "cgroup.subtree_control").read_text() == "+cpu +pids"
    assert (leaf / "memory.max").read_text() == str(512 << 20)
    assert (leaf / "cpu.max").read_text() == "200000 100000"
    assert groups.read("acme-default-0") == limits(mem_mib=256, vcpus=2)


@pytest.mark.root
def test_on_a_read_only_hierarchy_nothing_is_made_and_nothing_removed(files: Path, tmp_path: Path) -> None:
    with read_only(files) as mount:
        groups = Groups(ROOT, str(mount))
        assert groups.available() == ""
        groups.remove("acme-default-0")
        with pytest.raises(MissingPrerequisite, match="no control group") as caught:
            groups.apply("acme-default-0", limits(mem_mib=256, vcpus=2))
        assert "Read-only file system" in caught.value.details


def test_a_hierarchy_that_cannot_limit_says_so(files: Path) -> None:
    (files / "cgroup.controllers").write_text("memory hugetlb\n")
    assert Groups(ROOT, str(files)).available() == "cgroup v2 has no controller cpu, pids"
    (files / "cgroup.controllers").unlink()
    assert "cannot be read" in Groups(ROOT, str(files)).available()
    assert Groups(ROOT, "").available() == "no cgroup v2 is mounted"
    (files / SLICE / "cgroup.subtree_control").unlink()
    with pytest.raises(MissingPrerequisite, match="no control group") as caught:
        Groups(ROOT, str(files)).apply("acme-default-0", limits(mem_mib=256, vcpus=2))
    assert "cgroup.subtree_control" in caught.value.details
