"""What every operation works with: the instance's record, and the means to act on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mvm.core import record as records
from mvm.core.errors import GuestError, MvmError, VmmError
from mvm.core.ids import InstanceId, SnapshotId
from mvm.core.lifecycle import Action, Intent, NoOp, State, after_failure, plan_transition
from mvm.core.record import InstanceRecord
from mvm.hostd import keeper, sealing
from mvm.hostd.bounded_log import tail
from mvm.hostd.guest_channel import GuestChannel, GuestRefusal, WakeReport, connect, lock_path, socket_path
from mvm.hostd.keys import KeyProvider
from mvm.hostd.resources import cgroup, network, volume
from mvm.hostd.stopwatch import Stopwatch
from mvm.hostd.store import Store
from mvm.hostd.vmm.choice import Choice, driver_of
from mvm.hostd.vmm.driver import Driver, Vm
from mvm.linux import pidfd
from mvm.linux.files import fsync_dir, remove_tree
from mvm.linux.mount import detach, mounts_below

BOOT_S = 180.0
"""How long a guest may take to its first answer. Software emulation on a busy host needs most of a minute."""
ANSWER_S = 20.0
AWAKE_S = 180.0
"""How long a woken guest may take to its first answer; ample, because after that it is ended, its memory with it."""
_REAP_S = 2.0
_ASK_AGAIN_S = 5.0
_RETRY_S = 0.01
# Names in the runtime directory that outlive a VM: what a person reads afterwards.
KEPT = frozenset({"logs", "metrics", "fc.final.json"})


class Context:
    """One instance under its lock. `fault` is called with the name of every step that matters, for tests to fail at."""

    def __init__(
        self,
        store: Store,
        keys: KeyProvider,
        drivers: Driver | Choice,
        record: InstanceRecord,
        watch: Stopwatch,
        fault: Callable[[str], None],
        *,
        baseline: bool = False,
    ) -> None:
        self.store = store
        self.keys = keys
        self.drivers = drivers
        self._driver: Driver | None = None
        self.record = record
        self.watch = watch
        self.fault = fault
        self.baseline = baseline
        self.paths = store.instance_paths(record.id)

    @property
    def driver(self) -> Driver:
        """Of the VMM it has or sleeps under; a start sets another. MissingPrerequisite if the host has it no more."""
        return self._driver or driver_of(self.drivers, self.record)

    @driver.setter
    def driver(self, chosen: Driver) -> None:
        self._driver = chosen

    @property
    def id(self) -> InstanceId:
        return self.record.id

    def save(self, record: InstanceRecord) -> None:
        self.store.save_record(record)
        self.record = record

    def due(self, action: Action) -> bool:
        """Whether `action` has anything to do. Conflict if the table forbids it; nothing is written."""
        return not isinstance(plan_transition(self.record.state, action, self.id), NoOp)

    @contextmanager
    def step(self, action: Action, snapshot: SnapshotId | None = None) -> Iterator[bool]:
        """The frame of an operation: intent before, end after, the table's answer to a failure.

        Yields False where there is nothing to do. Inside, a raised error ends the VM unless the step's answer to a
        failure is `running`; then the caller has already put that right.
        """
        step = plan_transition(self.record.state, action, self.id)
        if isinstance(step, NoOp):
            yield False
            return
        self.save(records.begin(self.record, step, now_ns=time.time_ns(), snapshot=snapshot))
        self.fault("intent")
        try:
            yield True
            self.fault("before end")
        except BaseException as error:  # an interrupt from the keyboard must not leave a guest paused
            pending = self.record.pending
            committed = pending is not None and pending.committed
            end = after_failure(step, committed=committed, alive=True)
            # Asking a guest whether it lives resumes it, so nobody asks where the answer would not matter.
            if end is State.RUNNING and not self.revive():
                end = after_failure(step, committed=committed, alive=False)
            self.settle_host(end)
            text = error.brief if isinstance(error, MvmError) else f"{type(error).__name__}: {error}"
            self.save(records.end(self.record, end, now_ns=time.time_ns(), error=text))
            raise
        self.save(records.finish(self.record, now_ns=time.time_ns()))

    def commit(self) -> None:
        self.save(records.commit(self.record))
        self.fault("committed")

    # The VM.

    def process(self) -> records.ProcessIdentity | None:
        return self.record.process

    def vm(self) -> Vm:
        """The running VM. VmmError if it is gone."""
        identity = self.process()
        if identity is None or self.record.fingerprint is None:
            raise VmmError(f"{self.id} has no VM")
        return self.driver.adopt(
            identity, self.id.vm_name, self.record.fingerprint.mem_mib, self.paths.runtime
        )

    def revive(self) -> bool:
        """Whether the VM runs and its guest answers; resumes it for that if it is paused.

        A guest whose sleep was broken off was running before: one that is too busy to answer still is.
        """
        if not self._vmm_is_alive():
            return False
        try:
            vm = self.vm()
            try:
                vm.resume()
            finally:
                vm.close()
            self.tell_awake(remount_secrets=True, within_s=ANSWER_S)
        except GuestError:
            pending = self.record.pending
            return pending is not None and pending.intent is Intent.QUIESCING and self._vmm_is_alive()
        except (MvmError, OSError):
            return False
        return True

    def tell_awake(self, *, remount_secrets: bool, within_s: float) -> WakeReport:
        """Have a resumed guest put itself right, and return what it says. GuestError after `within_s`.

        Asked again every few seconds: doing it twice changes nothing, and a request can get lost between a port that
        a snapshot remembers as closed and the news that it is open.
        """
        deadline = time.monotonic() + within_s
        while True:
            left = deadline - time.monotonic()
            try:
                with self.channel() as channel:
                    return channel.after_wake(
                        remount_secrets=remount_secrets, timeout=min(_ASK_AGAIN_S, left)
                    )
            except GuestError as error:
                if isinstance(error, GuestRefusal) or left <= _ASK_AGAIN_S or not self._vmm_is_alive():
                    raise
                time.sleep(_RETRY_S)

    def _vmm_is_alive(self) -> bool:
        identity = self.process()
        return identity is not None and pidfd.is_alive(identity)

    def end_vm(self, grace_s: float) -> None:
        """End whatever there is of a VM, recorded or not. Returns when it is gone."""
        identity = self.process()
        if identity is not None:
            pidfd.terminate(identity, grace_s)
        # Killed before it has reaped the VMM, the keeper would leave a zombie to init.
        keeper.end_leftovers(self.paths.runtime, grace_s=0.0 if identity is None else _REAP_S)

    def release(self) -> None:
        """Remove what an ended VM leaves: its control group, sockets, locks, mounts; its data disk is locked. Logs and
        metrics stay."""
        cgroup.groups(self.store.root).remove(self.id.vm_name)
        volume.lock(self.paths.data_disk, self.id)
        # Only where mvm mounts anything: an operator may have put the volumes or snapshots on another disk.
        for folder in (self.paths.runtime, self.paths.jail):
            for point in mounts_below(folder):
                detach(point)
        if not self.paths.runtime.is_dir():
            return
        for name in os.listdir(self.paths.runtime):
            if name not in KEPT:
                remove_tree(self.paths.runtime / name)

    def settle_host(self, end: State) -> None:
        """Leave on the host what an instance in the state `end` has, and nothing else; before the record says so."""
        if end is not State.RUNNING:
            self.end_vm(0)
            self.release()
            self.release_network()
        if end in (State.RUNNING, State.SLEEPING):
            self.sweep_snapshots()
        else:
            self.destroy_snapshots()

    def release_network(self) -> None:
        with self.store.network_lock(self.id.tenant):
            network.remove_port(self.record.network.tap)
            network.remove_bridge_if_unused(self.record.network.bridge)

    # The guest.

    def channel(self, timeout: float = ANSWER_S) -> GuestChannel:
        """The host's own port of the guest."""
        runtime = self.paths.runtime
        return connect(
            socket_path(runtime, 0), lock_path=lock_path(runtime, 0), deadline=time.monotonic() + timeout
        )

    def await_guest(self, vm: Vm, timeout: float) -> None:
        """Return when the guest answers. VmmError if the VM ends first, GuestError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                with self.channel() as channel:
                    channel.hello(timeout=max(0.1, min(2.0, deadline - time.monotonic())))
                return
            except GuestError as error:
                time.sleep(_RETRY_S)  # a VMM may also refuse at once
                if not vm.is_alive():
                    raise VmmError(
                        f"the VM of {self.id} ended while it started",
                        details=tail(self.paths.console_log) or tail(self.paths.vmm_log),
                        resolution=f"See {self.paths.console_log}.",
                    ) from error
                if time.monotonic() > deadline:
                    raise GuestError(
                        f"the guest of {self.id} does not answer",
                        details=tail(self.paths.console_log),
                        resolution=f"See {self.paths.console_log}.",
                    ) from error

    # Snapshots.

    def sweep_snapshots(self) -> None:
        """Destroy whatever is not `latest`: half written, or replaced. No VM may run from such a one."""
        if self.paths.snapshots.is_dir():
            sealing.recover(self.paths.snapshots)

    def destroy_snapshots(self) -> None:
        """Key first, then all the rest."""
        self.sweep_snapshots()
        if self.paths.snapshots.is_dir():
            sealing.destroy(self.paths.latest)
            # Also where somebody removed it before: if he died before he synced that, a power loss would bring it back.
            fsync_dir(self.paths.snapshots)
