"""What the facade needs from builder and hostd, as protocols; `mvm.standalone.compose` supplies the real ones.

A test supplies others, so that everything the command line does can be run without a VM or a build.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from mvm.core.audit import AuditEntry, Verified
from mvm.core.ids import InstanceId, RevisionId, TenantId
from mvm.core.snapshot import ArtifactHash
from mvm.wire.executor import Executor

if TYPE_CHECKING:
    from mvm.hostd.guest_channel import GuestChannel
    from mvm.wire.hostd_api import Purpose

LineSink = Callable[[str], None]
"""Takes one line of a build's log."""
StepSink = Callable[[str, float | None], None]
"""Takes the present step of a build and its completed fraction, or None if that is not known."""


class Host(Executor, Protocol):
    """The privileged side with its sessions."""

    def channel(
        self, instance: InstanceId, purpose: Purpose, program: str = ""
    ) -> AbstractContextManager[GuestChannel]:
        """A control channel to the guest of a running instance. Conflict if it does not run, Busy if all are in use,
        GuestError if it does not answer.

        `purpose`, `program`: what it is for, as the audit log may show it; for a host that keeps the log of those who
        cannot.
        """
        ...


class Built(msgspec.Struct, frozen=True):
    """A revision that is in the revision directory. `reused`: it was there before."""

    revision: RevisionId
    flake_ref: str
    lock_sha256: str
    store_paths: tuple[str, ...]
    artifacts: tuple[ArtifactHash, ...]
    reused: bool = False


class Workshop(Protocol):
    """Builds flakes and keeps what they produce."""

    @property
    def notice(self) -> str:
        """Empty, or what to tell the operator about the way this builds."""
        ...

    def resolve(self, flake_ref: str, cwd: Path) -> str:
        """The reference to remember: one that means the same from any directory. InvalidInput if it names a
        directory that holds no flake."""
        ...

    def build(
        self, flake_ref: str, profile: str, lock_sha256: str | None, *, on_line: LineSink, on_step: StepSink
    ) -> Built:
        """Build, and have the result in the revision directory. BuildFailed and others as in
        `mvm.builder.model`."""
        ...

    def collect(self, keep: Collection[RevisionId]) -> list[RevisionId]:
        """Delete every revision that is not in `keep`; what was deleted."""
        ...


class AuditLog(Protocol):
    """The audit logs of this node's tenants."""

    def append(self, entry: AuditEntry) -> None: ...
    def verify(self, tenant: TenantId) -> Verified:
        """NotFound without a log, IntegrityError naming the first bad line."""
        ...
