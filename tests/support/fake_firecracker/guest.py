"""The guest: a worker that counts in guest memory, the project's own guest agent, and a port for tests.

- `AGENT_PORT` (5252, `mvm.guest.proto.VSOCK_PORT`): the real agent. It answers status, prepare_sleep, after_wake and
  shutdown, and runs no programs.
- `PROBE_PORT` (5253): one JSON object a line in, one out: what a test does inside the guest (`Guest.do_*`).

One lock is the virtual processor: guest threads hold it while they run, and who else holds it has paused the guest.
What the agent and the probe remember is in this process and begins anew at a restore; the worker's count, the written
pages and the map of used pages are in guest memory and nowhere else, so they go on only if the memory came back.

    page 16      the count, 8 bytes, little endian
    page 17      "booted from cold", written at a boot only
    page 32..    a bit for each page in use; the balloon gets only pages that are not
"""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import threading
import time

from mvm.guest import lifecycle, proto
from mvm.guest.conn import Connection
from mvm.guest.lifecycle import Lifecycle, Settings
from mvm.guest.loop import IN, Loop
from mvm.guest.session import Activity

from . import seccomp
from .memory import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .faults import Faults
    from .memory import GuestMemory

AGENT_PORT = proto.VSOCK_PORT
PROBE_PORT = 5253
COUNTER, BOOTED, USED = 16 * PAGE, 17 * PAGE, 32 * PAGE
_KEPT_BYTES = 16 << 20
_TICK_S = 0.002


class _Gate:
    """An epoll that gives the virtual processor up while it waits."""

    def __init__(self, epoll: select.epoll, processor: threading.Lock) -> None:
        self.register, self.modify, self.unregister = epoll.register, epoll.modify, epoll.unregister
        self._epoll = epoll
        self._processor = processor

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self._processor.release()
        try:
            return self._epoll.poll(timeout)
        finally:
            self._processor.acquire()


