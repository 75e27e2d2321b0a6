"""Stop an instance, and destroy one."""

from __future__ import annotations

import os
import time

from mvm.core.errors import MvmError
from mvm.core.lifecycle import Action, State
from mvm.hostd import net_policy
from mvm.hostd.operations.context import Context
from mvm.hostd.resources import volume
from mvm.hostd.store import InstancePaths
from mvm.linux import pidfd
from mvm.linux.files import remove_tree
from mvm.linux.process import wait_readable

AGREE_S = 10.0
"""How long a guest may take to say that it will go down."""
GUEST_S = 30.0
TERM_S = 5.0


def stop(context: Context) -> None:
    """Ask the guest, then SIGTERM, then SIGKILL, each bounded; a sleeping one loses its snapshot, key first."""
    with context.step(Action.STOP) as due:
        if not due:
            return
        _end(context)
        context.watch.phase("release")
        context.destroy_snapshots()
        context.release_network()


def destroy(context: Context, *, wipe_volumes: bool) -> None:
    """Stop it and remove what it had. Without `wipe_volumes` the data disk stays, locked, for the next of its name."""
    with context.step(Action.DESTROY) as due:
        if due:
            _end(context)
            context.watch.phase("remove")
            context.destroy_snapshots()
            context.release_network()
            if wipe_volumes:
                volume.wipe(context.paths.data_disk)
    remove_remains(context.paths, wipe_volumes=wipe_volumes)
    net_policy.refresh(context.store)


def remove_remains(paths: InstancePaths, *, wipe_volumes: bool) -> None:
    """Remove the files of a destroyed instance, under its lock; its record goes last. Repeatable after a crash."""
    for folder in (paths.runtime, paths.snapshots, paths.jail):
        remove_tree(folder)
    if wipe_volumes:
        volume.wipe(paths.data_disk)
    else:
        volume.settle(paths.data_disk)
    if volume.is_kept(paths.data_disk):
        paths.state.unlink(missing_ok=True)
    else:
        remove_tree(paths.base)


def _end(context: Context) -> None:
    if context.record.state is State.RUNNING:
        context.watch.phase("shut guest down")
        _ask_guest(context)
        context.watch.phase("end VMM")
    context.end_vm(TERM_S)
    context.release()


def _ask_guest(context: Context) -> None:
    """Best effort: a guest that will not or cannot shut down is ended all the same."""
    identity = context.process()
    handle = None if identity is None else pidfd.open_pidfd(identity)
    if handle is None:
        return
    try:
        began = time.monotonic()
        with context.channel(timeout=5.0) as channel:
            channel.shutdown(reboot=True, timeout=AGREE_S)
        wait_readable(handle, max(0.0, GUEST_S - (time.monotonic() - began)))
    except MvmError:
        return
    finally:
        os.close(handle)
