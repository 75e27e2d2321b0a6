"""Snapshots that are damaged, foreign, out of order or of another machine; disks that are full; plain text on disk."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.fake_driver import FakeDriver
from tests.support.fake_world import FakeWorld

from mvm.core.errors import IntegrityError, ResourceExhausted
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan
from mvm.linux.mount import MS_NODEV, MS_NOSUID, detach, mount
from mvm.wire.hostd_api import Purpose

pytestmark = pytest.mark.root


def asleep(world: FakeWorld, tenant: str = "acme", text: str = "a marker in memory ") -> InstancePlan:
    plan = world.plan(tenant)
    world.host().create_instance(plan)
    world.mark(plan, text)
    world.host().sleep_instance(plan.instance)
    return plan


def refused(world: FakeWorld, plan: InstancePlan) -> IntegrityError:
    """The wake is refused, says what to do, changes nothing, leaves nothing."""
    with pytest.raises(IntegrityError, match="cannot be woken") as caught:
        world.host().wake_instance(plan)
    error = caught.value
    assert f"mvm instance stop {plan.instance} && mvm instance start {plan.instance}" in error.resolution
    record = world.host().inspect_instance(plan.instance)
    assert record.state is State.SLEEPING
    assert record.pending is None
    assert record.last_error == error.brief
    world.assert_nothing_runs(plan, sleeping=world.paths(plan).latest.exists())
    return error


def starts_cold(world: FakeWorld, plan: InstancePlan) -> None:
    assert world.host().stop_instance(plan.instance).state is State.STOPPED
    world.assert_nothing_runs(plan)
    assert world.host().create_instance(plan).state is State.RUNNING
    assert not world.marked(plan, "a marker in memory "), "nothing of the old memory"


def snapshot_files(world: FakeWorld, plan: InstancePlan) -> list[Path]:
    return sorted(p for p in world.paths(plan).latest.iterdir() if p.name != "working-set")


def kind(path: Path) -> str:
    return path.name.partition("-")[0]


@pytest.mark.req("S4")
@pytest.mark.parametrize("what", ["manifest", "key", "state", "segment"])
@pytest.mark.parametrize("how", ["first", "middle", "last", "cut", "empty", "gone", "longer"])
def test_a_damaged_snapshot_is_refused(world: FakeWorld, what: str, how: str) -> None:
    plan = asleep(world)
    [path] = [p for p in snapshot_files(world, plan) if kind(p) == what]
    data = bytearray(path.read_bytes())
    if how in ("first", "middle", "last"):
        data[{"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[how]] ^= 1
    elif how == "cut":
        del data[-1]
    elif how == "longer":
        data += b"\0"
    elif how == "empty":
        data.clear()
    path.unlink() if how == "gone" else path.write_bytes(data)
    refused(world, plan)
    starts_cold(world, plan)


@pytest.mark.req("S4")
def test_any_single_changed_bit_is_refused(world: FakeWorld) -> None:
    plan, rng = asleep(world), random.Random(4)
    for path in snapshot_files(world, plan):
        whole = path.read_bytes()
        for _ in range(4):
            at, bit = rng.randrange(len(whole)), rng.randrange(8)
            data = bytearray(whole)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            refused(world, plan)
        path.write_bytes(whole)
    assert world.host().wake_instance(plan).state is State.RUNNING
    assert world.marked(plan, "a marker in memory ")


@pytest.mark.req("S4")
def test_another_tenants_snapshot_is_refused(world: FakeWorld) -> None:
    mine, theirs = asleep(world), asleep(world, "rival", "secrets of the rival ")
    shutil.rmtree(world.paths(mine).latest)
    shutil.copytree(world.paths(theirs).latest, world.paths(mine).latest)
    assert "another instance" in refused(world, mine).brief
    starts_cold(world, mine)
    assert world.host().wake_instance(theirs).state is State.RUNNING
    assert world.marked(theirs, "secrets of the rival ")


@pytest.mark.req("S4")
@pytest.mark.parametrize("what", ["key", "state", "segment", "manifest"])
def test_a_part_of_another_snapshot_is_refused(world: FakeWorld, what: str) -> None:
    mine, theirs = asleep(world), asleep(world, "rival")
    [target] = [p for p in snapshot_files(world, mine) if kind(p) == what]
    [source] = [p for p in snapshot_files(world, theirs) if kind(p) == what]
    target.write_bytes(source.read_bytes())
    refused(world, mine)


@pytest.mark.req("S4")
@pytest.mark.parametrize("what", ["all", "key", "state", "manifest"])
def test_an_older_snapshot_of_the_same_instance_is_refused(
    world: FakeWorld, what: str, tmp_path: Path
) -> None:
    plan = asleep(world)
    latest, old = world.paths(plan).latest, tmp_path / "old"
    shutil.copytree(latest, old)
    world.host().wake_instance(plan)
    world.host().sleep_instance(plan.instance)
    if what == "all":
        shutil.rmtree(latest)
        shutil.copytree(old, latest)
    else:
        shutil.copyfile(old / what, latest / what)
    refused(world, plan)
    starts_cold(world, plan)


@pytest.mark.req("S4")
def test_another_vmm_version_is_named(world: FakeWorld) -> None:
    plan = asleep(world)
    with pytest.raises(IntegrityError) as caught:
        world.host(driver=FakeDriver(version="2.0")).wake_instance(plan)
    assert caught.value.details == "VMM version: sealed under 1.0, now 2.0"
    assert caught.value.kind == "fingerprint"
    assert "mvm instance stop" in caught.value.resolution
    world.assert_nothing_runs(plan, sleeping=True)
    assert world.host().wake_instance(plan).state is State.RUNNING


@pytest.mark.req("S4")
def test_another_size_and_other_artifacts_are_named(world: FakeWorld) -> None:
    from tests.support.world import FAKE_FILES, add_revision

    from mvm.core import revision as revisions

    plan = asleep(world)
    with pytest.raises(IntegrityError) as caught:
        world.host().wake_instance(world.plan(mem_mib=256))
    assert caught.value.details == "memory in MiB: sealed under 128, now 256"
    world.revision = add_revision(world.store, {**FAKE_FILES, revisions.KERNEL: b"another kernel"})
    with pytest.raises(IntegrityError) as caught:
        world.host().wake_instance(world.plan())
    assert caught.value.details.startswith("artifact kernel: sealed under ")
    world.assert_nothing_runs(plan, sleeping=True)
    assert world.host().wake_instance(plan).state is State.RUNNING


@pytest.mark.req("S4", "K2")
def test_a_snapshot_whose_tenant_key_is_gone_is_refused(world: FakeWorld) -> None:
    plan = asleep(world)
    world.keys.destroy(plan.instance.tenant)
    refused(world, plan)


@pytest.mark.req("S4")
def test_a_damaged_parent_makes_no_sleep_and_leaves_the_guest_running(world: FakeWorld) -> None:
    plan = asleep(world)
    world.host().wake_instance(plan)
    manifest = world.paths(plan).latest / "manifest"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError):
        world.host().sleep_instance(plan.instance)
    assert world.host().inspect_instance(plan.instance).state is State.RUNNING
    assert world.marked(plan, "a marker in memory ")
    manifest.write_bytes(whole)
    assert world.host().sleep_instance(plan.instance).state is State.SLEEPING


@pytest.mark.req("S1")
@pytest.mark.parametrize("lives", [1, 2])
def test_a_full_disk_during_a_sleep_leaves_the_guest_running(world: FakeWorld, lives: int) -> None:
    plan = world.plan()
    snapshots = world.paths(plan).snapshots
    world.paths(plan).make()
    mount("tmpfs", snapshots, "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,mode=0700")
    try:
        world.host().create_instance(plan)
        for _ in range(lives - 1):
            world.host().sleep_instance(plan.instance)
            world.host().wake_instance(plan)
        world.ask(plan, "noise", first=4000, count=2000)  # 8 MB
        world.mark(plan, "alive ")
        with pytest.raises(ResourceExhausted, match="no space left") as caught:
            world.host().sleep_instance(plan.instance)
        assert str(snapshots) in caught.value.resolution
        assert world.host().inspect_instance(plan.instance).state is State.RUNNING
        assert world.marked(plan, "alive ")
        assert sorted(os.listdir(snapshots)) == (["latest"] if lives == 2 else [])
        with world.host().channel(plan.instance, Purpose.EXEC) as channel:
            channel.status()
        world.host().stop_instance(plan.instance)
    finally:
        world.destroy_all_processes()
        detach(snapshots)


@pytest.mark.req("S3")
def test_no_plain_text_of_memory_is_anywhere_after_a_sleep(world: FakeWorld) -> None:
    marker = "plaintext-" + os.urandom(12).hex()
    plan = asleep(world, text=marker)
    assert holders(world.store.root, marker.encode()) == []
    assert holders(Path("/dev/shm"), marker.encode()) == []
    world.host().wake_instance(plan)
    assert world.marked(plan, marker)
    # Awake: it is in the memory of processes, still in no file.
    assert holders(world.store.root, marker.encode()) == []
    world.host().sleep_instance(plan.instance)
    assert holders(world.store.root, marker.encode()) == []
    world.host().stop_instance(plan.instance)
    world.assert_nothing_runs(plan)


def holders(folder: Path, needle: bytes) -> list[Path]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and needle in path.read_bytes():
            found.append(path)
    return found


@pytest.mark.req("S6")
@pytest.mark.parametrize("end", ["stop", "destroy"])
def test_a_snapshot_loses_its_key_first(world: FakeWorld, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvm.hostd.sealing import directory

    plan = asleep(world)
    removed: list[str] = []
    for name in ("wipe", "remove_tree"):
        real: Callable[[Path], None] = getattr(directory, name)

        def noted(path: Path, real: Callable[[Path], None] = real) -> None:
            removed.append(path.name)
            real(path)

        monkeypatch.setattr(directory, name, noted)
    if end == "stop":
        world.host().stop_instance(plan.instance)
    else:
        world.host().destroy_instance(plan.instance, wipe_volumes=False)
    assert removed[0] == "key"
    assert removed[-1] == "latest"
    assert not world.paths(plan).latest.exists()
