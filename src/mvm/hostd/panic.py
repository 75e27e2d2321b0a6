"""Whether a guest whose VMM ended in good order had its kernel panic, by the kernel's own last words on the console.

A panic restarts the machine, and to a VMM that looks like any other restart; Firecracker has no device that could tell
it. So the end of the console log is looked at for two texts of the kernel, which it prints whatever its log level: that
of a panic, and that of an ordered restart or power-off. The later one counts, since the log goes on over several lives
of an instance.

The log is the guest's to write. What it can reach by that is to have its own end called a failure, or none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from mvm.hostd.bounded_log import tail

_LOOKED_AT: Final = 16 * 1024
"""Bytes from the end. A panic's report, with the stacks of some CPUs, is a few thousand."""
_SHOWN: Final = 200
_PANIC: Final = re.compile(r"Kernel panic - not syncing: ([^\r\n]*)")
_ORDERED: Final = re.compile(r"reboot: (?:Restarting system|Power down|System halted)")


def panic_message(console: Path) -> str:
    """What the kernel said it panicked for, printable and short; "" if its end was no panic, or nothing is known."""
    return find_panic(tail(console, _LOOKED_AT))


def find_panic(untrusted: str) -> str:
    panics = list(_PANIC.finditer(untrusted))
    if not panics:
        return ""
    if _ORDERED.search(untrusted, panics[-1].end()):
        return ""
    reason = "".join(c if " " <= c <= "~" else "?" for c in panics[-1][1]).strip()[:_SHOWN]
    return reason or "it did not say why"
