"""Where connections come from: virtio-serial ports by name, AF_VSOCK, and for tests a Unix socket.

There may be no udev in a guest, so ports are found by their names in sysfs and opened as /dev/vportNpM;
devtmpfs has the node, or it is made here.
"""

from __future__ import annotations

import _socket
import os

from mvm.guest import log, proto
from mvm.guest.conn import Connection
from mvm.guest.loop import IN, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from mvm.guest.conn import Handler

PORTS = tuple(f"mvm.{n}" for n in range(8))
_SYS = "/sys/class/virtio-ports"


def find_ports() -> list[tuple[str, str]]:
    """(port name, device path) of each of our ports this guest has."""
    try:
        entries = os.listdir(_SYS)
    except OSError:
        return []
    found = []
    for entry in sorted(entries):
        try:
            with open(f"{_SYS}/{entry}/name") as file:
                name = file.read().strip()
            if name not in PORTS:
                continue
            path = f"/dev/{entry}"
            if not os.path.exists(path):
                with open(f"{_SYS}/{entry}/dev") as file:
                    major, _, minor = file.read().strip().partition(":")
                os.mknod(path, 0o20600, os.makedev(int(major), int(minor)))
            found.append((name, path))
        except (OSError, ValueError) as error:
            log.failure(entry, error)
    return found


def open_ports(loop: Loop, verbs: Mapping[int, Handler]) -> int:
    """Serve every port there is; how many."""
    count = 0
    for name, path in find_ports():
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            log.failure(path, error)
            continue
        Connection(loop, fd, verbs, port=True, name=name)
        count += 1
    return count


def listen_vsock(loop: Loop, verbs: Mapping[int, Handler]) -> bool:
    """Serve AF_VSOCK where the kernel has it and a transport is there."""
    try:
        listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
        listener.bind((_socket.VMADDR_CID_ANY, proto.VSOCK_PORT))
        listener.listen(16)
    except (OSError, AttributeError):
        return False
    _accept_on(loop, verbs, listener, "vsock")
    return True


def listen_unix(loop: Loop, verbs: Mapping[int, Handler], path: str) -> None:
    """Serve a Unix socket; raises OSError."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(16)
    _accept_on(loop, verbs, listener, "unix")


def _accept_on(loop: Loop, verbs: Mapping[int, Handler], listener: _socket.socket, name: str) -> None:
    listener.setblocking(False)

    def accept(_events: int) -> None:
        try:
            fd, _peer = listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return  # the client left again
        Connection(loop, fd, verbs, port=False, name=name)

    loop.watch(listener.fileno(), IN, accept)
