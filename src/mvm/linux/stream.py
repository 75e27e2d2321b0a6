"""A client's end of a local stream socket, and what the kernel says of the groups of the one at the other end."""

from __future__ import annotations

import array
import socket
import time
from pathlib import Path
from typing import Self

from mvm.linux.sockets import connect_unix, recv_fds

_SO_PEERGROUPS = 59
_SEND_S = 30.0


class UnixStream:
    """Implements `mvm.wire.hostd_client.Transport`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def dial(cls, path: Path, timeout: float = 10.0) -> Self:
        """Raises OSError: nobody listens, not allowed, no such path, or not accepted in `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return cls(connect_unix(path, timeout))
            except BlockingIOError:
                # The backlog is full. With a time-out the kernel does not wait for room in it.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def send(self, data: bytes) -> None:
        self._sock.settimeout(_SEND_S)
        self._sock.sendall(data)

    def receive(self, size: int, timeout: float) -> tuple[bytes, list[int]]:
        self._sock.settimeout(timeout)
        return recv_fds(self._sock, size, 1)

    def close(self) -> None:
        self._sock.close()


def peer_groups(sock: socket.socket) -> frozenset[int]:
    """The supplementary groups of the process that connected, as of connect(2)."""
    groups = array.array("I")
    try:
        # As much as getsockopt takes from Python: 256 groups. Somebody in more counts as being in none.
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024))
    except OSError:
        return frozenset()
    return frozenset(groups)
