"""The ledger against reality, for a whole node: what no live instance owns is undone, and said.

`read` makes the ledger from the records, `observe` asks the kernel and the file system for everything under mvm's
names, `mvm.core.ledger.reconcile` decides, `recover_node` carries it out. It runs when mvm-hostd starts, before
anybody gets an answer; every instance's own recovery (`mvm.hostd.recovery`) settles steps that were cut short, and
what those hold is left to it.

Every effect takes the lock under which such a thing is made, without waiting, and asks the ledger again under it: a
command that is at work at this moment keeps what it has. An effect that fails is said and leaves the others alone.

Observers are functions of their own, so that a test or another host can replace each; one that cannot look is a
`Report.blind` entry, not an empty answer. Nothing here starts a program unless there is something to undo.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from mvm.core import ledger
from mvm.core.errors import Busy, Conflict, InvalidInput, MvmError, NotFound
from mvm.core.ids import InstanceId, TenantId
from mvm.core.ledger import Act, Entry, Foreign, Kind, Lacks, Ledger, Seen, Undo
from mvm.core.lifecycle import State
from mvm.core.record import InstanceRecord, entitled
from mvm.hostd import keeper, net_policy, sealing
from mvm.hostd.operations.context import KEPT
from mvm.hostd.operations.stop import remove_remains
from mvm.hostd.resources import audit, cgroup, dm_crypt, network, volume
from mvm.hostd.sealing.directory import LATEST
from mvm.linux import machine
from mvm.linux import netlink as nl
from mvm.linux.files import TEMPORARY_PREFIX, locked, remove_tree
from mvm.linux.mount import detach, mounts_below

if TYPE_CHECKING:
    from mvm.hostd.log import Log
    from mvm.hostd.store import Store

_ROUNDS: Final = 4

Observer = Callable[["Store"], Iterator[Seen]]


class Report(msgspec.Struct):
    """What was done, what was left alone, what running instances lack, what could not be undone, what not looked at."""

    undone: list[Undo]
    foreign: list[Foreign]
    lacks: list[Lacks]
    failed: list[tuple[Undo, str]]
    blind: list[str]

    @property
    def clean(self) -> bool:
        return not (self.undone or self.foreign or self.lacks or self.failed or self.blind)


def survey(store: Store) -> tuple[list[Act], list[str]]:
    """(what `recover_node` would do first, observers that could not look). Changes nothing."""
    seen, blind = observe(store)
    return ledger.reconcile(read(store), seen), blind


def recover_node(store: Store, log: Log | None = None) -> Report:
    """Undo whatever no live instance owns. Raises nothing for what cannot be undone: see `Report.failed`."""
    undone: list[Undo] = []
    failed: dict[Undo, str] = {}
    try:
        # Rules of instances of which nothing else is left: what no observer tells apart from those in force.
        net_policy.refresh(store)
    except (MvmError, OSError) as error:  # it says so again, and refuses, when an instance is to run
        failed[Undo(Kind.RULES, "mvm", "the records say otherwise")] = _text(error)
    actions: list[Act] = []
    blind: list[str] = []
    for _ in range(_ROUNDS):
        actions, blind = survey(store)
        due = [action for action in actions if isinstance(action, Undo) and action not in failed]
        if not due:
            break
        for action in due:
            try:
                if _undo(store, action):
                    undone.append(action)
                else:
                    failed[action] = "a command is at work on it"
            except (MvmError, OSError) as error:
                failed[action] = _text(error)
    report = Report(
        undone,
        [action for action in actions if isinstance(action, Foreign)],
        [action for action in actions if isinstance(action, Lacks)],
        list(failed.items()),
        blind,
    )
    if log is not None:
        _say(report, log)
    return report


def _say(report: Report, log: Log) -> None:
    for done in report.undone:
        log.warning("undone", kind=done.kind, name=done.name, why=done.why)
    for action, error in report.failed:
        log.error("not undone", kind=action.kind, name=action.name, error=error)
    for left in report.foreign:
        log.warning("left alone", kind=left.kind, name=left.name, why=left.why)
    for lack in report.lacks:
        log.warning("lacks", instance=lack.instance, kind=lack.kind, name=lack.name)
    for name in report.blind:
        log.warning("not looked at", what=name)


def _text(error: Exception) -> str:
    return error.brief if isinstance(error, MvmError) else str(error)


# The ledger.


def read(store: Store) -> Ledger:
    """The ledger of this state root."""
    entries: list[Entry] = []
    unreadable: set[InstanceId] = set()
    closed: set[int] = set()
    try:
        allocations = store.load_allocations()
        leases = {lease.tenant: lease.index for lease in allocations.leases}
        indices = {*leases.values(), *allocations.retired}
    except InvalidInput:
        leases, indices = {}, set()
    tenants = frozenset(_tenants(store))
    for instance in _folders(store):
        try:
            record = store.load_record(instance)
        except NotFound:
            continue
        except InvalidInput:
            unreadable.add(instance)
            if instance.tenant in leases:
                closed.add(leases[instance.tenant])
            continue
        indices.add(record.network.index)
        entries.append(_entry(record))
    return Ledger(tuple(entries), frozenset(indices), tenants, frozenset(unreadable), frozenset(closed))


def _entry(record: InstanceRecord) -> Entry:
    awake, pending = record.state is State.RUNNING, record.pending is not None
    # A record that an earlier version wrote says nothing of what its instance holds.
    holds = record.holds or (entitled(record) if awake or pending else ())
    return Entry(record.id, awake, pending, holds)


def _tenants(store: Store) -> Iterator[TenantId]:
    try:
        names = sorted(os.listdir(store.tenants_dir))
    except FileNotFoundError:
        return
    for name in names:
        try:
            yield TenantId.parse(name)
        except InvalidInput:
            continue  # not a name we give; `doctor` says so


def _folders(store: Store) -> Iterator[InstanceId]:
    """Every instance with a directory, with a record or without."""
    for tenant in _tenants(store):
        try:
            names = sorted(os.listdir(store.tenant_dir(tenant) / "instances"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            try:
                yield InstanceId.in_dir(tenant, name)
            except InvalidInput:
                continue


# Reality.


def observe(store: Store) -> tuple[list[Seen], list[str]]:
    """Everything under mvm's names, and which observers could not look."""
    found: list[Seen] = []
    blind: list[str] = []
    for name, look in OBSERVERS.items():
        try:
            found += look(store)
        except (OSError, MvmError) as error:
            blind.append(f"{name}: {_text(error)}")
    return found, blind


