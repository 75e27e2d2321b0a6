"""`Standalone`: everything the command line can ask for, on this machine, in this process.

Each verb lives in a module of its own that is imported when it is first used: waking a VM must not pay for
importing the builder. Verbs raise MvmErrors, never print, and are safe to repeat. Locks are taken in the
order root, tenant, instance.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from mvm.core.errors import InvalidInput
from mvm.core.ids import InstanceId, PoolId, TenantId
from mvm.core.lifecycle import Action
from mvm.hostd.store import Store
from mvm.standalone.journal import Journal, host_identity
from mvm.wire.executor import Progress, no_progress

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mvm.core.audit import Verified
    from mvm.core.history import Adopted, History
    from mvm.core.record import InstanceRecord
    from mvm.core.spec import TenantSpec
    from mvm.hostd.guest_channel import GuestChannel
    from mvm.hostd.keys import KeyProvider
    from mvm.standalone.builds import BuildResult
    from mvm.standalone.instances import Outcome
    from mvm.standalone.net import Report
    from mvm.standalone.pools import PoolResult
    from mvm.standalone.ports import AuditLog, Host, LineSink, StepSink, Workshop
    from mvm.standalone.secrets import SecretsResult
    from mvm.standalone.tenants import Created, Destroyed
    from mvm.wire.hostd_api import ConsoleAnswer, ConsolePlace

    ReadConsole = Callable[[int | None, ConsolePlace | None], ConsoleAnswer]
    """Takes how many lines before the end to begin (None: with all that is kept), or where to go on."""


def _quiet_line(_: str) -> None:
    pass


def _quiet_step(_: str, __: float | None) -> None:
    pass


class Standalone:
    """`host` and `workshop` are made when first needed. `command`: for the audit log."""

    def __init__(
        self,
        store: Store,
        keys: KeyProvider,
        *,
        host: Callable[[], Host],
        workshop: Callable[[], Workshop],
        audit: AuditLog,
        command: tuple[str, ...] = ("mvm",),
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.store = store
        self.keys = keys
        self.clock = clock
        self.audit = audit
        self.journal = Journal(store, audit, command, clock, host_identity())
        self._make_host = host
        self._make_workshop = workshop
        self._host: Host | None = None
        self._workshop: Workshop | None = None

    @classmethod
    def open(cls, root: Path, command: tuple[str, ...] = ("mvm",)) -> Self:
        """The state root at `root`, made if it is not there. Without root rights: what mvm-hostd lets its group do,
        or MissingPrerequisite where there is no daemon."""
        from mvm.standalone import compose

        member = compose.daemon_socket(root) if os.geteuid() != 0 else None
        if member is not None:
            from mvm.standalone.remote import MemberNode

            return cast("Self", MemberNode.at(member, command))
        store = Store(root)
        store.open()
        keys = compose.key_provider(root)
        return cls(
            store,
            keys,
            host=lambda: compose.host(store, keys),
            workshop=lambda: compose.workshop(store),
            audit=compose.FileAuditLog(store),
            command=command,
        )

    @property
    def host(self) -> Host:
        if self._host is None:
            self._host = self._make_host()
        return self._host

    @property
    def workshop(self) -> Workshop:
        if self._workshop is None:
            self._workshop = self._make_workshop()
        return self._workshop

    # Tenants.

    def create(self, spec: TenantSpec) -> Created:
        """Have the tenant exist as `spec` says. Conflict, naming the differences, if it exists otherwise."""
        from mvm.standalone import tenants

        return tenants.create(self, spec)

    def destroy(self, tenant: TenantId, *, wipe_volumes: bool, progress: Progress = no_progress) -> Destroyed:
        """Remove the tenant and all it has; its volumes, and the keys they need, only with `wipe_volumes`."""
        from mvm.standalone import tenants

        return tenants.destroy(self, tenant, wipe_volumes=wipe_volumes, progress=progress)

    def spec(self, tenant: TenantId) -> TenantSpec:
        return self.store.load_spec(tenant)

    def history(self, tenant: TenantId) -> History:
        return self.store.load_history(tenant)

    def verify_audit(self, tenant: TenantId) -> Verified:
        return self.audit.verify(tenant)

    def audited(self) -> list[TenantId]:
        """Every tenant, present or past, that has an audit log or the head of one."""
        try:
            names = sorted(os.listdir(self.store.tenants_dir))
        except FileNotFoundError:
            return []
        found = []
        for name in names:
            base = self.store.tenants_dir / name
            if (base / "audit.log").exists() or (base / "audit.head").exists():
                try:
                    found.append(TenantId.parse(name))
                except InvalidInput:
                    continue
        return found

    # Builds.

    def build(
        self, tenant: TenantId, *, on_line: LineSink = _quiet_line, on_step: StepSink = _quiet_step
    ) -> BuildResult:
        """Build what the tenant's flake, or its pin, says; the result becomes its current revision."""
        from mvm.standalone import builds

        return builds.build(self, tenant, on_line=on_line, on_step=on_step)

    def pin(self, tenant: TenantId, flake_ref: str | None, lock_sha256: str | None = None) -> History:
        """Let builds use `flake_ref`; None lets them use the spec's again."""
        from mvm.standalone import builds

        return builds.pin(self, tenant, flake_ref, lock_sha256)

    def rollback(self, tenant: TenantId, *, revision: str | None, steps: int | None) -> tuple[Adopted, bool]:
        """Make an older revision current; the entry, and whether that changed anything."""
        from mvm.standalone import builds

        return builds.rollback(self, tenant, revision=revision, steps=steps)

    # Instances.

    def act(
        self, who: TenantId | InstanceId, action: Action, progress: Progress = no_progress
    ) -> list[Outcome]:
        """Run, sleep, wake or stop one instance, or all of a tenant's."""
        from mvm.standalone import instances

        return instances.act(self, who, action, progress)

    def reserve(self, spec: TenantSpec, instance: InstanceId, index: int) -> int:
        """A slot in the tenant's subnet for an instance that has no record."""
        from mvm.standalone import instances

        return instances.reserve(self, spec, instance, index)

    def destroy_instance(
        self, instance: InstanceId, *, wipe_volumes: bool, progress: Progress = no_progress
    ) -> bool:
        """False if there was nothing to destroy."""
        from mvm.standalone import instances

        return instances.destroy(self, instance, wipe_volumes=wipe_volumes, progress=progress)

    def inspect(self, instance: InstanceId) -> InstanceRecord:
        """The instance as it is now, after recovery of whatever was interrupted."""
        return self.host.inspect_instance(instance)

    def session(
        self, instance: InstanceId, action: str, command: tuple[str, ...]
    ) -> AbstractContextManager[GuestChannel]:
        """An audited control channel to a running instance. Conflict if it is not running."""
        from mvm.standalone import sessions

        return sessions.session(self, instance, action, command)

    @contextmanager
    def console(self, instance: InstanceId) -> Iterator[ReadConsole]:
        """What reads the instance's console log. NotFound without a record, now or at the first piece."""
        from mvm.hostd.console import read_console

        self.store.load_record(instance)
        path = self.store.instance_paths(instance).console_log
        yield lambda lines, place: read_console(path, lines, place)

    # The network.

    def verify_network(self, *, active: bool, progress: Progress = no_progress) -> Report:
        """Compare the live network with what must be there; `active`: and have running guests send packets."""
        from mvm.standalone import net

        return net.verify(self, active=active, progress=progress)

    # Pools.

    def create_pool(self, tenant: TenantId, pool: PoolId, fields: Mapping[str, int | None]) -> PoolResult:
        """`fields`: values of PoolSpec."""
        from mvm.standalone import pools

        return pools.create(self, tenant, pool, fields)

    def scale_pool(
        self,
        tenant: TenantId,
        pool: PoolId,
        count: int,
        *,
        wipe_volumes: bool,
        progress: Progress = no_progress,
    ) -> PoolResult:
        """Have `count` instances asked for; surplus ones are destroyed, highest number first."""
        from mvm.standalone import pools

        return pools.scale(self, tenant, pool, count, wipe_volumes=wipe_volumes, progress=progress)

    def destroy_pool(
        self, tenant: TenantId, pool: PoolId, *, wipe_volumes: bool, progress: Progress = no_progress
    ) -> PoolResult:
        from mvm.standalone import pools

        return pools.destroy(self, tenant, pool, wipe_volumes=wipe_volumes, progress=progress)

    # Secrets.

    def set_secrets(self, tenant: TenantId, source: Path) -> SecretsResult:
        """Replace the tenant's secrets by those in `source`; guests see them at their next run or wake."""
        from mvm.standalone import secrets

        return secrets.set_from(self, tenant, source)

    def rotate_secrets(self, tenant: TenantId, source: Path | None) -> SecretsResult:
        """Encrypt the secrets, or those in `source`, anew and hand them to the running guests."""
        from mvm.standalone import secrets

        return secrets.rotate(self, tenant, source)
