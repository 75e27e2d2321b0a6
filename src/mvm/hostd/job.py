"""One operation in a process of its own, seen from the daemon's loop.

The loop has one thread, so it may fork: the child is the loop's memory without a single lock held, and what a VM's
keeper needs (to fork once more) holds there too. A crash, a leak or an endless wait of one operation ends with its
process. Nothing of the child's outlives the daemon (PR_SET_PDEATHSIG) but the keepers and VMMs it started, which belong
to init, and for a moment a program that it ran, which keeps the child's locks (`mvm.linux.process.run`); what the child
was at is then found by recovery, as after any kill.

The child talks through a SOCK_SEQPACKET pair, one message body a packet: whatever happens to it, the client sees whole
messages. SIGTERM raises `Ended` in it, at whatever it does; operations put things right on the way out, as they do for
an interrupt from a keyboard. SIGKILL is for the one that does not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from mvm.core.errors import CommandFailed

if TYPE_CHECKING:
    from mvm.core.ids import InstanceId
    from mvm.core.plan import InstancePlan
    from mvm.hostd.connection import Connection
    from mvm.linux.sockets import PeerCredentials

KILL_S = 30.0
"""From SIGTERM to SIGKILL."""
_PACKET = 256 * 1024
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15

_libc = ctypes.CDLL(None, use_errno=True)


def aside(body: Callable[[], object]) -> None:
    """Run `body` in a child, which dies with this process, and wait for it: what it allocated goes with it.

    CommandFailed if it raised, with its traceback on standard error.
    """
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        code = 1
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == parent:
                body()
                code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise CommandFailed("a process of mvm-hostd was killed", details=f"By signal {-code}.")
    if code > 0:
        raise CommandFailed(
            "a process of mvm-hostd failed", resolution="Its own words are above this in the log."
        )


class Ended(BaseException):
    """The daemon wants this operation to end."""


class Job:
    """A running child. The loop polls `pidfd` and `sock`, and calls `close` when the child has been reaped.

    `instance`: the one it acts on; None for what concerns the whole node.
    """

    def __init__(
        self,
        *,
        verb: str,
        instance: InstanceId | None,
        plan: InstancePlan | None,
        peer: PeerCredentials,
        connection: Connection | None,
        timeout_s: float,
    ) -> None:
        self.verb = verb
        self.instance = instance
        self.plan = plan
        self.peer = peer
        self.connection = connection
        self.began = time.monotonic()
        self.deadline = self.began + timeout_s
        self.answered = False
        self.terminated = False
        self.pid = 0
        self.pidfd = -1
        self.sock: socket.socket | None = None

    @property
    def what(self) -> str:
        """For people: `stop_instance on acme/default-0`."""
        return self.verb if self.instance is None else f"{self.verb} on {self.instance}"

    def start(self, body: Callable[[Callable[[bytes], None]], None], leave_loop: Callable[[], None]) -> None:
        """Fork. `body(tell)` runs in the child, which has no descriptor of the loop's but standard error."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PACKET)
        me = os.getpid()
        try:
            self.pid = os.fork()
        except BaseException:
            ours.close()
            theirs.close()
            raise
        if self.pid == 0:
            _child(body, leave_loop, ours, theirs, me)
        theirs.close()
        self.pidfd = os.pidfd_open(self.pid)
        ours.setblocking(False)
        self.sock = ours

    def messages(self) -> list[bytes]:
        """Bodies that have arrived."""
        found: list[bytes] = []
        while self.sock is not None:
            try:
                body = self.sock.recv(_PACKET)
            except BlockingIOError:
                break
            except OSError:
                body = b""
            if not body:
                self.sock.close()
                self.sock = None
                break
            found.append(body)
        return found

    def end(self) -> None:
        """SIGTERM; the deadline becomes that of the SIGKILL."""
        self._signal(signal.SIGTERM)
        self.terminated = True
        self.deadline = time.monotonic() + KILL_S

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.deadline = time.monotonic() + KILL_S

    def reap(self) -> int:
        """The wait status of the child, which has ended."""
        _, status = os.waitpid(self.pid, 0)
        return status

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def _signal(self, signum: int) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, signum)
        except ProcessLookupError:
            pass


def _child(
    body: Callable[[Callable[[bytes], None]], None],
    leave_loop: Callable[[], None],
    ours: socket.socket,
    theirs: socket.socket,
    parent: int,
) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, _raise_ended)
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _libc.prctl(_PR_SET_NAME, b"mvm-hostd-op", 0, 0, 0)
        if os.getppid() == parent:
            leave_loop()
            ours.detach()
            _close_all_but(theirs.fileno())
            body(lambda message: _tell(theirs, message))
    finally:
        # Not through the interpreter's end: what is registered there is the parent's.
        os._exit(0)


def _close_all_but(kept: int) -> None:
    os.closerange(3, kept)
    os.closerange(kept + 1, 1 << 16)


def _tell(sock: socket.socket, message: bytes) -> None:
    try:
        sock.send(message)
    except OSError:
        return  # the loop is gone, and this process with it


def _raise_ended(signum: int, frame: object) -> None:
    # Once: the way out must not be interrupted by an impatient second signal.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Ended
