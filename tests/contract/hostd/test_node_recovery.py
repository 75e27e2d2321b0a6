"""Node-wide recovery against a real kernel: what nobody owns goes, what lives or is not ours stays."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.support.fake_world import FakeWorld

from mvm.cli.root import root
from mvm.core import addressing
from mvm.core.errors import Conflict, NotFound
from mvm.core.ids import InstanceId, TenantId
from mvm.core.ledger import Foreign, Kind, Lacks, Seen
from mvm.hostd import ledger
from mvm.hostd.ledger import recover_node, survey
from mvm.hostd.resources import dm_crypt, network, volume
from mvm.hostd.store import Store
from mvm.linux import device_mapper
from mvm.linux import netlink as nl
from mvm.linux.device_mapper import Device

pytestmark = pytest.mark.root

_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB


def give_out(world: FakeWorld, *names: str) -> list[int]:
    found = []
    for name in names:
        with world.store.allocations() as (now, save):
            after, index = addressing.allocate(now, TenantId(name))
            save(after)
        found.append(index)
    return found


def persistent_tap(name: str) -> int:
    """A tap that stays when its descriptor, which is returned, is closed."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), 0x2 | 0x1000))
    fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    return fd


@pytest.mark.req("L3", "L7")
def test_links_nobody_owns_are_removed(world: FakeWorld) -> None:
    (index,) = give_out(world, "acme")
    bridge, tap = addressing.bridge_name(index), addressing.tap_name(index, 0)
    network.ensure_bridge(network.BridgeSpec(bridge, addressing.gateway(index), 24))
    os.close(persistent_tap(tap))
    report = recover_node(world.store)
    assert {(a.kind, a.name) for a in report.undone} == {(Kind.TAP, tap), (Kind.BRIDGE, bridge)}
    assert world.links() == set()
    assert recover_node(world.store).clean


@pytest.mark.req("L7")
def test_what_is_not_ours_is_said_and_left(world: FakeWorld) -> None:
    index, other = give_out(world, "acme", "beta")
    never, wrong = addressing.bridge_name(4000), addressing.bridge_name(other)
    tap, bridge = addressing.tap_name(index, 5), addressing.bridge_name(index)
    network.ensure_bridge(network.BridgeSpec(never, addressing.gateway(4000), 24))
    network.ensure_bridge(network.BridgeSpec(bridge, addressing.gateway(index), 24))
    os.close(persistent_tap(wrong))  # of another kind than its name says
    # As a second state root that gave out the same number: a tap that somebody has open, on our bridge's name.
    held = network.open_tap(tap, 12345, bridge)
    before = world.links()
    try:
        report = recover_node(world.store)
        assert {(type(a), a.name) for a in report.foreign} == {
            (Foreign, never), (Foreign, wrong), (Foreign, tap), (Foreign, bridge),
        }  # fmt: skip
        assert (report.undone, report.failed) == ([], [])
        assert world.links() == before
    finally:
        os.close(held)


@pytest.mark.req("L3", "L7")
def test_a_vm_whose_record_is_gone_is_ended(world: FakeWorld) -> None:
    plan = world.plan()
    give_out(world, "acme")
    world.host().create_instance(plan)
    world.paths(plan).state.unlink()
    recover_node(world.store)
    assert (world.processes(), world.links(), world.mounts()) == ({}, set(), [])
    assert world.files(plan) <= {
        "lock", "runtime/fc.final.json", "volumes/data.img", "volumes/data.key",
    }  # fmt: skip
    assert survey(world.store) == ([], [])


@pytest.mark.req("L3")
def test_nothing_of_the_living_is_touched(world: FakeWorld) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    world.mark(plan, "alive ")
    assert recover_node(world.store).clean
    world.assert_runs(plan)
    world.host().sleep_instance(plan.instance)
    assert recover_node(world.store).clean
    world.host().wake_instance(plan)
    assert recover_node(world.store).clean
    assert world.marked(plan, "alive ")


