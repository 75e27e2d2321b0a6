"""Creating and destroying tenants.

Creating is ordered so that it can be repeated after an interruption: subnet, key, specification (from here on
the tenant exists), records. The same specification again changes nothing.

Destroying: a mark, after which nobody makes an instance of it; then instances, secrets, keys, history, subnet
(retired for ever), and last the specification and the mark, so that an interrupted destroy is finished by the next
and by nothing else. **Without `wipe_volumes` the data volumes stay, and then the
keys that open them stay too**: a tenant created again under the same name finds its data. With it the keys go,
and with them everything that was encrypted for the tenant.

The audit log and its head stay where they are, in the tenant's directory: who creates the name again continues
the chain, and `mvm audit verify` covers both lives.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mvm.core import addressing
from mvm.core.errors import Conflict, NotFound
from mvm.core.ids import InstanceId, TenantId
from mvm.core.spec import TenantSpec
from mvm.linux.files import ensure_dir, wipe
from mvm.standalone import builds, instances

if TYPE_CHECKING:
    from mvm.standalone.facade import Standalone
    from mvm.wire.executor import Progress


class Created(msgspec.Struct, frozen=True):
    """`existed`: the tenant was there already, with the same specification."""

    spec: TenantSpec
    subnet: str
    ip: str
    existed: bool


class Destroyed(msgspec.Struct, frozen=True):
    """`existed`: False if it had been destroyed before. `kept_volumes`: instances whose data disk is still
    there."""

    existed: bool
    instances: tuple[InstanceId, ...] = ()
    kept_volumes: tuple[InstanceId, ...] = ()


def create(node: Standalone, spec: TenantSpec) -> Created:
    store, tenant = node.store, spec.id
    ensure_dir(store.tenant_dir(tenant))
    with store.life_lock(tenant), node.journal.entry("tenant.create", tenant) as note:
        note.add(flake_ref=spec.flake_ref)
        with store.tenant_lock(tenant):
            # Before a subnet is taken, which would be taken for ever.
            _refuse_other(node, spec)
        with store.allocations() as (now, save):
            after, index = addressing.allocate(now, tenant, fixed_ip=spec.ip)
            if after != now:
                save(after)
        with store.tenant_lock(tenant):
            existing = _refuse_other(node, spec)
            if existing is None:
                # What an interrupted destroy may have left as its very last.
                store.unmark_destroying(tenant)
                with node.keys.create(tenant):
                    store.save_spec(spec)
            # Made once: instances that were destroyed since are `mvm tenant run`'s to make again.
            if existing is None or not (store.tenant_dir(tenant) / "instances").exists():
                asked = (existing or spec).instances()
                instances.add_records(node, existing or spec, index, asked)
            note.skip = existing is not None
        there = store.instances(tenant)
        ip = store.load_record(there[0]).network.ip if there else ""
        return Created(existing or spec, addressing.subnet(index), ip, existed=existing is not None)


def _refuse_other(node: Standalone, spec: TenantSpec) -> TenantSpec | None:
    """The tenant's present specification, if it is the one asked for; None without one. Conflict."""
    try:
        there = node.store.load_spec(spec.id)
    except NotFound:
        return None
    node.store.refuse_destroyed(spec.id)
    found = differences(there, spec)
    if found:
        raise Conflict(
            f"{spec.id} exists with another specification",
            details="\n".join(found),
            resolution=f"Show it with: mvm tenant show {spec.id}; or destroy it first: mvm tenant destroy {spec.id}",
        )
    return there


# What the pools look like is changed by `mvm pool`, so `create` again must not object to it.
_NOT_COMPARED: Final = ("pools", "schema", "id")


def differences(there: TenantSpec, asked: TenantSpec) -> list[str]:
    """`mem_mib: it has 256, asked for 512`, one line per field."""
    have: dict[str, Any] = _flat(there)
    want: dict[str, Any] = _flat(asked)
    return [
        f"{name}: it has {have[name]}, asked for {want[name]}" for name in have if have[name] != want[name]
    ]


def _flat(spec: TenantSpec) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name in TenantSpec.__struct_fields__:
        if name in _NOT_COMPARED:
            continue
        value = getattr(spec, name)
        if isinstance(value, msgspec.Struct):
            for inner in value.__struct_fields__:
                flat[f"{name}.{inner}"] = _text(getattr(value, inner))
        else:
            flat[name] = _text(value)
    return flat


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value) or "nothing"
    return str(value)


def destroy(node: Standalone, tenant: TenantId, *, wipe_volumes: bool, progress: Progress) -> Destroyed:
    if not node.store.tenant_dir(tenant).is_dir():
        node.store.load_spec(tenant)  # raises, and says what to do
    with node.store.life_lock(tenant):
        try:
            node.store.load_spec(tenant)
        except NotFound:
            kept = volumes(node, tenant)
            if not (wipe_volumes and kept):
                return Destroyed(existed=False, kept_volumes=kept)
        return _destroy(node, tenant, wipe_volumes=wipe_volumes, progress=progress)


def _destroy(node: Standalone, tenant: TenantId, *, wipe_volumes: bool, progress: Progress) -> Destroyed:
    from mvm.hostd.resources import secrets_store

    store = node.store
    home = store.tenant_dir(tenant)
    with node.journal.entry("tenant.destroy", tenant) as note:
        with store.tenant_lock(tenant):
            store.mark_destroying(tenant)
        gone = tuple(store.instances(tenant))
        affected = dict.fromkeys([*gone, *(volumes(node, tenant) if wipe_volumes else ())])
        # Nobody makes one any more, but a start that did while the mark was set may still have to take it back.
        while affected:
            for instance in affected:
                with node.journal.entry("instance.destroy", tenant, instance):
                    instances.remove(
                        node,
                        instance,
                        wipe_volumes=wipe_volumes,
                        progress=instances.named(instance, progress),
                    )
            affected = dict.fromkeys(store.instances(tenant))
        progress("deleting secrets and keys")
        with store.tenant_lock(tenant):
            wipe(home / secrets_store.STORE_NAME)
            kept = volumes(node, tenant)
            if not kept:
                node.keys.destroy(tenant)
            wipe(home / "revisions.json")
        with store.allocations() as (now, save):
            after = addressing.release(now, tenant)
            if after != now:
                save(after)
        with store.tenant_lock(tenant):
            wipe(home / "spec.json")
            store.unmark_destroying(tenant)
        kept_text = ", ".join(i.dir_name for i in kept)
        note.add(detail=f"volumes and keys kept: {kept_text}" if kept else "keys destroyed")
    builds.collect_quietly(node)
    return Destroyed(existed=True, instances=gone, kept_volumes=kept)


def volumes(node: Standalone, tenant: TenantId) -> tuple[InstanceId, ...]:
    """The instances, present or past, whose data disk, or what is left of it, is on this machine."""
    from mvm.hostd.resources import volume

    try:
        names = sorted(os.listdir(node.store.tenant_dir(tenant) / "instances"))
    except FileNotFoundError:
        return ()
    found = [InstanceId.in_dir(tenant, name) for name in names]
    return tuple(i for i in found if volume.is_there(node.store.instance_paths(i).data_disk))
