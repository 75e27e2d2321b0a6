"""Whether hardware acceleration works on this host: found out by booting, not by looking.

On some nested hosts /dev/kvm opens, creates a VM and runs real-mode code, yet a stock kernel never boots. So the guest
kernel that will be used is booted once with `mvm.probe` on its command line: its initrd then prints a marker and powers
off. The answer is kept per host kernel, CPU, QEMU and guest kernel, which is known by its content: revisions that have
one kernel are one question. It is a tenant's kernel, so it is booted as its guests are: under a keeper, in a jail and a
control group (as binding as the mode), by a uid that owns nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mvm.core.addressing import UID_BASE
from mvm.core.errors import VmmError
from mvm.core.record import ProcessIdentity
from mvm.hostd import keeper
from mvm.hostd.bounded_log import tail
from mvm.hostd.vmm.probe_room import Room, probe_room
from mvm.hostd.vmm.qemu.command import CONSOLE_FD, INITRD_FD, KERNEL_FD, SANDBOX, accel_args
from mvm.hostd.vmm.qemu.jail import jail
from mvm.linux import machine as host
from mvm.linux.files import ensure_dir, write_atomic
from mvm.linux.pidfd import is_alive

MARKER = b"MVM-PROBE-OK"
# A kernel that boots here with hardware help says so in well under a second; emulated hardware help takes eight.
PROBE_S = 15.0
PROBE_MIB = 256
KERNELS_MAX = 64
KVM = "/dev/kvm"
_MARKER = MARKER.decode()


class Acceleration(NamedTuple):
    """`accel`: `kvm` or `tcg`; `reason`: why, for `node info`."""

    accel: str
    reason: str


def choose_acceleration(
    qemu: str, version: str, kernel: Path, initrd: Path, cache: Path, *, confined: bool = False
) -> Acceleration:
    """What to use for this guest kernel, from the cache or by a probe of at most PROBE_S seconds.

    `confined`: as for an instance in baseline mode, no probe is started without jail and control group. VmmError and
    MissingPrerequisite if none could be started, which says nothing of the host and is not remembered.
    """

    def ask() -> Acceleration:
        with probe_room(cache, mem_mib=PROBE_MIB, vcpus=1, confined=confined) as room:
            # Whoever had the room before may have found out the same.
            return known_acceleration(version, kernel, cache) or _probe(qemu, kernel, initrd, room, confined)

    return remember(version, kernel, cache, ask)


def remember(
    version: str, kernel: Path, cache: Path, probe: Callable[[], Acceleration], *, otherwise: str = "tcg"
) -> Acceleration:
    """The answer of `probe`, asked once for a VMM (`version`), guest kernel and host. `otherwise`: without /dev/kvm."""
    if not _usable():
        return _without(otherwise)
    ensure_dir(cache)
    facts = _facts(version, _digest(kernel, cache, keep=True))
    known = _read(facts, cache)
    if known is not None:
        return known
    chosen = probe()
    answer = {"accel": chosen.accel, "reason": chosen.reason, "facts": facts}
    write_atomic(_cached(facts, cache), json.dumps(answer).encode())
    return chosen


def known_acceleration(
    version: str, kernel: Path, cache: Path, *, otherwise: str = "tcg"
) -> Acceleration | None:
    """The answer where it needs no probe, else None. Writes nothing."""
    if not _usable():
        return _without(otherwise)
    try:
        return _read(_facts(version, _digest(kernel, cache, keep=False)), cache)
    except OSError:
        return None


def _usable() -> bool:
    return os.access(KVM, os.R_OK | os.W_OK)


def _without(otherwise: str) -> Acceleration:
    return Acceleration(otherwise, f"{KVM} is missing or closed to us")


def _facts(version: str, kernel: str) -> list[str]:
    """What the answer depends on. `kernel`: its digest."""
    return [host.kernel_release(), host.cpu_model().name, version, kernel]


def _cached(facts: list[str], cache: Path) -> Path:
    return cache / f"accel-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:16]}.json"


def _read(facts: list[str], cache: Path) -> Acceleration | None:
    try:
        known = json.loads(_cached(facts, cache).read_bytes())
        return Acceleration(str(known["accel"]), str(known["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(kernel: Path, cache: Path, *, keep: bool) -> str:
    """Of the file's content. Reading all of it takes as long as a tenth of a wake, so what is known of files that have
    not changed since is kept (`keep`), of the KERNELS_MAX last ones. OSError."""
    seen = os.stat(kernel)
    file = f"{seen.st_dev}:{seen.st_ino}:{seen.st_size}:{seen.st_mtime_ns}:{seen.st_ctime_ns}"
    path = cache / "kernels.json"
    try:
        read = json.loads(path.read_bytes())
        known = {str(name): str(digest) for name, digest in read.items()}
    except (OSError, ValueError, AttributeError):
        known = {}
    if file not in known:
        with kernel.open("rb") as opened:
            known[file] = hashlib.file_digest(opened, "sha256").hexdigest()
        if keep:
            write_atomic(path, json.dumps(dict(list(known.items())[-KERNELS_MAX:])).encode())
    return known[file]


def probe_command(qemu: str) -> list[str]:
    """Kernel, initrd and console are descriptors, under the numbers that they have for a guest."""
    return [
        qemu, "-M", "microvm,pit=on,pic=on,rtc=on,acpi=on,x-option-roms=off", *accel_args("kvm"),
        "-m", str(PROBE_MIB), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", SANDBOX, "-kernel", f"/proc/self/fd/{KERNEL_FD}", "-initrd", f"/proc/self/fd/{INITRD_FD}",
        "-chardev", f"socket,id=console,fd={CONSOLE_FD}", "-serial", "chardev:console",
        "-append", "console=ttyS0 quiet reboot=t panic=-1 mvm.probe",
    ]  # fmt: skip


def _probe(qemu: str, kernel: Path, initrd: Path, room: Room, confined: bool) -> Acceleration:
    began = time.monotonic()
    logs = room.runtime / "logs"
    ensure_dir(logs)
    console, errors = logs / "console.log", logs / "vmm.log"
    vmm = _start(qemu, kernel, initrd, room, errors, confined)
    while time.monotonic() - began < PROBE_S and _MARKER not in tail(console):
        if not is_alive(vmm):
            # What it said before is written down before how it ended.
            keeper.await_end(room.runtime)
            if _MARKER not in tail(console) and _killed(room.runtime):
                raise VmmError("the VMM of the probe was killed", details=tail(errors))
            break
        time.sleep(0.02)
    keeper.end_leftovers(room.runtime)
    spent = time.monotonic() - began
    if _MARKER in tail(console):
        return Acceleration("kvm", f"a stock kernel boots with it ({spent:.1f} s)")
    said = [line for log in (console, errors) for line in tail(log).splitlines() if line.strip()]
    # Two lines, because the last one is how it ended, if it did, and the one before may be why.
    last = f"; last said: {'; '.join(line[:200] for line in said[-2:])}" if said else ""
    return Acceleration(
        "tcg", f"{KVM} opens, but no stock kernel boots with it (tried for {spent:.1f} s{last})"
    )


def _start(
    qemu: str, kernel: Path, initrd: Path, room: Room, errors: Path, confined: bool
) -> ProcessIdentity:
    ours, theirs = socket.socketpair()
    with ours, theirs, kernel.open("rb") as vmlinux, initrd.open("rb") as ramdisk:
        program = keeper.Program(
            probe_command(qemu),
            {CONSOLE_FD: theirs.fileno(), KERNEL_FD: vmlinux.fileno(), INITRD_FD: ramdisk.fileno()},
            UID_BASE,
            UID_BASE,
            [os.stat(KVM).st_gid],
            jail=jail(qemu, room.jail, "kvm", required=confined),
            cgroup=room.cgroup,
        )
        return keeper.launch(program, runtime=room.runtime, console=ours, errors=errors)[0]


def _killed(runtime: Path) -> bool:
    """Whether it was, or how it ended is not known: its keeper was ended as well."""
    try:
        status = int((runtime / keeper.EXIT_FILE).read_bytes()[:16])
    except (OSError, ValueError):
        return True
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
