"""CPU time of any process, to the nanosecond, while it lives.

/proc/PID/stat counts in ticks of 10 ms, a twentieth of a wake. The kernel's per-process CPU clocks
(clock_getcpuclockid(3): the pid, inverted, shifted by three, with 2 for "scheduler time") count what the scheduler
charged to all threads of the process, ended ones included.
"""

from __future__ import annotations

import resource
import time
from typing import NamedTuple

_SCHEDULER_CLOCK = 2


class Cpu(NamedTuple):
    """Seconds charged to the command (this process or a finished child), the keeper, and the VMM."""

    command: float
    keeper: float
    vmm: float

    @property
    def total(self) -> float:
        return self.command + self.keeper + self.vmm

    def since(self, before: Cpu) -> Cpu:
        return Cpu(self.command - before.command, self.keeper - before.keeper, self.vmm - before.vmm)


class Faults(NamedTuple):
    """Page faults of a process: `minor` found the page in memory, `major` had to wait for it to be read."""

    minor: int
    major: int


def process_seconds(pid: int) -> float:
    """CPU seconds of a living process so far; 0.0 for one that is gone, and for pid 0."""
    if pid <= 0:
        return 0.0
    try:
        return time.clock_gettime((~pid << 3) | _SCHEDULER_CLOCK)
    except OSError:
        return 0.0


def parent_of(pid: int) -> int:
    """The parent's pid; 0 for a process that is gone, and for pid 0."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def faults(pid: int) -> Faults:
    """Those of a living process so far, of all its threads."""
    fields = _stat(pid)
    return Faults(int(fields[7]), int(fields[9])) if fields else Faults(0, 0)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name, state first; empty if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(")") + 1 :].split()


def of_vm(vmm_pid: int, command: float | None = None) -> Cpu:
    """Command, keeper and VMM now. `command`: seconds of another process than this one."""
    mine = time.process_time() if command is None else command
    return Cpu(mine, process_seconds(parent_of(vmm_pid)), process_seconds(vmm_pid))


def of_children() -> float:
    """CPU seconds of every child of this process that has ended and been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
