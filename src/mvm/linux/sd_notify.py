"""systemd's two protocols for a service: sockets handed over, and notices of its state. Spoken by hand: both are tiny.

sd_listen_fds(3): descriptors from 3 on, `LISTEN_PID` says for whom. sd_notify(3): one datagram of NAME=VALUE lines to
the socket in `NOTIFY_SOCKET`; a leading @ means the abstract name space. Without systemd both do nothing.
"""

from __future__ import annotations

import os
import socket

FIRST_FD = 3
_MAX_FDS = 16


def listen_fds() -> list[int]:
    """The descriptors handed to this process, made close-on-exec; the variables are taken out of the environment."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or int(count) > _MAX_FDS:
        return []
    fds = list(range(FIRST_FD, FIRST_FD + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


class Notifier:
    """Where to send notices. A child forgets it: it must not speak for its parent."""

    def __init__(self, address: str | None = None) -> None:
        self._socket: socket.socket | None = None
        target = os.environ.pop("NOTIFY_SOCKET", "") if address is None else address
        if target[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._target = "\0" + target[1:] if target[0] == "@" else target

    def tell(self, *lines: str) -> None:
        """`READY=1`, `STOPPING=1`, `STATUS=...`. A manager that does not listen costs nothing but the notice."""
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(lines).encode(), self._target)
        except OSError:
            return

    def forget(self) -> None:
        """In a child: give up the descriptor's number without closing it."""
        if self._socket is not None:
            self._socket.detach()
            self._socket = None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
