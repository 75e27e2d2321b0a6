"""Capabilities of this process: give up all but a set, and read back what the kernel says remains.

`limit_to` acts on every set: bounding (what a program started later could regain), ambient and inheritable (emptied),
permitted and effective (reduced to the wanted ones). Of one thread: call it before a second one starts.
capabilities(7); the numbers are those of include/uapi/linux/capability.h.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

NAMES: Final = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
_NUMBERS: Final = {name: number for number, name in enumerate(NAMES)}
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
_VERSION_3: Final = 0x20080522
_HEADER: Final = struct.Struct("Ii")
_DATA: Final = struct.Struct("6I")

_SETS: Final = ("Inh", "Prm", "Eff", "Bnd", "Amb")
_SET: Final = re.compile(r"[0-9a-f]{1,32}")

_libc = ctypes.CDLL(None, use_errno=True)


class Status(NamedTuple):
    """From /proc/<pid>/status. The sets are names without CAP_; `seccomp`: 0 none, 2 filter. `filters`: how many;
    kernels before 5.9 tell only that there is one."""

    inheritable: frozenset[str]
    permitted: frozenset[str]
    effective: frozenset[str]
    bounding: frozenset[str]
    ambient: frozenset[str]
    no_new_privs: bool
    seccomp: int
    filters: int


def mask(names: Iterable[str]) -> int:
    """KeyError for what is no capability."""
    value = 0
    for name in names:
        value |= 1 << _NUMBERS[name]
    return value


def names(value: int) -> frozenset[str]:
    """A capability newer than this table appears by its number."""
    return frozenset(
        NAMES[bit] if bit < len(NAMES) else str(bit) for bit in range(value.bit_length()) if value >> bit & 1
    )


def parse_status(text: str) -> Status:
    """KeyError if a line is missing, ValueError if it has not its form: a kernel that does not say is not believed."""
    lines: dict[str, str] = {}
    # A process's name may hold what Python takes for a line's end; the kernel escapes none but this one.
    for line in text.split("\n"):
        name, colon, value = line.partition(":")
        if colon:
            lines.setdefault(name, value.strip())
    if not all(_SET.fullmatch(lines[f"Cap{kind}"]) for kind in _SETS) or lines["NoNewPrivs"] not in (
        "0",
        "1",
    ):
        raise ValueError("a set of capabilities or NoNewPrivs")
    inheritable, permitted, effective, bounding, ambient = (
        names(int(lines[f"Cap{kind}"], 16)) for kind in _SETS
    )
    seccomp = int(lines["Seccomp"])
    return Status(
        inheritable,
        permitted,
        effective,
        bounding,
        ambient,
        int(lines["NoNewPrivs"]) == 1,
        seccomp,
        int(lines.get("Seccomp_filters", "1")) if seccomp == 2 else 0,
    )


def status(pid: int | None = None) -> Status:
    with open(f"/proc/{pid or 'thread-self'}/status", encoding="ascii", errors="replace") as file:
        return parse_status(file.read())


def limit_to(wanted: Iterable[str]) -> None:
    """Keep `wanted`, as far as we have it, and nothing else in any set. Raises OSError."""
    keep = mask(wanted)
    now = status()
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    # The bounding set first: dropping from it needs SETPCAP, which the last step takes away.
    for number in range(64):
        if mask_has(now.bounding, number) and not keep >> number & 1:
            _prctl(_PR_CAPBSET_DROP, number)
    _set(keep & mask_of(now.permitted))


def _set(kept: int) -> None:
    """Permitted and effective; the inheritable set is emptied."""
    low, high = kept & 0xFFFFFFFF, kept >> 32
    header = ctypes.create_string_buffer(_HEADER.pack(_VERSION_3, 0))
    data = ctypes.create_string_buffer(_DATA.pack(low, low, 0, high, high, 0))
    if _libc.capset(header, data) != 0:
        raise _failed("capset")


def give_up(keep: Iterable[str] = ()) -> None:
    """Have none but `keep` in this thread, and be able to gain none: for one that executes nothing any more. OSError.

    The bounding set stays where there is no SETPCAP to empty it; with no_new_privs nothing comes of it.
    """
    keep = frozenset(keep)
    no_new_privs()
    now = status()
    if "SETPCAP" in now.effective:
        limit_to(keep)
    else:
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        _set(mask(keep) & mask_of(now.permitted))
    found = status()
    if (
        not keep >= found.permitted | found.effective | found.inheritable | found.ambient
        or not found.no_new_privs
    ):
        raise OSError(1, "the kernel did not take the capabilities away")


def mask_has(found: frozenset[str], number: int) -> bool:
    return (NAMES[number] if number < len(NAMES) else str(number)) in found


def mask_of(found: frozenset[str]) -> int:
    """As `mask`, for what `names` made."""
    return sum(1 << (_NUMBERS[name] if name in _NUMBERS else int(name)) for name in found)


def no_new_privs() -> None:
    """No program started from here on gains anything by being set-uid or having file capabilities. For good."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, argument: int) -> None:
    if (
        _libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
        != 0
    ):
        raise _failed(f"prctl({option}, {argument})")


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
