"""What is checked before anything is changed, in this order; each step assumes the ones before.

    syntax      the bytes are a value of the verb's type (`mvm.wire.hostd_frames`), and a plan's derived values are the
                ones its numbers give (`check_plan`)
    permission  the peer is root or in the group; the plan is within this node's limits
    existence   the tenant, its subnet, the instance or the revision are there, and **the plan is the one that they
                give**: it is computed again from the stored specification and must be equal
    capacity    the node's limits on running instances and their memory; what the host has to give is asked again,
                under the instance's lock, by the operation itself

Syntax and permission are decided in the daemon's loop. Existence and capacity read documents, so they are decided in
the operation's own process, before it takes the instance's lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from mvm.core.errors import Conflict, InvalidInput, MvmError, NotFound, Refused, ResourceExhausted
from mvm.core.ids import InstanceId, TenantId
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan, check_plan, plan_instance
from mvm.core.record import InstanceRecord
from mvm.hostd.settings import HostLimits
from mvm.hostd.store import Store
from mvm.linux.sockets import PeerCredentials


def check_syntax(plan: InstancePlan) -> InstancePlan:
    """InvalidInput unless the plan agrees with itself."""
    return check_plan(plan)


def check_peer(peer: PeerCredentials, groups: Iterable[int], allowed_gid: int | None) -> None:
    """Refused unless it is root, or of the group."""
    if peer.uid == 0 or (allowed_gid is not None and (peer.gid == allowed_gid or allowed_gid in groups)):
        return
    raise Refused(
        "mvm-hostd does not serve this user",
        details=f"uid {peer.uid}, gid {peer.gid}",
        resolution="Use sudo, or have yourself added to the daemon's group and log in again.",
    )


def check_limits(plan: InstancePlan, limits: HostLimits) -> None:
    """Refused if the plan asks for more than this node gives one instance."""
    for name in ("vcpus", "mem_mib", "data_disk_mib"):
        wanted, most = getattr(plan, name), getattr(limits, name)
        if wanted > most:
            raise Refused(
                f"{plan.instance} may not have {name} {wanted} on this node",
                details=f"Its limit is {most}.",
                resolution="Ask for less, or have the limit in /etc/mvm/hostd.toml raised.",
            )


def check_exists(store: Store, plan: InstancePlan) -> None:
    """NotFound for a tenant, subnet or revision that is not here. Refused if the plan is not what they give."""
    tenant = plan.instance.tenant
    spec = store.load_spec(tenant)
    index = store.load_allocations().index_of(tenant)
    if plan.network.index != index:
        raise _foreign(plan, f"subnet {plan.network.index} is not the tenant's, which is {index}")
    try:
        expected = plan_instance(
            spec, plan.instance.pool, plan.instance.ordinal, plan.revision, index, plan.network.slot
        )
    except InvalidInput as error:
        raise _foreign(plan, f"{error.brief}. {error.details}") from error
    if plan != expected:
        wrong = [
            name for name in InstancePlan.__struct_fields__ if getattr(plan, name) != getattr(expected, name)
        ]
        raise _foreign(plan, f"differs in {', '.join(wrong)}")
    for other in store.instances(tenant):
        record = store.load_record(other)
        if other != plan.instance and record.network.slot == plan.network.slot:
            raise Conflict(
                f"{plan.instance} cannot have the address {plan.network.ip}",
                details=f"It belongs to {other}.",
                resolution="Make the plan with a free slot.",
            )
    record_of = _stored(store, plan.instance)
    known = {entry.revision for entry in store.load_history(tenant).entries}
    if plan.revision not in known and (record_of is None or record_of.revision != plan.revision):
        raise Refused(
            f"revision {plan.revision[:12]} is not one of {tenant}",
            details=f"It has {', '.join(sorted(r[:12] for r in known)) or 'none'}.",
            resolution=f"Build it for this tenant: mvm tenant build {tenant}",
        )
    if not (store.revisions_dir / plan.revision).is_dir():
        raise NotFound(
            f"revision {plan.revision[:12]} is not on this node",
            details=f"Looked in {store.revisions_dir}.",
            resolution=f"Build it again with: mvm tenant build {tenant}",
        )


def check_capacity(
    store: Store, plan: InstancePlan, limits: HostLimits, admitted: Iterable[InstancePlan]
) -> None:
    """ResourceExhausted if this node's limits leave no room. `admitted`: plans of operations still in progress."""
    running = {
        record.id: record.fingerprint.mem_mib if record.fingerprint is not None else 0
        for record in records(store)
        if record.state is State.RUNNING
    }
    running |= {other.instance: other.mem_mib for other in admitted}
    running.pop(plan.instance, None)
    if len(running) + 1 > limits.running:
        raise ResourceExhausted(
            f"no room for {plan.instance}",
            details=f"{len(running)} instances run or start; this node's limit is {limits.running}.",
            resolution="Put others to sleep (mvm tenant sleep), or have the limit in /etc/mvm/hostd.toml raised.",
        )
    memory = sum(running.values()) + plan.mem_mib
    if limits.running_mem_mib is not None and memory > limits.running_mem_mib:
        raise ResourceExhausted(
            f"no memory for {plan.instance}",
            details=f"{memory} MiB would be in use; this node's limit is {limits.running_mem_mib} MiB.",
            resolution="Put others to sleep (mvm tenant sleep), or have the limit in /etc/mvm/hostd.toml raised.",
        )


def tenant_names(store: Store) -> list[TenantId]:
    """Every tenant with a directory, in order: those that are being destroyed, or were, too."""
    try:
        names = sorted(os.listdir(store.tenants_dir))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        try:
            found.append(TenantId.parse(name))
        except MvmError:
            continue  # not a name we give; `doctor` says so
    return found


def all_instances(store: Store) -> list[InstanceId]:
    """Every instance with a record, of tenants that are being destroyed too."""
    found: list[InstanceId] = []
    for tenant in tenant_names(store):
        try:
            found += store.instances(tenant)
        except (MvmError, NotADirectoryError):
            continue
    return found


def records(store: Store) -> Iterator[InstanceRecord]:
    """What is recorded of every instance; one that cannot be read is left out."""
    for instance in all_instances(store):
        record = _stored(store, instance)
        if record is not None:
            yield record


def _stored(store: Store, instance: InstanceId) -> InstanceRecord | None:
    try:
        return store.load_record(instance)
    except MvmError:
        return None


def _foreign(plan: InstancePlan, why: str) -> Refused:
    return Refused(
        f"the plan for {plan.instance} is not the one that its tenant's specification gives",
        details=why,
        resolution="Make it again from the present specification, and ask again.",
    )
