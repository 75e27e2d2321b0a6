"""`Executor`: what may be asked of the privileged side, whoever asks and however it is reached.

In development mode the command line composes `mvm.hostd.host.Host` in its own process; with daemons a socket client
implements the same protocol. Callers cannot tell the two apart. Every verb states an intent; none takes a path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mvm.core.ids import InstanceId
from mvm.core.plan import InstancePlan
from mvm.core.record import InstanceRecord

Progress = Callable[[str], None]
"""Told the name of each phase as it begins, for whoever draws progress."""


def no_progress(phase: str) -> None:
    """For callers that draw nothing."""


class Executor(Protocol):
    """All verbs are idempotent, take the instance's lock (Busy if another command holds it for too long), first finish
    or undo whatever an interrupted one left, and raise only `MvmError`s on purpose."""

    def create_instance(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        """Have the instance exist and run, started from the plan's revision. Conflict if it sleeps."""
        ...

    def sleep_instance(self, instance: InstanceId, progress: Progress = no_progress) -> InstanceRecord:
        """Put it to sleep; `last_receipt` of the answer is the SleepReceipt."""
        ...

    def wake_instance(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        """Wake it where it left off; `last_receipt` is the WakeReceipt. IntegrityError leaves it sleeping."""
        ...

    def stop_instance(self, instance: InstanceId, progress: Progress = no_progress) -> InstanceRecord:
        """Graceful, then SIGTERM, then SIGKILL. A sleeping one loses its snapshot, key first."""
        ...

    def destroy_instance(
        self, instance: InstanceId, *, wipe_volumes: bool, progress: Progress = no_progress
    ) -> None:
        """Stop it and delete what it had; its data volume too with `wipe_volumes`, else that is kept."""
        ...

    def inspect_instance(self, instance: InstanceId) -> InstanceRecord:
        """What it is now, after recovery. NotFound if it was never created."""
        ...
