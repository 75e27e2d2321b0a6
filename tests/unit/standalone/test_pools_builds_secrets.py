"""Pools, builds with their history, and secrets, through the facade."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.standalone.fakes import FakeNode

from mvm.core.errors import BuildFailed, Conflict, GuestError, InvalidInput, NotFound
from mvm.core.ids import InstanceId, PoolId, RevisionId, TenantId
from mvm.core.lifecycle import Action, State
from mvm.core.spec import new_tenant
from mvm.linux.files import locked
from mvm.standalone.facade import Standalone

ACME = TenantId("acme")
WEB, DEFAULT = PoolId("web"), PoolId("default")
FIRST = InstanceId("acme", "default", 0)


@pytest.fixture
def node(fake: FakeNode) -> Standalone:
    node = fake.open()
    node.create(new_tenant(ACME, "nix/embedded"))
    return node


def pool_instances(fake: FakeNode) -> list[str]:
    return [str(i) for i in fake.store.instances(ACME) if i.pool == WEB]


@pytest.mark.req("L1", "L5")
def test_a_pool_is_made_scaled_and_destroyed(fake: FakeNode, node: Standalone) -> None:
    made = node.create_pool(ACME, WEB, {"count": 2, "mem_mib": 512, "vcpus": None})
    assert [str(i) for i in made.added] == ["acme/web-0", "acme/web-1"]
    assert not node.create_pool(ACME, WEB, {"count": 2, "mem_mib": 512}).changed
    up = node.scale_pool(ACME, WEB, 3, wipe_volumes=False)
    assert [str(i) for i in up.added] == ["acme/web-2"]
    assert not node.scale_pool(ACME, WEB, 3, wipe_volumes=False).changed
    down = node.scale_pool(ACME, WEB, 1, wipe_volumes=False)
    assert [str(i) for i in down.removed] == ["acme/web-2", "acme/web-1"]
    assert pool_instances(fake) == ["acme/web-0"]
    assert node.destroy_pool(ACME, WEB, wipe_volumes=False).pool is None
    assert pool_instances(fake) == []
    with pytest.raises(NotFound, match="has no pool web"):
        node.destroy_pool(ACME, WEB, wipe_volumes=False)


@pytest.mark.req("L5")
def test_a_pool_of_other_sizes_is_a_conflict(node: Standalone) -> None:
    node.create_pool(ACME, WEB, {"count": 1})
    with pytest.raises(Conflict) as refusal:
        node.create_pool(ACME, WEB, {"count": 1, "mem_mib": 1024})
    assert refusal.value.details == "mem_mib: it has the tenant's, asked for 1024"


@pytest.mark.req("L5")
@pytest.mark.parametrize("fields", [{"count": 300}, {"mem_mib": 1}, {"vcpus": 99}, {"count": -1}])
def test_pools_beyond_the_limits_change_nothing(
    fake: FakeNode, node: Standalone, fields: dict[str, int]
) -> None:
    before = fake.store.load_spec(ACME)
    with pytest.raises(InvalidInput):
        node.create_pool(ACME, WEB, fields)
    assert fake.store.load_spec(ACME) == before
    with pytest.raises(InvalidInput):
        node.scale_pool(ACME, DEFAULT, 254, wipe_volumes=False)
    assert fake.store.load_spec(ACME) == before


@pytest.mark.req("L5")
def test_the_last_pool_and_the_one_with_the_fixed_address_stay(fake: FakeNode, node: Standalone) -> None:
    with pytest.raises(Conflict, match="the only pool"):
        node.destroy_pool(ACME, DEFAULT, wipe_volumes=False)
    other = TenantId("fixed")
    node.create(new_tenant(other, "nix/embedded", ip="10.240.7.9"))
    node.create_pool(other, WEB, {"count": 1})
    with pytest.raises(Conflict, match="holds the fixed address"):
        node.destroy_pool(other, DEFAULT, wipe_volumes=False)
    assert fake.state("fixed/default-0") is State.CREATED


@pytest.mark.req("L3")
def test_an_interrupted_scale_down_is_finished_by_the_next(fake: FakeNode, node: Standalone) -> None:
    node.create_pool(ACME, WEB, {"count": 3})
    fake.host.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        node.scale_pool(ACME, WEB, 1, wipe_volumes=False)
    assert len(pool_instances(fake)) == 3
    done = node.scale_pool(ACME, WEB, 1, wipe_volumes=False)
    assert done.changed
    assert pool_instances(fake) == ["acme/web-0"]


@pytest.mark.req("B5")
def test_building_twice_gives_the_same_revision(fake: FakeNode, node: Standalone) -> None:
    first = node.build(ACME)
    again = node.build(ACME)
    assert first.changed
    assert not again.changed
    assert first.built.revision == again.built.revision
    assert len(fake.store.load_history(ACME).entries) == 1


@pytest.mark.req("B4", "O2")
def test_a_build_that_fails_changes_nothing(fake: FakeNode, node: Standalone) -> None:
    fake.workshop.fail = BuildFailed("did not build", details="end of the log")
    with pytest.raises(BuildFailed):
        node.build(ACME)
    assert fake.store.load_history(ACME).current is None
    assert fake.entries("acme")[-1] == ("tenant.build", "failed")


@pytest.mark.req("B6")
def test_pin_and_roll_back(fake: FakeNode, node: Standalone) -> None:
    first = node.build(ACME).built.revision
    node.pin(ACME, "github:owner/name", "cd" * 32)
    second = node.build(ACME).built.revision
    assert fake.workshop.built[-1] == ("github:owner/name", "baseline", "cd" * 32)
    assert first != second
    entry, changed = node.rollback(ACME, revision=None, steps=1)
    assert (entry.revision, changed) == (first, True)
    assert node.rollback(ACME, revision=first[:8], steps=None) == (entry, False)
    assert node.rollback(ACME, revision=second[:8], steps=None)[0].revision == second
    assert len(fake.store.load_history(ACME).entries) == 2
    assert node.pin(ACME, None).pinned is None
    for revision, steps in ((None, None), ("ff", None), (None, 9), (first, 1)):
        with pytest.raises((NotFound, InvalidInput)):
            node.rollback(ACME, revision=revision, steps=steps)


@pytest.mark.req("B6")
@pytest.mark.parametrize(
    ("ref", "lock"), [("-x", None), ("a b", None), ("x" * 2000, None), ("ok", "zz"), ("ok", "AB" * 32)]
)
def test_a_pin_must_be_of_its_form(fake: FakeNode, node: Standalone, ref: str, lock: str | None) -> None:
    with pytest.raises(InvalidInput):
        node.pin(ACME, ref, lock)
    assert fake.store.load_history(ACME).pinned is None


@pytest.mark.req("B6")
def test_rolling_back_to_what_was_deleted_says_how_to_build_it(fake: FakeNode, node: Standalone) -> None:
    first = node.build(ACME).built.revision
    node.pin(ACME, "github:owner/name")
    node.build(ACME)
    (fake.store.revisions_dir / first).rmdir()
    with pytest.raises(NotFound) as refusal:
        node.rollback(ACME, revision=None, steps=1)
    assert "mvm tenant pin acme --flake nix/embedded --lock" in refusal.value.resolution


@pytest.mark.req("B5")
def test_only_what_nothing_refers_to_is_collected(fake: FakeNode, node: Standalone) -> None:
    stray = RevisionId("ee" * 32)
    (fake.store.revisions_dir / stray).mkdir()
    first = node.build(ACME)
    assert first.collected == (stray,)
    node.act(ACME, Action.RUN)
    last = first
    for n in range(12):
        node.pin(ACME, f"github:owner/name/{n}")
        last = node.build(ACME)
    left = {p.name for p in fake.store.revisions_dir.iterdir()}
    # The ten that are listed, and the one the instance runs.
    assert len(left) == 11
    assert first.built.revision in left
    assert last.built.revision in left
    node.destroy(ACME, wipe_volumes=True)
    assert not list(fake.store.revisions_dir.iterdir())


@pytest.mark.req("B5")
def test_nothing_is_collected_while_another_build_is_under_way(fake: FakeNode, node: Standalone) -> None:
    stray = fake.store.revisions_dir / ("ee" * 32)
    stray.mkdir()
    with locked(fake.store.root / "revisions.lock", wait=1, shared=True):
        assert node.build(ACME).collected == ()
    assert stray.exists()


@pytest.mark.req("B5")
def test_nothing_is_collected_while_a_record_cannot_be_read(fake: FakeNode, node: Standalone) -> None:
    (fake.store.revisions_dir / ("ee" * 32)).mkdir()
    fake.store.instance_paths(FIRST).state.write_bytes(b"not JSON")
    assert node.build(ACME).collected == ()


@pytest.mark.req("K3")
def test_secrets_are_stored_and_handed_to_what_runs(fake: FakeNode, node: Standalone, tmp_path: Path) -> None:
    source = tmp_path / "secrets.env"
    source.write_text("TOKEN=hunter2\n")
    stored = node.set_secrets(ACME, source)
    assert (stored.version, stored.names, stored.refreshed) == (1, ("TOKEN",), ())
    assert node.rotate_secrets(ACME, None).refreshed == ()
    node.build(ACME)
    node.act(ACME, Action.RUN)
    rotated = node.rotate_secrets(ACME, None)
    assert (rotated.version, rotated.refreshed) == (3, (FIRST,))
    assert fake.host.fake_channel.calls == [("refresh", {"TOKEN": b"hunter2"})]
    sealed = (fake.store.tenant_dir(ACME) / "secrets.sealed").read_bytes()
    log = (fake.store.tenant_dir(ACME) / "audit.log").read_bytes()
    assert b"hunter2" not in sealed + log


@pytest.mark.req("K3")
def test_a_guest_that_cannot_be_refreshed_is_named(fake: FakeNode, node: Standalone, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "TOKEN").write_text("x")
    node.build(ACME)
    node.act(ACME, Action.RUN)
    fake.host.fail = GuestError("no answer")
    result = node.rotate_secrets(ACME, tmp_path / "s")
    assert result.failed == ((FIRST, "no answer"),)
    assert result.version == 1


@pytest.mark.req("K3")
def test_secrets_that_are_not_there(fake: FakeNode, node: Standalone, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no secrets"):
        node.rotate_secrets(ACME, None)
    with pytest.raises(InvalidInput, match="does not exist"):
        node.set_secrets(ACME, tmp_path / "absent")
    with pytest.raises(NotFound, match="no tenant"):
        node.set_secrets(TenantId("nobody"), tmp_path)
