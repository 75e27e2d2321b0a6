"""`seccomp = "strict"`: a release's own list of system calls, less what mvm never has Firecracker do. Pure.

The list is the JSON file that comes with each release (`seccomp-filter-v1.16.1-x86_64.json`; its form is that of
Firecracker's docs/seccompiler.md): thread -> rules, each a system call, most with conditions on its arguments. Rules
are taken away, none is added and none changed, so what is left allows nothing that the release does not.

What a rule is for differs between versions, so the table below holds for the series it was read from and no other.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from mvm.core.errors import InvalidInput, MissingPrerequisite
from mvm.hostd.vmm.firecracker.version import Version

SERIES: Final = frozenset({(1, 16)})
POLICY_MAX: Final = 1 << 20
THREADS: Final = ("vmm", "api", "vcpu")


class Rule(NamedTuple):
    """A system call of a thread; where `argument` is not negative, only with `value` as that argument."""

    thread: str
    syscall: str
    argument: int = -1
    value: int = 0


_URING: Final = "drives with the engine Async; ours are Sync"
_PMEM: Final = "pmem devices, which a base configuration may not have"
_HOTPLUG: Final = "devices plugged in while the guest runs"
_MEMORY: Final = "memory plugged in while the guest runs"
_USER: Final = "drives that another process serves (vhost-user)"
_PCI: Final = "interrupts of devices on a PCI bus, which is off"
_DIFF: Final = "snapshots of the type Diff; memory is read from outside"
_TERMINAL: Final = "a terminal as standard input; it is /dev/null"

UNUSED: Final[dict[Rule, str]] = {
    Rule("vmm", "io_uring_setup"): _URING,
    Rule("vmm", "io_uring_enter"): _URING,
    Rule("vmm", "io_uring_register"): _URING,
    Rule("vmm", "eventfd2"): _URING,
    Rule("vmm", "mmap", 3, 0x8001): _URING,  # MAP_SHARED|MAP_POPULATE
    Rule("vmm", "msync"): _PMEM,
    Rule("vmm", "mmap", 3, 0x4001): _PMEM,  # MAP_SHARED|MAP_NORESERVE
    Rule("vmm", "mmap", 3, 0x4022): _PMEM,  # MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE
    Rule("vmm", "mmap", 3, 0x4011): _PMEM,  # MAP_SHARED|MAP_FIXED|MAP_NORESERVE
    Rule("vmm", "mmap", 3, 0x0011): _HOTPLUG,  # MAP_SHARED|MAP_FIXED
    Rule("vmm", "memfd_create"): _HOTPLUG,
    Rule("vmm", "fcntl", 1, 1033): _HOTPLUG,  # F_ADD_SEALS
    Rule("vmm", "timerfd_create"): _HOTPLUG,
    Rule("vmm", "ioctl", 1, 0x4040AE79): _HOTPLUG,  # KVM_IOEVENTFD
    Rule("vmm", "ioctl", 1, 0x4020AE76): _HOTPLUG,  # KVM_IRQFD
    Rule("vmm", "ioctl", 1, 0x400454CA): _HOTPLUG,  # TUNSETIFF
    Rule("vmm", "ioctl", 1, 0x400454D0): _HOTPLUG,  # TUNSETOFFLOAD
    Rule("vmm", "ioctl", 1, 0x400454D8): _HOTPLUG,  # TUNSETVNETHDRSZ
    Rule("vmm", "ioctl", 1, 0x4020AE46): _MEMORY,  # KVM_SET_USER_MEMORY_REGION
    Rule("vmm", "mprotect"): _MEMORY,
    Rule("vmm", "sendmsg"): _USER,
    Rule("vmm", "recvmsg"): _USER,
    Rule("vcpu", "sendmsg"): _USER,
    Rule("vcpu", "ioctl", 1, 0xAE03): _PCI,  # KVM_CHECK_EXTENSION
    Rule("vcpu", "ioctl", 1, 0x4008AE6A): _PCI,  # KVM_SET_GSI_ROUTING
    Rule("vcpu", "ioctl", 1, 0x4020AE76): _PCI,  # KVM_IRQFD
    Rule("vmm", "mincore"): _DIFF,
    Rule("vmm", "ioctl", 1, 0x5401): _TERMINAL,  # TCGETS
    Rule("vmm", "ioctl", 1, 0x5402): _TERMINAL,  # TCSETS
}
"""Rule that goes -> what it is for."""


def require_series(version: Version) -> None:
    """MissingPrerequisite for a version whose list nobody has read for this."""
    if version[:2] not in SERIES:
        known = " and ".join(f"{major}.{minor}" for major, minor in sorted(SERIES))
        raise MissingPrerequisite(
            f"what is not needed of Firecracker {version}'s system calls is not known",
            details=f"Strict filters are made for {known}.",
            resolution="Give hostd a filter of your own: [[vmm.strict_filters]] in hostd.toml.",
        )


def derive(policy: bytes, version: Version) -> bytes:
    """`policy`, a release's list, without the rules of UNUSED. InvalidInput if it is not such a list."""
    require_series(version)
    if len(policy) > POLICY_MAX:
        raise _not_one(f"it has {len(policy)} bytes")
    try:
        found = msgspec.json.decode(policy)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_one(str(error)) from error
    if not isinstance(found, dict) or set(found) != set(THREADS):
        raise _not_one(f"its threads are not {', '.join(THREADS)}")
    made = {}
    gone: set[Rule] = set()
    for thread in THREADS:
        part = found[thread]
        if not isinstance(part, dict) or not isinstance(part.get("filter"), list):
            raise _not_one(f"{thread} has no list of rules")
        if part.get("default_action") != "trap" or part.get("filter_action") != "allow":
            raise _not_one(f"{thread} does not end what it does not allow")
        unused = [_unused(thread, rule) for rule in part["filter"]]
        kept = [rule for rule, entry in zip(part["filter"], unused, strict=True) if entry is None]
        gone.update(entry for entry in unused if entry is not None)
        made[thread] = {**part, "filter": kept}
    if missing := UNUSED.keys() - gone:
        raise _not_one(f"it has no rule {sorted(missing)[0]}, so it is not the list that is known here")
    return msgspec.json.encode(made, order="sorted")


def _unused(thread: str, rule: Any) -> Rule | None:
    """The entry of UNUSED that a rule is, if it is one."""
    if not isinstance(rule, dict) or not isinstance(rule.get("syscall"), str):
        raise _not_one(f"{thread} has a rule without a system call")
    syscall = rule["syscall"]
    if Rule(thread, syscall) in UNUSED:
        return Rule(thread, syscall)
    # A list of conditions, all of which have to hold.
    conditions = rule.get("args") or []
    if not isinstance(conditions, list) or not all(isinstance(one, dict) for one in conditions):
        raise _not_one(f"{thread} has a rule on {syscall} whose conditions are none")
    for one in conditions:
        index, value = one.get("index"), one.get("val")
        if one.get("op") == "eq" and isinstance(index, int) and isinstance(value, int):
            if (entry := Rule(thread, syscall, index, value)) in UNUSED:
                return entry
    return None


def _not_one(why: str) -> InvalidInput:
    return InvalidInput(
        "that is not a Firecracker release's list of system calls",
        details=why[:300],
        resolution="Take seccomp-filter-v<version>-x86_64.json from the release that the programs are from.",
    )
