"""Facts about one running process, for root. A process that ends meanwhile is None, never half a picture."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from typing import Final

import msgspec

from mvm.hostd.inspect import text
from mvm.hostd.inspect.text import Mapping, Mount, ThreadStatus

NAMESPACES: Final = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_NET_TABLES: Final = (
    "tcp",
    "tcp6",
    "udp",
    "udp6",
    "udplite",
    "udplite6",
    "raw",
    "raw6",
    "icmp",
    "icmp6",
    "packet",
)
_LIMITS: Final = ("memory.max", "cpu.max", "cpuset.cpus", "pids.max")
# File systems whose content is gone with the power; a type that is not named here counts as a disk.
_IN_MEMORY: Final = frozenset(
    {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"}
)


class OpenFile(msgspec.Struct, frozen=True):
    """`target`: as /proc names it; `regular`: a file with content; `persistent`: on a file system that a power cut
    leaves, or a block device; `writable`: opened for writing; `block`: of a block device, `major:minor`."""

    fd: int
    target: str
    regular: bool
    persistent: bool
    writable: bool
    block: str = ""


class ProcessFacts(msgspec.Struct, frozen=True):
    """`root`: `/` if its root directory is this process's, else `own`; `own_namespaces`: kinds in which it differs from
    this process; `apart`: whether its parent is in another network namespace than this process (a VMM's parent is on
    the node's network, the VMM itself on none); `network_sockets`: descriptors of IPv4, IPv6 and packet sockets;
    `plain_maps`: writable mappings of files on a disk; `limits`: of its cgroup v2, by file name."""

    pid: int
    threads: tuple[ThreadStatus, ...]
    argv: tuple[str, ...]
    environ: tuple[str, ...]
    files: tuple[OpenFile, ...]
    plain_maps: tuple[Mapping, ...]
    network_sockets: int
    root: str
    own_namespaces: tuple[str, ...]
    apart: bool
    cgroup: str
    limits: dict[str, str]
    core_limit: str


def read_process(pid: int, mounts: Collection[Mount], unified: str) -> ProcessFacts | None:
    """`mounts`: of this process; `unified`: where cgroup v2 is mounted, or "". PermissionError without root."""
    base = f"/proc/{pid}"
    try:
        threads = tuple(
            text.parse_status(_read(f"{base}/task/{tid}/status"))
            for tid in os.listdir(f"{base}/task")
            if os.path.exists(f"{base}/task/{tid}")
        )
        files = tuple(_files(base, mounts))
        sockets = {int(f.target[8:-1]) for f in files if f.target.startswith("socket:[")}
        network: set[int] = set()
        # It may hold sockets of a namespace that it is not in: those of ours, and of whoever started it.
        parent = text.parse_parent(_read(f"{base}/status"))
        for place in dict.fromkeys((base, f"/proc/{parent or pid}", "/proc/thread-self")):
            for table in _NET_TABLES:
                try:
                    network |= text.parse_socket_table(_read(f"{place}/net/{table}"))
                except (FileNotFoundError, ProcessLookupError):
                    continue  # a kernel without that family, or a parent that has ended
        cgroup = text.parse_unified_cgroup(_read(f"{base}/cgroup"))
        return ProcessFacts(
            pid=pid,
            threads=threads,
            argv=tuple(_read(f"{base}/cmdline").split("\0")[:-1]),
            environ=tuple(_read(f"{base}/environ").split("\0")[:-1]),
            files=files,
            plain_maps=tuple(
                mapping
                for mapping in text.parse_writable_maps(_read(f"{base}/maps"))
                if is_persistent(mapping.device, mapping.inode, mapping.path, mounts)
            ),
            network_sockets=len(sockets & network),
            root="/" if os.path.samestat(os.stat(f"{base}/root/"), os.stat("/")) else "own",
            own_namespaces=tuple(kind for kind in NAMESPACES if _differs(base, kind)),
            apart=_differs(f"/proc/{parent or pid}", "net"),
            cgroup=cgroup,
            limits=_limits(f"{unified}{cgroup}") if unified and cgroup else {},
            core_limit=text.parse_core_limit(_read(f"{base}/limits")),
        )
    except (FileNotFoundError, ProcessLookupError):
        return None


def holders(paths: Collection[str]) -> tuple[list[tuple[str, int]], list[int]]:
    """(path, pid) for every process that has one of `paths` open, and the pids that could not be looked into."""
    wanted, found, unseen = frozenset(paths), [], []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        links = set()
        try:
            for fd in os.listdir(f"/proc/{entry}/fd"):
                try:
                    links.add(os.readlink(f"/proc/{entry}/fd/{fd}"))
                except FileNotFoundError:
                    continue  # closed meanwhile
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            unseen.append(int(entry))
        found += [(path, int(entry)) for path in sorted(links & wanted)]
    return found, sorted(unseen)


def is_persistent(device: str, inode: int, path: str, mounts: Collection[Mount]) -> bool:
    """Whether a file lies on a file system that outlives the power. `device` as `major:minor`.

    Some file systems (btrfs, overlay) name one device here and another in mountinfo; then the path decides, if it still
    leads to that inode. A mount taken out of the tree, as the pager's is, has neither.
    """
    for mount in mounts:
        if mount.device == device:
            return mount.kind not in _IN_MEMORY
    try:
        if not path.startswith("/") or os.lstat(path).st_ino != inode:
            return False
    except OSError:
        return False
    above = [m for m in mounts if path == m.point or path.startswith(m.point.rstrip("/") + "/")]
    return bool(above) and max(above, key=lambda m: len(m.point)).kind not in _IN_MEMORY


def _files(base: str, mounts: Collection[Mount]) -> list[OpenFile]:
    found = []
    for fd in sorted(map(int, os.listdir(f"{base}/fd"))):
        try:
            target = os.readlink(f"{base}/fd/{fd}")
            flags = text.parse_fd_flags(_read(f"{base}/fdinfo/{fd}"))
        except FileNotFoundError:
            continue  # closed meanwhile
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        try:
            seen = os.stat(f"{base}/fd/{fd}")
        except FileNotFoundError:
            continue
        except OSError:
            # The pager's file: only the VMM's uid may look at it. It is served from memory, and is on no disk.
            found.append(OpenFile(fd, target, True, False, writable))
            continue
        if stat.S_ISBLK(seen.st_mode):
            number = f"{os.major(seen.st_rdev)}:{os.minor(seen.st_rdev)}"
            found.append(OpenFile(fd, target, False, True, writable, number))
            continue
        regular = stat.S_ISREG(seen.st_mode)
        device = f"{os.major(seen.st_dev)}:{os.minor(seen.st_dev)}"
        persistent = regular and is_persistent(device, seen.st_ino, target, mounts)
        found.append(OpenFile(fd, target, regular, persistent, writable))
    return found


def _differs(base: str, kind: str) -> bool:
    try:
        return os.readlink(f"{base}/ns/{kind}") != os.readlink(f"/proc/thread-self/ns/{kind}")
    except FileNotFoundError:
        return False  # a kernel without that kind


def _limits(folder: str) -> dict[str, str]:
    found = {}
    for name in _LIMITS:
        try:
            found[name] = _read(f"{folder}/{name}").strip()
        except OSError:
            continue
    return found


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(16 << 20).decode("utf-8", "replace")
