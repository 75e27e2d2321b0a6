"""Unix sockets: listening and connecting at paths of any length, who is at the other end, passing
descriptors.

sun_path holds 107 bytes; instance directories are longer. So the directory is opened, and the socket named
through `/proc/self/fd/N/<name>`: only the last component is limited. Modes are set before bind(2), which
masks the socket inode's mode with the umask, so there is no moment at which a stranger could connect.
"""

from __future__ import annotations

import array
import os
import socket
import stat
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from mvm.core.errors import Conflict, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAX_FDS = 64
"""Descriptors in one message; the kernel's own limit (SCM_MAX_FD) is 253."""
_MSG_CMSG_CLOEXEC = 0x40000000
_UCRED = struct.Struct("iII")


class PeerCredentials(NamedTuple):
    """Who connected, as of connect(2). The pid may be gone by now; the ids are the ones to decide by."""

    pid: int
    uid: int
    gid: int


@contextmanager
def _short(path: Path) -> Iterator[str]:
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def listen_unix(path: Path, *, mode: int = 0o600, backlog: int = 16) -> socket.socket:
    """A listening stream socket at `path`. A socket nobody listens on any more is replaced; Conflict
    otherwise."""
    with _short(path) as name:
        _remove_stale(path, name)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(server.fileno(), mode)
            server.bind(name)
            # bind took the umask's bits away; give back what the caller asked for.
            os.chmod(name, mode)
            server.listen(backlog)
        except BaseException:
            server.close()
            raise
    return server


def _remove_stale(path: Path, name: str) -> None:
    try:
        found = os.lstat(name)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise Conflict(f"{path} is in the way", details="it is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            os.unlink(name)
            return
        except BlockingIOError:
            pass  # a full backlog: somebody listens
    raise Conflict(
        f"{path} is in use", details="a process listens on it", resolution="stop that process first"
    )


def connect_unix(path: Path, timeout: float) -> socket.socket:
    """A connected stream socket with `timeout` seconds set for this and every later operation.

    ConnectionRefusedError and FileNotFoundError pass through: they say whether anybody listens.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(timeout)
        with _short(path) as name:
            client.connect(name)
    except BaseException:
        client.close()
        raise
    return client


def connect_owned(path: Path, uid: int, timeout: float) -> socket.socket:
    """Like `connect_unix`, for a directory that `uid` can write to: only to a socket that is there and is `uid`'s.

    A name in such a directory may become a symbolic link to any socket of the host at any moment. So what is there is
    opened first, without following a link, looked at, and connected to by its descriptor. IntegrityError for what it
    is not.
    """
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        seen = os.fstat(found)
        if not stat.S_ISSOCK(seen.st_mode) or seen.st_uid != uid:
            raise IntegrityError(
                f"{path} is not the socket that was made there",
                details=f"mode {seen.st_mode:o}, owner {seen.st_uid}, expected {uid}",
            )
        client.settimeout(timeout)
        client.connect(f"/proc/self/fd/{found}")
    except BaseException:
        client.close()
        raise
    finally:
        os.close(found)
    return client


def peer(sock: socket.socket) -> PeerCredentials:
    """The kernel's word on who is at the other end."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(raw))


def send_fds(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send `data` (at least one byte, as the carrier) with descriptors. They stay open here."""
    if not data or len(fds) > MAX_FDS:
        raise ValueError("descriptors travel with at least one byte, and at most MAX_FDS at once")
    rights = array.array("i", fds).tobytes()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
    sent = sock.sendmsg([data], ancillary)
    if sent < len(data):
        # The descriptors went with the first byte; the rest is plain stream.
        sock.sendall(data[sent:])


def recv_fds(sock: socket.socket, size: int, max_fds: int = MAX_FDS) -> tuple[bytes, list[int]]:
    """At most `size` bytes and the owned, close-on-exec descriptors that came with them; b"" at the end of
    stream.

    IntegrityError, with every descriptor closed, if the peer sent more descriptors than `max_fds`.
    """
    room = socket.CMSG_SPACE(max_fds * 4)
    data, ancillary, flags, _ = sock.recvmsg(size, room, _MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    # CMSG_SPACE rounds up, so one more than asked for may fit without being marked as cut off.
    if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
        for fd in fds:
            os.close(fd)
        raise IntegrityError("the peer passed more descriptors than expected", details=f"limit {max_fds}")
    return data, list(fds)
