"""Running, sleeping, waking, stopping and destroying instances: one, or all of a tenant's.

A verb on a tenant goes through its instances in order and stops at the first failure, except that an instance
whose state forbids the verb is skipped, with the reason, as long as another one could follow it: a tenant
with one instance asleep and one stopped can still be run. If none could, the verb is refused.

An instance gets its address when its record is made, under the tenant's lock, so two commands cannot give
one slot out twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from mvm.core.errors import Conflict, NotFound
from mvm.core.ids import InstanceId, RevisionId, TenantId
from mvm.core.lifecycle import Action, NoOp, State, plan_transition
from mvm.core.plan import InstancePlan, plan_instance, slot_for
from mvm.core.record import InstanceRecord, network_identity, new_record
from mvm.hostd.resources import volume
from mvm.hostd.store import LOCK_WAIT_S
from mvm.linux.files import ensure_dir, locked, remove_tree

if TYPE_CHECKING:
    from mvm.core.spec import TenantSpec
    from mvm.hostd.store import Store
    from mvm.standalone.facade import Standalone
    from mvm.wire.executor import Progress


class Outcome(msgspec.Struct, frozen=True):
    """What a verb did to one instance. `note`: why nothing was done, or what to know. `skipped`: the state
    forbade it."""

    record: InstanceRecord
    changed: bool
    note: str = ""
    skipped: bool = False


def act(node: Standalone, who: TenantId | InstanceId, action: Action, progress: Progress) -> list[Outcome]:
    tenant = who.tenant if isinstance(who, InstanceId) else who
    spec = node.store.load_spec(tenant)
    if isinstance(who, InstanceId):
        return [_one(node, spec, who, action, who, progress)]
    targets = _targets(node.store, spec, action)
    if len(targets) == 1:
        return [_one(node, spec, targets[0], action, who, progress)]
    done: list[Outcome] = []
    refusals: list[Conflict] = []
    for instance in targets:
        try:
            done.append(_one(node, spec, instance, action, instance, named(instance, progress)))
        except Conflict as refusal:
            record = _stored(node.store, instance)
            if record is None:
                raise
            refusals.append(refusal)
            note = f"{refusal.brief}. {refusal.resolution}"
            done.append(Outcome(record, changed=False, note=note, skipped=True))
    if len(refusals) == len(done):
        raise refusals[0]
    return done


def destroy(node: Standalone, instance: InstanceId, *, wipe_volumes: bool, progress: Progress) -> bool:
    spec = node.store.load_spec(instance.tenant)
    with node.journal.entry("instance.destroy", instance.tenant, instance) as note:
        note.add(detail="volumes wiped" if wipe_volumes else "volumes kept")
        paths = node.store.instance_paths(instance)
        before = _stored(node.store, instance)
        if before is None and not (wipe_volumes and volume.is_there(paths.data_disk)):
            if all(pool.id != instance.pool for pool in spec.pools) and not paths.base.exists():
                spec.pool(instance.pool)  # raises: more likely a slip than a second try
            note.skip = True
            return False
        if before is not None:
            note.add(**facts(before))
        remove(node, instance, wipe_volumes=wipe_volumes, progress=progress)
        return True


def remove(node: Standalone, instance: InstanceId, *, wipe_volumes: bool, progress: Progress) -> None:
    """Destroy it; also the volume that an earlier destroy of it left, which has no record any more."""
    node.host.destroy_instance(instance, wipe_volumes=wipe_volumes, progress=progress)
    paths = node.store.instance_paths(instance)
    if not wipe_volumes or not volume.is_there(paths.data_disk):
        return
    with locked(paths.lock, wait=LOCK_WAIT_S):
        # Not if somebody has made it anew in the meantime: the volume is that one's now.
        if not paths.state.exists():
            progress("wiping the volume")
            volume.wipe(paths.data_disk)
            remove_tree(paths.base)


def add_records(node: Standalone, spec: TenantSpec, index: int, wanted: Iterable[InstanceId]) -> None:
    """Give every wanted instance that has none a record, and with it an address. The caller holds the
    tenant's lock. Conflict if the tenant is being destroyed."""
    node.store.refuse_destroyed(spec.id)
    taken = {i: node.store.load_record(i).network.slot for i in node.store.instances(spec.id)}
    for instance in wanted:
        if instance in taken:
            continue
        slot = slot_for(spec, instance, index, frozenset(taken.values()))
        mac = spec.mac if spec.holds_fixed_address(instance) else None
        network = network_identity(instance, index, slot, mac=mac)
        paths = node.store.instance_paths(instance)
        ensure_dir(paths.base.parent)
        ensure_dir(paths.base)
        with locked(paths.lock, wait=LOCK_WAIT_S):
            node.store.save_record(new_record(instance, network, now_ns=node.clock()))
        taken[instance] = slot


def facts(record: InstanceRecord) -> dict[str, Any]:
    """What the audit log says of an instance, as far as its record knows it."""
    known: dict[str, Any] = {"ip": record.network.ip, "mac": record.network.mac}
    if record.revision is not None:
        known["revision"] = record.revision
    if record.snapshot is not None:
        known["snapshot_hash"] = record.snapshot.manifest_sha256
    return known


