"""Who uses which port of a guest: one client at a time, and whether the last one left it in order.

Port n of an instance is the socket `guest-<n>.sock` in its runtime directory and the lock `guest-<n>.lock` beside it.
The lock is flock(2), held for as long as the client is connected, so it dies with its holder. The file's content is the
port's state: "clean" after a client that left with nothing under way, anything else after one that did not (or was
killed); the next client then resynchronises. Port 0 is the host's own, 1 to 7 are for sessions.

A guest whose VMM has vsock has one socket for all (`mvm.hostd.guest_channel.vsock`); the locks are the same, and bound
how many clients it has.

A guest that is restored from a snapshot remembers the ports as they were then, whatever happened since:
`distrust_ports` belongs to every wake that does not follow its own sleep, and to every cold start after a crash.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from mvm.core.errors import Busy

LIFECYCLE_PORT = 0
SESSION_PORTS = range(1, 8)
_CLEAN = b"clean\n"


def socket_path(runtime_dir: Path, port: int) -> Path:
    """Where the VMM listens for port `port`."""
    return runtime_dir / f"guest-{port}.sock"


def lock_path(runtime_dir: Path, port: int) -> Path:
    return runtime_dir / f"guest-{port}.lock"


class PortLease:
    """The right to use one port. Owns the lock's descriptor until `release`."""

    def __init__(self, path: Path, fd: int, *, was_clean: bool, port: int | None = None) -> None:
        self.path = path
        self.port = port
        self.was_clean = was_clean
        self._fd = fd

    @property
    def socket(self) -> Path:
        """The socket that belongs to this lock."""
        return self.path.with_suffix(".sock")

    def release(self, *, clean: bool) -> None:
        """Give the port back. `clean` only if the guest has read all that was sent and nothing is open."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            if clean:
                os.pwrite(fd, _CLEAN, 0)
                os.ftruncate(fd, len(_CLEAN))
        finally:
            os.close(fd)

    def __enter__(self) -> PortLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release(clean=False)


def take_port(path: Path, *, port: int | None = None) -> PortLease:
    """Take the lock at `path`, created if need be; Busy if another client holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        was_clean = os.pread(fd, 16, 0) == _CLEAN
        # From here on a kill leaves the port marked, whatever else happens.
        mark = b"open %d\n" % os.getpid()
        os.pwrite(fd, mark, 0)
        os.ftruncate(fd, len(mark))
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise Busy(
            "the guest's control port is in use",
            details=f"{path.name}: {holder}",
            resolution="wait for the other command to end, then try again",
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return PortLease(path, fd, was_clean=was_clean, port=port)


def acquire_session_port(runtime_dir: Path) -> PortLease:
    """Take a free session port, one left clean first; Busy if all are in use."""
    fallback: PortLease | None = None
    for port in SESSION_PORTS:
        try:
            lease = take_port(lock_path(runtime_dir, port), port=port)
        except Busy:
            continue
        if lease.was_clean:
            if fallback is not None:
                fallback.release(clean=False)
            return lease
        if fallback is None:
            fallback = lease
        else:
            lease.release(clean=False)
    if fallback is not None:
        return fallback
    raise Busy(
        "all session channels of this instance are in use",
        details=f"{len(SESSION_PORTS)} shells, commands or copies are running",
        resolution="end one of them, then try again",
    )


def distrust_ports(runtime_dir: Path, ports: range = range(8)) -> None:
    """Make the next client of each port resynchronise. A port in use is left to its user."""
    for port in ports:
        try:
            take_port(lock_path(runtime_dir, port)).release(clean=False)
        except Busy:
            continue
