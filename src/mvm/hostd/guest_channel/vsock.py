"""The guest's agent through a VMM's vsock socket: `CONNECT <port>`, `OK <n>`, and then it is a stream like any other.

The VMM listens for all of a guest's ports on one socket, `/run/vsock.sock` in its jail (`mvm.hostd.jailed_run`). Every
connection is a new one to the guest, with boundaries of its own, so nothing of an earlier client can be on it. A port
that nobody listens on, and a guest that is too busy to be asked, look the same: the connection closes.

The answer is read byte by byte: what follows its line is the guest's already.
"""

from __future__ import annotations

import socket
import time
from typing import Final

from mvm.hostd.jailed_run import Place

SOCKET: Final = "vsock.sock"
_LINE_MAX: Final = 32


def ask_vsock(vmm: Place, port: int, timeout: float) -> socket.socket:
    """Connected to the VMM and `port` of the guest asked for; what the VMM says to that is read by `await_vsock`.

    `timeout`: 0 never waits (BlockingIOError if the VMM takes no more connections). OSError if there is no VMM,
    IntegrityError if what is there is not the VMM's socket.
    """
    sock = vmm.connect(SOCKET, timeout)
    try:
        sock.sendall(b"CONNECT %d\n" % port)
    except BaseException:
        sock.close()
        raise
    return sock


def await_vsock(sock: socket.socket, deadline: float) -> None:
    """Return when the guest has taken the connection. OSError if nobody listens, TimeoutError at `deadline`
    (time.monotonic())."""
    line = b""
    while not line.endswith(b"\n"):
        sock.settimeout(_left(deadline))
        byte = sock.recv(1)
        if not byte or len(line) > _LINE_MAX:
            raise ConnectionRefusedError(111, "nothing answers on that port of the guest")
        line += byte
    if not line.startswith(b"OK "):
        raise ConnectionRefusedError(111, f"the VMM answers {line!r}")


def connect_vsock(vmm: Place, port: int, deadline: float) -> socket.socket:
    """Connected to `port` of the guest; raises what the two steps raise."""
    sock = ask_vsock(vmm, port, _left(deadline))
    try:
        await_vsock(sock, deadline)
    except BaseException:
        sock.close()
        raise
    return sock


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the guest does not take the connection")
    return left
