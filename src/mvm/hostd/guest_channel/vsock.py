"""The guest's agent through a VMM's vsock socket: `CONNECT <port>`, `OK <n>`, and then it is a stream like any other.

The VMM listens for all of a guest's ports on one socket (`vmm/vsock.sock` in the runtime directory), in a directory
that is its uid's. Every connection is a new one to the guest, with boundaries of its own, so nothing of an earlier
client can be on it. A port that nobody listens on, and a guest that is too busy to be asked, look the same: the
connection closes.

The answer is read byte by byte: what follows its line is the guest's already.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Final

from mvm.linux.sockets import connect_owned

_LINE_MAX: Final = 32


def vsock_path(runtime: Path) -> Path:
    """The socket of the VMM that runs there, if that VMM has vsock."""
    return runtime / "vmm" / "vsock.sock"


def ask_vsock(path: Path, port: int, timeout: float) -> socket.socket:
    """Connected to the VMM and `port` of the guest asked for; what the VMM says to that is read by `await_vsock`.

    `timeout`: 0 never waits (BlockingIOError if the VMM takes no more connections). OSError if there is no VMM,
    IntegrityError if what is there is not the VMM's socket.
    """
    owner = os.stat(path.parent, follow_symlinks=False).st_uid
    sock = connect_owned(path, owner, timeout)
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


def connect_vsock(path: Path, port: int, deadline: float) -> socket.socket:
    """Connected to `port` of the guest; raises what the two steps raise."""
    sock = ask_vsock(path, port, _left(deadline))
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
