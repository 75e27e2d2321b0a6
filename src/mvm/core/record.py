"""What is known about an instance: `state.json`, one document per instance.

A record is a value; the functions here return the next one and the caller persists it. The order is always

    begin      intent set, `state` still the old one        persisted before the first effect
    (effects)  `commit` at the step's commit point          persisted as soon as it is passed
    finish     the step's success, intent cleared           persisted after the last effect
    or `end`   another state, with the reason, intent cleared

so a record that holds an intent was interrupted and must be recovered (`mvm.core.lifecycle.settle`, then
`end`) before anything else is done with the instance. `generation` goes up by one with every one of these,
which makes two copies of a record comparable. The record is the instance's entry in the ledger as well: `holds`
is all that the host may have of it (`mvm.core.ledger`), set by `begin` of a step that makes such things and
cleared with the change to a state that has none, so writing it down costs nothing. Times are nanoseconds since 1970
and come from the caller.

Rules, checked on every decode: `sleeping` has a snapshot, `created`, `stopped` and `destroyed` have none;
addresses and names are the ones that index and slot give; an intent is one the table knows for this state; what
neither runs nor is in the middle of anything holds nothing.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.core import addressing, codec, ledger, limits
from mvm.core.errors import Conflict, InvalidInput
from mvm.core.ids import InstanceId, RevisionId, SnapshotId
from mvm.core.lifecycle import TRANSITIONS, Action, Intent, State, Step
from mvm.core.snapshot import Count, Fingerprint, Name, Nanoseconds, Receipt, SnapshotRef

SCHEMA: Final = 1


class NetworkIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An instance's place on its tenant's network. Made by `network_identity`."""

    index: addressing.SubnetIndex
    slot: addressing.Slot
    bridge: str
    tap: str
    gateway: str
    prefix: Annotated[int, Meta(ge=addressing.PREFIX, le=addressing.PREFIX)]
    ip: str
    mac: str

    @property
    def cidr(self) -> str:
        """`10.240.1.2/24`"""
        return f"{self.ip}/{self.prefix}"


def network_identity(
    instance: InstanceId, index: int, slot: int, *, mac: str | None = None
) -> NetworkIdentity:
    """All names and addresses of `instance`; `mac` if the tenant fixed one. Raises InvalidInput."""
    return NetworkIdentity(
        index=index,
        slot=slot,
        bridge=addressing.bridge_name(index),
        tap=addressing.tap_name(index, slot),
        gateway=addressing.gateway(index),
        prefix=addressing.PREFIX,
        ip=addressing.instance_ip(index, slot),
        mac=addressing.instance_mac(instance) if mac is None else addressing.parse_mac(mac),
    )


class ProcessIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One process and no other: a pid alone is reused. `start_ticks`: field 22 of /proc/<pid>/stat;
    `boot_id`: of the boot the ticks count from."""

    pid: Annotated[int, Meta(ge=1, le=2**22)]
    start_ticks: Count
    boot_id: Annotated[str, Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]


class VmmIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`driver`: `qemu`, `firecracker`, `fake`."""

    driver: Name
    version: Name


