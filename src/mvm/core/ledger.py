"""The ledger: which objects of the host an instance may have, and what is to be done about any other.

Rules.

- What an instance may have is in its record (`InstanceRecord.holds`), written with the intent to start or wake it
  and so durable before the first object exists, and cleared by the record's change to a state without a VM, which
  is after the last is gone. It costs no write of its own.
- An object under one of mvm's names is **held** (an instance that is awake, or in the middle of a step, lists it),
  **ours** (nobody lists it, and it cannot be another state root's), or **foreign**. Held is left alone, ours is
  undone, foreign is said and never touched.
- "Cannot be another's" is told by where a thing lies (processes, mounts and files, by a path below the state root;
  mappings, by a mark of the directory of their image), or else by three conditions at once: the name is one that this
  root has given out, the kind is the one mvm makes, and nothing uses it. A second root on the same host may have given
  out the same numbers; what it uses is never idle.
- An instance whose record cannot be read may hold anything of its tenant: nothing of that tenant is undone.

`reconcile` is pure. It is asked again after its actions were carried out, because an object that was in use by
another that went is then idle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.core import limits
from mvm.core.errors import InvalidInput
from mvm.core.ids import InstanceId, TenantId

MAPPING_PREFIX: Final = "mvm-"
OBJECTS_MAX: Final = 16


class Kind(StrEnum):
    """In the order in which things are undone: what uses others before what is used."""

    PROCESS = "process"
    """Keeper and VMM, by the instance: whoever holds the lock on `runtime/alive`."""
    MOUNT = "mount"
    """Mount points at or below a directory, relative to the state root."""
    MAPPING = "mapping"
    """Device-mapper device of the data volume."""
    CGROUP = "cgroup"
    """Leaf below mvm.slice/mvm-instances, by the VM's name; of another state root's, its path."""
    TAP = "tap"
    BRIDGE = "bridge"
    RUNTIME = "runtime"
    """Sockets, locks and other names in the runtime directory, relative to the state root."""
    FILE = "file"
    """A half-written file or directory, relative to the state root. In nobody's ledger, ever."""
    REMAINS = "remains"
    """The directory of an instance without a record, relative to the state root. In nobody's ledger."""
    RULES = "rules"
    """The packet filter's tables. Every record holds them, awake or not (docs/adr/0006)."""


_ORDER: Final = {kind: n for n, kind in enumerate(Kind)}
_BELOW_ROOT: Final = frozenset({Kind.PROCESS, Kind.MOUNT, Kind.RUNTIME, Kind.FILE, Kind.REMAINS})


class HostObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    kind: Kind
    name: Annotated[str, Meta(min_length=1, max_length=limits.PATH_MAX)]


Holds = Annotated[tuple[HostObject, ...], Meta(max_length=OBJECTS_MAX)]


def mapping_name(instance: InstanceId) -> str:
    """`mvm-acme--default-0`; in the kernel a mark of the image's directory follows (`mvm.hostd.resources.dm_crypt`)."""
    return MAPPING_PREFIX + instance.vm_name


def folder(instance: InstanceId, name: str = "") -> str:
    """`tenants/acme/instances/default-0/runtime`, relative to the state root."""
    base = f"tenants/{instance.tenant}/instances/{instance.dir_name}"
    return f"{base}/{name}" if name else base


def entitled(instance: InstanceId, *, bridge: str, tap: str) -> tuple[HostObject, ...]:
    """All that an awake instance may have. Which of it there is depends on the host and on the VMM."""
    return (
        HostObject(Kind.PROCESS, str.__str__(instance)),
        HostObject(Kind.MOUNT, folder(instance, "runtime")),
        HostObject(Kind.MOUNT, folder(instance, "jail")),
        HostObject(Kind.MAPPING, mapping_name(instance)),
        HostObject(Kind.CGROUP, instance.vm_name),
        HostObject(Kind.TAP, tap),
        HostObject(Kind.BRIDGE, bridge),
        HostObject(Kind.RUNTIME, folder(instance, "runtime")),
    )


NEEDED: Final = frozenset({Kind.PROCESS, Kind.TAP, Kind.BRIDGE})
"""What no awake instance is without, whatever the host can do."""


class Entry(msgspec.Struct, frozen=True):
    """One instance. `awake`: its record says running. `pending`: a step was begun, and its own recovery, which takes
    the instance's lock, sees to what it holds."""

    instance: InstanceId
    awake: bool
    pending: bool
    holds: tuple[HostObject, ...]


class Ledger(msgspec.Struct, frozen=True):
    """Everything a state root knows of. `indices`: subnets it has ever given to a tenant. `tenants`: names with a
    directory. `unreadable`: instances whose record cannot be read, and `closed`: subnets of their tenants."""

    entries: tuple[Entry, ...] = ()
    indices: frozenset[int] = frozenset()
    tenants: frozenset[TenantId] = frozenset()
    unreadable: frozenset[InstanceId] = frozenset()
    closed: frozenset[int] = frozenset()


class Seen(msgspec.Struct, frozen=True):
    """An object as the kernel or the file system shows it.

    `in_use`: a tap somebody has open, a veth whose other end is up, a bridge with ports, a cgroup with processes, a
    mapping somebody has open. `below_root`: whether what it is made from lies below the state root, None where that
    does not apply or cannot be told. `proper`: it is what mvm makes under such a name (a bridge, not a dummy; no half
    of a disk).
    """

    kind: Kind
    name: str
    in_use: bool = False
    below_root: bool | None = None
    proper: bool = True


