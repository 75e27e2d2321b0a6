"""Makes starting a process or opening a socket impossible while a unit test runs.

An audit hook sees the event whichever module, alias, thread or C caller raises it, which a patched name would
not; `multiprocessing` reaches the kernel below the audited layer, so its one entry is replaced as well. A
hook cannot be removed from an interpreter, so it stays and looks at a flag.

A violation raises at the call and is also remembered: code that swallows the exception still fails its test.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

FORBIDDEN_EVENTS = frozenset(
    {
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "pty.spawn",
        "socket.__new__",
        "socket.bind",
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "socket.sendto",
        "subprocess.Popen",
    }
)


class IsolationViolation(RuntimeError):
    """A unit test tried to start a process or to open a socket."""


class Guard:
    """The state the hook looks at. `violations`: one line per forbidden call since last cleared."""

    def __init__(self) -> None:
        self.active = False
        self.violations: list[str] = []

    def refuse(self, what: str) -> NoReturn:
        message = f"{what}: unit tests start no process and open no socket; move this test to tests/contract"
        self.violations.append(message)
        raise IsolationViolation(message)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        # This runs for every audited event of the interpreter, so the flag comes first.
        if self.active and event in FORBIDDEN_EVENTS:
            self.refuse(f"{event}{args!r:.120}")

    @contextmanager
    def enforced(self) -> Iterator[list[str]]:
        """Forbid the events in the block. Yields the violations seen in it, emptied at the start."""
        self.violations.clear()
        self.active = True
        try:
            yield self.violations
        finally:
            self.active = False


def install() -> Guard:
    """Add the hook to this interpreter, switched off. Call once: every further call adds another hook."""
    import _posixsubprocess  # CPython's fork+exec helper, which raises no audit event of its own

    guard = Guard()
    sys.addaudithook(guard.audit)
    real_fork_exec = _posixsubprocess.fork_exec

    def fork_exec(*args: Any) -> int:
        if guard.active:
            guard.refuse("_posixsubprocess.fork_exec")
        return real_fork_exec(*args)

    # subprocess bound its own name at import; it is audited anyway. multiprocessing looks it up at each call.
    _posixsubprocess.fork_exec = fork_exec
    return guard