def processes(store: Store) -> Iterator[Seen]:
    """By the lock that keeper and VMM hold, which no process of anybody else's has a reason to take."""
    for instance in _folders(store):
        if keeper.anything_left(store.instance_paths(instance).runtime) is not None:
            yield Seen(Kind.PROCESS, str.__str__(instance), in_use=True, below_root=True)


def mounts(store: Store) -> Iterator[Seen]:
    root = os.path.realpath(store.root)
    for point in mounts_below(store.tenants_dir):
        name = os.path.relpath(point, root)
        # An operator may have put volumes or snapshots on another disk: mvm mounts in these two places only.
        if _MOUNTED.fullmatch(name):
            yield Seen(Kind.MOUNT, name, below_root=True)


_MOUNTED: Final = re.compile(r"tenants/[^/]+/instances/[^/]+/(?:runtime|jail)(?:/.*)?")


def links(store: Store) -> Iterator[Seen]:
    with nl.Netlink() as route:
        there = route.links()
    ports: dict[int, int] = {}
    for link in there:
        ports[link.master] = ports.get(link.master, 0) + 1
    for link in there:
        if ledger.link_index(link.name) is None:
            continue
        if ledger.is_tap_name(link.name):
            proper = link.kind in ("tun", "veth")
            yield Seen(Kind.TAP, link.name, in_use=link.carrier, proper=proper)
        else:
            yield Seen(Kind.BRIDGE, link.name, in_use=link.ifindex in ports, proper=link.kind == "bridge")