class Undo(msgspec.Struct, frozen=True):
    kind: Kind
    name: str
    why: str = "no live instance holds it"

    def describe(self) -> str:
        return f"undo {self.kind} {self.name}: {self.why}"


class Foreign(msgspec.Struct, frozen=True):
    """Something under a name of ours that is left alone."""

    kind: Kind
    name: str
    why: str

    def describe(self) -> str:
        return f"leave {self.kind} {self.name}: {self.why}"


class Lacks(msgspec.Struct, frozen=True):
    """A running instance is without something it needs."""

    instance: InstanceId
    kind: Kind
    name: str

    def describe(self) -> str:
        return f"{self.instance} lacks its {self.kind} {self.name}"


Act = Undo | Foreign | Lacks

_LINK: Final = re.compile(r"mvm-(?:b|t)([1-9][0-9]{0,3})(?:s(?:0|[1-9][0-9]{0,2}))?")
_FOLDER: Final = re.compile(r"tenants/([^/]+)(?:/instances/([^/]+))?(?:/.*)?")


def link_index(name: str) -> int | None:
    """The subnet index in the name of a bridge or tap of mvm's, else None."""
    found = _LINK.fullmatch(name)
    index = 0 if found is None else int(found[1])
    return index if 1 <= index < limits.SUBNETS else None


def is_tap_name(name: str) -> bool:
    return name.startswith("mvm-t") and "s" in name


def instance_named(vm_name: str) -> InstanceId | None:
    """The instance of a jail, cgroup or mapping's name without prefix; None if no instance is called so."""
    tenant, separator, rest = vm_name.partition("--")
    try:
        return InstanceId.in_dir(TenantId.parse(tenant), rest) if separator else None
    except InvalidInput:
        return None


def instance_of(kind: Kind, name: str) -> InstanceId | None:
    """The instance that an object's name tells, None where it tells none."""
    try:
        if kind is Kind.PROCESS:
            return InstanceId.parse(name)
        if kind is Kind.CGROUP:
            return instance_named(name)
        if kind is Kind.MAPPING:
            return instance_named(name.removeprefix(MAPPING_PREFIX))
        found = _FOLDER.fullmatch(name)
        if kind in _BELOW_ROOT and found is not None and found[2]:
            return InstanceId.in_dir(TenantId.parse(found[1]), found[2])
    except InvalidInput:
        pass
    return None


def reconcile(ledger: Ledger, observed: Iterable[Seen]) -> list[Act]:
    """What to do about `observed`, in order: users before what they use. Nothing that a live instance holds is
    undone, nothing foreign is, and what is undone is undone once."""
    seen = {(s.kind, s.name): s for s in observed}
    live = [entry for entry in ledger.entries if entry.awake or entry.pending]
    held = {(o.kind, o.name) for entry in live for o in entry.holds}
    pending = {entry.instance for entry in live if entry.pending}
    actions: list[Act] = []
    for (kind, name), s in sorted(seen.items(), key=lambda item: (_ORDER[item[0][0]], item[0][1])):
        if kind is Kind.RULES:
            if not ledger.entries and not ledger.unreadable:
                actions.append(
                    Undo(kind, name) if s.below_root else Foreign(kind, name, "this root never applied any")
                )
        elif _is_held(kind, name, held):
            if not s.proper:
                actions.append(Foreign(kind, name, "it is in the way: not what mvm makes under that name"))
        elif kind is Kind.FILE and instance_of(kind, name) in pending:
            continue  # a step cut short may need what it left; the instance's own recovery removes the rest
        elif why := _foreign(ledger, s):
            actions.append(Foreign(kind, name, why))
        else:
            actions.append(Undo(kind, name))
    for entry in ledger.entries:
        if entry.awake and not entry.pending:
            actions += [
                Lacks(entry.instance, o.kind, o.name)
                for o in entry.holds
                if o.kind in NEEDED and (o.kind, o.name) not in seen
            ]
    return actions


def _is_held(kind: Kind, name: str, held: set[tuple[Kind, str]]) -> bool:
    if (kind, name) in held:
        return True
    # What a directory holds, everything below it is held by.
    return kind in (Kind.MOUNT, Kind.RUNTIME) and any(k is kind and name.startswith(n + "/") for k, n in held)


def _foreign(ledger: Ledger, seen: Seen) -> str:
    """Why it may be somebody else's, "" if it cannot."""
    instance = instance_of(seen.kind, seen.name)
    if instance is not None and instance in ledger.unreadable:
        return "the record of its instance cannot be read"
    if seen.kind is Kind.REMAINS and not seen.proper:
        return "of its data disk, the image or the key is missing; mvm tenant destroy --wipe-volumes removes the rest"
    if seen.kind in _BELOW_ROOT:
        return ""
    if not seen.proper:
        return "it is not what mvm makes under that name"
    if seen.kind is Kind.MAPPING:
        if not seen.below_root:
            return "it is another state root's, or of no instance"
        return "somebody has it open" if seen.in_use else ""
    if seen.kind is Kind.CGROUP:
        if instance is None or instance.tenant not in ledger.tenants:
            return "this root has no such instance"
        return "it has processes" if seen.in_use else ""
    index = link_index(seen.name)
    if index is None or index not in ledger.indices:
        return "this root never gave out its subnet"
    if index in ledger.closed:
        return "a record of its tenant cannot be read"
    return "it is in use" if seen.in_use else ""
