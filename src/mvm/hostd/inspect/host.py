"""Facts about this machine, as its kernel tells them. What cannot be read is None, and never guessed."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import Final

import msgspec

from mvm.hostd import jail
from mvm.hostd.inspect import text
from mvm.hostd.resources import cgroup
from mvm.linux import machine

_KVM_GET_API_VERSION: Final = 0xAE00
_TIME_ERROR: Final = 5
_DEVICES: Final = ("/dev/kvm", "/dev/net/tun", "/dev/fuse", "/dev/userfaultfd", "/dev/vhost-vsock")
ENVIRONMENT_FILE: Final = Path("/etc/mvm/environment")
"""One word, written by whatever makes a development node: the name that `mvm node info` shows."""


class PathFacts(msgspec.Struct, frozen=True):
    """`mode`: permission bits with set-id and sticky; `kind`: `file`, `directory`, `link` or `other`."""

    path: str
    kind: str
    uid: int
    mode: int


class Kvm(msgspec.Struct, frozen=True):
    """`api`: of KVM_GET_API_VERSION, None if the device did not open; `problem`: why it did not."""

    present: bool
    api: int | None = None
    problem: str = ""


class SwapFacts(msgspec.Struct, frozen=True):
    """`safe`: encrypted, or compressed memory; None where that cannot be seen."""

    path: str
    safe: bool | None


class HostFacts(msgspec.Struct, frozen=True):
    """`no_jail`, `no_limits`: why VMMs can be given no namespaces, no control groups here; "" if they can, None if only
    root can tell."""

    root: bool
    environment: str
    hypervisor: bool
    os: str
    kernel: str
    machine: str
    cpu: str
    cpus: int
    load_1m: float
    mem_total: int
    mem_available: int
    kvm: Kvm
    smt: str | None
    ksm: str | None
    swaps: tuple[SwapFacts, ...] | None
    vulnerabilities: dict[str, str]
    cgroup: str
    controllers: tuple[str, ...]
    devices: dict[str, bool]
    dm_crypt: str
    nr_uarts: int | None
    clock_synchronised: bool | None
    state: tuple[PathFacts, ...]
    disk_total: int
    disk_free: int
    no_jail: str | None = None
    no_limits: str = ""


def read_host(root: Path) -> HostFacts:
    """`root`: the state root; disk figures are of the file system it is on, or would be."""
    cpu = machine.cpu_model()
    kind, mountpoint = machine.cgroup_version()
    disk = os.statvfs(_existing(root))
    return HostFacts(
        root=os.geteuid() == 0,
        environment=environment(),
        hypervisor="hypervisor" in cpu.features,
        os=text.parse_os_release(_read("/etc/os-release") or ""),
        kernel=machine.kernel_release(),
        machine=os.uname().machine,
        cpu=cpu.name,
        cpus=cpu.online,
        load_1m=os.getloadavg()[0],
        mem_total=machine.memory_total(),
        mem_available=machine.memory_available(),
        kvm=_kvm(),
        smt=_word("/sys/devices/system/cpu/smt/control"),
        ksm=_word("/sys/kernel/mm/ksm/run"),
        swaps=_swaps(),
        vulnerabilities=_vulnerabilities(),
        cgroup=kind,
        controllers=tuple((_read(f"{mountpoint}/cgroup.controllers") or "").split()) if mountpoint else (),
        devices={name: os.path.exists(name) for name in _DEVICES},
        dm_crypt=_dm_crypt(),
        nr_uarts=_number("/sys/module/8250/parameters/nr_uarts"),
        clock_synchronised=_clock_synchronised(),
        state=state_paths(root),
        disk_total=disk.f_blocks * disk.f_frsize,
        disk_free=disk.f_bavail * disk.f_frsize,
        no_jail=jail.unavailable() if os.geteuid() == 0 else None,
        no_limits=cgroup.groups(root).available(),
    )


def environment() -> str:
    """`lima`, `container`, the name a development node gave itself, or `bare`: nothing between mvm and this system.

    The first that is seen counts: a development node and Lima say so themselves, a container is found by its traces.
    """
    named = _word(ENVIRONMENT_FILE)
    if named and len(named) <= 32 and named.replace("-", "").isalnum() and named.isascii():
        return named
    if os.path.exists("/run/lima-boot-done") or os.path.isdir("/mnt/lima-cidata"):
        return "lima"
    if any(os.path.exists(p) for p in ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")):
        return "container"
    return "bare"


def state_paths(root: Path) -> tuple[PathFacts, ...]:
    """The state root and every directory above it, as far as they exist."""
    found = [path_facts(path) for path in (root, *root.parents)]
    return tuple(facts for facts in found if facts is not None)


def path_facts(path: Path | str) -> PathFacts | None:
    """None where there is nothing, or nothing that we may see."""
    try:
        seen = os.lstat(path)
    except OSError:
        return None
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    kind = kinds.get(stat.S_IFMT(seen.st_mode), "other")
    return PathFacts(str(path), kind, seen.st_uid, stat.S_IMODE(seen.st_mode))


def _kvm() -> Kvm:
    import fcntl

    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Kvm(False, problem="there is no /dev/kvm")
    except OSError as error:
        return Kvm(True, problem=f"/dev/kvm does not open: {error.strerror}")
    try:
        return Kvm(True, fcntl.ioctl(fd, _KVM_GET_API_VERSION))
    except OSError as error:
        return Kvm(True, problem=f"/dev/kvm does not answer: {error.strerror}")
    finally:
        os.close(fd)


def _swaps() -> tuple[SwapFacts, ...] | None:
    table = _read("/proc/swaps")
    if table is None:
        return None
    return tuple(SwapFacts(swap.path, _is_safe(swap)) for swap in text.parse_swaps(table))


def _is_safe(swap: text.Swap) -> bool | None:
    """Whether what is swapped there reaches a disk encrypted, or no disk at all."""
    if swap.kind != "partition":
        return False  # a file; whether the disk below it is encrypted is not looked into
    name = os.path.basename(os.path.realpath(swap.path))
    if name.startswith("zram"):
        # A zram device may have been told to write back to a disk.
        return (_word(f"/sys/block/{name}/backing_dev") or "none") == "none"
    uuid = _word(f"/sys/block/{name}/dm/uuid")
    if uuid is not None:
        return uuid.startswith("CRYPT-")
    return False if os.path.isdir("/sys/block") else None


def _vulnerabilities() -> dict[str, str]:
    folder = "/sys/devices/system/cpu/vulnerabilities"
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    return {name: (_word(f"{folder}/{name}") or "unreadable") for name in names}


def _dm_crypt() -> str:
    """`ready`, `loadable` (the module is installed), or `absent`."""
    if "device-mapper" in (_read("/proc/misc") or "") and os.path.isdir("/sys/module/dm_crypt"):
        return "ready"
    folder = f"/lib/modules/{machine.kernel_release()}"
    for table in ("modules.dep", "modules.builtin"):
        if "/dm-crypt.ko" in (_read(f"{folder}/{table}") or ""):
            return "loadable"
    return "absent"


def _clock_synchronised() -> bool | None:
    """What adjtimex(2) says when nothing is set."""
    buffer = ctypes.create_string_buffer(256)  # struct timex is 208 bytes; its first member, `modes`, is 0
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(buffer)
    if state < 0:
        return None
    return bool(state != _TIME_ERROR)


def _existing(path: Path) -> Path:
    while True:
        try:
            os.stat(path)
            return path
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES) or path == path.parent:
                raise
            path = path.parent


def _read(path: str | Path, limit: int = 4 << 20) -> str | None:
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:
        return None


def _word(path: str | Path) -> str | None:
    found = _read(path, 4096)
    return None if found is None else found.strip()


def _number(path: str) -> int | None:
    word = _word(path)
    return int(word) if word is not None and word.isascii() and word.isdecimal() else None
