"""Naming a process so that the name never means another one.

A pid is reused; pid, start time and boot id together are not. Signals go through a pidfd that was opened
first and checked against the identity afterwards: from then on the descriptor means that process whatever
becomes of its number. A zombie counts as dead: it runs nothing and holds nothing but its number.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from mvm.core.errors import Busy
from mvm.core.record import ProcessIdentity
from mvm.linux import machine
from mvm.linux.process import wait_readable

if TYPE_CHECKING:
    from typing import Literal

_KILL_WAIT_S = 10.0


def parse_stat(text: str) -> tuple[str, int]:
    """(state letter, start ticks) of a /proc/PID/stat line. ValueError if it is not one."""
    # The command name may hold spaces and parentheses; only the last ')' ends it.
    fields = text[text.rindex(")") + 1 :].split()
    if len(fields) < 20:
        raise ValueError("a stat line has at least 22 fields")
    return fields[0], int(fields[19])


def _read_stat(pid: int) -> tuple[str, int] | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return parse_stat(file.read())
    except (FileNotFoundError, ProcessLookupError):
        return None


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of a running process, None if there is none. Ask while the pid is known to be yours."""
    seen = _read_stat(pid)
    return None if seen is None else ProcessIdentity(pid=pid, start_ticks=seen[1], boot_id=machine.boot_id())


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether that very process still runs."""
    if identity.pid <= 0 or identity.boot_id != machine.boot_id():
        return False
    seen = _read_stat(identity.pid)
    return seen is not None and seen[0] not in "ZXx" and seen[1] == identity.start_ticks


def open_pidfd(identity: ProcessIdentity) -> int | None:
    """An owned pidfd of that very process, None if it is gone."""
    if identity.pid <= 0:
        return None
    try:
        fd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return None
    # Checked after the open: if the number changed hands before it, the start time tells.
    if not is_alive(identity):
        os.close(fd)
        return None
    return fd


def terminate(identity: ProcessIdentity, grace_s: float) -> Literal["gone", "terminated", "killed"]:
    """End it: SIGTERM, then after `grace_s` seconds SIGKILL. Says what it took; reaps it if it is our child.

    Busy if it survives SIGKILL for ten seconds: it hangs in the kernel.
    """
    fd = open_pidfd(identity)
    if fd is None:
        return "gone"
    try:
        if grace_s > 0:
            _send(fd, signal.SIGTERM)
            if wait_readable(fd, grace_s):
                return "terminated"
        _send(fd, signal.SIGKILL)
        if wait_readable(fd, _KILL_WAIT_S):
            return "killed"
        raise Busy(
            f"process {identity.pid} does not end",
            details=f"it survived SIGKILL for {_KILL_WAIT_S:g} s, so it waits in the kernel",
            resolution=f"see /proc/{identity.pid}/stack, then try again",
        )
    finally:
        try:
            os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            pass
        os.close(fd)


def _send(fd: int, signum: int) -> None:
    try:
        signal.pidfd_send_signal(fd, signum)
    except ProcessLookupError:
        pass
