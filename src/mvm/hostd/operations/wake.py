"""Wake an instance where it left off.

The snapshot is opened and bound to the record before anything starts; then three things go on at once: the VMM starts,
the pager decrypts the working set ahead of it, and every record of the snapshot is authenticated here. Only when all
of it is sound do the vCPUs go on. That instant is the commit point: from then on the guest may write to its disk, and
this memory must never be restored again.
"""

from __future__ import annotations

from contextlib import ExitStack

from mvm.core import record as records
from mvm.core.errors import GuestError, IntegrityError, MvmError, NotFound
from mvm.core.lifecycle import Action, command_for
from mvm.core.plan import InstancePlan
from mvm.core.snapshot import WakeReceipt
from mvm.hostd import net_policy, sealing
from mvm.hostd.assembly import assemble, has_secrets, load_revision, require_memory
from mvm.hostd.guest_channel import WakeReport, distrust_ports
from mvm.hostd.operations import confinement
from mvm.hostd.operations.context import AWAKE_S, Context
from mvm.hostd.operations.snapshots import open_latest
from mvm.hostd.pager import open_memory


def wake(context: Context, plan: InstancePlan) -> None:
    """Restore and go on. IntegrityError (damaged, foreign, made under something else) leaves it sleeping."""
    if not context.due(Action.WAKE):
        return
    context.watch.phase("open snapshot")
    revision = load_revision(context.store, plan)
    require_memory(plan)
    net_policy.require()
    confinement.require(context, plan)
    ref = context.record.snapshot
    with context.step(Action.WAKE, ref.id if ref is not None else None) as due:
        if not due or ref is None:
            return
        try:
            with ExitStack() as opened:
                machine = opened.enter_context(
                    assemble(
                        context.store, context.keys, plan, revision, cold=False, wants=context.driver.wants
                    )
                )
                fingerprint = context.driver.fingerprint(machine)
                image = opened.enter_context(open_latest(context, ref, fingerprint))
                state = image.state()
                distrust_ports(context.paths.runtime, range(1, 8))
                memory = open_memory(image, plan.uid, plan.gid, context.paths.runtime / "memory")
                opened.callback(memory.close)
                context.watch.phase("start VMM")
                try:
                    confined = confinement.confine(context, machine)
                    vm = context.driver.restore(confined.machine, memory)
                finally:
                    # While we held its device, a VMM whose pager died would wait for a page and not even be killable.
                    memory.handed_over()
                opened.callback(vm.close)
                unconfined = confinement.check(context, confined, vm)
                context.record = records.note(
                    context.record,
                    process=vm.identity,
                    vmm=records.VmmIdentity(driver=context.driver.name, version=fingerprint.vmm_version),
                    revision=plan.revision,
                    fingerprint=fingerprint,
                    unconfined=unconfined,
                )
                context.fault("started")
                context.watch.phase("verify snapshot")
                image.authenticate()
                context.watch.phase("load devices")
                vm.load_state(state)
                context.fault("loaded")
                context.watch.phase("resume")
                context.commit()
                vm.resume()
                context.fault("resumed")
                context.watch.phase("guest answers")
                # A tenant that never had secrets has none to mount, and mounting is half of the guest's work.
                wanted = has_secrets(context.store, plan)
                report = context.tell_awake(remount_secrets=wanted, within_s=AWAKE_S)
                memory.answered(vm.identity.pid)
                _check(context, report, secrets=wanted)
                phases, total = context.watch.stop()
                decrypted, chunks = memory.decrypted(), image.chunk_count
        except (IntegrityError, NotFound) as error:
            raise _refused(context, error) from error
        context.record = records.note(
            context.record,
            receipt=WakeReceipt(
                instance=context.id,
                snapshot=ref.id,
                total_ns=total,
                phases=phases,
                chunks_read=decrypted,
                chunks_total=chunks,
            ),
        )


def _check(context: Context, report: WakeReport, *, secrets: bool) -> None:
    """What the guest says it did. It is awake in any case; an operator has to know what it lacks."""
    lacks = [] if report.network_ok else ["its network address"]
    if secrets and report.secrets == "failed":  # "none": the last set that was given is empty
        lacks.append("its new secrets")
    if lacks:
        raise GuestError(
            f"{context.id} is awake without {' and '.join(lacks)}",
            details=f"The guest's agent reports: secrets {report.secrets}, network_ok {report.network_ok}.",
            resolution=f"See {context.paths.console_log}, and restart it if need be.",
        )


def _refused(context: Context, error: MvmError) -> IntegrityError:
    """The refusal with the way on: the snapshot is not used, the instance still sleeps."""
    stop, run = (command_for(action, context.id) for action in (Action.STOP, Action.RUN))
    brief = f"{context.id} cannot be woken: {error.brief}"
    refused = IntegrityError(brief)
    if isinstance(error, sealing.FingerprintMismatch):
        refused = sealing.FingerprintMismatch(error.differences)
        refused.args = (brief,)
    refused.brief = brief
    refused.details = error.details
    refused.resolution = f"It still sleeps. To give up its memory and start it cold: {stop} && {run}"
    return refused
