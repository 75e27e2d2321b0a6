"""QEMU's jail: its program, the libraries and firmware that it loads, the devices that it opens. Pure but for looking.

All of a machine is in descriptors. QEMU opens some of them again, by way of /proc/self/fd, so the jail has a /proc, in
which QEMU is the only process. What is needed was found by tracing cold starts and wakes; a distribution that keeps
libraries elsewhere shows as an error of the dynamic loader in `vmm.log`.

It stays in the daemon's IPC and UTS namespaces: the objects of the one are behind system calls that a VMM in a jail
does not have (`mvm.linux.seccomp.forbid`), and the other holds nothing but the host's name.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from mvm.hostd.jail import Bind, Jail

_FIRMWARE = ("share/qemu", "share/seabios")  # Debian's QEMU has links to the other in the one


def jail(program: str, root: Path, accel: str, *, required: bool) -> Jail:
    """For the QEMU at `program`, accelerated by `kvm` or `tcg`."""
    prefix = os.path.dirname(os.path.dirname(program))
    triplet = f"{platform.machine()}-linux-gnu"
    libraries = [f"{base}/{name}" for base in ("", "/usr", prefix) for name in (f"lib/{triplet}", "lib64")]
    wanted = (program, *libraries, *(f"{prefix}/{name}" for name in _FIRMWARE), "/etc/ld.so.cache")
    return Jail(
        root=root,
        binds=tuple(Bind(path, path) for path in dict.fromkeys(wanted) if os.path.exists(path)),
        devices=("/dev/null", "/dev/urandom", *(("/dev/kvm",) if accel == "kvm" else ())),
        namespaces=frozenset({"mount", "net", "pid"}),
        proc=True,
        required=required,
    )
