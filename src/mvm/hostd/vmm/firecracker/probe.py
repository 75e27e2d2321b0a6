"""Whether a guest boots with Firecracker on this host: found out by booting, not by looking (see `vmm/qemu/probe.py`).

Firecracker runs here without its jailer, as a uid that owns nothing, from a configuration in memory, without an API.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from mvm.core.addressing import UID_BASE
from mvm.hostd.vmm.qemu.probe import KVM, MARKER, PROBE_S, Acceleration
from mvm.linux import memfd
from mvm.linux.process import start


def probe_config(kernel: str, initrd: str) -> dict[str, Any]:
    """`kernel`, `initrd`: paths, which are those of descriptors."""
    return {
        "boot-source": {
            "kernel_image_path": kernel,
            "initrd_path": initrd,
            "boot_args": "console=ttyS0 quiet reboot=k panic=-1 mvm.probe",
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256, "smt": False},
        "drives": [],
    }


def probe(firecracker: Path, kernel: Path, initrd: Path) -> Acceleration:
    """At most PROBE_S seconds. `accel` is `kvm`, or `none` where no guest boots."""
    began = time.monotonic()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    seen = b""
    config = -1
    try:
        with kernel.open("rb") as vmlinux, initrd.open("rb") as ramdisk:
            files = [vmlinux.fileno(), ramdisk.fileno()]
            text = json.dumps(probe_config(*(f"/proc/self/fd/{fd}" for fd in files))).encode()
            config = memfd.of_bytes("mvm-probe", text)
            argv = [str(firecracker), "--no-api", "--config-file", memfd.proc_path(config)]
            child = start(
                argv, pass_fds=[*files, config], stdout=writer, stderr=writer,
                uid=UID_BASE, gid=UID_BASE, groups=[os.stat(KVM).st_gid],
            )  # fmt: skip
        os.close(writer)
        writer = -1
        with child:
            try:
                while time.monotonic() - began < PROBE_S and MARKER not in seen:
                    ended = child.wait(0.02) is not None
                    try:
                        seen = (seen + os.read(reader, 1 << 16))[-(1 << 16) :]
                    except BlockingIOError:
                        pass
                    if ended:
                        break
            finally:
                child.stop(0)
    finally:
        for fd in (reader, writer, config):
            if fd >= 0:
                os.close(fd)
    spent = time.monotonic() - began
    if MARKER in seen:
        return Acceleration("kvm", f"a stock kernel boots with it ({spent:.1f} s)")
    said = seen.decode("utf-8", "replace").strip().splitlines()
    last = f"; last said: {said[-1][:200]}" if said else ""
    return Acceleration(
        "none", f"no stock kernel boots with Firecracker here (tried for {spent:.1f} s{last})"
    )
