"""Lists read from the documents alone."""

from __future__ import annotations

import pytest
from tests.unit.standalone.fakes import FakeNode

from mvm.core.ids import InstanceId, PoolId, TenantId
from mvm.core.lifecycle import Action
from mvm.core.spec import new_tenant
from mvm.standalone import views

ACME = TenantId("acme")


def filled(fake: FakeNode) -> None:
    node = fake.open()
    node.create(new_tenant(ACME, "nix/embedded", vcpus=2))
    node.create_pool(ACME, PoolId("web"), {"count": 2, "mem_mib": 512})
    node.create_pool(ACME, PoolId("web-1"), {"count": 1})
    node.create(new_tenant(TenantId("beta"), "nix/embedded"))
    node.build(ACME)
    node.act(ACME, Action.RUN)
    node.act(InstanceId("acme", "web", 1), Action.SLEEP)


@pytest.mark.req("L5")
def test_tenants(fake: FakeNode) -> None:
    filled(fake)
    rows = {row.tenant: row for row in views.list_tenants(str(fake.store.root))}
    assert rows["acme"].state == "3 running, 1 sleeping"
    assert (rows["acme"].instances, rows["acme"].running, rows["acme"].ip) == (4, 3, "10.240.1.2")
    assert (rows["beta"].state, rows["beta"].ip) == ("created", "10.240.2.2")


@pytest.mark.req("L5")
def test_instances_and_pools(fake: FakeNode) -> None:
    filled(fake)
    found = [(r.instance, r.state) for r in views.list_instances(fake.store, ["acme", "nobody"])]
    assert found == [
        ("acme/default-0", "running"),
        ("acme/web-0", "running"),
        ("acme/web-1", "sleeping"),
        ("acme/web-1-0", "running"),
    ]
    pools = {r.pool: (r.count, r.running, r.vcpus, r.mem_mib) for r in views.list_pools(fake.store, ["acme"])}
    assert pools == {"default": (1, 1, 2, 256), "web": (2, 1, 2, 512), "web-1": (1, 1, 2, 256)}


@pytest.mark.req("L5")
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"id":1}', b"\xff" * 10_000, b"{" * 10_000])
def test_one_damaged_document_is_one_row(fake: FakeNode, damage: bytes) -> None:
    filled(fake)
    (fake.store.tenant_dir(TenantId("beta")) / "spec.json").write_bytes(damage)
    fake.store.instance_paths(InstanceId("acme", "web", 0)).state.write_bytes(damage)
    rows = {row.tenant: row.state for row in views.list_tenants(str(fake.store.root))}
    assert rows == {"acme": "2 running, 1 unreadable, 1 sleeping", "beta": "unreadable"}
    states = [r.state for r in views.list_instances(fake.store, ["acme"])]
    assert states == ["running", "unreadable", "sleeping", "running"]


def test_what_was_destroyed_and_what_is_no_tenant_is_left_out(fake: FakeNode) -> None:
    filled(fake)
    fake.open().destroy(TenantId("beta"), wipe_volumes=True)
    (fake.store.tenants_dir / "stray").write_text("x")
    assert [row.tenant for row in views.list_tenants(str(fake.store.root))] == ["acme"]


def test_a_root_that_is_not_there_is_empty(fake: FakeNode) -> None:
    assert list(views.list_tenants(str(fake.store.root / "absent"))) == []


def test_a_document_longer_than_the_first_read_is_read_whole(fake: FakeNode) -> None:
    from mvm.core.spec import EgressRule

    rules = tuple(EgressRule(f"203.0.113.{n}/32") for n in range(200))
    fake.open().create(new_tenant(ACME, "nix/embedded", egress=rules))
    assert [row.state for row in views.list_tenants(str(fake.store.root))] == ["created"]
