"""What lists show a member of mvm-hostd's group: the rows of `mvm.standalone.views`, made from the daemon's answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mvm.core.ids import InstanceId
from mvm.standalone.views import UNREADABLE, InstanceRow, PoolRow, TenantRow, summary

if TYPE_CHECKING:
    from mvm.core.ids import PoolId, TenantId
    from mvm.wire.hostd_api import InstanceLine, TenantLine
    from mvm.wire.hostd_client import HostdClient


def tenants(client: HostdClient) -> Iterator[TenantRow]:
    recorded = {line.instance: line for line in client.list_instances()}
    for tenant in client.list_tenants():
        if not tenant.readable:
            yield TenantRow(tenant.tenant, UNREADABLE, 0, 0, "", 0, 0, "", "")
            continue
        asked = [
            recorded.get(InstanceId(tenant.tenant, pool.id, ordinal))
            for pool in tenant.pools
            for ordinal in range(pool.count)
        ]
        states = ["absent" if line is None else _state(line) for line in asked]
        ip = next((line.ip for line in asked if line is not None and line.state != UNREADABLE), "")
        yield TenantRow(
            tenant.tenant, summary(states), len(states), states.count("running"), tenant.profile,
            tenant.vcpus, tenant.mem_mib, ip, tenant.flake_ref,
        )  # fmt: skip


def instances(client: HostdClient, tenant: TenantId | None) -> Iterator[InstanceRow]:
    """NotFound if `tenant` is not there."""
    if tenant is not None:
        client.inspect_tenant(tenant)
    for line in client.list_instances(tenant):
        known = line.state != UNREADABLE
        ip = line.ip if known else ""
        yield InstanceRow(str(line.instance), _state(line), ip, line.revision, line.changed_ns)


def pools(client: HostdClient, tenant: TenantId | None) -> Iterator[PoolRow]:
    """NotFound if `tenant` is not there."""
    if tenant is not None:
        client.inspect_tenant(tenant)
    running = [
        (line.instance.tenant, line.instance.pool)
        for line in client.list_instances(tenant)
        if _state(line) == "running"
    ]
    for found in client.list_tenants():
        if tenant in (None, found.tenant):
            yield from _pools_of(found, running)


def _pools_of(tenant: TenantLine, running: list[tuple[TenantId, PoolId]]) -> Iterator[PoolRow]:
    for pool in tenant.pools:
        yield PoolRow(
            tenant.tenant, pool.id, pool.count, running.count((tenant.tenant, pool.id)),
            pool.vcpus or tenant.vcpus, pool.mem_mib or tenant.mem_mib,
            pool.data_disk_mib or tenant.data_disk_mib,
        )  # fmt: skip


def _state(line: InstanceLine) -> str:
    return f"{line.state} ({line.pending})" if line.pending else line.state