class Guest:
    """`ended(code)`: the guest asks for its VMM's end. `reported(first, count)`: its balloon driver says that pages are
    free, a moment after they are; None without one that does. Starts paused: the caller holds `processor`."""

    def __init__(
        self,
        memory: GuestMemory,
        *,
        restored: bool,
        console: Callable[[bytes], None],
        ended: Callable[[int], None],
        reported: Callable[[int, int], None] | None,
        faults: Faults,
    ) -> None:
        self.memory = memory
        self.processor = threading.Lock()
        self.processor.acquire()
        self._restored = restored
        self._console = console
        self._ended = ended
        self._reported = reported
        self._freed: list[tuple[int, int]] = []
        self._silent = "silent guest" in faults or (restored and "silent after load" in faults)
        self._listens = "no guest" not in faults
        self._arrivals: list[tuple[int, socket.socket]] = []
        self._arrived = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._off = False
        self._ctrl_alt_del = False

    def start(self, *, filtered: bool, booted: Callable[[], None]) -> None:
        """`booted`: called when the guest's drivers are up, some moments after it first runs."""
        for n, run in enumerate((self._serve, self._work)):
            threading.Thread(
                target=self._thread, args=(run, filtered, booted), name=f"fc_vcpu {n}", daemon=True
            ).start()

    def connect(self, port: int, sock: socket.socket) -> bool:
        """A connection from the host; False where nobody listens. The guest takes it when it runs next."""
        if not self._listens or self._off or port not in (AGENT_PORT, PROBE_PORT):
            sock.close()
            return False
        self._arrivals.append((port, sock))
        os.eventfd_write(self._arrived, 1)
        return True

    def ctrl_alt_del(self) -> None:
        """Heard when the guest runs next; with `reboot=k` it ends the VMM."""
        self._ctrl_alt_del = True

    def count(self) -> int:
        return int.from_bytes(self.memory.read(COUNTER, 8), "little")

    def _thread(self, run: Callable[[Callable[[], None]], None], filtered: bool, booted: Any) -> None:
        seccomp.name_thread(threading.current_thread().name)
        if filtered:
            seccomp.apply()
        run(booted)

    def _work(self, _: Callable[[], None]) -> None:
        while True:
            with self.processor:
                if self._ctrl_alt_del:
                    self._ended(0)
                while self._freed and self._reported is not None:
                    self._reported(*self._freed.pop())
                if not self._off:
                    self.memory.write(COUNTER, (self.count() + 1).to_bytes(8, "little"))
            time.sleep(_TICK_S)

    def _serve(self, booted: Callable[[], None]) -> None:
        self.processor.acquire()
        if not self._restored:
            self.memory.write(BOOTED, b"booted from cold")
            self._mark_used(0, USED // PAGE + 32, True)
            self._console(b"the fake guest boots\n")
        booted()
        # The machine that the agent sees is the guest, not the one that runs the tests, nor a jail without /proc.
        os.sync = lambda: None
        os.getloadavg = lambda: (0.0, 0.0, 0.0)
        lifecycle._meminfo = self._meminfo
        settings = Settings()
        settings.disks = False
        settings.simulate = True
        life = Lifecycle(settings, Activity())
        loop = Loop()
        loop._epoll = _Gate(loop._epoll, self.processor)  # type: ignore[assignment]
        verbs = {
            proto.STATUS: life.status,
            proto.PREPARE_SLEEP: life.prepare_sleep,
            proto.AFTER_WAKE: life.after_wake,
            proto.SHUTDOWN: self._noting_reboot(life),
        }

        def accept(_: int) -> None:
            os.eventfd_read(self._arrived)
            arrivals, self._arrivals = self._arrivals, []
            for port, sock in arrivals:
                if self._silent:
                    _silenced.append(sock)
                elif port == AGENT_PORT:
                    Connection(loop, sock.detach(), verbs, port=False, name="vsock")
                else:
                    _Probe(loop, sock, self)

        loop.watch(self._arrived, IN, accept)
        loop.run()
        # A poweroff leaves the VMM running, with nothing in it; only a reboot ends it.
        if self._reboots:
            self._ended(0)
        self._off = True
        self.processor.release()

    _reboots = False

    def _noting_reboot(self, life: Lifecycle) -> Callable[[Connection, int, bytes], None]:
        def shutdown(conn: Connection, number: int, body: bytes) -> None:
            self._reboots = len(body) == 3 and proto.SHUTDOWN_BODY.unpack(body)[0] == proto.SHUTDOWN_REBOOT
            life.shutdown(conn, number, body)

        return shutdown

    def _meminfo(self) -> dict[bytes, int]:
        used = sum(byte.bit_count() for byte in self._used()) * (PAGE >> 10)
        total = self.memory.size >> 10
        return {b"MemTotal": total, b"MemFree": total - used, b"MemAvailable": total - used}

    # The map of used pages.

    def _used(self) -> bytes:
        return self.memory.read(USED, self.memory.size // PAGE // 8)

    def _mark_used(self, first: int, count: int, used: bool) -> None:
        at, end = first // 8, (first + count + 7) // 8
        bits = bytearray(self.memory.read(USED + at, end - at))
        for page in range(first, first + count):
            mask = 1 << page % 8
            index = page // 8 - at
            bits[index] = bits[index] | mask if used else bits[index] & ~mask
        self.memory.write(USED + at, bytes(bits))

    def unused(self, pages: int) -> list[tuple[int, int]]:
        """Runs (first page, count) of at most `pages` pages that are not in use, from the top of memory down."""
        runs: list[tuple[int, int]] = []
        used, left = self._used(), pages
        for page in range(self.memory.size // PAGE - 1, _KEPT_BYTES // PAGE - 1, -1):
            if left == 0:
                break
            if used[page // 8] >> page % 8 & 1:
                continue
            left -= 1
            if runs and runs[-1][0] == page + 1:
                runs[-1] = (page, runs[-1][1] + 1)
            else:
                runs.append((page, 1))
        return runs

    # What a test does inside the guest.

    def do_status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"count": self.count(), "restored": self._restored}

    def do_write(self, request: dict[str, Any]) -> dict[str, Any]:
        """`pages` get the text `fill`, repeated, and are in use."""
        fill = request["fill"].encode()
        for page in request["pages"]:
            self.memory.write(page * PAGE, (fill * (PAGE // len(fill) + 1))[:PAGE])
            self._mark_used(page, 1, True)
        return {}

    def do_noise(self, request: dict[str, Any]) -> dict[str, Any]:
        """`count` pages from `first` get bytes that do not compress, and are in use."""
        first, count = request["first"], request["count"]
        self.memory.write(first * PAGE, os.urandom(count * PAGE))
        self._mark_used(first, count, True)
        return {}

    def do_free(self, request: dict[str, Any]) -> dict[str, Any]:
        """`count` pages from `first` are not in use any more; what is in them stays until they are reported."""
        self._mark_used(request["first"], request["count"], False)
        self._freed.append((request["first"], request["count"]))
        return {}

    def do_read(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"data": self.memory.read(request["page"] * PAGE, PAGE).hex()}

    def do_console(self, request: dict[str, Any]) -> dict[str, Any]:
        left, block = request["bytes"], b"x" * 999 + b"\n"
        while left > 0:
            self._console(block[:left])
            left -= len(block)
        return {}

    def do_silence(self, _: dict[str, Any]) -> dict[str, Any]:
        """Connections that come from now on are never answered."""
        self._silent = True
        return {}

    def do_take_over(self, request: dict[str, Any]) -> dict[str, Any]:
        """As a guest that has broken out would: the VMM lets go of its block devices, then opens `path`."""
        closed = 0
        for fd in range(3, 1024):
            try:
                if not stat.S_ISBLK(os.fstat(fd).st_mode):
                    continue
            except OSError:
                continue
            os.close(fd)
            closed += 1
        try:
            os.close(os.open(request["path"], os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            return {"closed": closed, "errno": error.errno}
        return {"closed": closed, "errno": 0}

    def do_fill(self, request: dict[str, Any]) -> dict[str, Any]:
        """As a guest that has broken out would: directories in directories of `path`, and a file, to the last byte."""
        made, written = 0, 0
        try:
            os.chdir(request["path"])
            while made < 1000:
                os.mkdir("deeper")
                os.chdir("deeper")
                made += 1
        except OSError:
            pass
        finally:
            os.chdir("/")
        try:
            with open(f"{request['path']}/log.1", "wb", buffering=0) as file:
                while written < 1 << 30:
                    written += file.write(b"\1" * (1 << 20))
        except OSError:
            pass
        return {"made": made, "written": written}

    def do_exit(self, request: dict[str, Any]) -> dict[str, Any]:
        """The guest reboots (0), or the VMM fails with `code`."""
        self._ended(request["code"])
        return {}


_silenced: list[socket.socket] = []


class _Probe:
    def __init__(self, loop: Loop, sock: socket.socket, guest: Guest) -> None:
        self._loop, self._sock, self._guest = loop, sock, guest
        self._line = b""
        loop.watch(sock.fileno(), IN, self._readable)

    def _readable(self, _: int) -> None:
        data = self._sock.recv(65536)
        if not data:
            self._loop.forget(self._sock.fileno())
            self._sock.close()
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            answer = getattr(self._guest, f"do_{request['do']}")(request)
            self._sock.sendall(json.dumps(answer).encode() + b"\n")
