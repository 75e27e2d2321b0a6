"""How a Firecracker process ended, in words."""

from __future__ import annotations

import os
import signal
from typing import Final

_CODES: Final = {
    0: "it ended as asked, or its guest rebooted",
    1: "it ended with an error of its own",
    2: "it ended with an error that should not be possible",
    148: "it made a system call that its seccomp filter forbids, and was ended for it",
    149: "SIGBUS: a page of the guest's memory could not be had (the pager is gone, or the snapshot is damaged)",
    150: "SIGSEGV: it accessed memory that it does not have",
    151: "SIGXFSZ: a file became larger than its limit allows",
    152: "its configuration is not one it accepts",
    153: "its arguments are none it knows",
    154: "SIGXCPU: its limit of CPU time is used up",
    155: "SIGPIPE: what it wrote to is closed",
    156: "SIGHUP: its terminal went away",
    157: "SIGILL: an instruction that this processor does not have",
}


def describe(status: int) -> str:
    """`status`: as waitpid(2) gives it."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"Exit code {code}: {_CODES.get(code, 'unknown')}."
    if -code == signal.SIGKILL:
        return "It was killed (SIGKILL): by mvm, by an operator, with its keeper, or for want of memory."
    try:
        return f"It was ended by {signal.Signals(-code).name}."
    except ValueError:
        return f"It was ended by signal {-code}."
