"""Putting right what an interrupted command left, before anything else is done with the instance.

Correctness lives here, not in orderly shutdown: every operation may be killed between any two of its steps. The record
says what was under way and whether its commit point had passed; the host says what is there. The table says the end
(`mvm.core.lifecycle.settle`). Afterwards nothing is pending, and what the state does not have is gone from the host.
"""

from __future__ import annotations

import time
from pathlib import Path

from mvm.core import record as records
from mvm.core.errors import MvmError
from mvm.core.ids import SnapshotId
from mvm.core.lifecycle import Action, Intent, State, settle
from mvm.core.snapshot import SnapshotRef
from mvm.hostd import keeper, sealing
from mvm.hostd.operations.context import Context
from mvm.hostd.panic import panic_message
from mvm.hostd.resources import volume
from mvm.hostd.sealing.layout import SEGMENT_PREFIX
from mvm.linux import pidfd
from mvm.linux.files import fsync_dir, sweep_temporaries


def recover(context: Context) -> bool:
    """Bring record and host into agreement. True if anything had to be done. Takes no time where nothing has."""
    # A command killed while it wrote its very intent left that half written, and nothing in the record.
    sweep_temporaries(context.paths.base)
    if context.record.pending is not None:
        context.watch.phase("recover")
        _settle_pending(context)
        return True
    if context.record.state is State.RUNNING:
        return _check_running(context)
    return False


def _settle_pending(context: Context) -> None:
    pending = context.record.pending
    assert pending is not None
    step = records.pending_step(context.record)
    committed = pending.committed
    if context.paths.volumes.is_dir():
        sweep_temporaries(context.paths.volumes)
        volume.settle(context.paths.data_disk)
    if pending.intent is Intent.QUIESCING and not committed and pending.snapshot is not None:
        # The rename is the commit point, and the record is written after it.
        ref = _committed_snapshot(context, pending.snapshot)
        if ref is not None:
            context.record = records.note(context.record, snapshot=ref)
            context.commit()
            committed = True
    end = settle(step, committed=committed, alive=True)
    if end is State.RUNNING and not context.revive():
        end = settle(step, committed=committed, alive=False)
    context.settle_host(end)
    error = f"interrupted while {pending.intent}" if end is State.FAILED else ""
    context.save(records.end(context.record, end, now_ns=time.time_ns(), error=error))


def _committed_snapshot(context: Context, wanted: SnapshotId) -> SnapshotRef | None:
    """What `latest` is, if it is the snapshot that was being made."""
    latest = context.paths.latest
    try:
        identity, digest = sealing.peek(latest)
    except MvmError:
        return None
    if identity.instance != context.id or identity.snapshot != wanted:
        return None
    # Whoever renamed it may have died before it synced that. The record must not say `sleeping` before the disk does.
    fsync_dir(latest.parent)
    return SnapshotRef(
        id=wanted,
        manifest_sha256=digest,
        created_ns=int(latest.stat().st_mtime_ns),
        stored_bytes=sealing.bytes_on_disk(latest),
        chain=max(0, sum(1 for _ in latest.glob(f"{SEGMENT_PREFIX}*")) - 1),
    )


def _check_running(context: Context) -> bool:
    """A VMM that is gone without having been asked: the guest powered off, or it was lost."""
    identity = context.process()
    if identity is not None and pidfd.is_alive(identity):
        return False
    # The keeper writes the status after the VMM has gone, and ends itself then.
    keeper.await_end(context.paths.runtime)
    panic = panic_message(context.paths.console_log)
    orderly = read_exit(context.paths.runtime) == 0 and not panic
    context.settle_host(State.STOPPED if orderly else State.FAILED)
    action = Action.EXIT if orderly else Action.LOSE
    text = "" if orderly else "its VM ended without having been asked to"
    if panic:
        text = f"its kernel panicked: {panic}"
    context.save(records.observe(context.record, action, now_ns=time.time_ns(), error=text))
    return True


def read_exit(runtime: Path) -> int | None:
    """The VMM's wait status as its keeper wrote it, None if there is none."""
    try:
        return int((runtime / keeper.EXIT_FILE).read_bytes()[:16])
    except (OSError, ValueError):
        return None
