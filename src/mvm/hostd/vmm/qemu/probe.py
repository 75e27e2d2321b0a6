"""Whether hardware acceleration works on this host: found out by booting, not by looking.

On some nested hosts /dev/kvm opens, creates a VM and runs real-mode code, yet a stock kernel never boots. So the guest
kernel that will be used is booted once with `mvm.probe` on its command line: its initrd then prints a marker and powers
off. The answer is kept per host kernel, CPU, QEMU and guest kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mvm.core.addressing import UID_BASE
from mvm.hostd.vmm.qemu.command import SANDBOX, accel_args
from mvm.linux import machine as host
from mvm.linux.files import write_atomic
from mvm.linux.process import start

MARKER = b"MVM-PROBE-OK"
# A kernel that boots here with hardware help says so in well under a second; emulated hardware help takes eight.
PROBE_S = 15.0
KVM = "/dev/kvm"


class Acceleration(NamedTuple):
    """`accel`: `kvm` or `tcg`; `reason`: why, for `node info`."""

    accel: str
    reason: str


def choose_acceleration(qemu: str, version: str, kernel: Path, initrd: Path, cache: Path) -> Acceleration:
    """What to use for this guest kernel, from the cache or by a probe of at most PROBE_S seconds."""
    return remember(version, kernel, cache, lambda: _probe(qemu, kernel, initrd))


def remember(
    version: str, kernel: Path, cache: Path, probe: Callable[[], Acceleration], *, otherwise: str = "tcg"
) -> Acceleration:
    """The answer of `probe`, asked once for a VMM (`version`), guest kernel and host. `otherwise`: without /dev/kvm."""
    known = known_acceleration(version, kernel, cache, otherwise=otherwise)
    if known is not None:
        return known
    chosen = probe()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = _facts(version, kernel)
    answer = {"accel": chosen.accel, "reason": chosen.reason, "facts": facts}
    write_atomic(_cached(facts, cache), json.dumps(answer).encode())
    return chosen


def known_acceleration(
    version: str, kernel: Path, cache: Path, *, otherwise: str = "tcg"
) -> Acceleration | None:
    """The answer where it needs no probe, else None."""
    if not os.access(KVM, os.R_OK | os.W_OK):
        return Acceleration(otherwise, f"{KVM} is missing or closed to us")
    try:
        known = json.loads(_cached(_facts(version, kernel), cache).read_bytes())
        return Acceleration(str(known["accel"]), str(known["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _facts(version: str, kernel: Path) -> list[str]:
    """What the answer depends on."""
    seen = os.stat(kernel)
    size, changed = str(seen.st_size), str(seen.st_mtime_ns)
    return [host.kernel_release(), host.cpu_model().name, version, size, changed, str(kernel)]


def _cached(facts: list[str], cache: Path) -> Path:
    return cache / f"accel-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:16]}.json"


def probe_command(qemu: str, kernel: str, initrd: str) -> list[str]:
    """`kernel`, `initrd`: paths, which are those of descriptors."""
    return [
        qemu, "-M", "microvm,pit=on,pic=on,rtc=on,acpi=on,x-option-roms=off", *accel_args("kvm"),
        "-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", SANDBOX, "-kernel", kernel, "-initrd", initrd, "-serial", "stdio",
        "-append", "console=ttyS0 quiet reboot=t panic=-1 mvm.probe",
    ]  # fmt: skip


def _probe(qemu: str, kernel: Path, initrd: Path) -> Acceleration:
    began = time.monotonic()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    seen = b""
    try:
        # A tenant's kernel: it is booted by a uid that owns nothing, as its guests will be.
        with kernel.open("rb") as vmlinux, initrd.open("rb") as ramdisk:
            files = [vmlinux.fileno(), ramdisk.fileno()]
            argv = probe_command(qemu, *(f"/proc/self/fd/{fd}" for fd in files))
            groups = [os.stat(KVM).st_gid] if os.path.exists(KVM) else []
            child = start(
                argv, pass_fds=files, stdout=writer, stderr=writer, uid=UID_BASE, gid=UID_BASE, groups=groups
            )
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
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    spent = time.monotonic() - began
    if MARKER in seen:
        return Acceleration("kvm", f"a stock kernel boots with it ({spent:.1f} s)")
    said = seen.decode("utf-8", "replace").strip().splitlines()
    last = f"; last said: {said[-1][:200]}" if said else ""
    return Acceleration(
        "tcg", f"{KVM} opens, but no stock kernel boots with it (tried for {spent:.1f} s{last})"
    )
