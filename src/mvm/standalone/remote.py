"""The privileged side across mvm-hostd's socket, for root and for members of its group.

Root has the documents on disk and sends the verbs to the daemon: `SocketHost` takes the place of the in-process host,
and nothing else changes. A member of the group can read nothing below the state root: `MemberNode` has the same facade
over `MemberStore`, whose documents come from the daemon, and refuses what only root may do. The daemon audits what a
member does.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

from mvm.core.addressing import Allocations, Lease, locate
from mvm.core.audit import AuditEntry, Verified
from mvm.core.errors import Conflict, MissingPrerequisite
from mvm.core.history import History
from mvm.core.ids import InstanceId, TenantId
from mvm.core.lifecycle import Action, State, command_for
from mvm.core.plan import slot_for
from mvm.core.record import InstanceRecord
from mvm.core.spec import TenantSpec
from mvm.hostd.guest_channel import GuestChannel, PortLease, take_over
from mvm.hostd.guest_channel.channel import ANSWER_TIMEOUT
from mvm.hostd.store import Store
from mvm.linux.stream import UnixStream
from mvm.standalone.facade import Standalone
from mvm.standalone.views import UNREADABLE
from mvm.wire.executor import Progress, no_progress
from mvm.wire.hostd_api import Purpose
from mvm.wire.hostd_client import HostdClient

if TYPE_CHECKING:
    from mvm.standalone.facade import ReadConsole
    from mvm.standalone.net import Report
    from mvm.standalone.views import InstanceRow, PoolRow, TenantRow
    from mvm.wire.hostd_api import InstanceLine

_NOWHERE = Path("/nonexistent/mvm")


class SocketHost(HostdClient):
    """Implements `mvm.standalone.ports.Host`."""

    def __init__(self, path: Path) -> None:
        super().__init__(lambda: UnixStream.dial(path))

    @contextmanager
    def channel(self, instance: InstanceId, purpose: Purpose, program: str = "") -> Iterator[GuestChannel]:
        """A session, and what the audit log of a member's doings shall say of it. Conflict unless it runs."""
        record = self.inspect_instance(instance)
        if record.state is not State.RUNNING:
            verb = Action.WAKE if record.state is State.SLEEPING else Action.RUN
            raise Conflict(
                f"{instance} is {record.state}",
                details="Only a running guest can be talked to.",
                resolution=f"{verb.value.capitalize()} it first: {command_for(verb, instance)}",
            )
        opened = self.open_channel(instance, purpose, program)
        # It has what the channel asks of a lease; the lock itself is in the daemon.
        with take_over(
            socket.socket(fileno=opened.fd),
            cast(PortLease, opened),
            vsock=opened.vsock,
            deadline=time.monotonic() + ANSWER_TIMEOUT,
        ) as channel:
            yield channel


class MemberStore(Store):
    """What the daemon says of tenants and instances. There are no files: paths lead nowhere."""

    def __init__(self, client: HostdClient) -> None:
        super().__init__(_NOWHERE)
        self._client = client

    def open(self) -> None:
        """Nothing to make."""

    def tenants(self) -> list[TenantId]:
        return [line.tenant for line in self._client.list_tenants()]

    def load_spec(self, tenant: TenantId) -> TenantSpec:
        return self._client.inspect_tenant(tenant).spec

    def load_history(self, tenant: TenantId) -> History:
        return self._client.inspect_tenant(tenant).history

    def instances(self, tenant: TenantId) -> list[InstanceId]:
        return [line.instance for line in self._client.list_instances(tenant)]

    def load_record(self, instance: InstanceId) -> InstanceRecord:
        return self._client.inspect_instance(instance)

    def load_allocations(self) -> Allocations:
        found = [line for line in self._client.list_tenants() if line.index]
        return Allocations(leases=tuple(Lease(line.tenant, line.index) for line in found))

    def tenant_lock(self, tenant: TenantId) -> NoReturn:
        _needs_root()

    def allocations(self) -> NoReturn:
        _needs_root()


class _DaemonAudits:
    """Implements AuditLog: the daemon writes the entries, because the caller may not."""

    def append(self, entry: AuditEntry) -> None:
        """Written by the daemon already."""

    def verify(self, tenant: TenantId) -> Verified:
        _needs_root()


class _NoKeys:
    """No key of any tenant is a member's to use."""

    def __getattr__(self, name: str) -> NoReturn:
        _needs_root()