def cgroups(store: Store) -> Iterator[Seen]:
    _, mount = machine.cgroup_version()
    leaves_in = Path(mount or "/nonexistent") / cgroup.SLICE
    groups = cgroup.groups(store.root)
    try:
        with os.scandir(leaves_in) as entries:
            leaves = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return
    for leaf in leaves:
        try:
            events = (leaves_in / leaf / "cgroup.events").read_text(encoding="ascii")
        except FileNotFoundError:
            continue
        # Another root's is said by its path, which no instance is called.
        name = groups.vm_name(leaf) or f"{cgroup.SLICE}/{leaf}"
        yield Seen(Kind.CGROUP, name, in_use="populated 1" in events)


def mappings(store: Store) -> Iterator[Seen]:
    """Open data disks, of this root and of others."""
    for mapping in dm_crypt.opened():
        instance = ledger.instance_named(mapping.vm_name)
        if instance is not None and dm_crypt.is_of(mapping, store.instance_paths(instance).data_disk):
            yield Seen(Kind.MAPPING, ledger.mapping_name(instance), below_root=True)
        else:
            # Another root's is said by its whole name, which no instance is called.
            yield Seen(Kind.MAPPING, mapping.name, below_root=False)


def leavings(store: Store) -> Iterator[Seen]:
    """Names in runtime directories, and half-written files."""
    for name in _half(store.root):
        yield Seen(Kind.FILE, name, below_root=True)
    for tenant in _tenants(store):
        for name in _half(store.tenant_dir(tenant)):
            yield Seen(Kind.FILE, f"tenants/{tenant}/{name}", below_root=True)
    for instance in _folders(store):
        paths = store.instance_paths(instance)
        if any(name not in KEPT for name in _names(paths.runtime)):
            yield Seen(Kind.RUNTIME, ledger.folder(instance, "runtime"), below_root=True)
        for place in (paths.base, paths.volumes):
            for name in _half(place):
                where = os.path.relpath(place / name, paths.base)
                yield Seen(Kind.FILE, ledger.folder(instance, where), below_root=True)
        for name in _names(paths.snapshots):
            if name != LATEST:
                yield Seen(Kind.FILE, ledger.folder(instance, f"snapshots/{name}"), below_root=True)
        if not paths.state.exists():
            # A destroy that was not asked to wipe leaves the disk and its key for the next instance of the name.
            kept = volume.is_kept(paths.data_disk)
            if not (kept and volume.is_whole(paths.data_disk)):
                yield Seen(Kind.REMAINS, ledger.folder(instance), below_root=True, proper=not kept)


def rules(store: Store) -> Iterator[Seen]:
    if net_policy.load(store) is not None:
        yield Seen(Kind.RULES, "mvm", below_root=True)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _half(folder: Path) -> list[str]:
    return [name for name in _names(folder) if name.startswith(TEMPORARY_PREFIX)]


OBSERVERS: dict[str, Observer] = {
    "processes": processes,
    "mounts": mounts,
    "mappings": mappings,
    "cgroups": cgroups,
    "links": links,
    "files": leavings,
    "rules": rules,
}
_OBSERVER: Final = {
    Kind.PROCESS: "processes",
    Kind.MOUNT: "mounts",
    Kind.MAPPING: "mappings",
    Kind.CGROUP: "cgroups",
    Kind.TAP: "links",
    Kind.BRIDGE: "links",
    Kind.RUNTIME: "files",
    Kind.FILE: "files",
    Kind.REMAINS: "files",
    Kind.RULES: "rules",
}
"""Who would have seen it."""


# Effects. Each returns whether the thing is gone.


def _undo(store: Store, action: Undo) -> bool:
    try:
        with ExitStack() as held:
            instance = ledger.instance_of(action.kind, action.name)
            if instance is not None and store.instance_paths(instance).base.is_dir():
                held.enter_context(locked(store.instance_paths(instance).lock, wait=0))
            for lock in _locks(store, action):
                held.enter_context(lock)
            # A command may have begun since: what it has written down is there to read under its lock.
            seen, blind = observe(store)
            if action not in ledger.reconcile(read(store), seen):
                if unseen := [text for text in blind if text.startswith(f"{_OBSERVER[action.kind]}: ")]:
                    raise Conflict(f"it could not be looked at again: {unseen[0]}")
                return True
            UNDO[action.kind](store, action.name)
    except Busy:
        return False
    return True


