"""The program that `FakeDriver` runs where QEMU would run: a machine without a processor, but with real memory.

It is `__main__` of a zip archive that also holds `mvm.guest`, because it runs as an instance's uid, which may read
nothing of ours by name. Everything reaches it under the descriptor numbers that `mvm.hostd.vmm.qemu.command` uses.

- Guest memory is private: anonymous at a cold start, a private mapping of descriptor 5 at a restore.
- The guest is the real agent (`mvm.guest`) on this process's main thread. Its worker counts in guest memory and
  nowhere else, so that a count which goes on proves memory that came back.
- One lock is the virtual processor: the guest holds it while it runs, `pause` takes it away.
- The monitor reads one JSON object a line and answers with one, to several clients at once.
"""

from __future__ import annotations

import _socket
import ctypes
import json
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from mvm.guest import proto, transports
from mvm.guest.lifecycle import Lifecycle, Settings
from mvm.guest.loop import Loop
from mvm.guest.session import Activity

MONITOR_FD, CONSOLE_FD, MEMORY_FD, CHANNEL_FD, CHANNELS = 3, 4, 5, 10, 8
PAGE = 4096
COUNTER = 16 * PAGE
BOOTED = 17 * PAGE
TICK_S = 0.002


class Gate:
    """An epoll that gives the virtual processor up while it waits."""

    def __init__(self, epoll: select.epoll, processor: threading.Lock, answers: threading.Event) -> None:
        self.register, self.modify, self.unregister = epoll.register, epoll.modify, epoll.unregister
        self._epoll = epoll
        self._processor = processor
        self._answers = answers

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self._processor.release()
        try:
            return self._epoll.poll(timeout)
        finally:
            self._answers.wait()
            self._processor.acquire()


class Vmm:
    def __init__(self, size: int, restored: bool) -> None:
        self.size = size
        self.processor = threading.Lock()
        self.answers = threading.Event()
        self.answers.set()
        self.status = "waiting" if restored else "paused"
        self.processor.acquire()
        if restored:
            handle = os.open(f"/proc/self/fd/{MEMORY_FD}", os.O_RDWR)
            self.memory = mmap.mmap(
                handle, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
            os.close(handle)
        else:
            self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.serial = os.urandom(16).hex()
        self.refuse_state = False

    def count(self) -> int:
        return int.from_bytes(self.memory[COUNTER : COUNTER + 8], "little")

    def work(self) -> None:
        """The guest's worker."""
        while True:
            with self.processor:
                self.memory[COUNTER : COUNTER + 8] = (self.count() + 1).to_bytes(8, "little")
            time.sleep(TICK_S)

    def boot(self) -> None:
        self.memory[BOOTED : BOOTED + 16] = b"booted from cold"
        os.write(CONSOLE_FD, b"the fake guest boots\n")

    # Monitor commands: each takes the request, returns the answer.

    def do_status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"status": self.status, "address": self.address, "count": self.count(), "serial": self.serial}

    def do_pause(self, _: dict[str, Any]) -> dict[str, Any]:
        if self.status == "running":
            self.processor.acquire()
            self.status = "paused"
        return {}

    def do_resume(self, _: dict[str, Any]) -> dict[str, Any]:
        if self.status == "waiting":
            return {"error": "no device state was loaded"}
        if self.status == "paused":
            self.status = "running"
            self.processor.release()
        return {}

    def do_save(self, _: dict[str, Any]) -> dict[str, Any]:
        if self.status != "paused" or self.refuse_state:
            return {"error": f"the state cannot be saved while {self.status}"}
        return {"state": json.dumps({"fake": 1, "size": self.size, "serial": self.serial})}

    def do_load(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.status != "waiting":
            return {"error": f"no state can be loaded while {self.status}"}
        try:
            state = json.loads(request["state"])
            if state["fake"] != 1 or state["size"] != self.size:
                raise ValueError("of another machine")
            self.serial = str(state["serial"])
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"the state is not usable: {error}"}
        self.status = "paused"
        return {}

    def do_write(self, request: dict[str, Any]) -> dict[str, Any]:
        """As the guest would: `pages` get the text `fill`, repeated."""
        fill = request["fill"].encode()
        for page in request["pages"]:
            text = fill * (PAGE // len(fill) + 1)
            self.memory[page * PAGE : (page + 1) * PAGE] = text[:PAGE]
        return {}

    def do_noise(self, request: dict[str, Any]) -> dict[str, Any]:
        """`count` pages from `first` get bytes that do not compress."""
        first, count = request["first"], request["count"]
        self.memory[first * PAGE : (first + count) * PAGE] = os.urandom(count * PAGE)
        return {}

    def do_read(self, request: dict[str, Any]) -> dict[str, Any]:
        page = request["page"]
        return {"data": bytes(self.memory[page * PAGE : (page + 1) * PAGE]).hex()}

    def do_console(self, request: dict[str, Any]) -> dict[str, Any]:
        left = request["bytes"]
        block = b"x" * 999 + b"\n"
        while left > 0:
            left -= os.write(CONSOLE_FD, block[:left])
        return {}

    def do_hang(self, _: dict[str, Any]) -> dict[str, Any]:
        """The monitor answers nobody any more."""
        threading.Event().wait()
        return {}

    def do_silence(self, request: dict[str, Any]) -> dict[str, Any]:
        """The guest's agent stops answering; the VMM is as well as ever."""
        self.answers.clear() if request["on"] else self.answers.set()
        return {}

    def do_refuse_state(self, request: dict[str, Any]) -> dict[str, Any]:
        self.refuse_state = bool(request["on"])
        return {}

    def do_exit(self, request: dict[str, Any]) -> dict[str, Any]:
        """The guest powers off (0), or the VMM fails."""
        os._exit(request["code"])

    def serve(self) -> None:
        listener = socket.socket(fileno=MONITOR_FD)
        while True:
            client, _ = listener.accept()
            # Each in a thread of its own: a test looks in while the driver is connected.
            threading.Thread(target=self.answer, args=(client,), daemon=True).start()

    def answer(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as stream:
            try:
                for line in stream:
                    request = json.loads(line)
                    made = getattr(self, f"do_{request['do']}")(request)
                    client.sendall(json.dumps(made).encode() + b"\n")
            except OSError:
                return  # it was killed before it heard the answer


def serve_guest(vmm: Vmm, channels: list[_socket.socket]) -> None:
    settings = Settings()
    settings.disks = False
    settings.simulate = True
    activity = Activity()
    life = Lifecycle(settings, activity)
    loop = Loop()
    loop._epoll = Gate(loop._epoll, vmm.processor, vmm.answers)  # type: ignore[assignment]
    verbs = {
        proto.STATUS: life.status,
        proto.PREPARE_SLEEP: life.prepare_sleep,
        proto.AFTER_WAKE: life.after_wake,
        proto.SHUTDOWN: life.shutdown,
    }
    for n, channel in enumerate(channels):
        transports._accept_on(loop, verbs, channel, f"channel {n}")
    loop.run()


def main(arguments: list[str]) -> None:
    machine = json.loads(arguments[0])
    if machine.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The guest's sync is its own disk's, not that of the machine which runs the tests.
    os.sync = lambda: None
    vmm = Vmm(machine["mem_bytes"], machine["restored"])
    if not machine["restored"]:
        vmm.boot()
    channels = [_socket.socket(fileno=CHANNEL_FD + n) for n in range(CHANNELS)]
    for run in (vmm.work, vmm.serve):
        threading.Thread(target=run, daemon=True).start()
    vmm.processor.acquire()  # until the first resume
    serve_guest(vmm, channels)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