@pytest.mark.req("L3")
def test_a_record_that_cannot_be_read_keeps_everything(world: FakeWorld) -> None:
    plan = world.plan()
    give_out(world, "acme")
    world.host().create_instance(plan)
    text = world.paths(plan).state.read_bytes()
    world.paths(plan).state.write_bytes(b"not a record")
    report = recover_node(world.store)
    assert report.undone == []
    assert {a.kind for a in report.foreign} >= {Kind.PROCESS, Kind.TAP, Kind.BRIDGE}
    world.paths(plan).state.write_bytes(text)
    assert recover_node(world.store).clean
    world.assert_runs(plan)


@pytest.mark.req("L3")
def test_what_a_running_instance_lacks_is_said(world: FakeWorld) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    with nl.Netlink() as route:
        found = route.find_link(plan.network.tap)
        assert found is not None
        route.execute([nl.Request(nl.RTM_DELLINK, 0, nl.link(found.ifindex), "remove the tap")])
    report = recover_node(world.store)
    assert report.lacks == [Lacks(plan.instance, Kind.TAP, plan.network.tap)]
    assert world.host().inspect_instance(plan.instance).process is not None


@pytest.mark.req("L3", "L7")
def test_half_written_files_are_removed(world: FakeWorld) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    world.host().stop_instance(plan.instance)
    paths = world.paths(plan)
    left = [
        world.store.root / ".tmp-allocations.json-1",
        paths.base.parent.parent / ".tmp-spec.json-2",
        paths.base / ".tmp-state.json-3",
        paths.volumes / ".tmp-data.img-4",
        paths.snapshots / ".new-00000000000000000000000000000000/segment-1",
        paths.runtime / "monitor.sock",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    shutil.copytree(paths.base, paths.base.with_name("web-3"))
    empty = paths.base.with_name("web-3")
    (empty / "state.json").unlink()
    (empty / "volumes/data.img").unlink()
    (empty / "volumes/data.key").rename(empty / "volumes/data.key.new")  # a creation that was killed
    report = recover_node(world.store)
    assert (report.failed, report.foreign) == ([], [])
    assert [path for path in left if path.exists()] == []
    assert not empty.exists()
    assert paths.data_disk.exists()
    assert recover_node(world.store).clean


@pytest.mark.req("L3", "L7", "O1")
def test_without_a_daemon_the_doctor_says_and_undoes_it(world: FakeWorld) -> None:
    index = give_out(world, "acme", "beta")[1]
    bridge, half = addressing.bridge_name(index), world.store.root / ".tmp-allocations.json-1"
    network.ensure_bridge(network.BridgeSpec(bridge, addressing.gateway(index), 24))
    half.touch()
    plan = world.plan()
    assert world.killed_at("intent", lambda host: host.create_instance(plan))

    def doctor(*words: str) -> tuple[str, list[str]]:
        done = CliRunner().invoke(
            root, ["--root", str(world.store.root), "doctor", *words, "--output", "json"]
        )
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        undone = [row["undone"]["name"] for row in rows if "undone" in row]
        return next(row["seen"] for row in rows if row.get("id") == "leftovers"), undone

    before, none = doctor()
    assert f"bridge {bridge}: no live instance holds it" in before
    assert (none, half.exists(), world.links()) == ([], True, {bridge})
    after, undone = doctor("--repair")
    assert undone == [bridge, half.name]
    assert after == "nothing is left over, and nothing is missing"
    assert (half.exists(), world.links()) == (False, set())
    assert world.record(plan).pending is None, "a step that was cut short is finished as well"


@pytest.mark.req("L3")
def test_what_cannot_be_looked_at_again_is_not_called_undone(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    (index,) = give_out(world, "acme")
    bridge, looks = addressing.bridge_name(index), 0
    network.ensure_bridge(network.BridgeSpec(bridge, addressing.gateway(index), 24))
    real = ledger.OBSERVERS["links"]

    def sees_once(store: Store) -> Iterator[Seen]:
        nonlocal looks
        looks += 1
        if looks > 1:
            raise OSError("no socket")
        return real(store)

    monkeypatch.setitem(ledger.OBSERVERS, "links", sees_once)
    report = recover_node(world.store)
    assert report.undone == []
    assert [(a.kind, a.name) for a, _ in report.failed] == [(Kind.BRIDGE, bridge)]
    assert report.blind == ["links: no socket"]
    assert world.links() == {bridge}
    monkeypatch.setitem(ledger.OBSERVERS, "links", real)
    assert [a.name for a in recover_node(world.store).undone] == [bridge]


@pytest.mark.req("L7", "K1")
def test_mappings_are_told_by_the_mark_of_their_directory(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device(name: str, kind: str = "CRYPT-LUKS2-") -> Device:
        # Below it is what the kernel says once the mount namespace it was opened in is gone.
        return Device(name, f"{kind}{'0' * 32}-{name}", "/dev/dm-0", ("/tenants/a/volumes/data.img",))

    def image(tenant: str) -> Path:
        return world.store.instance_paths(InstanceId(tenant, "x", 0)).data_disk

    theirs = dm_crypt.render_name(Path("/srv/other/data.img"), "a--x-0")
    there = [
        device(dm_crypt.render_name(image("a"), "a--x-0")),
        device(dm_crypt.render_name(image("a"), "b--x-0")),
        device(theirs),
        device("mvm-a--x-0"),
        device("mvm-swap", "LVM-"),  # somebody's volume group of our name
    ]
    monkeypatch.setattr(device_mapper, "devices", lambda: there)
    assert list(ledger.mappings(world.store)) == [
        Seen(Kind.MAPPING, "mvm-a--x-0", below_root=True),
        Seen(Kind.MAPPING, dm_crypt.render_name(image("a"), "b--x-0"), below_root=False),
        Seen(Kind.MAPPING, theirs, below_root=False),
    ]


@pytest.mark.req("L3", "K1")
@pytest.mark.parametrize("missing", ["data.key", "data.img"])
def test_half_of_a_kept_disk_is_said_and_left(world: FakeWorld, missing: str, tmp_path: Path) -> None:
    """A key lost, or an image moved away for a moment: nothing that mvm did, so nothing for it to finish."""
    plan = world.plan()
    world.host().create_instance(plan)
    world.host().destroy_instance(plan.instance, wipe_volumes=False)
    paths = world.paths(plan)
    before = {path.name: path.read_bytes() for path in paths.volumes.iterdir()}
    (paths.volumes / missing).rename(tmp_path / missing)
    for _ in range(2):
        report = recover_node(world.store)
        assert [(type(a), a.kind) for a in report.foreign] == [(Foreign, Kind.REMAINS)]
        assert (report.undone, report.failed) == ([], [])
    with pytest.raises((Conflict, NotFound)):
        world.host().create_instance(plan)
    world.host().destroy_instance(plan.instance, wipe_volumes=False)
    shutil.move(tmp_path / missing, paths.volumes / missing)
    assert {path.name: path.read_bytes() for path in paths.volumes.iterdir()} == before
    assert world.host().create_instance(plan).process is not None
    # And half of one goes as a whole does, when somebody asks for it.
    (paths.volumes / missing).rename(tmp_path / missing)
    world.host().destroy_instance(plan.instance, wipe_volumes=True)
    assert not paths.base.exists()
    assert recover_node(world.store).clean


@pytest.mark.req("L3", "K1")
def test_a_wipe_without_a_record_that_was_cut_short_is_finished(world: FakeWorld) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    world.host().destroy_instance(plan.instance, wipe_volumes=False)
    paths = world.paths(plan)
    (paths.volumes / volume.WIPING_NAME).touch()
    volume.key_path(paths.data_disk).unlink()
    assert [action.kind for action in recover_node(world.store).undone] == [Kind.REMAINS]
    assert not paths.base.exists()


@pytest.mark.req("L3")
def test_a_command_at_work_keeps_what_it_has(world: FakeWorld) -> None:
    from mvm.linux.files import locked

    plan = world.plan()
    paths = world.paths(plan)
    paths.make()
    with locked(paths.lock, wait=1):
        report = recover_node(world.store)
        assert [action.kind for action, _ in report.failed] == [Kind.REMAINS]
        assert paths.base.exists()
    assert [action.kind for action in recover_node(world.store).undone] == [Kind.REMAINS]
    assert not paths.base.exists()