def _targets(store: Store, spec: TenantSpec, action: Action) -> list[InstanceId]:
    there = store.instances(spec.id)
    if action is Action.RUN:
        there = list(dict.fromkeys([*spec.instances(), *(i for i in there if _asked_for(spec, i))]))
    if not there:
        pool = spec.pools[0].id
        raise Conflict(
            f"{spec.id} has no instance",
            details="Its pools ask for none." if not spec.instances() else "They were destroyed.",
            resolution=f"Run it with: mvm tenant run {spec.id}"
            if spec.instances()
            else f"Scale a pool up with: mvm pool scale {spec.id} {pool} 1",
        )
    return there


def _asked_for(spec: TenantSpec, instance: InstanceId) -> bool:
    return any(pool.id == instance.pool and instance.ordinal < pool.count for pool in spec.pools)


def _stored(store: Store, instance: InstanceId) -> InstanceRecord | None:
    try:
        return store.load_record(instance)
    except NotFound:
        return None


def named(instance: InstanceId, progress: Progress) -> Progress:
    return lambda phase: progress(f"{instance.dir_name}: {phase}")


def _one(
    node: Standalone,
    spec: TenantSpec,
    instance: InstanceId,
    action: Action,
    who: TenantId | InstanceId,
    progress: Progress,
) -> Outcome:
    """`who`: what the user named, for the messages."""
    with node.journal.entry(f"instance.{action}", instance.tenant, instance) as note:
        before = _stored(node.store, instance)
        verb = _verb(node, spec, instance, action, who, before, progress)
        try:
            after = verb()
        except Conflict:
            # The executor names the instance; somebody who named the tenant gets advice that names it too.
            now = _stored(node.store, instance)
            if now is not None and now.pending is None:
                plan_transition(now.state, action, who)
            raise
        changed = before is None or after.generation != before.generation
        note.skip = not changed
        note.add(**facts(after))
        if action in (Action.RUN, Action.WAKE):
            note.add(**_final_config(node.store, instance))
        return Outcome(after, changed=changed, note="" if changed else _why_nothing(node, after, action))


def _verb(
    node: Standalone,
    spec: TenantSpec,
    instance: InstanceId,
    action: Action,
    who: TenantId | InstanceId,
    before: InstanceRecord | None,
    progress: Progress,
) -> Callable[[], InstanceRecord]:
    if action is Action.RUN:
        revision = node.store.load_history(instance.tenant).current_entry().revision
        plan = _plan(node, spec, instance, revision, before)
        return lambda: node.host.create_instance(plan, progress)
    if before is None:
        node.store.load_record(instance)  # raises NotFound with what to do
    assert before is not None
    if action is Action.WAKE:
        if before.revision is None:
            plan_transition(before.state, action, who)
        # Of the revision that its memory belongs to, whatever the tenant's current one is by now.
        plan = _plan(node, spec, instance, before.revision or _none_started(instance), before)
        return lambda: node.host.wake_instance(plan, progress)
    if action is Action.SLEEP:
        return lambda: node.host.sleep_instance(instance, progress)
    assert action is Action.STOP
    return lambda: node.host.stop_instance(instance, progress)


def _none_started(instance: InstanceId) -> RevisionId:
    raise Conflict(
        f"{instance} was never started from a revision",
        details="Its record names none.",
        resolution=f"Start it with: mvm instance start {instance}",
    )


def _plan(
    node: Standalone,
    spec: TenantSpec,
    instance: InstanceId,
    revision: RevisionId,
    record: InstanceRecord | None,
) -> InstancePlan:
    if record is None:
        index = node.store.load_allocations().index_of(spec.id)
        # A plan for what the pools do not ask for must fail before an address is given out.
        plan_instance(
            spec, instance.pool, instance.ordinal, revision, index, _any_slot(spec, instance, index)
        )
        slot = node.reserve(spec, instance, index)
    else:
        index, slot = record.network.index, record.network.slot
    return plan_instance(spec, instance.pool, instance.ordinal, revision, index, slot)


def reserve(node: Standalone, spec: TenantSpec, instance: InstanceId, index: int) -> int:
    """A slot for an instance that has no record, which it has then."""
    with node.store.tenant_lock(spec.id):
        add_records(node, spec, index, [instance])
    return node.store.load_record(instance).network.slot


def _any_slot(spec: TenantSpec, instance: InstanceId, index: int) -> int:
    return slot_for(spec, instance, index, frozenset())


def _why_nothing(node: Standalone, record: InstanceRecord, action: Action) -> str:
    rule = plan_transition(record.state, action, record.id)
    note = rule.note if isinstance(rule, NoOp) else f"is {record.state}"
    if action is Action.RUN and record.state is State.RUNNING:
        current = node.store.load_history(record.id.tenant).current
        if current is not None and record.revision is not None and current != record.revision:
            note += (
                f", from revision {record.revision[:12]}; the current one is {current[:12]}: to use it, stop the "
                "instance and start it again"
            )
    return note


def _final_config(store: Store, instance: InstanceId) -> dict[str, Any]:
    try:
        data = store.instance_paths(instance).fc_config.read_bytes()
    except OSError:
        return {}
    return {"final_config_hash": hashlib.sha256(data).hexdigest()}
