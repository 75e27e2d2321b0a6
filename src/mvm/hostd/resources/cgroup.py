"""The control group (v2) of each VMM: what it may use at most, and where its processes are found.

    <mount>/mvm.slice/mvm-instances/<name of the VM>.<digest of the state root's path>/

    render     from a machine's size to files and their contents: pure
    apply      make the group and write them; the VMM joins it before it is executed (`mvm.hostd.keeper`)
    parse      read them back
    verify     whether a process is in its group, by /proc/<pid>/cgroup
    remove     end whatever is in it, and take it away

The daemon's unit is in `mvm.slice` too (mvm-hostd.service), whose controllers systemd keeps on; a command without
daemon makes the slice where it is missing. A group outlives nobody: stop, sleep, destroy and recovery remove it, and
`mvm.hostd.ledger` whatever was forgotten. Only VMMs are in it: a keeper must survive what ends its VMM.

A host may have several state roots, each with a VM of the same name, and to make a group is to end what is in an older
one: so a group's name tells whose it is.

Guest memory that a keeper has placed in the page cache ahead of its guest is charged to the keeper's group until the
guest writes to it; it is clean, and of bounded size.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

from mvm.core.errors import Busy, MissingPrerequisite, VmmError
from mvm.linux.machine import cgroup_version

SLICE: Final = "mvm.slice/mvm-instances"
CONTROLLERS: Final = ("cpu", "memory", "pids")
OVERHEAD_MIB: Final = 256
"""Beside the guest's memory: the VMM's code and heap, 64 MiB of translated code, page tables, page cache."""
THREADS: Final = 128
"""Beside the vCPUs: a VMM's main thread and its workers for disk requests (QEMU has 64 of them at most)."""
PERIOD_US: Final = 100_000
_WAIT_S: Final = 10.0


class Limits(msgspec.Struct, frozen=True):
    """`memory_max` in bytes, no swap; `cpu_us`: of each PERIOD_US, all vCPUs together; `pids_max`: threads."""

    memory_max: int
    cpu_us: int
    pids_max: int


def limits(*, mem_mib: int, vcpus: int) -> Limits:
    """Of a VMM with a guest of this size."""
    return Limits((mem_mib + OVERHEAD_MIB) << 20, vcpus * PERIOD_US, vcpus + THREADS)


def render(wanted: Limits) -> dict[str, str]:
    """File -> content, in the order to write them."""
    return {
        "memory.max": str(wanted.memory_max),
        "memory.swap.max": "0",
        # A VMM that lost one of its threads would be no VM any more.
        "memory.oom.group": "1",
        "cpu.max": f"{wanted.cpu_us} {PERIOD_US}",
        "pids.max": str(wanted.pids_max),
    }


def parse(files: dict[str, str]) -> Limits:
    """What `render` made. ValueError for anything else, "max" included."""
    quota, period = files["cpu.max"].split()
    # A kernel without swap accounting has no such file.
    if (
        int(period) != PERIOD_US
        or files.get("memory.swap.max", "0") != "0"
        or files["memory.oom.group"] != "1"
    ):
        raise ValueError(f"not the limits of a VMM: {files}")
    return Limits(int(files["memory.max"]), int(quota), int(files["pids.max"]))


def membership(text: str) -> str:
    """The group of a process, as a path below the mount, from its /proc/<pid>/cgroup; "" if it is in none."""
    for line in text.splitlines():
        if line.startswith("0::"):
            return line[3:]
    return ""


