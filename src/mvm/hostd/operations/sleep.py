"""Put an instance to sleep.

    guest quiesces -> vCPUs pause -> memory and device state are sealed into snapshots/.new-<id> -> renamed to latest
    -> the VMM is killed, and with it go memory, tap, passphrase and the pages in the kernel's cache

Before the rename the guest can go on as if nothing had been asked; after it, it sleeps. There is no moment in between.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress

from mvm.core import record as records
from mvm.core.errors import MvmError
from mvm.core.ids import SnapshotId
from mvm.core.lifecycle import Action
from mvm.core.snapshot import SleepReceipt, SnapshotRef
from mvm.hostd import sealing
from mvm.hostd.operations.context import Context
from mvm.hostd.operations.snapshots import identity_of, open_latest
from mvm.hostd.sealing.directory import NEW_PREFIX
from mvm.linux.files import fsync_dir

QUIESCE_S = 120.0
"""How long a guest may take to write its dirty pages to its disk."""
_PAGE = sealing.PAGE


def sleep(context: Context) -> None:
    """Seal and release. An error before the commit point leaves the guest running."""
    snapshot = SnapshotId(os.urandom(16).hex())
    with context.step(Action.SLEEP, snapshot) as due:
        if not due:
            return
        context.watch.phase("quiesce guest")
        with context.channel() as channel:
            channel.prepare_sleep(timeout=QUIESCE_S)
        context.fault("quiesced")
        ref, info, resident = _seal(context, snapshot)
        context.fault("sealed")
        context.watch.phase("commit")
        try:
            replaced = sealing.commit(
                context.paths.snapshots / f"{NEW_PREFIX}{snapshot}", context.paths.latest
            )
            context.fault("renamed")
        except BaseException:
            # The rename may have happened all the same (a failed sync, an interrupt). Then it sleeps: the image that
            # the guest runs from is no longer `latest` and will be destroyed.
            if _is_latest(context, snapshot):
                with suppress(OSError):  # it failed already, perhaps; the guest may not go on in any case
                    fsync_dir(context.paths.snapshots)
                context.record = records.note(context.record, snapshot=ref)
                context.commit()
            raise
        context.record = records.note(context.record, snapshot=ref)
        context.commit()
        context.watch.phase("release")
        context.end_vm(0)
        context.release()
        if replaced is not None:
            sealing.destroy(replaced)
        context.release_network()
        phases, total = context.watch.stop()
        context.record = records.note(
            context.record,
            receipt=SleepReceipt(
                instance=context.id,
                snapshot=snapshot,
                total_ns=total,
                written_bytes=info.bytes_written,
                resident_bytes=resident,
                dirty_bytes=info.dirty_bytes,
                phases=phases,
            ),
        )


def _is_latest(context: Context, snapshot: SnapshotId) -> bool:
    try:
        return sealing.peek(context.paths.latest)[0].snapshot == snapshot
    except MvmError:
        return False


def _seal(context: Context, snapshot: SnapshotId) -> tuple[SnapshotRef, sealing.SealedInfo, int]:
    """Write the snapshot beside `latest`; the VM is left paused."""
    record = context.record
    with ExitStack() as opened:
        vm = context.vm()
        opened.callback(vm.close)
        context.watch.phase("pause")
        vm.pause()
        context.fault("paused")
        state = vm.save_state()
        context.watch.phase("seal memory")
        key = opened.enter_context(context.keys.tenant_key(context.id.tenant))
        parent = None
        if record.snapshot is not None:
            parent = opened.enter_context(open_latest(context, record.snapshot))
        memory = opened.enter_context(vm.memory())
        present = memory.present_pages()
        writer = opened.enter_context(
            sealing.SealWriter(
                context.paths.snapshots / f"{NEW_PREFIX}{snapshot}",
                identity_of(context, snapshot),
                key.wrap,
                parent=parent,
            )
        )
        writer.write_pages(memory)
        context.fault("pages written")
        writer.write_state(state)
        context.watch.phase("sync")
        info = writer.finish()
    # A woken guest's memory is its image and what it wrote; the image's untouched part was never in memory.
    ref = SnapshotRef(
        id=snapshot,
        manifest_sha256=info.manifest_sha256,
        created_ns=time.time_ns(),
        stored_bytes=sealing.bytes_on_disk(context.paths.snapshots / f"{NEW_PREFIX}{snapshot}"),
        chain=info.segments - 1,
    )
    return ref, info, present.count(1) * _PAGE