class Pending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The step in progress. `snapshot`: the one being made (sleep) or restored (wake)."""

    action: Action
    intent: Intent
    started_ns: Nanoseconds
    committed: bool = False
    snapshot: SnapshotId | None = None


Lacking = Annotated[str, Meta(min_length=1, max_length=limits.MESSAGE_MAX)]
"""What a VMM runs without, and why: `without a jail: Operation not permitted`."""
Lackings = Annotated[tuple[Lacking, ...], Meta(max_length=8)]


class InstanceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: InstanceId
    state: State
    network: NetworkIdentity
    created_ns: Nanoseconds
    changed_ns: Nanoseconds  # of the last change of `state`
    generation: Count = 0
    pending: Pending | None = None
    revision: RevisionId | None = None  # what it was last started from
    vmm: VmmIdentity | None = None
    process: ProcessIdentity | None = None
    snapshot: SnapshotRef | None = None
    fingerprint: Fingerprint | None = None  # of the running VMM, or of the snapshot
    last_receipt: Receipt | None = None
    holds: ledger.Holds = ()
    unconfined: Lackings = ()  # of the running VMM; only ever in development mode
    last_error: Annotated[str, Meta(max_length=limits.MESSAGE_MAX)] = ""
    schema: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA


def new_record(instance: InstanceId, network: NetworkIdentity, *, now_ns: int) -> InstanceRecord:
    return InstanceRecord(
        id=instance, state=State.CREATED, network=network, created_ns=now_ns, changed_ns=now_ns
    )


def begin(
    record: InstanceRecord, step: Step, *, now_ns: int, snapshot: SnapshotId | None = None
) -> InstanceRecord:
    """Set the intent. Raises Conflict if another step is in progress or the step starts elsewhere."""
    if record.pending is not None:
        raise Conflict(
            f"{record.id} was interrupted while {record.pending.intent}",
            details=f"Asked to {step.action} before that was recovered.",
            resolution=f"Recover it first; any command on it does so: mvm instance show {record.id}",
        )
    if record.state is not step.source:
        raise Conflict(
            f"{record.id} is {record.state}, not {step.source}",
            details=f"Asked to {step.action}.",
            resolution="Read the record again and plan from what it says.",
        )
    pending = Pending(action=step.action, intent=step.intent, started_ns=now_ns, snapshot=snapshot)
    if step.success is State.RUNNING:
        return _next(record, pending=pending, holds=entitled(record))
    return _next(record, pending=pending)


def entitled(record: InstanceRecord) -> ledger.Holds:
    """What the host may have of this instance while it has a VM."""
    return ledger.entitled(record.id, bridge=record.network.bridge, tap=record.network.tap)


def commit(record: InstanceRecord) -> InstanceRecord:
    """The step in progress passed its commit point. Doing it twice changes nothing more."""
    pending = _pending(record)
    return (
        record
        if pending.committed
        else _next(record, pending=msgspec.structs.replace(pending, committed=True))
    )


def note(
    record: InstanceRecord,
    *,
    process: ProcessIdentity | None = None,
    vmm: VmmIdentity | None = None,
    revision: RevisionId | None = None,
    snapshot: SnapshotRef | None = None,
    fingerprint: Fingerprint | None = None,
    receipt: Receipt | None = None,
    unconfined: tuple[str, ...] | None = None,
) -> InstanceRecord:
    """Write down facts that came up; None leaves a field as it is."""
    facts = {
        "process": process,
        "vmm": vmm,
        "revision": revision,
        "snapshot": snapshot,
        "fingerprint": fingerprint,
        "last_receipt": receipt,
        "unconfined": unconfined,
    }
    return _next(record, **{name: fact for name, fact in facts.items() if fact is not None})


def pending_step(record: InstanceRecord) -> Step:
    """The table's rule for the step in progress. Raises Conflict if there is none."""
    rule = TRANSITIONS[(record.state, _pending(record).action)]
    assert isinstance(rule, Step)  # decode and begin admit nothing else
    return rule


def finish(record: InstanceRecord, *, now_ns: int) -> InstanceRecord:
    """The step in progress succeeded. Raises Conflict if there is none, InvalidInput if a fact is missing."""
    return end(record, pending_step(record).success, now_ns=now_ns)


def end(record: InstanceRecord, state: State, *, now_ns: int, error: str = "") -> InstanceRecord:
    """Clear the intent and be in `state`, dropping what that state does not have.

    Only a state that the table allows for the step in progress is accepted (Conflict otherwise).
    """
    step = pending_step(record)
    if state not in reachable(step):
        raise Conflict(
            f"{record.id} cannot become {state} by {step.action} from {step.source}",
            details=f"Possible: {', '.join(sorted(reachable(step)))}.",
            resolution="This is a defect of mvm; report it with the record.",
        )
    running = state is State.RUNNING
    return _consistent(
        _next(
            record,
            state=state,
            changed_ns=now_ns,
            pending=None,
            process=record.process if running else None,
            holds=(record.holds or entitled(record)) if running else (),
            unconfined=record.unconfined if running else (),
            snapshot=record.snapshot if running or state is State.SLEEPING else None,
            fingerprint=record.fingerprint if running or state is State.SLEEPING else None,
            last_error=error[: limits.MESSAGE_MAX],
        )
    )