def require_member(leaf: Path, pid: int) -> None:
    """VmmError unless the process is in the group whose directory this is."""
    try:
        found = membership(Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii", errors="replace"))
    except OSError as error:
        raise VmmError("the VMM ended at once", details=str(error)) from error
    wanted = f"/{SLICE}/{leaf.name}"
    if found != wanted:
        raise VmmError(
            "the VMM is not in its control group",
            details=f"It is in {found or 'none'}, not in {wanted}.",
            resolution="Nothing but mvm may move its processes: see what else manages mvm.slice.",
        )


@cache
def groups(root: Path) -> Groups:
    """Those of this host that belong to the state root."""
    return Groups(root)


class Groups:
    """The groups of a state root's VMMs below the cgroup2 mount `mount`; "" where there is none that can be used."""

    def __init__(self, root: Path, mount: str | None = None) -> None:
        self._mark = "." + hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:12]
        if mount is None:
            kind, found = cgroup_version()
            self._problem = "" if kind == "v2" else f"this host has cgroup {kind}"
            mount = found if kind == "v2" else ""
        else:
            self._problem = ""
        self._mount = Path(mount) if mount else None

    def available(self) -> str:
        """ "" if VMMs can be given groups, else why not."""
        if self._mount is None:
            return self._problem or "no cgroup v2 is mounted"
        try:
            there = (self._mount / "cgroup.controllers").read_text(encoding="ascii").split()
        except OSError as error:
            return f"{self._mount} cannot be read: {error.strerror}"
        missing = [name for name in CONTROLLERS if name not in there]
        return f"cgroup v2 has no controller {', '.join(missing)}" if missing else ""

    def leaf(self, vm_name: str) -> Path:
        """Its directory, whether it is there or not. Only where `available`."""
        assert self._mount is not None
        return self._mount / SLICE / f"{vm_name}{self._mark}"

    def vm_name(self, leaf: str) -> str:
        """The VM that a directory of this name belongs to; "" if it is not this state root's."""
        return leaf.removesuffix(self._mark) if leaf.endswith(self._mark) else ""

    def apply(self, vm_name: str, wanted: Limits) -> Path:
        """The group, empty and with these limits. MissingPrerequisite where the kernel does not let us."""
        leaf = self.leaf(vm_name)
        try:
            self._enable(leaf.parent)
            self.remove(vm_name)
            leaf.mkdir(0o755)
            for name, content in render(wanted).items():
                try:
                    (leaf / name).write_text(content, encoding="ascii")
                except FileNotFoundError:
                    if name != "memory.swap.max":
                        raise
        except OSError as error:
            raise MissingPrerequisite(
                "no control group can be made for the VM",
                details=f"{error.filename or leaf}: {error.strerror}",
                resolution="mvm-hostd's unit has mvm.slice to itself: see systemctl status mvm-hostd.",
            ) from error
        return leaf

    def _enable(self, parent: Path) -> None:
        """Have the controllers on in every group from the mount down to `parent`, which is made if need be."""
        assert self._mount is not None
        at = self._mount
        for part in ("", *parent.relative_to(self._mount).parts):
            at = at / part
            if part:
                try:
                    at.mkdir(0o755)
                except FileExistsError:
                    pass
            control = at / "cgroup.subtree_control"
            on = control.read_text(encoding="ascii").split()
            off = [name for name in CONTROLLERS if name not in on]
            if off:
                control.write_text(" ".join(f"+{name}" for name in off), encoding="ascii")

    def read(self, vm_name: str) -> Limits:
        """The limits in force. OSError, ValueError."""
        leaf = self.leaf(vm_name)
        names = [name for name in render(Limits(0, 0, 0)) if (leaf / name).exists()]
        return parse({name: (leaf / name).read_text(encoding="ascii").strip() for name in names})

    def verify(self, vm_name: str, pid: int) -> None:
        """VmmError unless the process is in that group, and the limits are in force."""
        require_member(self.leaf(vm_name), pid)
        try:
            self.read(vm_name)
        except (OSError, ValueError, KeyError) as error:
            raise VmmError("the VMM's control group has not its limits", details=str(error)) from error

    def remove(self, vm_name: str) -> None:
        """End what is in the group and remove it. Nothing where there is none. Busy if it does not get empty."""
        if self._mount is None:
            return
        leaf = self.leaf(vm_name)
        if not leaf.exists():  # on a hierarchy that is read-only, removing nothing would be an error
            return
        deadline = time.monotonic() + _WAIT_S
        while True:
            try:
                os.rmdir(leaf)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            # Only what has not been ended yet: the usual one is empty, and goes at the first attempt.
            try:
                (leaf / "cgroup.kill").write_text("1", encoding="ascii")
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise
            if time.monotonic() > deadline:
                raise Busy(
                    f"the control group of {vm_name} does not get empty",
                    details=f"{leaf}: populated after {_WAIT_S:g} s.",
                    resolution=f"See which processes hang: cat {leaf}/cgroup.procs",
                )
            time.sleep(0.002)
