"""Whether a guest boots with Firecracker on this host: found out by booting, not by looking (see `vmm/qemu/probe.py`).

It is booted as any other is, in a jail and as a uid that owns nothing: what is found out is whether all of that works.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mvm.core.addressing import UID_BASE
from mvm.core.errors import MvmError
from mvm.hostd.bounded_log import tail
from mvm.hostd.vmm.driver import Machine, Vm
from mvm.hostd.vmm.firecracker.jail import PATHS
from mvm.hostd.vmm.qemu.probe import MARKER, PROBE_S, Acceleration
from mvm.linux.files import ensure_dir

_MEM_MIB = 256


def probe_machine(kernel: Path, initrd: Path, folder: Path) -> Machine:
    """`folder`: a directory for this one use."""
    return Machine(
        name="mvm-probe",
        vcpus=1,
        mem_mib=_MEM_MIB,
        kernel=kernel,
        initrd=initrd,
        boot_args="console=ttyS0 quiet reboot=k panic=-1 mvm.probe",
        drives=(),
        nic=None,
        uid=UID_BASE,
        gid=UID_BASE,
        runtime=folder / "runtime",
        jail=folder / "jail",
        config={
            "boot-source": {
                "kernel_image_path": PATHS.kernel,
                "initrd_path": PATHS.initrd,
                "boot_args": "console=ttyS0 quiet reboot=k panic=-1 mvm.probe",
            },
            "machine-config": {"vcpu_count": 1, "mem_size_mib": _MEM_MIB, "smt": False},
        },
    )


def probe(start: Callable[[Machine], Vm], machine: Machine) -> Acceleration:
    """At most PROBE_S seconds. `accel` is `kvm`, or `none` where no guest boots."""
    began = time.monotonic()
    console = machine.runtime / "logs" / "console.log"
    for needed in (machine.runtime, console.parent, machine.runtime / "metrics", machine.jail):
        if needed is not None:
            ensure_dir(needed)
    try:
        vm = start(machine)
    except MvmError as error:
        said = " ".join(error.details.split())[-200:]
        return Acceleration("none", f"Firecracker does not start here: {error.brief}; {said}".rstrip("; "))
    try:
        while time.monotonic() - began < PROBE_S and vm.is_alive() and MARKER.decode() not in tail(console):
            time.sleep(0.02)
    finally:
        vm.stop(0)
    spent = time.monotonic() - began
    if MARKER.decode() in tail(console):
        return Acceleration("kvm", f"a stock kernel boots with it ({spent:.1f} s)")
    last = f"; last said: {said.splitlines()[-1][:200]}" if (said := tail(console)) else ""
    return Acceleration(
        "none", f"no stock kernel boots with Firecracker here (tried for {spent:.1f} s{last})"
    )
