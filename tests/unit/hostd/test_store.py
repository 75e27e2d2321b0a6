"""Where things lie, what is found there, and what is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mvm.core.errors import InvalidInput, MissingPrerequisite, NotFound
from mvm.core.ids import InstanceId, TenantId
from mvm.core.record import InstanceRecord, network_identity, new_record
from mvm.core.spec import new_tenant
from mvm.hostd.store import Store

ACME = TenantId("acme")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    made = Store(tmp_path / "root")
    made.open()
    return made


def record(name: str) -> InstanceRecord:
    instance = InstanceId.parse(name)
    return new_record(instance, network_identity(instance, 1, 3), now_ns=1)


@pytest.mark.req("L4")
def test_everything_is_roots_alone(store: Store) -> None:
    store.save_spec(new_tenant(ACME, "nix/embedded"))
    store.save_record(record("acme/default-0"))
    store.instance_paths(InstanceId.parse("acme/default-0")).make()
    for path in [store.root, *store.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.req("L4")
def test_only_root_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingPrerequisite, match="root"):
        Store(tmp_path / "root").open()
    assert not (tmp_path / "root").exists()


@pytest.mark.req("L4")
def test_a_node_keeps_its_id(store: Store) -> None:
    first = store.node_id()
    assert store.node_id() == Store(store.root).node_id() == first
    (store.root / "node-id").write_text("nonsense\n")
    with pytest.raises(InvalidInput):
        store.node_id()


@pytest.mark.req("L4")
def test_documents_are_read_back(store: Store) -> None:
    spec, kept = new_tenant(ACME, "nix/embedded"), record("acme/default-0")
    store.save_spec(spec)
    store.save_record(kept)
    assert store.load_spec(ACME) == spec
    assert store.load_record(kept.id) == kept
    assert store.tenants() == [ACME]


@pytest.mark.req("L1")
def test_instances_are_found_in_order_and_only_with_a_record(store: Store) -> None:
    for name in ("acme/default-10", "acme/default-2", "acme/batch-0"):
        store.save_record(record(name))
    store.instance_paths(InstanceId.parse("acme/gone-0")).make()
    assert [str(i) for i in store.instances(ACME)] == ["acme/batch-0", "acme/default-2", "acme/default-10"]
    assert store.instances(TenantId("nobody")) == []


@pytest.mark.req("L5")
def test_what_is_not_there_says_what_to_do(store: Store) -> None:
    with pytest.raises(NotFound) as caught:
        store.load_spec(ACME)
    assert "mvm tenant create" in caught.value.resolution
    with pytest.raises(NotFound) as caught:
        store.load_record(InstanceId.parse("acme/default-0"))
    assert caught.value.resolution == "Start it with: mvm tenant run acme"


@pytest.mark.req("L4", "S4")
def test_a_record_copied_from_another_instance_is_refused(store: Store) -> None:
    store.save_record(record("acme/default-0"))
    other = store.instance_paths(InstanceId.parse("acme/default-1"))
    other.make()
    other.state.write_bytes(store.instance_paths(InstanceId.parse("acme/default-0")).state.read_bytes())
    with pytest.raises(InvalidInput, match="record of acme/default-0"):
        store.load_record(InstanceId.parse("acme/default-1"))
