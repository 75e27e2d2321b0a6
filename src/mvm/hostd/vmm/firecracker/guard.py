"""What is read back from the kernel about a VMM that has started: is it confined as it was meant to be?

Firecracker's release binaries put a seccomp filter on each of their threads, builds against glibc have an empty list
and put none. Only the kernel can say which of the two runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mvm.core.errors import VmmError
from mvm.linux import capabilities


def filters(status: str) -> int:
    """How many seccomp filters a thread has, by its status file; 0 if that cannot be read."""
    try:
        return capabilities.parse_status(status).filters
    except (KeyError, ValueError):
        return 0


def unfiltered(statuses: Mapping[int, str], inherited: int = 0) -> list[str]:
    """One line for each thread without a filter of its own or without no_new_privs.

    `statuses`: thread id -> its status file. `inherited`: filters it had before it was executed, from the daemon's
    confinement; with them alone every thread says `Seccomp: 2` and nothing of the VMM's own is known.
    """
    found = []
    for thread, text in sorted(statuses.items()):
        try:
            status = capabilities.parse_status(text)
        except (KeyError, ValueError):
            found.append(f"thread {thread}: its status cannot be read")
            continue
        own = status.filters - inherited
        if own <= 0 or not status.no_new_privs:
            found.append(
                f"thread {thread}: Seccomp {status.seccomp}, {max(own, 0)} of its own, "
                f"NoNewPrivs {int(status.no_new_privs)}"
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
