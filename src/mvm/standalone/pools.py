"""Pools: groups of like instances. The specification changes first, so that what is then destroyed is no longer
asked for and an interrupted `scale` is finished by the same command again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from mvm.core.errors import Conflict, InvalidInput
from mvm.core.ids import InstanceId, PoolId, TenantId
from mvm.core.spec import PoolSpec, TenantSpec, changed, validated
from mvm.standalone import instances

if TYPE_CHECKING:
    from mvm.standalone.facade import Standalone
    from mvm.wire.executor import Progress


class PoolResult(msgspec.Struct, frozen=True):
    """`pool` as it is now, None if it is gone. `added`, `removed`: instances."""

    tenant: TenantId
    pool: PoolSpec | None
    changed: bool
    added: tuple[InstanceId, ...] = ()
    removed: tuple[InstanceId, ...] = ()


def create(node: Standalone, tenant: TenantId, pool: PoolId, fields: Mapping[str, int | None]) -> PoolResult:
    node.store.load_spec(tenant)
    wanted = PoolSpec(pool, **{name: value for name, value in fields.items() if value is not None})
    with node.journal.entry("pool.create", tenant) as note:
        note.add(detail=f"pool {pool}")
        index = node.store.load_allocations().index_of(tenant)
        with node.store.tenant_lock(tenant):
            node.store.refuse_destroyed(tenant)
            spec = node.store.load_spec(tenant)
            there = next((p for p in spec.pools if p.id == pool), None)
            if there is not None:
                _refuse_other(tenant, there, wanted)
                note.skip = True
                return PoolResult(tenant, there, changed=False)
            spec = changed(spec, pools=(*spec.pools, wanted))
            added = _of_pool(spec, pool)
            node.store.save_spec(spec)
            instances.add_records(node, spec, index, added)
            return PoolResult(tenant, wanted, changed=True, added=added)


def scale(
    node: Standalone, tenant: TenantId, pool: PoolId, count: int, *, wipe_volumes: bool, progress: Progress
) -> PoolResult:
    node.store.load_spec(tenant).pool(pool)
    with node.journal.entry("pool.scale", tenant) as note:
        note.add(detail=f"pool {pool} to {count}")
        index = node.store.load_allocations().index_of(tenant)
        with node.store.tenant_lock(tenant):
            node.store.refuse_destroyed(tenant)
            spec = node.store.load_spec(tenant)
            old = spec.pool(pool)
            new = msgspec.structs.replace(old, count=count)
            spec = validated(
                msgspec.structs.replace(spec, pools=tuple(new if p.id == pool else p for p in spec.pools))
            )
            there = node.store.instances(tenant)
            surplus = tuple(reversed([i for i in there if i.pool == pool and i.ordinal >= count]))
            added = tuple(i for i in _of_pool(spec, pool) if i not in there)
            if old != new:
                node.store.save_spec(spec)
            instances.add_records(node, spec, index, added)
        for instance in surplus:
            instances.destroy(node, instance, wipe_volumes=wipe_volumes, progress=progress)
        note.skip = old == new and not added and not surplus
        return PoolResult(tenant, new, changed=not note.skip, added=added, removed=surplus)


def destroy(
    node: Standalone, tenant: TenantId, pool: PoolId, *, wipe_volumes: bool, progress: Progress
) -> PoolResult:
    spec = node.store.load_spec(tenant)
    with node.journal.entry("pool.destroy", tenant) as note:
        note.add(detail=f"pool {pool}")
        known = any(p.id == pool for p in spec.pools)
        left_over = [i for i in node.store.instances(tenant) if i.pool == pool]
        if not known and not left_over:
            spec.pool(pool)  # raises NotFound with the pools there are
        with node.store.tenant_lock(tenant):
            node.store.refuse_destroyed(tenant)
            spec = node.store.load_spec(tenant)
            if any(p.id == pool for p in spec.pools):
                node.store.save_spec(_without(spec, pool))
            there = tuple(reversed([i for i in node.store.instances(tenant) if i.pool == pool]))
        for instance in there:
            instances.destroy(node, instance, wipe_volumes=wipe_volumes, progress=progress)
        return PoolResult(tenant, None, changed=True, removed=there)


def _without(spec: TenantSpec, pool: PoolId) -> TenantSpec:
    if len(spec.pools) == 1:
        raise Conflict(
            f"{pool} is the only pool of {spec.id}",
            details="A tenant has at least one pool.",
            resolution=f"Destroy the tenant (mvm tenant destroy {spec.id}), or its instances: "
            f"mvm pool scale {spec.id} {pool} 0",
        )
    if spec.pools[0].id == pool and (spec.ip is not None or spec.mac is not None):
        raise Conflict(
            f"{pool} holds the fixed address of {spec.id}",
            details=f"Instance {pool}-0 has {spec.ip or spec.mac}.",
            resolution=f"Keep the pool and scale it instead: mvm pool scale {spec.id} {pool} 1",
        )
    return changed(spec, pools=tuple(p for p in spec.pools if p.id != pool))


def _of_pool(spec: TenantSpec, pool: PoolId) -> tuple[InstanceId, ...]:
    return tuple(i for i in spec.instances() if i.pool == pool)


def _refuse_other(tenant: TenantId, there: PoolSpec, wanted: PoolSpec) -> None:
    if there == wanted:
        return
    lines = [
        f"{name}: it has {_text(getattr(there, name))}, asked for {_text(getattr(wanted, name))}"
        for name in PoolSpec.__struct_fields__
        if getattr(there, name) != getattr(wanted, name)
    ]
    raise Conflict(
        f"pool {there.id} of {tenant} exists with other sizes",
        details="\n".join(lines),
        resolution=f"Change the number of instances with: mvm pool scale {tenant} {there.id} COUNT",
    )


def _text(value: object) -> str:
    return "the tenant's" if value is None else str(value)


def check_count(count: int) -> int:
    """Raises InvalidInput for a negative count; the upper bound is the specification's."""
    if count < 0:
        raise InvalidInput(
            f"{count} is not a number of instances",
            details="A pool has zero or more.",
            resolution="Use 0 to have none and keep the pool.",
        )
    return count