class MemberNode(Standalone):
    """Running, sleeping, waking, stopping, destroying and looking at instances, and sessions with guests."""

    _client: HostdClient

    @classmethod
    def at(cls, path: Path, command: tuple[str, ...]) -> Self:
        """`path`: of the daemon's socket."""
        host = SocketHost(path)
        keys: Any = _NoKeys()
        made = cls(
            MemberStore(host),
            keys,
            host=lambda: host,
            workshop=_needs_root,
            audit=_DaemonAudits(),
            command=command,
        )
        made._client = host
        return made

    @contextmanager
    def console(self, instance: InstanceId) -> Iterator[ReadConsole]:
        with self._client.console(instance) as console:
            yield console.read

    def verify_network(self, *, active: bool, progress: Progress = no_progress) -> Report:
        from mvm.hostd.net_verify import Difference
        from mvm.standalone.net import Report

        if active:
            raise MissingPrerequisite(
                "--active needs root",
                details="It listens on all interfaces of this host, for which mvm-hostd has no right.",
                resolution="Run the command with sudo, or without --active.",
            )
        seen = self._client.verify_network(progress)
        differences = [Difference(found.where, found.what, found.fix) for found in seen.findings]
        return Report(seen.tenants, seen.running, differences, [], seen.left_out)

    def tenant_rows(self) -> Iterator[TenantRow]:
        """As `mvm.standalone.views.list_tenants`."""
        from mvm.standalone import member_views

        return member_views.tenants(self._client)

    def instance_rows(self, tenant: TenantId | None) -> Iterator[InstanceRow]:
        """As `mvm.standalone.views.list_instances`, of one tenant or all."""
        from mvm.standalone import member_views

        return member_views.instances(self._client, tenant)

    def pool_rows(self, tenant: TenantId | None) -> Iterator[PoolRow]:
        """As `mvm.standalone.views.list_pools`, of one tenant or all."""
        from mvm.standalone import member_views

        return member_views.pools(self._client, tenant)

    def node_id(self) -> str:
        return self._client.ping().node

    def recorded(self) -> list[InstanceLine]:
        """Every instance as recorded."""
        return self._client.list_instances()

    def reserve(self, spec: TenantSpec, instance: InstanceId, index: int) -> int:
        """A free slot. Nobody keeps it: if somebody else is faster, the daemon refuses the plan as a conflict."""
        lines = self._client.list_instances(spec.id)
        taken = frozenset(locate(line.ip)[1] for line in lines if line.state != UNREADABLE)
        return slot_for(spec, instance, index, taken)

    def destroy_instance(
        self, instance: InstanceId, *, wipe_volumes: bool, progress: Progress = no_progress
    ) -> bool:
        spec = self.spec(instance.tenant)
        there = instance in self.store.instances(instance.tenant)
        if not there and all(pool.id != instance.pool for pool in spec.pools):
            spec.pool(instance.pool)  # raises: more likely a slip than a second try
        if there or wipe_volumes:  # of an earlier one, whose volume the daemon may still find
            self._client.destroy_instance(instance, wipe_volumes=wipe_volumes, progress=progress)
        return there

    def create(self, *_: Any) -> NoReturn:
        _needs_root()

    def audited(self) -> NoReturn:
        _needs_root()

    def verify_audit(self, *_: Any) -> NoReturn:
        _needs_root()

    def destroy(self, *_: Any, **__: Any) -> NoReturn:
        _needs_root()

    def build(self, *_: Any, **__: Any) -> NoReturn:
        _needs_root()

    def pin(self, *_: Any) -> NoReturn:
        _needs_root()

    def rollback(self, *_: Any, **__: Any) -> NoReturn:
        _needs_root()

    def create_pool(self, *_: Any) -> NoReturn:
        _needs_root()

    def scale_pool(self, *_: Any, **__: Any) -> NoReturn:
        _needs_root()

    def destroy_pool(self, *_: Any, **__: Any) -> NoReturn:
        _needs_root()

    def set_secrets(self, *_: Any) -> NoReturn:
        _needs_root()

    def rotate_secrets(self, *_: Any) -> NoReturn:
        _needs_root()


def _needs_root() -> NoReturn:
    raise MissingPrerequisite(
        "this needs root",
        details="Members of mvm-hostd's group may run, stop, enter and look at instances; tenants, builds, secrets and "
        "audit logs are root's.",
        resolution="Run the command with sudo.",
    )
