"""Whether guest memory had better come through userfaultfd(2) than through the pager's FUSE file. Needs root.

    python -m bench.uffd [--firecracker DIR] [--size 256] [--repeats 10]

Firecracker takes a snapshot's memory either from a file or from a process that answers its page faults. Restores one
sleeping guest again and again, in turn plain, encrypted as shipped (`mvm.hostd.pager`), and encrypted with faults
answered by a handler of this file: the same chunks, the same decryption, the same working set ahead of the guest, two
threads, in a process of its own. All are medians, from opening the memory to the guest's answer.

The handler is for measuring: it does not watch over the VMM, which waits for ever for a page when its handler dies.
What it restored is all anonymous memory, so /proc/<pid>/pagemap does not tell any more what the guest wrote.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Final, NamedTuple

from bench.figures import aligned
from bench.node import (
    Guest,
    Opened,
    Restored,
    Way,
    encrypted,
    measuring_node,
    open_snapshot,
    plain,
)
from bench.target import add_options, of_options

from mvm.core.errors import MvmError
from mvm.core.snapshot import Fingerprint
from mvm.hostd.operations.context import Context
from mvm.hostd.pager import by_chunk, plain_memory
from mvm.hostd.sealing import CHUNK, PAGE, SealedImage, load_working_set
from mvm.hostd.vmm.driver import Vm
from mvm.hostd.vmm.firecracker import requests as rq
from mvm.hostd.vmm.firecracker import vm as vms
from mvm.hostd.vmm.firecracker.jail import STATE_IN
from mvm.hostd.vmm.firecracker.vm import FirecrackerVm

SOCKET: Final = "uffd.sock"
_THREADS: Final = 2
# <linux/userfaultfd.h>: UFFDIO_COPY, and struct uffd_msg of a page fault (event, padding, flags, address).
_COPY: Final = 0xC028AA03
_COPY_ARGS: Final = struct.Struct("=QQQQq")
_MESSAGE: Final = struct.Struct("=B7xQQ8x")
_PAGEFAULT: Final = 0x12


class Region(NamedTuple):
    """A part of guest memory: `offset` in the image, `base` in the VMM."""

    base: int
    size: int
    offset: int


class Handler:
    """Answers one VMM's page faults from an image."""

    def __init__(self, image: SealedImage, uffd: int, regions: Sequence[Region]) -> None:
        self._image = image
        self._uffd = uffd
        self._regions = regions

    def serve(self) -> None:
        """Until the VMM is gone."""
        threading.Thread(target=self._ahead, daemon=True).start()
        poll = select.poll()
        poll.register(self._uffd, select.POLLIN)
        while True:
            if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll()):
                return
            try:
                event, _, address = _MESSAGE.unpack(os.read(self._uffd, _MESSAGE.size))
            except BlockingIOError:
                continue
            if event == _PAGEFAULT:
                number = self._offset(address) // CHUNK
                self._place(number, [(0, CHUNK // PAGE)])

    def _ahead(self) -> None:
        wanted = by_chunk(load_working_set(self._image))
        numbers = list(wanted)
        for n in range(_THREADS):
            threading.Thread(target=self._store, args=(numbers[n::_THREADS], wanted), daemon=True).start()

    def _store(self, numbers: Sequence[int], wanted: dict[int, list[tuple[int, int]]]) -> None:
        with suppress(OSError):  # the VMM is gone
            for number in numbers:
                self._place(number, wanted[number])

    def _offset(self, address: int) -> int:
        for base, size, offset in self._regions:
            if base <= address < base + size:
                return address - base + offset
        raise ValueError(f"a fault at {address:x}, which is no guest memory")

    def _address(self, offset: int) -> int:
        for base, size, start in self._regions:
            if start <= offset < start + size:
                return offset - start + base
        raise ValueError(f"no part of guest memory has {offset}")

    def _place(self, number: int, runs: Sequence[tuple[int, int]]) -> None:
        """Runs of pages of a chunk; whatever of them is there already stays as it is."""
        chunk = bytearray(self._image.read_chunk(number))
        source = ctypes.addressof(ctypes.c_char.from_buffer(chunk))
        for first, count in runs:
            at, end = first * PAGE, (first + count) * PAGE
            while at < end:
                at += self._copy(source + at, self._address(number * CHUNK + at), end - at)

    def _copy(self, source: int, target: int, size: int) -> int:
        """Bytes that are there now, from `target` on: at least a page."""
        arguments = bytearray(_COPY_ARGS.pack(target, source, size, 0, 0))
        try:
            fcntl.ioctl(self._uffd, _COPY, arguments)
        except OSError as error:
            done = int(_COPY_ARGS.unpack(arguments)[4])
            if error.errno == errno.EEXIST or done == -errno.EEXIST:
                return PAGE
            if error.errno == errno.EAGAIN:
                return max(0, done)
            raise
        return size


def by_userfault(guest: Guest, context: Context, fingerprint: Fingerprint, opened: ExitStack) -> Opened:
    """As `encrypted`, but that the VMM's faults are answered."""
    image = opened.enter_context(open_snapshot(context, fingerprint))
    state = image.state()
    handlers: list[int] = []
    opened.callback(_end, handlers)

    def load(vm: Vm) -> None:
        assert isinstance(vm, FirecrackerVm)
        handlers.append(_load(vm, state, image, guest.plan.uid))

    # The file is bound into the jail, and the VMM does not open it.
    return Opened(plain_memory(guest.plain_image), image.authenticate, load)


def _end(handlers: Sequence[int]) -> None:
    """Of VMMs that may be there yet: an answer that did not come is no reason to wait for it."""
    for pid in handlers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _load(vm: FirecrackerVm, state: bytes, image: SealedImage, uid: int) -> int:
    """`FirecrackerVm.load_state` with a handler, whose pid is returned; it ends with the VMM."""
    request = rq.call(
        "PUT",
        "/snapshot/load",
        {
            "snapshot_path": f"/{STATE_IN}",
            "mem_backend": {"backend_type": "Uffd", "backend_path": f"/run/{SOCKET}"},
            "resume_vm": False,
        },
    )
    with vm._root() as root, socket.socket(socket.AF_UNIX) as listening:
        place = f"/proc/self/fd/{root}/run/{SOCKET}"
        listening.bind(place)
        os.chown(place, uid, uid)
        listening.listen(1)
        vms._write(root, STATE_IN, state)
        pid = os.fork()
        if pid == 0:
            try:
                Handler(image, *_accept(listening)).serve()
            except BaseException as error:
                print(f"handler: {error!r}", file=sys.stderr)
            finally:
                os._exit(0)
        vm.ask(request, timeout=vms.LOAD_S)
    vm.take_nodes()
    return pid


def _accept(listening: socket.socket) -> tuple[int, list[Region]]:
    """The fault descriptor and where guest memory is, from a VMM that loads."""
    listening.settimeout(vms.LOAD_S)
    connection, _ = listening.accept()
    data, fds, *_ = socket.recv_fds(connection, 1 << 16, 1)
    told = json.loads(data)
    return fds[0], [Region(each["base_host_virt_addr"], each["size"], each["offset"]) for each in told]


WAYS: Final[dict[str, Way]] = {"plain": plain, "file (as shipped)": encrypted, "userfaultfd": by_userfault}


def measure(size: int, repeats: int, say: Callable[[str], None], options: argparse.Namespace) -> str:
    found: dict[str, list[Restored]] = {name: [] for name in WAYS}
    with measuring_node((size,), say, of_options(options)) as node:
        guest = node.guests[0]
        guest.put_to_sleep()
        names = list(WAYS)
        for repeat in range(repeats):
            say(f"{100 * repeat // repeats:3d} %  repeat {repeat + 1}/{repeats}")
            for name in names[repeat % 3 :] + names[: repeat % 3]:
                found[name].append(guest.restore(WAYS[name]))
    plainly = _median(found["plain"], lambda restored: restored.core)
    rows = [
        [
            f"{size} MiB, medians of {repeats}",
            "until the answer",
            "to plain",
            "until the worker's",
            "CPU of the VMM",
        ]
    ]
    for name, restored in found.items():
        core = _median(restored, lambda each: each.core)
        served, vmm = (
            _median(restored, lambda each: each.served),
            _median(restored, lambda each: each.cpu.vmm),
        )
        rows.append([name, _ms(core), f"{core / plainly:.2f}", _ms(served), _ms(vmm)])
    return aligned(rows)


def _median(restored: Sequence[Restored], of: Callable[[Restored], float]) -> float:
    return statistics.median(of(each) for each in restored)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.uffd", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", type=int, default=256, help="guest memory in MiB (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=10)
    add_options(parser)
    parser.set_defaults(vmm="firecracker")
    options = parser.parse_args(arguments)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        print(measure(options.size, options.repeats, say, options))
    except MvmError as error:
        print(f"error: {error.brief}\n{error.details}\n{error.resolution}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
