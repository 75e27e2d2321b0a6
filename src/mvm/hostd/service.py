"""What each verb of the table does, given a request that passed syntax and permission.

`perform` runs in a process of its own and may wait; `answer` runs in the daemon's loop and must not. Neither knows
about sockets or frames. What a caller other than root has done is written to the tenant's audit log here: it is not the
one who keeps that log.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mvm
from mvm.core import limits as bounds
from mvm.core.audit import AuditEntry
from mvm.core.errors import Busy, Conflict, InvalidInput, MvmError, NotFound, Refused
from mvm.core.ids import InstanceId, NodeId
from mvm.core.plan import InstancePlan
from mvm.core.record import InstanceRecord
from mvm.hostd.admission import check_capacity, check_exists, check_limits, check_syntax, tenant_names
from mvm.hostd.console import read_console
from mvm.hostd.daemon_host import DaemonHost
from mvm.hostd.resources import audit
from mvm.hostd.settings import HostLimits
from mvm.hostd.store import Store
from mvm.linux.sockets import PeerCredentials
from mvm.wire.executor import Progress
from mvm.wire.hostd_api import (
    FINDINGS,
    LIST_ROWS,
    TENANT_ROWS,
    ChannelRequest,
    ConsoleAnswer,
    ConsoleRequest,
    InstanceLine,
    ListAnswer,
    ListRequest,
    NetworkAnswer,
    NetworkFinding,
    NodeAnswer,
    Nothing,
    PlanRequest,
    RecordAnswer,
    TenantAnswer,
    TenantLine,
    TenantRequest,
    TenantsAnswer,
    TenantsRequest,
    Verb,
)

_REFUSALS = (Refused, Conflict, InvalidInput, NotFound, Busy)
_FINDING_BYTES = 128 * 1024
"""What goes through an operation's socket in one message, with room for JSON's escapes."""
_AUDITED = {
    "create_instance": "instance.run",
    "wake_instance": "instance.wake",
    "sleep_instance": "instance.sleep",
    "stop_instance": "instance.stop",
    "destroy_instance": "instance.destroy",
    "attach_drives": "instance.attach-drives",
    "setup_network": "instance.setup-network",
}


class Service:
    def __init__(self, store: Store, host: DaemonHost, limits: HostLimits, driver: str) -> None:
        self.store = store
        self.host = host
        self.node: NodeId = store.node_id()
        self._limits = limits
        self._driver = driver
        self._machine = _machine()

    def admit(self, request: Any) -> None:
        """The rest of syntax, and permission. Reads nothing."""
        if isinstance(request, PlanRequest):
            check_syntax(request.plan)
            check_limits(request.plan, self._limits)

    # In a process of its own.

    def is_audited(self, verb: Verb) -> bool:
        """Whether an entry in a tenant's audit log comes of it, if somebody other than root asks."""
        return verb.name in _AUDITED or verb.name == "open_channel"

    def perform(
        self,
        verb: Verb,
        request: Any,
        peer: PeerCredentials,
        progress: Progress,
        admitted: Sequence[InstancePlan],
    ) -> Any:
        """The verb's answer. `admitted`: plans whose operations are in progress and not yet recorded as running."""
        try:
            if isinstance(request, PlanRequest):
                check_exists(self.store, request.plan)
                if verb.name in ("create_instance", "wake_instance"):
                    check_capacity(self.store, request.plan, self._limits, admitted)
            answer = self._perform(verb, request, progress)
        except BaseException as error:
            outcome = "refused" if isinstance(error, _REFUSALS) else "failed"
            self._audit_operation(verb, request, peer, outcome, error)
            raise
        self._audit_operation(verb, request, peer, "done", None)
        return answer

    def _perform(self, verb: Verb, request: Any, progress: Progress) -> Any:
        host = self.host
        match verb.name:
            case "create_instance":
                return RecordAnswer(host.create_instance(request.plan, progress))
            case "wake_instance":
                return RecordAnswer(host.wake_instance(request.plan, progress))
            case "sleep_instance":
                return RecordAnswer(host.sleep_instance(request.instance, progress))
            case "stop_instance":
                return RecordAnswer(host.stop_instance(request.instance, progress))
            case "attach_drives":
                return RecordAnswer(host.attach_drives(request.plan, progress))
            case "setup_network":
                return RecordAnswer(host.setup_network(request.plan, progress))
            case "inspect_instance":
                return RecordAnswer(host.inspect_instance(request.instance))
            case "verify_network":
                return self._verify_network(progress)
            case "destroy_instance":
                host.destroy_instance(request.instance, wipe_volumes=request.wipe_volumes, progress=progress)
                return Nothing()
        raise AssertionError(f"{verb.name} is not performed in a process")

    def _verify_network(self, progress: Progress) -> NetworkAnswer:
        from mvm.hostd import net_verify

        progress("comparing")
        expected, found = net_verify.verify(self.store)
        findings: list[NetworkFinding] = []
        room = _FINDING_BYTES
        for difference in found[:FINDINGS]:
            texts = [str(text)[: bounds.MESSAGE_MAX] for text in difference]
            room -= sum(len(text.encode()) for text in texts) + 64
            if room < 0:
                break
            findings.append(NetworkFinding(*texts))
        running = sum(instance.has_tap for instance in expected.instances)
        return NetworkAnswer(
            len(expected.policy.tenants), running, tuple(findings), left_out=len(found) - len(findings)
        )

    def _audit_operation(
        self, verb: Verb, request: Any, peer: PeerCredentials, outcome: str, error: BaseException | None
    ) -> None:
        if peer.uid == 0 or verb.name not in _AUDITED:
            return
        detail = "" if error is None else error.brief if isinstance(error, MvmError) else type(error).__name__
        instance = request.plan.instance if isinstance(request, PlanRequest) else request.instance
        self._audit(_AUDITED[verb.name], outcome, instance, peer, detail)

    def _audit(
        self, action: str, outcome: str, instance: InstanceId, peer: PeerCredentials, detail: str
    ) -> None:
        folder = self.store.tenant_dir(instance.tenant)
        if not folder.is_dir():
            return  # no tenant, no log: a refusal of its name is in the daemon's own
        entry = AuditEntry(
            time_ns=time.time_ns(),
            tenant=instance.tenant,
            action=action,
            outcome=outcome,
            node=self.node,
            host=self._machine,
            command=("mvm-hostd", f"uid={peer.uid}"),
            detail=detail[: bounds.MESSAGE_MAX],
            instance=instance,
        )
        audit.append(folder / audit.LOG_NAME, entry)

    # In the loop.

    def list_instances(self, request: ListRequest) -> ListAnswer:
        after = request.after
        if request.tenant is not None:
            tenants = [request.tenant]
        else:
            tenants = tenant_names(self.store)
        # No further than what is asked for: a page costs as much whether it is the first or the last of many.
        found: list[InstanceId] = []
        for tenant in tenants:
            if after is not None and tenant < after.tenant:
                continue
            try:
                there = self.store.instances(tenant)
            except (MvmError, NotADirectoryError):
                if request.tenant is not None:
                    raise
                continue  # something there is not ours; `doctor` says so
            if after is not None and tenant == after.tenant:
                there = [i for i in there if i.sort_key > after.sort_key]
            found += there
            if len(found) > LIST_ROWS:
                break
        rows = [line for instance in found[:LIST_ROWS] if (line := self._line(instance)) is not None]
        return ListAnswer(tuple(rows), more=len(found) > LIST_ROWS)

    def list_tenants(self, request: TenantsRequest) -> TenantsAnswer:
        names = [t for t in tenant_names(self.store) if request.after is None or t > request.after]
        names = [t for t in names if (self.store.tenant_dir(t) / "spec.json").exists()]
        indices = {lease.tenant: lease.index for lease in self.store.load_allocations().leases}
        rows = []
        for tenant in names[:TENANT_ROWS]:
            try:
                spec = self.store.load_spec(tenant)
            except NotFound:
                continue
            except MvmError:
                rows.append(TenantLine(tenant, readable=False))
                continue
            rows.append(
                TenantLine(
                    tenant, indices.get(tenant, 0), spec.profile.value, spec.vcpus, spec.mem_mib,
                    spec.data_disk_mib, spec.flake_ref, spec.pools,
                )
            )  # fmt: skip
        return TenantsAnswer(tuple(rows), more=len(names) > TENANT_ROWS)

    def read_console(self, request: ConsoleRequest) -> ConsoleAnswer:
        if not self.store.instance_paths(request.instance).state.exists():
            self.store.load_record(request.instance)  # raises, and says what to do
        return read_console(
            self.store.instance_paths(request.instance).console_log, request.lines, request.place
        )

    def _line(self, instance: InstanceId) -> InstanceLine | None:
        try:
            record: InstanceRecord = self.store.load_record(instance)
        except NotFound:
            return None
        except MvmError:
            return InstanceLine(instance, "unreadable", "-", 0)
        return InstanceLine(
            instance,
            record.state.value,
            record.network.ip,
            record.changed_ns,
            "" if record.pending is None else record.pending.intent.value,
            record.revision or "",
        )

    def inspect_tenant(self, request: TenantRequest) -> TenantAnswer:
        spec = self.store.load_spec(request.tenant)
        index = self.store.load_allocations().index_of(request.tenant)
        return TenantAnswer(spec, self.store.load_history(request.tenant), index)

    def note_console(self, request: ConsoleRequest, peer: PeerCredentials) -> None:
        """Write it into the audit log that somebody other than root reads what a guest writes."""
        if peer.uid != 0:
            self._audit("instance.logs", "done", request.instance, peer, "")

    def note_channel(self, request: ChannelRequest, peer: PeerCredentials, error: MvmError | None) -> None:
        """Write a session of somebody other than root into the audit log."""
        if peer.uid == 0:
            return
        outcome = "done" if error is None else "refused" if isinstance(error, _REFUSALS) else "failed"
        what = request.program if error is None else error.brief
        self._audit(f"instance.{request.purpose.value}", outcome, request.instance, peer, what)

    def describe(self, *, operations: int, channels: int, recovering: int) -> NodeAnswer:
        return NodeAnswer(
            mvm.__version__, os.getpid(), self.node, self._driver, operations, channels, recovering
        )


def _machine() -> str:
    try:
        machine = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine = ""
    return f"{os.uname().nodename} {machine}".strip()[: bounds.HOST_IDENTITY_MAX]
