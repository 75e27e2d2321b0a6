"""What the daemon gives up before it listens to anybody, and the proof that it has.

    capabilities   all but CAPABILITIES and what its drivers name in DRIVERS, in every set, the bounding set included:
                   no program it starts has more either
    privileges     no_new_privs: none can be gained by executing something
    system calls   the allow-list of `mvm.linux.seccomp`, inherited by every program it starts
    then           /proc/thread-self/status is read back; the daemon does not start if it says anything else

docs/privileges.md is written from CAPABILITIES; a test compares the two, another takes each capability away in turn and
sees an operation fail.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from mvm.core.errors import MissingPrerequisite, Refused
from mvm.linux import capabilities, seccomp

CAPABILITIES: Final[dict[str, str]] = {
    "KILL": "pidfd_send_signal(2) to a VMM, which runs as its instance's uid",
    "NET_ADMIN": "bridges, taps and their ports by rtnetlink(7); TUNSETIFF; nftables",
    "SETGID": "setgroups(2), setresgid(2) in the keeper, before it executes a VMM",
    "SETUID": "setresuid(2) in the keeper, before it executes a VMM; setfsuid(2) to open a VMM's files in /proc",
    "SYS_ADMIN": "mount(2) of the pager's one-file system at a wake; ioctl(2) of loop devices and device mapper; a"
    " VMM's jail: unshare(2), mounts, pivot_root(2)",
    "SYS_PTRACE": "reading a paused VMM's memory (/proc/<pid>/mem, pagemap) to seal it",
}

DRIVERS: Final[dict[str, dict[str, str]]] = {
    "qemu": {},
    "firecracker": {
        "CHOWN": "chown(2), by its jailer and for it: the jail's devices, pipes and disks are the instance's uid's",
        "DAC_OVERRIDE": "making names in the jail's root and reaching the sockets in it, which is the instance's uid's"
        " alone",
        "MKNOD": "mknod(2), by its jailer and for it: /dev/kvm, /dev/net/tun and the data disk's device in the jail",
    },
}
"""What a driver's VMM needs besides, with the call that needs it: kept only where that driver is used."""


def wanted_by(drivers: Collection[str]) -> tuple[str, ...]:
    """Everything a daemon with these drivers keeps."""
    more = {name for driver in drivers for name in DRIVERS.get(driver, {})}
    return (*CAPABILITIES, *sorted(more - CAPABILITIES.keys()))


def confine(
    wanted: Collection[str] = tuple(CAPABILITIES), *, filter_calls: bool = True
) -> capabilities.Status:
    """Give up everything else, for good. Refused if the kernel reports anything but what was asked for.

    MissingPrerequisite if one of `wanted` is not there to keep. Call with one thread.
    """
    wanted = frozenset(wanted)
    missing = wanted - capabilities.status().permitted
    if missing:
        raise MissingPrerequisite(
            "mvm-hostd lacks capabilities",
            details=", ".join(f"CAP_{name}" for name in sorted(missing)),
            resolution="Start it as root, by its systemd unit; a container may have to be given them.",
        )
    capabilities.limit_to(wanted)
    capabilities.no_new_privs()
    if filter_calls:
        try:
            seccomp.install()
        except MissingPrerequisite:
            filter_calls = False  # the unit's SystemCallFilter= is the one there is
    return check(wanted, filtered=filter_calls)


def check(wanted: Collection[str], *, filtered: bool) -> capabilities.Status:
    """What the kernel says now. Refused unless it is exactly `wanted` and no way back."""
    found = capabilities.status()
    expected = frozenset(wanted)
    wrong = [
        f"{name}: {', '.join(sorted(there)) or 'none'}"
        for name, there, right in (
            ("effective", found.effective, expected),
            ("permitted", found.permitted, expected),
            ("bounding", found.bounding, expected),
            ("inheritable", found.inheritable, frozenset()),
            ("ambient", found.ambient, frozenset()),
        )
        if there != right
    ]
    if not found.no_new_privs:
        wrong.append("NoNewPrivs: 0")
    if filtered and found.seccomp != 2:
        wrong.append(f"Seccomp: {found.seccomp}")
    if wrong:
        raise Refused(
            "mvm-hostd could not give up its privileges",
            details="\n".join(wrong),
            resolution="It does not start with more than docs/privileges.md lists; see what its manager gave it.",
        )
    return found
