"""The vsock device: the Unix socket of the host's end, the CONNECT handshake, and what a snapshot does to connections.

A thread carries the bytes, in both directions, under `lock`; who holds the lock has frozen the device. The program
reads a CONNECT line without waiting: a client that does not send all of it at once is dropped, and so is here.

From 1.16 on the device holds back everything for the guest after a resume (`_gated`), until the guest has acknowledged
a reset event. Only a snapshot sends that event (`prepare_save`). So a resume without a snapshot before it leaves the
guest deaf, for as long as no snapshot is taken; connections are taken and never answered.
"""

from __future__ import annotations

import os
import select
import socket
import threading

from . import seccomp, versions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .versions import Version

    Connect = Callable[[int, socket.socket], bool]

MAX_CONNECTIONS = 1023
_PORT_BASE = 1 << 30
_CHUNK = 65536
_SHORTEST = len(b"connect 0\n")
_LONGEST = 32


class _Pair:
    """One connection: `host` is the client's socket, `guest` the guest's end, `local` our port number."""

    def __init__(self, host: socket.socket, guest: socket.socket, local: int) -> None:
        self.host, self.guest, self.local = host, guest, local
        self.waiting: dict[int, bytes] = {host.fileno(): b"", guest.fileno(): b""}
        self.ended: set[int] = set()

    def other(self, fd: int) -> socket.socket:
        return self.guest if fd == self.host.fileno() else self.host

    def this(self, fd: int) -> socket.socket:
        return self.host if fd == self.host.fileno() else self.guest


class Vsock:
    """OSError if the socket's name is taken. `connect` is set once there is a guest to connect to."""

    def __init__(self, cid: int, path: str, version: Version, local_last: int = _PORT_BASE - 1) -> None:
        self.cid, self.path, self.local_last = cid, path, local_last
        self.lock = threading.Lock()
        self.connect: Connect | None = None
        self.added = 0
        self._holds_back = versions.vsock_dies_of_a_bare_pause(version)
        self._gated = False
        self._reset_sent = False
        self._active = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._fresh: dict[int, socket.socket] = {}
        self._deaf: list[socket.socket] = []
        self._pairs: dict[int, _Pair] = {}
        self._poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        """Before it ran: a second PUT /vsock takes its place. The name goes with it."""
        os.unlink(self.path)
        self._listener.close()

    def start(self, connect: Connect, *, filtered: bool, active: bool) -> None:
        """`active`: the guest's driver has the device already, because this guest was restored."""
        self.connect = connect
        self._active = active
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        self._poll.register(self._wake, select.EPOLLIN)
        threading.Thread(target=self._run, args=(filtered,), name="fc_vsock", daemon=True).start()

    def activated(self) -> None:
        """The guest's driver has found the device."""
        self._active = True

    # What the VMM's thread does to it; the VM is paused, or this freezes it for the moment.

    def prepare_save(self) -> None:
        self._reset_sent = self._active

    def prepare_restored(self) -> None:
        """The saved guest has the reset event in its memory, unread."""
        self._reset_sent = True

    def kick(self) -> None:
        """Every resume does this, with the device still frozen."""
        if not self._active:
            return
        if self._reset_sent:
            self._reset_sent = False
            for pair in set(self._pairs.values()):
                self._end(pair)
            for sock in self._deaf:
                sock.close()
            self._deaf.clear()
            self._gated = False
        elif self._holds_back:
            self._gated = True
            for pair in set(self._pairs.values()):
                self._watch(pair)
        os.eventfd_write(self._wake, 1)

    def _run(self, filtered: bool) -> None:
        seccomp.name_thread("fc_vsock")
        if filtered:
            seccomp.apply()
        while True:
            ready = self._poll.poll()
            with self.lock:
                for fd, events in ready:
                    if fd == self._wake:
                        os.eventfd_read(self._wake)
                    elif fd == self._listener.fileno():
                        self._accept()
                    elif fd in self._fresh:
                        self._handshake(fd)
                    elif fd in self._pairs:
                        self._carry(fd, events)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        if len(self._pairs) >= 2 * MAX_CONNECTIONS:
            client.close()
            return
        client.setblocking(False)
        self._fresh[client.fileno()] = client
        self._poll.register(client.fileno(), select.EPOLLIN)

    def _handshake(self, fd: int) -> None:
        client = self._fresh.pop(fd)
        self._poll.unregister(fd)
        port = _wanted_port(client)
        if port is None or self.connect is None:
            client.close()
            return
        self.local_last = (self.local_last + 1) & ~(1 << 31) | _PORT_BASE
        if self._gated:
            self._deaf.append(client)  # the request waits for the guest, which will never see it
            return
        ours, theirs = socket.socketpair()
        if not self.connect(port, theirs):
            ours.close()
            client.close()
            return
        ours.setblocking(False)
        client.sendall(b"OK %d\n" % self.local_last)
        pair = _Pair(client, ours, self.local_last)
        self.added += 1
        for sock in (client, ours):
            self._pairs[sock.fileno()] = pair
            self._poll.register(sock.fileno(), 0)
        self._watch(pair)

    def _watch(self, pair: _Pair) -> None:
        for sock in (pair.host, pair.guest):
            fd = sock.fileno()
            events = select.EPOLLOUT if pair.waiting[fd] else 0
            blocked = pair.waiting[pair.other(fd).fileno()] or fd in pair.ended
            if not blocked and not (self._gated and sock is pair.host):
                events |= select.EPOLLIN
            self._poll.modify(fd, events)

    def _carry(self, fd: int, events: int) -> None:
        pair = self._pairs[fd]
        sock, other = pair.this(fd), pair.other(fd)
        try:
            if events & select.EPOLLOUT and pair.waiting[fd]:
                pair.waiting[fd] = pair.waiting[fd][sock.send(pair.waiting[fd]) :]
            held = self._gated and sock is pair.host
            if events & (select.EPOLLIN | select.EPOLLHUP) and fd not in pair.ended and not held:
                if not pair.waiting[other.fileno()]:
                    data = sock.recv(_CHUNK)
                    if data:
                        pair.waiting[other.fileno()] = data[other.send(data) :]
                    else:
                        pair.ended.add(fd)
                        other.shutdown(socket.SHUT_WR)
            elif events & (select.EPOLLERR | select.EPOLLHUP):
                raise ConnectionResetError
        except BlockingIOError:
            pass
        except OSError:
            self._end(pair)
            return
        if len(pair.ended) == 2:
            self._end(pair)
        else:
            self._watch(pair)

    def _end(self, pair: _Pair) -> None:
        for sock in (pair.host, pair.guest):
            self._pairs.pop(sock.fileno(), None)
            self._poll.unregister(sock.fileno())
            sock.close()


def _wanted_port(client: socket.socket) -> int | None:
    """The port of a CONNECT line, if all of it has come."""
    try:
        line = client.recv(_SHORTEST)
        if len(line) < _SHORTEST:
            return None
        while not line.endswith(b"\n") and len(line) < _LONGEST:
            more = client.recv(1)
            if not more:
                return None
            line += more
    except OSError:
        return None
    words = line.split()
    if len(words) < 2 or words[0].lower() != b"connect" or not words[1].isdigit():
        return None
    port = int(words[1])
    return port if port < 1 << 32 else None