def observe(record: InstanceRecord, action: Action, *, now_ns: int, error: str) -> InstanceRecord:
    """`running`, but its VMM turned out to be gone: `exit` if the guest powered itself off, else `lose`.

    One change, because there is no effect between an intent and its end. Not running: the record as it is.
    """
    rule = TRANSITIONS[(record.state, action)]
    if not isinstance(rule, Step):
        return record
    return end(begin(record, rule, now_ns=now_ns), rule.success, now_ns=now_ns, error=error)


def reachable(step: Step) -> frozenset[State]:
    """Every state that the step can end in."""
    settled = (step.before_commit, step.after_commit)
    return frozenset({step.success, step.failure, *(s.alive for s in settled), *(s.gone for s in settled)})


def encode_record(record: InstanceRecord) -> bytes:
    return codec.encode(record)


def decode_record(untrusted: bytes, *, of: InstanceId | None = None) -> InstanceRecord:
    """Raises InvalidInput, and nothing else, whatever the bytes.

    `of`: whose record this must be, from the place it was read from; a file copied from elsewhere is refused.
    """
    record = _consistent(
        codec.decode(
            untrusted,
            InstanceRecord,
            limit=limits.RECORD_JSON_BYTES,
            what="the instance's state",
            resolution="Restore the file from a backup, or destroy the instance: mvm instance destroy",
        )
    )
    if of is not None and record.id != of:
        raise InvalidInput(
            f"the instance's state is not valid: field `id`: it is the record of {record.id}, not of {of}",
            details="The file was copied from another instance.",
            resolution=f"Restore the file from a backup, or destroy the instance: mvm instance destroy {of}",
        )
    return record


def _pending(record: InstanceRecord) -> Pending:
    if record.pending is None:
        raise Conflict(
            f"{record.id} has no step in progress",
            details=f"It is {record.state}.",
            resolution="Begin a step before ending one.",
        )
    return record.pending


def _next(record: InstanceRecord, **changes: object) -> InstanceRecord:
    return msgspec.structs.replace(record, generation=record.generation + 1, **changes)


_SNAPSHOT_STATES: Final = frozenset({State.SLEEPING, State.RUNNING})


def _consistent(record: InstanceRecord) -> InstanceRecord:
    net, problem = record.network, ""
    if net != network_identity(record.id, net.index, net.slot, mac=net.mac):
        problem = "field `network`: its names and addresses are not those of its index and slot"
    elif record.state is State.SLEEPING and record.snapshot is None:
        problem = "field `snapshot`: a sleeping instance has one"
    elif record.state not in _SNAPSHOT_STATES and record.snapshot is not None:
        problem = f"field `snapshot`: an instance that is {record.state} has none"
    elif record.state is State.RUNNING and record.process is None:
        problem = "field `process`: a running instance has one"
    elif record.state is not State.RUNNING and record.pending is None and record.holds:
        problem = f"field `holds`: an instance that is {record.state} holds nothing"
    elif record.pending is not None:
        rule = TRANSITIONS[(record.state, record.pending.action)]
        if not isinstance(rule, Step) or rule.intent is not record.pending.intent:
            problem = f"field `pending`: no instance that is {record.state} can be {record.pending.intent}"
    if problem:
        raise InvalidInput(
            f"the instance's state is not valid: {problem}",
            details=f"Instance {record.id}, generation {record.generation}.",
            resolution="Restore the file from a backup, or destroy the instance: mvm instance destroy",
        )
    return record
