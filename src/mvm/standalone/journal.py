"""Audit entries around what a command does: one per state-changing command and instance, written when it ended.

Outcomes: `done`; `refused` when mvm said no (form, state, policy, integrity, somebody else at work); `failed`
for everything else, an interrupt included. A command that found everything already as wanted writes nothing.
A tenant that does not exist has no log, so a refusal of its name is not recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvm.core import limits
from mvm.core.audit import AuditEntry
from mvm.core.errors import Busy, Conflict, InvalidInput, MvmError, NotFound, Refused

if TYPE_CHECKING:
    from mvm.core.ids import InstanceId, NodeId, TenantId
    from mvm.hostd.store import Store
    from mvm.standalone.ports import AuditLog

_REFUSALS = (Refused, Conflict, InvalidInput, NotFound, Busy)


class Note:
    """What the block learns while it runs. `skip`: nothing was changed, write no entry."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.skip = False

    def add(self, **facts: Any) -> None:
        """Fields of AuditEntry."""
        self.facts.update(facts)


class Journal:
    """`command`: the command line as given, secrets left out by the caller."""

    def __init__(
        self, store: Store, log: AuditLog, command: tuple[str, ...], clock: Callable[[], int], host: str
    ) -> None:
        self._store = store
        self._log = log
        self._clock = clock
        self._host = host
        self._node: NodeId | None = None
        self.command = command

    @contextmanager
    def entry(
        self,
        action: str,
        tenant: TenantId,
        instance: InstanceId | None = None,
        *,
        command: tuple[str, ...] | None = None,
    ) -> Iterator[Note]:
        """Write the entry for the block when it ends, whichever way."""
        note = Note()
        try:
            yield note
        except BaseException as error:
            brief = error.brief if isinstance(error, MvmError) else type(error).__name__
            outcome = "refused" if isinstance(error, _REFUSALS) else "failed"
            try:
                self._write(action, outcome, tenant, instance, command, {**note.facts, "detail": brief})
            except (OSError, MvmError) as second:
                # What went wrong first is what the operator must see; this must not hide it.
                error.add_note(f"and the audit log could not be written: {second}")
            raise
        if not note.skip:
            self._write(action, "done", tenant, instance, command, note.facts)

    def _write(
        self,
        action: str,
        outcome: str,
        tenant: TenantId,
        instance: InstanceId | None,
        command: tuple[str, ...] | None,
        facts: dict[str, Any],
    ) -> None:
        if not self._store.tenant_dir(tenant).is_dir():
            return
        if self._node is None:
            self._node = self._store.node_id()
        given = self.command if command is None else command
        detail = str(facts.pop("detail", ""))[: limits.MESSAGE_MAX]
        self._log.append(
            AuditEntry(
                time_ns=self._clock(),
                tenant=tenant,
                action=action,
                outcome=outcome,
                node=self._node,
                host=self._host,
                command=clipped(given),
                detail=detail,
                instance=instance,
                **facts,
            )
        )


def clipped(command: tuple[str, ...]) -> tuple[str, ...]:
    """`command` within what an entry may hold, marked where something was left out."""
    kept = [word[: limits.MESSAGE_MAX] for word in command[: limits.AUDIT_ARGUMENTS]]
    # 64 arguments of 4 KiB would not fit one line of the log.
    while sum(len(word.encode("utf-8", "replace")) for word in kept) > limits.AUDIT_LINE_BYTES // 4:
        kept.pop()
    if len(kept) < len(command):
        kept = [*kept[: limits.AUDIT_ARGUMENTS - 1], f"... ({len(command)} words)"]
    # Arguments are bytes to the kernel; what is no UTF-8 must not make the entry impossible.
    return tuple(word.encode("utf-8", "replace").decode() for word in kept)


def host_identity() -> str:
    """Host name and machine id."""
    try:
        machine = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine = ""
    return f"{os.uname().nodename} {machine}".strip()[: limits.HOST_IDENTITY_MAX]
