"""`Host`: the executor in this process, holding the instance's lock around every verb."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mvm.core import record as records
from mvm.core.errors import Conflict, MvmError, NotFound
from mvm.core.ids import InstanceId
from mvm.core.lifecycle import Action, State, command_for
from mvm.core.plan import InstancePlan, check_plan
from mvm.core.record import InstanceRecord
from mvm.hostd import net_policy
from mvm.hostd.guest_channel import GuestChannel, acquire_session_port, connect
from mvm.hostd.keys import KeyProvider
from mvm.hostd.operations.context import ANSWER_S, Context
from mvm.hostd.operations.sleep import sleep
from mvm.hostd.operations.start import start
from mvm.hostd.operations.stop import destroy, remove_remains, stop
from mvm.hostd.operations.wake import wake
from mvm.hostd.recovery import recover
from mvm.hostd.stopwatch import Stopwatch
from mvm.hostd.store import LOCK_WAIT_S, Store
from mvm.hostd.vmm.choice import Choice
from mvm.hostd.vmm.driver import Driver
from mvm.linux.files import locked
from mvm.wire.executor import Progress, no_progress

if TYPE_CHECKING:
    from mvm.wire.hostd_api import Purpose


def no_fault(step: str) -> None:
    """Nothing fails on purpose outside of tests."""


class Host:
    """Implements `mvm.wire.executor.Executor`. `fault` is told every step's name and may end the process there.

    `baseline`: whether instances start only with everything that mode demands (`mvm.hostd.operations.confinement`).
    """

    def __init__(
        self,
        store: Store,
        keys: KeyProvider,
        driver: Driver | Choice,
        *,
        fault: Callable[[str], None] = no_fault,
        lock_wait_s: float = LOCK_WAIT_S,
        baseline: bool = False,
    ) -> None:
        self._store = store
        self._keys = keys
        self._driver = driver
        self._fault = fault
        self._lock_wait_s = lock_wait_s
        self._baseline = baseline

    def create_instance(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        check_plan(plan)
        with self._instance(plan.instance, progress, plan) as context:
            start(context, plan)
            return context.record

    def sleep_instance(self, instance: InstanceId, progress: Progress = no_progress) -> InstanceRecord:
        with self._instance(instance, progress) as context:
            sleep(context)
            return context.record

    def wake_instance(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        check_plan(plan)
        with self._instance(plan.instance, progress) as context:
            wake(context, plan)
            return context.record

    def stop_instance(self, instance: InstanceId, progress: Progress = no_progress) -> InstanceRecord:
        with self._instance(instance, progress) as context:
            stop(context)
            return context.record

    def destroy_instance(
        self, instance: InstanceId, *, wipe_volumes: bool, progress: Progress = no_progress
    ) -> None:
        try:
            with self._instance(instance, progress) as context:
                destroy(context, wipe_volumes=wipe_volumes)
        except NotFound:
            # An earlier destroy may have been cut short after the last of the instance's files.
            net_policy.refresh(self._store)
            if wipe_volumes:
                self._wipe_kept(instance)

    def _wipe_kept(self, instance: InstanceId) -> None:
        """Wipe the data disk that an earlier destroy left."""
        paths = self._store.instance_paths(instance)
        if paths.volumes.is_dir():
            with locked(paths.lock, wait=self._lock_wait_s):
                if not paths.state.exists():
                    remove_remains(paths, wipe_volumes=True)

    def inspect_instance(self, instance: InstanceId) -> InstanceRecord:
        with self._instance(instance, no_progress) as context:
            return context.record

    @contextmanager
    def channel(self, instance: InstanceId, purpose: Purpose, program: str = "") -> Iterator[GuestChannel]:
        """A session with the guest of a running instance. Conflict if it does not run, Busy if all ports are taken.

        What it is for is the caller's to audit: it has the rights for that, or could not be in this process.
        """
        record = self.inspect_instance(instance)
        if record.state is not State.RUNNING:
            verb = Action.WAKE if record.state is State.SLEEPING else Action.RUN
            raise Conflict(
                f"{instance} is {record.state}",
                details="Only a running guest can be talked to.",
                resolution=f"{verb.value.capitalize()} it first: {command_for(verb, instance)}",
            )
        lease = acquire_session_port(self._store.instance_paths(instance).runtime)
        with connect(lease.socket, lease=lease, deadline=time.monotonic() + ANSWER_S) as channel:
            yield channel

    @contextmanager
    def _instance(
        self, instance: InstanceId, progress: Progress, plan: InstancePlan | None = None
    ) -> Iterator[Context]:
        """The instance under its lock, recovered. With `plan` it is created where there is no record yet."""
        paths = self._store.instance_paths(instance)
        while True:
            if plan is not None:
                paths.make()
            elif not paths.state.exists():
                self._store.load_record(instance)  # raises, and says what to do
            with locked(paths.lock, wait=self._lock_wait_s):
                context = self._recovered(instance, progress, plan)
                if context is not None:
                    yield context
                    return

    def _create(self, plan: InstancePlan) -> InstanceRecord:
        """A record where there is none. NotFound or Conflict, and nothing left, if the tenant is gone or going.

        A tenant that is destroyed meanwhile must not keep a VM that nobody can name, and who destroys it does not hold
        this instance's lock. That one leaves its mark and then looks for records; here the record comes first and then
        the look for the mark: one of the two sees what the other did. It is the same for two instances that want one
        address.
        """
        record = records.new_record(plan.instance, plan.network, now_ns=time.time_ns())
        try:
            self._refuse_outdated(plan)
            self._store.save_record(record)
            self._fault("record made")
            self._refuse_outdated(plan)
        except MvmError:
            remove_remains(self._store.instance_paths(plan.instance), wipe_volumes=False)
            raise
        return record

    def _refuse_outdated(self, plan: InstancePlan) -> None:
        tenant = plan.instance.tenant
        self._store.refuse_destroyed(tenant)
        # Two that are first started at once may have been planned with one slot; then neither has it.
        for other in self._store.instances(tenant):
            if other != plan.instance and self._slot(other) == plan.network.slot:
                raise Conflict(
                    f"{plan.instance} cannot have the address {plan.network.ip}",
                    details=f"It belongs to {other}.",
                    resolution="Ask again.",
                )
        # Subnets are never given out twice: one of the same name with another is another tenant.
        indices = [lease.index for lease in self._store.load_allocations().leases if lease.tenant == tenant]
        if indices not in ([], [plan.network.index]):
            raise Conflict(
                f"{tenant} was destroyed and created again",
                details=f"The plan is for subnet {plan.network.index}; it has {indices[0]} now.",
                resolution="Ask again.",
            )

    def _slot(self, instance: InstanceId) -> int | None:
        try:
            return self._store.load_record(instance).network.slot
        except NotFound:
            return None  # gone since it was listed

    def _recovered(
        self, instance: InstanceId, progress: Progress, plan: InstancePlan | None
    ) -> Context | None:
        """The instance with nothing pending. None if the last of it was removed just now, and the lock with it."""
        try:
            record = self._store.load_record(instance)
        except NotFound:
            if plan is None:
                return None
            record = self._create(plan)
        else:
            if plan is not None:
                self._store.refuse_destroyed(instance.tenant)
        watch = Stopwatch(progress)
        context = Context(
            self._store, self._keys, self._driver, record, watch, self._fault, baseline=self._baseline
        )
        recover(context)
        if context.record.state is State.DESTROYED:
            remove_remains(context.paths, wipe_volumes=False)
            net_policy.refresh(self._store)
            return None
        if plan is not None and plan.network != record.network:
            raise Conflict(
                f"{instance} has another address than the plan gives it",
                details=f"It has {record.network.ip} ({record.network.mac}), the plan {plan.network.ip} "
                f"({plan.network.mac}).",
                resolution="Destroy it, which keeps its data disk, and start it again: "
                + command_for(Action.DESTROY, instance),
            )
        return context
