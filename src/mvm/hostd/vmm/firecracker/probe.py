"""Whether a guest boots with Firecracker on this host: found out by booting, not by looking (see `vmm/qemu/probe.py`).

It is booted as any other is, in a jail and a control group and as a uid that owns nothing: what is found out is whether
all of that works.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from mvm.core.addressing import UID_BASE
from mvm.core.errors import VmmError
from mvm.hostd.bounded_log import tail
from mvm.hostd.keeper import EXIT_FILE
from mvm.hostd.vmm.driver import Machine, Vm
from mvm.hostd.vmm.firecracker.jail import PATHS
from mvm.hostd.vmm.probe_room import NAME, Room
from mvm.hostd.vmm.qemu.probe import MARKER, PROBE_S, Acceleration
from mvm.linux.files import ensure_dir

PROBE_MIB = 256


def probe_machine(kernel: Path, initrd: Path, room: Room) -> Machine:
    return Machine(
        name=NAME,
        vcpus=1,
        mem_mib=PROBE_MIB,
        kernel=kernel,
        initrd=initrd,
        boot_args="console=ttyS0 quiet reboot=k panic=-1 mvm.probe",
        drives=(),
        nic=None,
        uid=UID_BASE,
        gid=UID_BASE,
        runtime=room.runtime,
        jail=room.jail,
        cgroup=room.cgroup,
        config={
            "boot-source": {
                "kernel_image_path": PATHS.kernel,
                "initrd_path": PATHS.initrd,
                "boot_args": "console=ttyS0 quiet reboot=k panic=-1 mvm.probe",
            },
            "machine-config": {"vcpu_count": 1, "mem_size_mib": PROBE_MIB, "smt": False},
        },
    )


def probe(start: Callable[[Machine], Vm], machine: Machine) -> Acceleration:
    """At most PROBE_S seconds. `accel` is `kvm`, or `none` where no guest boots. VmmError if none could be started, or
    somebody ended it: that says nothing of the host."""
    began = time.monotonic()
    console = machine.runtime / "logs" / "console.log"
    for needed in (console.parent, machine.runtime / "metrics"):
        ensure_dir(needed)
    vm = start(machine)
    try:
        while time.monotonic() - began < PROBE_S and vm.is_alive() and MARKER.decode() not in tail(console):
            time.sleep(0.02)
        ended = not vm.is_alive()
    finally:
        vm.stop(0)
    spent = time.monotonic() - began
    if MARKER.decode() in tail(console):
        return Acceleration("kvm", f"a stock kernel boots with it ({spent:.1f} s)")
    if ended and _killed(machine.runtime):
        raise VmmError("the VMM of the probe was killed")
    last = f"; last said: {said.splitlines()[-1][:200]}" if (said := tail(console)) else ""
    return Acceleration(
        "none", f"no stock kernel boots with Firecracker here (tried for {spent:.1f} s{last})"
    )


def _killed(runtime: Path) -> bool:
    """Whether it was, or how it ended is not known: its keeper was ended as well."""
    try:
        status = int((runtime / EXIT_FILE).read_bytes()[:16])
    except (OSError, ValueError):
        return True
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
