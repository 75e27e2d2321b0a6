"""Start an instance cold."""

from __future__ import annotations

from mvm.core import record as records
from mvm.core.lifecycle import Action
from mvm.core.plan import InstancePlan
from mvm.core.revision import INITRD, KERNEL
from mvm.hostd import net_policy
from mvm.hostd.assembly import assemble, load_revision, require_memory, verify_artifacts
from mvm.hostd.operations import confinement
from mvm.hostd.operations.context import BOOT_S, Context
from mvm.hostd.vmm.choice import driver_for


def start(context: Context, plan: InstancePlan) -> None:
    """Boot `plan`'s revision. Running when the guest has answered.

    Everything that can be refused is refused before the record changes. A snapshot of an earlier life goes first: its
    memory is older than the disk from the first write on.
    """
    if not context.due(Action.RUN):
        return
    revision = load_revision(context.store, plan)
    folder = context.store.revisions_dir / plan.revision
    context.driver = driver_for(context.drivers, folder / KERNEL, folder / INITRD)
    context.driver.version()
    require_memory(plan)
    net_policy.require()
    confinement.require(context, plan)
    with context.step(Action.RUN) as due:
        if not due:
            return
        context.watch.phase("prepare")
        context.end_vm(0)
        context.release()
        context.destroy_snapshots()
        context.watch.phase("verify artifacts")
        verify_artifacts(context.store, revision)
        with assemble(
            context.store, context.keys, plan, revision, cold=True, wants=context.driver.wants
        ) as machine:
            context.watch.phase("check acceleration")
            fingerprint = context.driver.fingerprint(machine)
            context.watch.phase("start VMM")
            confined = confinement.confine(context, machine)
            vm = context.driver.start(confined.machine)
        try:
            unconfined = confinement.check(context, confined, vm)
            context.fault("started")
            context.save(
                records.note(
                    context.record,
                    process=vm.identity,
                    vmm=records.VmmIdentity(driver=context.driver.name, version=fingerprint.vmm_version),
                    revision=plan.revision,
                    fingerprint=fingerprint,
                    unconfined=unconfined,
                )
            )
            context.watch.phase("boot guest")
            context.await_guest(vm, BOOT_S)
        finally:
            vm.close()
        context.commit()
