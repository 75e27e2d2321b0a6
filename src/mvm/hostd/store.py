"""Where everything lies below the state root, and the records in it.

    <root>/node-id                                   32 hex digits, made once
    <root>/allocations.json                          subnet of every tenant, never reused
    <root>/lock, tenants/<tenant>/lock               guard the files beside them
    <root>/revisions/<id>/                           what builds produced, immutable
    <root>/keys/                                     the development key provider's (other providers leave it empty)
    <root>/tenants/<tenant>/spec.json                what the operator asked for
    <root>/tenants/<tenant>/destroying               its destruction was begun: it gets no instances any more
    <root>/tenants/<tenant>/life.lock                held while it is created or destroyed
    <root>/tenants/<tenant>/revisions.json           what it can go back to
    <root>/tenants/<tenant>/secrets.sealed           encrypted
    <root>/tenants/<tenant>/audit.log, audit.head    hash-chained
    <root>/tenants/<tenant>/instances/<pool>-<n>/
        lock                                         held by whoever acts on the instance
        state.json                                   its record
        runtime/                                     exists only while it runs, but for logs/ and metrics/
            fc.final.json  qmp.sock  mvm.<n>.sock  memory  logs/console.log  metrics/
        volumes/data.img, data.key
        snapshots/latest/
        jail/

Directories are 0700 and root's. Documents are replaced atomically and fsynced; a reader sees the old or the new one.
Locks are always taken in the order tenant's life, root, tenant, instance, tenant's network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from mvm.core import limits
from mvm.core.addressing import Allocations, decode_allocations, encode_allocations
from mvm.core.errors import Conflict, MissingPrerequisite, NotFound
from mvm.core.history import History, decode_history, encode_history
from mvm.core.ids import InstanceId, NodeId, TenantId
from mvm.core.record import InstanceRecord, decode_record, encode_record
from mvm.core.spec import TenantSpec, decode_spec, encode_spec
from mvm.linux.files import ensure_dir, fsync_dir, locked, read_bounded, write_atomic

AllocationWriter = Callable[[Allocations], None]

DEFAULT_ROOT = Path("/var/lib/mvm")
LOCK_WAIT_S = 120.0


class InstancePaths:
    """The paths of one instance. Making this touches nothing."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.lock = base / "lock"
        self.state = base / "state.json"
        self.runtime = base / "runtime"
        self.logs = self.runtime / "logs"
        self.metrics = self.runtime / "metrics"
        self.console_log = self.logs / "console.log"
        self.vmm_log = self.logs / "vmm.log"
        self.fc_config = self.runtime / "fc.final.json"
        self.volumes = base / "volumes"
        self.data_disk = self.volumes / "data.img"
        self.snapshots = base / "snapshots"
        self.latest = self.snapshots / "latest"
        self.jail = base / "jail"

    def make(self) -> None:
        for folder in (self.base, self.runtime, self.logs, self.metrics, self.volumes, self.snapshots):
            ensure_dir(folder)


