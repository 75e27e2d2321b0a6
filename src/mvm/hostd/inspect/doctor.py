"""The production-host checklist: one pure judge for each row, over facts that were read before.

A result is `fail` where a guarantee mvm is there for cannot hold on this host, `warning` where it can but something
should be put right or could not be seen, `n/a` where the question does not arise. A fix is a command, or a sentence
where no command can do it. Nothing here runs one.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final

import msgspec

from mvm.hostd.inspect.host import HostFacts, PathFacts
from mvm.hostd.inspect.tools import PROGRAMS, NftFacts, Tool

CONTROLLERS: Final = ("cpu", "memory", "pids", "io", "cpuset")
KVM_API: Final = 12
DISK_WARN: Final = 10 << 30
DISK_FAIL: Final = 2 << 30
MEMORY_WARN: Final = 1 << 30
UARTS_MAX: Final = 4
"""What distributions set; each is a port whose output a guest's console could be bound to."""


class Result(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAIL = "fail"
    NOT_APPLICABLE = "n/a"


class Check(msgspec.Struct, frozen=True):
    """`seen`: what was found; `fix`: what to do about it, "" where nothing has to be done."""

    id: str
    what: str
    result: Result
    seen: str
    fix: str = ""


class Acceleration(msgspec.Struct, frozen=True):
    """The cached answer of a boot probe. `accel`: `kvm`, `tcg`, or "" where no guest kernel was ever tried here."""

    accel: str
    reason: str


class Leftovers(msgspec.Struct, frozen=True):
    """The host compared with the ledger (mvm.hostd.ledger), a sentence each. `undo`: what nobody owns; `left`: what may
    be somebody else's; `lacks`: what running instances are without; `unseen`: what could not be looked at."""

    undo: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


class Facts(msgspec.Struct, frozen=True):
    """Everything the judges look at. `root`: the state root; `leftovers`: None if nobody looked, and no row then."""

    root: str
    host: HostFacts
    tools: dict[str, Tool]
    nft: NftFacts
    accel: Acceleration
    leftovers: Leftovers | None = None


def diagnose(facts: Facts) -> list[Check]:
    """Every row, in order."""
    return [check for judge in _JUDGES for check in judge(facts)]


def _kvm(facts: Facts) -> Iterator[Check]:
    what, kvm = "KVM, API 12", facts.host.kvm
    if kvm.api == KVM_API:
        yield Check("kvm", what, Result.OK, f"/dev/kvm answers with API {kvm.api}")
    elif kvm.api is not None:
        yield Check("kvm", what, Result.FAIL, f"API {kvm.api}", "run a kernel newer than 2.6.22")
    elif kvm.present and not facts.host.root:
        yield Check("kvm", what, Result.WARNING, kvm.problem, "sudo mvm doctor")
    else:
        fix = "modprobe kvm_amd || modprobe kvm_intel" if not kvm.present else "chmod 660 /dev/kvm"
        if facts.host.hypervisor:
            fix = f"switch on nested virtualisation in the hypervisor below, then: {fix}"
        yield Check("kvm", what, Result.FAIL, kvm.problem, fix)
    what, accel = "a guest kernel boots under KVM", facts.accel
    if accel.accel == "kvm":
        yield Check("kvm-boots", what, Result.OK, accel.reason)
    elif not accel.accel:
        fix = "mvm node info --probe   # once a guest was built: mvm tenant build TENANT"
        yield Check("kvm-boots", what, Result.WARNING, accel.reason, fix)
    else:
        fix = "use a host whose KVM boots a stock kernel; software emulation is slow and no security boundary"
        yield Check("kvm-boots", what, Result.FAIL, accel.reason, fix)


def _cpu(facts: Facts) -> Iterator[Check]:
    smt, ksm = facts.host.smt, facts.host.ksm
    what = "simultaneous multithreading is off"
    if smt in ("off", "forceoff", "notsupported", "notimplemented"):
        yield Check("smt", what, Result.OK, smt)
    elif smt is None:
        yield Check("smt", what, Result.WARNING, "the kernel does not say", "switch it off in the firmware")
    else:
        fix = "echo off > /sys/devices/system/cpu/smt/control   # and for good: boot with nosmt=force"
        yield Check("smt", what, Result.FAIL, f"{smt}: two tenants can share a core", fix)
    what = "kernel samepage merging is off"
    if ksm is None:
        yield Check("ksm", what, Result.NOT_APPLICABLE, "this kernel has none")
    elif ksm == "0":
        yield Check("ksm", what, Result.OK, "not running")
    else:
        fix = "echo 2 > /sys/kernel/mm/ksm/run   # 2 also takes apart what was merged"
        yield Check("ksm", what, Result.FAIL, f"run is {ksm}: tenants' pages can be shared", fix)
    what = "no CPU vulnerability is open"
    # The kernel's `SMT vulnerable`, in small letters, is the row above.
    bad = {n: v for n, v in facts.host.vulnerabilities.items() if "Vulnerable" in v}
    if not facts.host.vulnerabilities:
        yield Check("cpu", what, Result.WARNING, "the kernel does not say", "run a kernel that says")
    elif bad:
        seen = "; ".join(f"{name}: {value}" for name, value in bad.items())
        fix = "apt-get install --only-upgrade linux-image-amd64 amd64-microcode intel-microcode && reboot"
        yield Check("cpu", what, Result.FAIL, seen, fix)
    else:
        yield Check("cpu", what, Result.OK, f"{len(facts.host.vulnerabilities)} looked at")


def _swap(facts: Facts) -> Iterator[Check]:
    what, swaps = "no unencrypted swap", facts.host.swaps
    if swaps is None:
        yield Check("swap", what, Result.WARNING, "/proc/swaps cannot be read", "sudo mvm doctor")
        return
    bad = [swap.path for swap in swaps if swap.safe is False]
    unseen = [swap.path for swap in swaps if swap.safe is None]
    if bad:
        fix = "; ".join(f"swapoff {shlex.quote(p)}" for p in bad) + "   # and take it out of /etc/fstab"
        yield Check(
            "swap", what, Result.FAIL, f"{', '.join(bad)}: guest memory can reach a disk in plain", fix
        )
    elif unseen:
        yield Check("swap", what, Result.WARNING, f"{', '.join(unseen)}: not known", "sudo mvm doctor")
    else:
        yield Check("swap", what, Result.OK, f"{len(swaps)} encrypted or compressed" if swaps else "no swap")


def _cgroup(facts: Facts) -> Iterator[Check]:
    what, host = "cgroup v2 with cpu, memory, pids, io, cpuset", facts.host
    missing = [name for name in CONTROLLERS if name not in host.controllers]
    if host.cgroup == "v2" and not missing:
        yield Check("cgroup", what, Result.OK, f"v2: {' '.join(host.controllers)}")
        return
    seen = host.cgroup if host.cgroup != "v2" else f"v2 without {' '.join(missing)}"
    fix = "boot with systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all"
    yield Check("cgroup", what, Result.FAIL, seen, fix)


def _devices(facts: Facts) -> Iterator[Check]:
    has = facts.host.devices
    what = "memory of a woken guest can be served"
    ways = [name for name in ("/dev/userfaultfd", "/dev/fuse") if has.get(name)]
    if ways:
        yield Check("paging", what, Result.OK, " and ".join(ways))
    else:
        yield Check("paging", what, Result.FAIL, "neither /dev/fuse nor /dev/userfaultfd", "modprobe fuse")
    what = "taps can be made"
    if has.get("/dev/net/tun"):
        yield Check("tun", what, Result.OK, "/dev/net/tun")
    else:
        yield Check("tun", what, Result.FAIL, "there is no /dev/net/tun", "modprobe tun")
    what = "vsock to guests"
    if has.get("/dev/vhost-vsock"):
        yield Check("vsock", what, Result.OK, "/dev/vhost-vsock")
    else:
        seen = "there is no /dev/vhost-vsock; QEMU's guests are reached by virtio-serial"
        yield Check("vsock", what, Result.NOT_APPLICABLE, seen)
    what = "dm-crypt"
    if facts.host.dm_crypt == "absent":
        seen = "this kernel has none; only VMMs that open encrypted disks themselves (QEMU) can run"
        yield Check(
            "dm-crypt", what, Result.FAIL, seen, "run a kernel with CONFIG_DM_CRYPT: modprobe dm_crypt"
        )
    else:
        yield Check("dm-crypt", what, Result.OK, facts.host.dm_crypt)
    what = "few serial ports"
    uarts = facts.host.nr_uarts
    if uarts is None or uarts <= UARTS_MAX:
        seen = "no 8250 driver" if uarts is None else f"8250.nr_uarts={uarts}"
        yield Check("uarts", what, Result.OK, seen)
    else:
        yield Check("uarts", what, Result.WARNING, f"8250.nr_uarts={uarts}", "boot with 8250.nr_uarts=0")


def _nft(facts: Facts) -> Iterator[Check]:
    what, nft = "nftables takes mvm's kind of rules", facts.nft
    if nft.works:
        yield Check("nftables", what, Result.OK, f"nft {facts.tools['nft'].version}: a dry run passed")
    elif nft.works is None:
        yield Check("nftables", what, Result.WARNING, nft.problem, "sudo mvm doctor")
    else:
        fix = (
            "modprobe nf_tables && modprobe nft_chain_nat   # or a kernel with CONFIG_NF_TABLES_BRIDGE"
            if facts.tools["nft"].path
            else "apt-get install nftables"
        )
        yield Check("nftables", what, Result.FAIL, " ".join(nft.problem.split())[:300], fix)


def _room(facts: Facts) -> Iterator[Check]:
    host = facts.host
    free = host.disk_free
    result = Result.FAIL if free < DISK_FAIL else Result.WARNING if free < DISK_WARN else Result.OK
    seen = f"{free >> 20} MiB free of {host.disk_total >> 20} MiB where {facts.root} is"
    fix = "" if result is Result.OK else "free some, or give the state root a disk of its own"
    yield Check("disk", "room on the disk", result, seen, fix)
    low = host.mem_available < MEMORY_WARN
    seen = f"{host.mem_available >> 20} MiB available of {host.mem_total >> 20} MiB"
    fix = "put instances to sleep: mvm tenant sleep" if low else ""
    yield Check("memory", "memory for guests", Result.WARNING if low else Result.OK, seen, fix)


def _state(facts: Facts) -> Iterator[Check]:
    what = "the state and the directories above it are root's alone to change"
    bad = list(open_to_others(facts.host.state, facts.root))
    if bad:
        seen = "; ".join(problem for _, problem, _ in bad)
        yield Check("state", what, Result.FAIL, seen, " && ".join(fix for _, _, fix in bad))
    elif not any(path.path == facts.root for path in facts.host.state):
        yield Check(
            "state", what, Result.NOT_APPLICABLE, f"{facts.root} is not there yet, or not ours to see"
        )
    else:
        yield Check("state", what, Result.OK, f"{facts.root}, and {len(facts.host.state) - 1} above it")


def open_to_others(paths: tuple[PathFacts, ...], root: str) -> Iterator[tuple[str, str, str]]:
    """(path, problem, fix) for each that somebody but root could change, or, at the root itself, look into.

    A sticky directory above may be world-writable: nobody can rename another's entry there.
    """
    for path in paths:
        quoted, mode = shlex.quote(path.path), f"{path.mode:04o}"
        if path.kind == "link":
            yield path.path, f"{path.path} is a symbolic link", f"use what it points to: readlink -f {quoted}"
        elif path.uid != 0:
            yield path.path, f"{path.path} belongs to uid {path.uid}", f"chown root:root {quoted}"
        elif path.path == root and path.mode & 0o077:
            yield path.path, f"{path.path} has mode {mode}", f"chmod 700 {quoted}"
        elif path.mode & 0o022 and not path.mode & 0o1000:
            yield path.path, f"{path.path} has mode {mode}", f"chmod go-w {quoted}"


def _leftovers(facts: Facts) -> Iterator[Check]:
    what, found = "the host has of mvm's what its instances own, and nothing else", facts.leftovers
    if found is None:
        return
    seen = [*found.undo, *found.left, *found.lacks, *found.unseen]
    if not seen:
        yield Check("leftovers", what, Result.OK, "nothing is left over, and nothing is missing")
        return
    fixes = []
    if found.undo:
        fixes.append("mvm doctor --repair")
    if found.lacks:
        fixes.append("stop and run again what lacks something")
    if found.left:
        fixes.append("see whose it is, and remove it by hand if it is nobody's")
    if found.unseen:
        fixes.append("see why that cannot be looked at" if facts.host.root else "sudo mvm doctor")
    yield Check("leftovers", what, Result.WARNING, "; ".join(seen), "; ".join(fixes))


def _programs(facts: Facts) -> Iterator[Check]:
    for name, (_, package, purpose) in PROGRAMS.items():
        tool = facts.tools[name]
        what = f"{name}, which {purpose}"
        if tool.path:
            yield Check(
                f"program:{name}", what, Result.OK, f"{tool.version or 'version not told'} ({tool.path})"
            )
        else:
            fix = f"apt-get install --no-install-recommends {package}"
            yield Check(f"program:{name}", what, Result.FAIL, "not installed", fix)
    what = "Firecracker and its jailer, of one version"
    fire, jail = facts.tools["firecracker"], facts.tools["jailer"]
    if not fire.path and not jail.path:
        yield Check("firecracker", what, Result.NOT_APPLICABLE, "not installed; QEMU runs the VMs")
    elif fire.version and fire.version == jail.version:
        yield Check("firecracker", what, Result.OK, f"{fire.version} ({fire.path}, {jail.path})")
    else:
        seen = "; ".join(f"{tool.name} {_said(tool)}" for tool in (fire, jail))
        fix = "install both from one release: mvm-install.sh --firecracker DIRECTORY --firecracker-sums FILE"
        yield Check("firecracker", what, Result.WARNING, seen, fix)


def _said(tool: Tool) -> str:
    if not tool.path:
        return "is not installed"
    return tool.version or tool.problem or "does not say its version"


def _clock(facts: Facts) -> Iterator[Check]:
    what, synchronised = "the clock is synchronised", facts.host.clock_synchronised
    if synchronised:
        yield Check("clock", what, Result.OK, "the kernel says so")
    else:
        seen = "the kernel says no" if synchronised is False else "the kernel does not say"
        yield Check(
            "clock", what, Result.WARNING, seen, "apt-get install chrony && systemctl enable --now chrony"
        )


_JUDGES: Final[tuple[Callable[[Facts], Iterator[Check]], ...]] = (
    _kvm, _cpu, _swap, _cgroup, _devices, _nft, _room, _state, _leftovers, _programs, _clock,
)  # fmt: skip
