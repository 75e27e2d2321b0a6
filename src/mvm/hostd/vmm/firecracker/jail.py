"""Firecracker's jail, and the names of everything in it: pure.

    <root>/firecracker/<id>/root/     what the jailer pivots into; all of it in memory that dies with the VMM
        vmlinux, initrd, rootfs       the revision's files, bound read-only
        data                          a node of the data disk's own device, until the VMM has opened it
        secrets                       a copy of the secrets disk
        memory                        the pager's file, for a wake
        run/
            api.sock, vsock.sock      made by the VMM, reached by `mvm.hostd.jailed_run`
            log, metrics              pipes, read by the keeper; bound from `<runtime>/vmm`, which the VMM has not
        snapshot                      the device state to load; snapshot.new: the one that was saved

A jail is made for one start or one wake and never used again. It is in a mount namespace of the jailer's own, so it is
gone with the VMM, by whatever hand. `root` stays empty on the host. The VMM's uid may make any name in its root and in
`run`: whoever follows one from outside does not follow links. There is room for ROOM_BYTES and ROOM_FILES of them; they
count as the VMM's memory, and none is on the host's disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from mvm.core.errors import MissingPrerequisite
from mvm.core.fc_config import FcPaths
from mvm.hostd.guest_channel import vsock
from mvm.hostd.jail import Bind, Copy, Jail, Room
from mvm.hostd.jailed_run import FOLDER
from mvm.hostd.vmm.driver import Drive, Machine

EXECUTABLE: Final = "firecracker"
ROOM_BYTES: Final = 64 << 20
"""Of the jail: the program (4 MB), the secrets disk, a device state to load and one that was saved (10 MB each)."""
ROOM_FILES: Final = 128
API, VSOCK, LOG, METRICS = "api.sock", vsock.SOCKET, "log", "metrics"
MEMORY: Final = "/memory"
STATE_IN, STATE_OUT = "snapshot", "snapshot.new"
FILTER: Final = "/seccomp.bpf"
NO_FILE: Final = "/"
"""Where guest memory is to be written on a save: nothing can open a directory for writing."""

PATHS: Final = FcPaths(
    kernel="/vmlinux", initrd="/initrd", rootfs="/rootfs", data="/data", secrets="/secrets",
    vsock=f"/run/{VSOCK}", log=f"/run/{LOG}", metrics=f"/run/{METRICS}",
)  # fmt: skip


class Programs(msgspec.Struct, frozen=True):
    """`filter_file`: a compiled seccomp filter to use in the place of the built-in one."""

    firecracker: Path
    jailer: Path
    filter_file: Path | None = None


def instance_name(machine: Machine) -> str:
    """What the jailer and the VMM's log call it: letters, digits and hyphens, 64 at most."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in machine.name)
    return kept[-64:]


def command(programs: Programs, machine: Machine, root: Path) -> list[str]:
    """The jailer's argument list. Without `--cgroup` it leaves the process where the keeper has put it."""
    extra = [] if programs.filter_file is None else ["--seccomp-filter", FILTER]
    return [
        str(programs.jailer), "--id", instance_name(machine), "--exec-file", str(programs.firecracker),
        "--uid", str(machine.uid), "--gid", str(machine.gid), "--chroot-base-dir", str(root),
        "--cgroup-version", "2", *_cgroup(machine),
        "--", "--api-sock", f"/run/{API}", "--log-path", f"/run/{LOG}", *extra,
    ]  # fmt: skip


def _cgroup(machine: Machine) -> Sequence[str]:
    if machine.cgroup is None:
        return ()
    # Relative to the hierarchy's root; the jailer moves itself there, where the keeper has put it already.
    return ("--parent-cgroup", str(machine.cgroup).removeprefix("/sys/fs/cgroup/"))


def jail(programs: Programs, machine: Machine, root: Path, memory: int | None) -> Jail:
    """`memory`: a descriptor of the guest's memory, for a wake. MissingPrerequisite for a disk it cannot open."""
    top = f"/{programs.firecracker.name}/{instance_name(machine)}/root"
    binds = [
        Bind(str(machine.runtime / FOLDER / name), f"{top}/run/{name}", read_only=False)
        for name in (LOG, METRICS)
    ]
    copies: list[Copy] = []
    if memory is None:
        binds += [
            Bind(str(machine.kernel), top + PATHS.kernel),
            Bind(str(machine.initrd), f"{top}{PATHS.initrd}"),
        ]
    else:
        binds.append(Bind(f"/proc/self/fd/{memory}", top + MEMORY))
    if programs.filter_file is not None:
        binds.append(Bind(str(programs.filter_file), top + FILTER))
    for drive in machine.drives:
        target = f"{top}/{drive.id}"
        if drive.device or drive.id == "secrets":
            copies.append(
                Copy(drive.path, target, machine.uid, machine.gid, 0o400 if drive.read_only else 0o600)
            )
        elif drive.key_fd is not None:
            raise _encrypted(drive)
        else:
            binds.append(Bind(drive.path, target, read_only=drive.read_only))
    return Jail(
        root=root,
        binds=tuple(binds),
        copies=tuple(copies),
        # `pid` is the keeper's and the VMM's in common.
        namespaces=frozenset({"mount", "net", "ipc"}),
        network=None if machine.nic is None else machine.nic.namespace,
        pivot=False,
        room=Room(ROOM_BYTES, ROOM_FILES),
    )


def _encrypted(drive: Drive) -> MissingPrerequisite:
    return MissingPrerequisite(
        "Firecracker cannot open an encrypted data disk by itself",
        details=f"{drive.path} is a LUKS volume, and this host's kernel has no dm-crypt to open it with.",
        resolution='Load the module (modprobe dm-crypt), or let QEMU run it: driver = "qemu" below [vmm].',
    )
