"""What is read back from the kernel about a VMM that has started: is it confined as it was meant to be?

Firecracker's release binaries put a seccomp filter on each of their threads, builds against glibc have an empty list
and put none. Only the kernel can say which of the two runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mvm.core.errors import VmmError


def parse_status(text: str) -> dict[str, str]:
    """/proc/<pid>/status as name -> value."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def filters(status: str) -> int:
    """How many seccomp filters a thread has, by its status file; kernels before 5.9 tell only that there is one."""
    found = parse_status(status)
    if found.get("Seccomp") != "2":
        return 0
    count = found.get("Seccomp_filters", "")
    return int(count) if count.isdigit() else 1


def unfiltered(statuses: Mapping[int, str], inherited: int = 0) -> list[str]:
    """One line for each thread without a filter of its own or without no_new_privs.

    `statuses`: thread id -> its status file. `inherited`: filters it had before it was executed, from the daemon's
    confinement; with them alone every thread says `Seccomp: 2` and nothing of the VMM's own is known.
    """
    found = []
    for thread, text in sorted(statuses.items()):
        status = parse_status(text)
        own, privileges = filters(text) - inherited, status.get("NoNewPrivs", "?")
        if own <= 0 or privileges != "1":
            found.append(
                f"{status.get('Name', thread)}: Seccomp {status.get('Seccomp', '?')}, {max(own, 0)} of its own, "
                f"NoNewPrivs {privileges}"
            )
    return found


def thread_statuses(pid: int) -> dict[int, str]:
    """Of every thread of a process. Threads that end meanwhile are left out; VmmError if all have."""
    found: dict[int, str] = {}
    for number in _threads(pid):
        try:
            found[number] = Path(f"/proc/{pid}/task/{number}/status").read_text(
                encoding="utf-8", errors="replace"
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
    if not found:
        raise VmmError("Firecracker is gone", details=f"Process {pid} has no threads.")
    return found


def _threads(pid: int) -> Iterator[int]:
    try:
        yield from (int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return


def cgroup_of(text: str) -> str:
    """The control group (v2) of /proc/<pid>/cgroup, "" if there is none."""
    return next((line[3:] for line in text.splitlines() if line.startswith("0::")), "")


def require_cgroup(pid: int, wanted: Path) -> None:
    """VmmError unless the process is in the group `wanted`, a directory below /sys/fs/cgroup."""
    try:
        found = cgroup_of(Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, ProcessLookupError):
        raise VmmError("Firecracker is gone", details=f"Process {pid} has ended.") from None
    if f"/sys/fs/cgroup{found}" != str(wanted):
        raise VmmError(
            "Firecracker is not in its control group", details=f"It is in {found or 'none'}, not in {wanted}."
        )
