"""The daemon's lists, a page at a time: everything once, in order, whatever lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from mvm.core.ids import InstanceId, PoolId, TenantId
from mvm.core.record import encode_record, network_identity, new_record
from mvm.core.spec import encode_spec, new_tenant
from mvm.hostd.service import Service
from mvm.hostd.settings import HostLimits
from mvm.hostd.store import Store
from mvm.wire.hostd_api import LIST_ROWS, TENANT_ROWS, ListRequest, TenantsRequest

pytestmark = pytest.mark.req("H2")


@pytest.fixture
def service(tmp_path: Path) -> Service:
    store = Store(tmp_path)
    store.tenants_dir.mkdir()
    return Service(store, cast(Any, None), HostLimits(), "fake")


def add(store: Store, tenant: str, count: int, index: int) -> list[InstanceId]:
    made = [InstanceId(TenantId(tenant), PoolId("default"), n) for n in range(count)]
    store.tenant_dir(TenantId(tenant)).mkdir()
    (store.tenant_dir(TenantId(tenant)) / "spec.json").write_bytes(
        encode_spec(new_tenant(TenantId(tenant), "nix/embedded"))
    )
    for slot, instance in enumerate(made):
        paths = store.instance_paths(instance)
        paths.base.mkdir(parents=True)
        record = new_record(instance, network_identity(instance, index, slot), now_ns=1)
        paths.state.write_bytes(encode_record(record))
    return made


def test_instances_of_many_tenants(service: Service) -> None:
    expected = [
        i for n, name in enumerate(("a", "a-b", "ab", "b")) for i in add(service.store, name, 200, n + 1)
    ]
    (service.store.tenants_dir / "lost+found").mkdir()
    strange = service.store.tenants_dir / "strange"
    strange.mkdir()
    (strange / "instances").write_text("no directory")
    found: list[InstanceId] = []
    pages = 0
    while True:
        answer = service.list_instances(ListRequest(None, found[-1] if found else None))
        assert len(answer.rows) <= LIST_ROWS
        found += [row.instance for row in answer.rows]
        pages += 1
        if not answer.more:
            break
    assert found == expected
    assert pages == 4
    two = service.list_instances(ListRequest(TenantId("a-b"), expected[210]))
    assert [row.instance for row in two.rows] == expected[211:400]


def test_tenants_with_one_that_cannot_be_read(service: Service) -> None:
    names = sorted(f"t{n}" for n in range(TENANT_ROWS + 30))
    for n, name in enumerate(names):
        add(service.store, name, 0, n + 1)
    (service.store.tenant_dir(TenantId("t5")) / "spec.json").write_text("{")
    service.store.tenant_dir(TenantId("t7")).joinpath("spec.json").unlink()  # destroyed
    first = service.list_tenants(TenantsRequest())
    assert (len(first.rows), first.more) == (TENANT_ROWS, True)
    rest = service.list_tenants(TenantsRequest(first.rows[-1].tenant))
    rows = [*first.rows, *rest.rows]
    assert not rest.more
    assert [row.tenant for row in rows] == [name for name in names if name != "t7"]
    assert [row.tenant for row in rows if not row.readable] == ["t5"]