def _locks(store: Store, action: Undo) -> Iterator[AbstractContextManager[int]]:
    """The locks that guard what is not inside an instance's directory."""
    if action.kind in (Kind.TAP, Kind.BRIDGE):
        index = ledger.link_index(action.name)
        for lease in store.load_allocations().leases:
            if lease.index == index and store.tenant_dir(lease.tenant).is_dir():
                yield locked(store.tenant_dir(lease.tenant) / "network.lock", wait=0)
    elif action.kind is Kind.FILE and ledger.instance_of(action.kind, action.name) is None:
        folder = (store.root / action.name).parent
        if Path(action.name).name.startswith(f"{TEMPORARY_PREFIX}{audit.HEAD_NAME}"):
            yield _appending(folder / audit.LOG_NAME)
        # Beside the document that was being written lies the lock for it; network.json has one of its own.
        for name in ("lock", "network.lock"):
            if (folder / name).exists():
                yield locked(folder / name, wait=0)


@contextmanager
def _appending(log: Path) -> Iterator[int]:
    """The lock of whoever appends to an audit log, which is on the log itself and must leave it as it is."""
    fd = os.open(log, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("somebody writes to the audit log") from None
        yield fd
    finally:
        os.close(fd)


def _end_process(store: Store, name: str) -> None:
    keeper.end_leftovers(store.instance_paths(InstanceId.parse(name)).runtime)


def _detach(store: Store, name: str) -> None:
    for point in mounts_below(store.root / name):
        detach(point)


def _close_mapping(store: Store, name: str) -> None:
    instance = ledger.instance_of(Kind.MAPPING, name)
    if instance is None:
        raise Conflict(f"the mapping {name} is of no instance")
    volume.lock(store.instance_paths(instance).data_disk, instance)


def _remove_leaf(store: Store, name: str) -> None:
    try:
        os.rmdir(cgroup.groups(store.root).leaf(name))  # EBUSY if a process came in
    except FileNotFoundError:
        pass


def _remove_tap(store: Store, name: str) -> None:
    with nl.Netlink() as route:
        found = route.find_link(name)
        if found is None:
            return
        if found.kind not in ("tun", "veth") or found.carrier:
            raise Conflict(f"the link {name} is in use", details="Some process has it open.")
        route.execute([nl.Request(nl.RTM_DELLINK, 0, nl.link(found.ifindex), f"remove tap {name}")])


def _remove_bridge(store: Store, name: str) -> None:
    if not network.remove_bridge_if_unused(name):
        raise Conflict(f"the bridge {name} has ports again")


def _empty_runtime(store: Store, name: str) -> None:
    for entry in _names(store.root / name):
        if entry not in KEPT:
            remove_tree(store.root / name / entry)


def _sweep(store: Store, name: str) -> None:
    path = store.root / name
    if path.parent.name == "snapshots":
        sealing.recover(path.parent)
    elif path.name.startswith(TEMPORARY_PREFIX):
        remove_tree(path)


def _remove_remains(store: Store, name: str) -> None:
    instance = ledger.instance_of(Kind.REMAINS, name)
    assert instance is not None  # an observer gave it this name
    remove_remains(store.instance_paths(instance), wipe_volumes=False)


def _refresh_rules(store: Store, name: str) -> None:
    net_policy.refresh(store)


UNDO: Mapping[Kind, Callable[[Store, str], None]] = {
    Kind.PROCESS: _end_process,
    Kind.MOUNT: _detach,
    Kind.MAPPING: _close_mapping,
    Kind.CGROUP: _remove_leaf,
    Kind.TAP: _remove_tap,
    Kind.BRIDGE: _remove_bridge,
    Kind.RUNTIME: _empty_runtime,
    Kind.FILE: _sweep,
    Kind.REMAINS: _remove_remains,
    Kind.RULES: _refresh_rules,
}
