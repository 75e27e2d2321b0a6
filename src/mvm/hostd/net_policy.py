"""The node's packet filter, kept equal to what tenants and records ask for.

Every change replaces the whole ruleset, rendered from the records of all instances on the node, so there is no
sequence of changes whose result could differ from a fresh start. `network.json` remembers what was applied and the
kernel's generation right after it: while both still hold, `ensure` has nothing to do and costs no process, and a wake
pays microseconds. Anybody's change to any rule of this network namespace ends that, and the next start or wake puts
the whole ruleset there again.

Locks: `<root>/network.lock` is taken inside an instance's lock and nothing is locked inside it. Records of other
instances are read without their locks; each is replaced atomically, and one that appears a moment later is found
missing from what was applied when it starts. A record that cannot be read gives no permission."""

from __future__ import annotations

from contextlib import AbstractContextManager

import msgspec

from mvm.core import codec, firewall
from mvm.core.errors import InvalidInput, NotFound
from mvm.core.firewall import HostNetwork, Policy, TenantNetwork
from mvm.core.ids import TenantId
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan
from mvm.core.record import InstanceRecord
from mvm.core.spec import TenantSpec
from mvm.hostd.resources import forwarding, nft_generation, nftables
from mvm.hostd.resources.nft_generation import Generation
from mvm.hostd.store import LOCK_WAIT_S, Store
from mvm.linux.files import locked, read_bounded, write_atomic

DOCUMENT = "network.json"
LOCK = "network.lock"
_DOCUMENT_BYTES = 64 << 20


class Applied(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`generation`: right after; None if something else changed rules at the same moment."""

    policy: Policy
    generation: Generation | None
    schema: int = 1


def require() -> None:
    """MissingPrerequisite where the policy could not be applied. Nothing may start without it."""
    nftables.require()


def ensure(store: Store, plan: InstancePlan) -> bool:
    """Have the rules for `plan`'s instance live before it has a tap. False if they were.

    The bridge must be there. Raises CommandFailed, and the old rules stay, if nft refuses.
    """
    forwarding.prepare_bridge(plan.network.bridge)
    with _lock(store):
        applied = load(store)
        host = forwarding.host_network()
        if applied is not None and _holds(applied, plan, host):
            return False
        now = wanted(store, host)
        now = firewall.with_guest(now, plan.network, metadata=plan.metadata, egress=plan.egress)
        _replace(store, applied, now)
        return True


def refresh(store: Store) -> bool:
    """Bring the rules to what the records say, after one was removed. False if they were there.

    With the last instance go both tables and the forwarding. Nothing is done where no rules were ever applied.
    """
    with _lock(store):
        applied = load(store)
        if applied is None:
            return False
        now = wanted(store, forwarding.host_network())
        if applied.policy == now and applied.generation == nft_generation.live():
            return False
        _replace(store, applied, now)
        return True


def wanted(store: Store, host: HostNetwork) -> Policy:
    """The policy of every instance with a record, whatever its state."""
    tenants: dict[int, TenantNetwork] = {}
    for name in store.tenants():
        spec, records = readable(store, name)
        # One tenant has one subnet; by index, so that a wrong record can at most add to its own.
        for index in {record.network.index for record in records}:
            guests = [firewall.guest_of(r.network) for r in records if r.network.index == index]
            if spec is not None and index not in tenants:
                tenants[index] = firewall.tenant_network(
                    index, guests, metadata=spec.metadata, egress=spec.egress
                )
    return firewall.policy(tenants.values(), host)


def readable(store: Store, tenant: TenantId) -> tuple[TenantSpec | None, list[InstanceRecord]]:
    """The tenant's specification and the records of its instances, without what cannot be read."""
    try:
        spec = store.load_spec(tenant)
    except (InvalidInput, NotFound):
        return None, []
    records = []
    try:
        instances = store.instances(tenant)
    except InvalidInput:
        return spec, []
    for instance in instances:
        try:
            record = store.load_record(instance)
        except (InvalidInput, NotFound):
            continue
        if record.state is not State.DESTROYED:
            records.append(record)
    return spec, records


def load(store: Store) -> Applied | None:
    """What was applied last. None if nothing was, or the document cannot be read: it is only a shortcut."""
    try:
        data = read_bounded(store.root / DOCUMENT, _DOCUMENT_BYTES)
        return codec.decode(data, Applied, limit=_DOCUMENT_BYTES, what="the applied network policy")
    except (FileNotFoundError, InvalidInput):
        return None


def _lock(store: Store) -> AbstractContextManager[int]:
    return locked(store.root / LOCK, wait=LOCK_WAIT_S)


def _holds(applied: Applied, plan: InstancePlan, host: HostNetwork) -> bool:
    if applied.generation is None or applied.generation != nft_generation.live():
        return False
    if firewall.policy((), host).host != applied.policy.host:
        return False
    now = applied.policy
    return firewall.with_guest(now, plan.network, metadata=plan.metadata, egress=plan.egress) is now


def _replace(store: Store, applied: Applied | None, now: Policy) -> None:
    """Apply, then remember. Killed in between, the generation does not match and the next one applies again."""
    before = () if applied is None else applied.policy.host.uplinks
    uplinks = now.host.uplinks if now.tenants else ()
    # An interface that ceases to be ours to restrict must cease to forward before its rule goes.
    forwarding.close_uplinks(name for name in before if name not in uplinks)
    # Before the rules, so that there is no moment in which somebody could take them for never applied.
    _save(store, Applied(now, None))
    generation = nft_generation.live()
    nftables.apply(now)
    after = nft_generation.live()
    forwarding.open_uplinks(uplinks)
    if now.tenants:
        known = after if after.is_next_after(generation) else None
        _save(store, Applied(now, known))
    else:
        (store.root / DOCUMENT).unlink(missing_ok=True)


def _save(store: Store, applied: Applied) -> None:
    write_atomic(store.root / DOCUMENT, codec.encode(applied))