class Store:
    """The documents below one state root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tenants_dir = root / "tenants"
        self.revisions_dir = root / "revisions"
        self.keys_dir = root / "keys"
        self.allocations_file = root / "allocations.json"

    def open(self) -> None:
        """Make the root. MissingPrerequisite without root rights."""
        if os.geteuid() != 0:
            raise MissingPrerequisite(
                "mvm needs root here",
                details=f"The state below {self.root} and the VMs' devices belong to root.",
                resolution="Run the command with sudo.",
            )
        for folder in (self.root, self.tenants_dir, self.revisions_dir, self.keys_dir):
            ensure_dir(folder)

    # Tenants.

    def tenant_dir(self, tenant: TenantId) -> Path:
        return self.tenants_dir / tenant

    def tenant_lock(self, tenant: TenantId) -> AbstractContextManager[int]:
        return locked(self.tenant_dir(tenant) / "lock", wait=LOCK_WAIT_S)

    def life_lock(self, tenant: TenantId) -> AbstractContextManager[int]:
        """Held while the tenant is created or destroyed."""
        return locked(self.tenant_dir(tenant) / "life.lock", wait=LOCK_WAIT_S)

    def network_lock(self, tenant: TenantId) -> AbstractContextManager[int]:
        """Held while the tenant's bridge gets a port, or goes for want of one."""
        ensure_dir(self.tenant_dir(tenant))
        return locked(self.tenant_dir(tenant) / "network.lock", wait=LOCK_WAIT_S)

    def tenants(self) -> list[TenantId]:
        """Every tenant with a spec, sorted."""
        try:
            with os.scandir(self.tenants_dir) as entries:
                names = sorted(entry.name for entry in entries)
        except FileNotFoundError:
            return []
        return [TenantId(name) for name in names if (self.tenants_dir / name / "spec.json").exists()]

    def load_spec(self, tenant: TenantId) -> TenantSpec:
        """Raises NotFound."""
        try:
            data = read_bounded(self.tenant_dir(tenant) / "spec.json", limits.SPEC_JSON_BYTES)
        except FileNotFoundError:
            raise NotFound(
                f"there is no tenant {tenant}",
                details=f"Looked in {self.tenants_dir}.",
                resolution="List them with: mvm tenant list. Create one with: mvm tenant create",
            ) from None
        return decode_spec(data, of=tenant)

    def mark_destroying(self, tenant: TenantId) -> None:
        """From here on no instance of it is made (`refuse_destroyed`); what there is can be looked for and removed."""
        write_atomic(self.tenant_dir(tenant) / "destroying", b"")

    def unmark_destroying(self, tenant: TenantId) -> None:
        """It is gone, or about to be created anew."""
        (self.tenant_dir(tenant) / "destroying").unlink(missing_ok=True)
        fsync_dir(self.tenant_dir(tenant))

    def refuse_destroyed(self, tenant: TenantId) -> None:
        """NotFound if there is no such tenant, Conflict if its destruction was begun."""
        if (self.tenant_dir(tenant) / "destroying").exists() and (
            self.tenant_dir(tenant) / "spec.json"
        ).exists():
            raise Conflict(
                f"{tenant} is being destroyed",
                details="Its destruction was begun, and may have been interrupted.",
                resolution=f"Finish it with: mvm tenant destroy {tenant}",
            )
        self.load_spec(tenant)

    def save_spec(self, spec: TenantSpec) -> None:
        ensure_dir(self.tenant_dir(spec.id))
        write_atomic(self.tenant_dir(spec.id) / "spec.json", encode_spec(spec))

    def load_history(self, tenant: TenantId) -> History:
        try:
            data = read_bounded(self.tenant_dir(tenant) / "revisions.json", limits.REVISIONS_JSON_BYTES)
        except FileNotFoundError:
            return History(tenant=tenant)
        return decode_history(data)

    def save_history(self, history: History) -> None:
        write_atomic(self.tenant_dir(history.tenant) / "revisions.json", encode_history(history))

    # The node.

    @contextmanager
    def allocations(self) -> Iterator[tuple[Allocations, AllocationWriter]]:
        """The allocations and a function that persists the next value, under the root's lock."""
        with locked(self.root / "lock", wait=LOCK_WAIT_S):
            yield self.load_allocations(), self._save_allocations

    def load_allocations(self) -> Allocations:
        try:
            data = read_bounded(self.allocations_file, limits.ALLOCATIONS_JSON_BYTES)
        except FileNotFoundError:
            return Allocations()
        return decode_allocations(data)

    def _save_allocations(self, value: Allocations) -> None:
        write_atomic(self.allocations_file, encode_allocations(value))

    def node_id(self) -> NodeId:
        """This node's id, made at the first call."""
        path = self.root / "node-id"
        with locked(self.root / "lock", wait=LOCK_WAIT_S):
            try:
                return NodeId(read_bounded(path, 64).decode("ascii", "replace").strip())
            except FileNotFoundError:
                made = NodeId(os.urandom(16).hex())
                write_atomic(path, made.encode() + b"\n", 0o644)
                return made

    # Instances.

    def instance_paths(self, instance: InstanceId) -> InstancePaths:
        return InstancePaths(self.tenant_dir(instance.tenant) / "instances" / instance.dir_name)

    def instances(self, tenant: TenantId) -> list[InstanceId]:
        """Every instance of `tenant` with a record, in order."""
        try:
            names = os.listdir(self.tenant_dir(tenant) / "instances")
        except FileNotFoundError:
            return []
        found = [InstanceId.in_dir(tenant, name) for name in names]
        return sorted((i for i in found if self.instance_paths(i).state.exists()), key=lambda i: i.sort_key)

    def load_record(self, instance: InstanceId) -> InstanceRecord:
        """Raises NotFound."""
        try:
            data = read_bounded(self.instance_paths(instance).state, limits.RECORD_JSON_BYTES)
        except FileNotFoundError:
            raise NotFound(
                f"there is no instance {instance}",
                details="It was never started, or it was destroyed.",
                resolution=f"Start it with: mvm tenant run {instance.tenant}",
            ) from None
        return decode_record(data, of=instance)

    def save_record(self, record: InstanceRecord) -> None:
        path = self.instance_paths(record.id).state
        ensure_dir(path.parent)
        if record.generation == 0:
            # Whoever made these directories may have died before he synced their names. Once there is a record, they
            # are durable, and so is what is synced below them.
            for folder in (path.parent.parent, self.tenant_dir(record.id.tenant), self.tenants_dir):
                fsync_dir(folder)
        write_atomic(path, encode_record(record))
