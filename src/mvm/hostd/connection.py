"""One client of the daemon: its bytes in and out, and how long it may be silent or slow.

States: reading a request -> (an operation runs, or an answer is queued) -> reading the next. While an operation runs or
an answer waits to be taken, no further bytes are read. With a guest channel open the only request is `close_channel`,
and silence is no fault.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from mvm.hostd.guest_channel import PortLease
from mvm.linux.sockets import PeerCredentials, send_fds
from mvm.wire.hostd_api import MAX_ANSWER, MAX_REQUEST
from mvm.wire.hostd_frames import FrameReader, frame

if TYPE_CHECKING:
    from mvm.core.ids import InstanceId
    from mvm.hostd.job import Job

IDLE_S = 30.0
"""A connection on which nothing is asked for so long is closed."""
FRAME_S = 5.0
"""From the first byte of a request to its last."""
DRAIN_S = 30.0
"""From the first unread byte of our answer to the last."""
OUT_BYTES = 256 * 1024
"""What waits for a client that does not read; beyond it progress is dropped. One answer always fits on top."""
_RECEIVE = 65536


class Gone(Exception):
    """The client closed, or its connection broke."""


class Connection:
    """Owns its socket and, with a channel open, the lease of a guest's port."""

    def __init__(self, sock: socket.socket, peer: PeerCredentials) -> None:
        self.sock = sock
        self.peer = peer
        self.job: Job | None = None
        self.lease: PortLease | None = None
        self.console: InstanceId | None = None
        """Whose console log it reads; said in the audit log already."""
        self.closing = False
        """Close as soon as what is queued has been sent."""
        self._reader = FrameReader(MAX_REQUEST)
        self._out = bytearray()
        self._deadline = time.monotonic() + IDLE_S
        sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._out)

    @property
    def wants_read(self) -> bool:
        """Not while an answer waits: its next request stays with the kernel, and costs us nothing."""
        return not self.closing and not self._out

    @property
    def deadline(self) -> float | None:
        """time.monotonic() after which the client is too slow, or None while it is not its turn."""
        if self._out or self._reader.started or (self.job is None and self.lease is None) or self.closing:
            return self._deadline
        return None

    def receive(self) -> list[bytes]:
        """Whole requests. Gone at the end of the stream; InvalidInput for what is no frame."""
        try:
            data = self.sock.recv(_RECEIVE)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Gone from error
        if not data:
            raise Gone
        fresh = not self._reader.started
        bodies = self._reader.feed(data)
        if bodies or fresh:
            self._wait(FRAME_S if self._reader.started else IDLE_S)
        return bodies

    def queue(self, body: bytes, *, droppable: bool = False) -> None:
        if droppable and len(self._out) > OUT_BYTES:
            return
        if not self._out:
            self._wait(DRAIN_S)
        self._out += frame(body, MAX_ANSWER)
        self.send()

    def queue_with_fd(self, body: bytes, fd: int) -> None:
        """Send at once: an answer to a request is alone on the connection, so there is room. Gone if there is not."""
        try:
            send_fds(self.sock, frame(body, MAX_ANSWER), [fd])
        except OSError as error:
            raise Gone from error

    def send(self) -> None:
        """What the socket takes now. Gone if the connection broke."""
        try:
            while self._out:
                sent = self.sock.send(self._out)
                del self._out[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            raise Gone from error
        if not self.closing:
            self._wait(IDLE_S)

    def give_back(self, *, clean: bool) -> None:
        if self.lease is not None:
            lease, self.lease = self.lease, None
            lease.release(clean=clean)

    def close(self) -> None:
        self.give_back(clean=False)
        self.sock.close()

    def _wait(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
