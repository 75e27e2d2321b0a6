"""What keeps a VMM in bounds, as an operation sees it: demanded before, given with the machine, checked after.

In baseline mode an instance does not start without all of it; in development mode it starts with what the host has.
What its VMM is without is then in its record (`InstanceRecord.unconfined`), and said aloud by the command and in the
daemon's log.
nftables is demanded in both (`mvm.hostd.net_policy.require`).
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from mvm.core import limits
from mvm.core.errors import MissingPrerequisite
from mvm.core.plan import InstancePlan
from mvm.core.revision import INITRD, KERNEL
from mvm.hostd import jail, keeper
from mvm.hostd.operations.context import Context
from mvm.hostd.resources import cgroup, dm_crypt
from mvm.hostd.vmm.driver import Machine, Vm


class Confined(NamedTuple):
    """`unlimited`: why the machine was given no control group, "" if it was."""

    machine: Machine
    unlimited: str


def require(context: Context, plan: InstancePlan) -> None:
    """MissingPrerequisite in baseline mode unless the host has jails, control groups, dm-crypt and KVM for the plan's
    kernel. Changes nothing.
    """
    if not context.baseline:
        return
    missing = [
        f"{what}: {why}"
        for what, why in (
            ("the VMM's jail", jail.unavailable()),
            ("control groups", cgroup.groups(context.store.root).available()),
            ("encryption of data disks by the kernel", dm_crypt.unavailable()),
            ("virtualisation by the processor", _emulated(context, plan)),
        )
        if why
    ]
    if missing:
        raise MissingPrerequisite(
            f"{context.id} does not start: this host lacks what baseline mode demands",
            details="\n".join(missing),
            resolution="See: mvm doctor. For one user's own machine: mvm bootstrap --development",
        )


def _emulated(context: Context, plan: InstancePlan) -> str:
    """Why the guest would be emulated, "" if it would not. An emulator is no boundary that anybody vouches for."""
    folder = context.store.revisions_dir / plan.revision
    found = context.driver.capabilities(folder / KERNEL, folder / INITRD)
    return (found.accel_reason or "there is only emulation") if found.accel == "tcg" else ""


def confine(context: Context, machine: Machine) -> Confined:
    """The machine with a control group, which is made here, and with a jail that is as binding as the mode."""
    groups, group = cgroup.groups(context.store.root), None
    unlimited = groups.available()
    if not unlimited:
        try:
            group = groups.apply(machine.name, cgroup.limits(mem_mib=machine.mem_mib, vcpus=machine.vcpus))
        except MissingPrerequisite as error:
            # A hierarchy may show its controllers and still be read-only, or full of somebody else's processes.
            if context.baseline:
                raise
            unlimited = error.details or error.brief
    return Confined(msgspec.structs.replace(machine, cgroup=group, confined=context.baseline), unlimited)


def check(context: Context, confined: Confined, vm: Vm) -> tuple[str, ...]:
    """What the VMM runs without, and why. VmmError unless it is in the group that it was given."""
    machine, without = confined.machine, []
    if machine.cgroup is not None:
        cgroup.groups(context.store.root).verify(machine.name, vm.identity.pid)
    else:
        without.append(f"without limits on memory, CPU and threads: {confined.unlimited}")
    if why := keeper.unjailed(machine.runtime):
        without.append(f"without a jail: {why}")
    return tuple(text[: limits.MESSAGE_MAX] for text in without)
