"""What keeps a VMM in bounds, as an operation sees it: demanded before, given with the machine, checked after.

In baseline mode an instance does not start without all of it; in development mode it starts with what the host has, and
`mvm posture` says what that is. nftables is demanded in both (`mvm.hostd.net_policy.require`).
"""

from __future__ import annotations

import msgspec

from mvm.core.errors import MissingPrerequisite
from mvm.hostd import jail
from mvm.hostd.operations.context import Context
from mvm.hostd.resources import cgroup, dm_crypt
from mvm.hostd.vmm.driver import Machine, Vm


def require(context: Context) -> None:
    """MissingPrerequisite in baseline mode unless the host has jails, control groups and dm-crypt. Changes nothing."""
    if not context.baseline:
        return
    missing = [
        f"{what}: {why}"
        for what, why in (
            ("the VMM's jail", jail.unavailable()),
            ("control groups", cgroup.groups(context.store.root).available()),
            ("encryption of data disks by the kernel", dm_crypt.unavailable()),
        )
        if why
    ]
    if missing:
        raise MissingPrerequisite(
            f"{context.id} does not start: this host lacks what baseline mode demands",
            details="\n".join(missing),
            resolution="See: mvm doctor. For one user's own machine: mvm bootstrap --mode development",
        )


def confine(context: Context, machine: Machine) -> Machine:
    """The machine with a control group, which is made here, and with a jail that is as binding as the mode."""
    groups, group = cgroup.groups(context.store.root), None
    if not groups.available():
        group = groups.apply(machine.name, cgroup.limits(mem_mib=machine.mem_mib, vcpus=machine.vcpus))
    return msgspec.structs.replace(machine, cgroup=group, confined=context.baseline)


def check(context: Context, machine: Machine, vm: Vm) -> None:
    """VmmError unless the VMM is in the group that it was given."""
    if machine.cgroup is not None:
        cgroup.groups(context.store.root).verify(machine.name, vm.identity.pid)
