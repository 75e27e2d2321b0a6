"""The pager: a sealed image as a file whose pages are decrypted when the guest touches them.

`open_memory` mounts a one-file FUSE system, keeps only a descriptor to it and takes the mount out of the tree again, so
there is never a mount to clean up (the descriptor's is a copy of the mount, attached nowhere): the file system lives
exactly as long as the VMM maps it and the keeper answers for it. Only the instance's uid can open the file; root
cannot, short of tracing the VMM.

A wake touches about the same pages every time. The image carries the list of those (the working set), and two threads
place them in the kernel's page cache ahead of the guest (`FUSE_NOTIFY_STORE`), while the VMM is still starting. What
the VMM has mapped when the guest answers is the list for the next wake; the kernel maps up to 64 KiB around a fault if
they are there, so it is a little more than what was touched.

Decrypted pages are in the kernel's page cache, in the few chunks of `_recent`, and in the VMM; all of it in memory, all
of it gone when the VMM is.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import threading
import time
from pathlib import Path

from mvm.core.errors import IntegrityError, MissingPrerequisite, MvmError
from mvm.hostd import sealing
from mvm.hostd.sealing import CHUNK, PAGE, SealedImage, load_working_set, save_working_set
from mvm.hostd.vmm.driver import GuestMemory
from mvm.linux import mount_tree
from mvm.linux.fuse import ROOT_NODE, FileServer, mount_file
from mvm.linux.mount import detach
from mvm.linux.procmem import open_file, present_pages

WINDOW_S = 10.0
"""How long after a wake the guest's answer is waited for, to record what it touched until then."""
WORKING_SET_PAGES = 32768
"""128 MiB: what is decrypted ahead at most."""
_THREADS = 2
_RECENT = 8
_MAPS_BYTES = 1 << 20
# What the process that wakes the guest and the keeper share: chunks decrypted.
_COUNT = struct.Struct("<Q")
_PAGES_PER_CHUNK = CHUNK // PAGE


class Pager:
    """Answers for the pages of one image. `serve` runs in the keeper, in several threads at once."""

    def __init__(self, image: SealedImage, device: int, uid: int, gid: int) -> None:
        self._image = image
        self._server = FileServer(device, image.size, uid, gid, self.read)
        self._recent: dict[int, bytes | bytearray] = {}
        self._first = threading.Lock()
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._tell, self._hear = socket.socketpair()

    def serve(self, known: threading.Event) -> None:
        """Answer the kernel until the file system is gone; the first caller sees to the working set as well."""
        if self._first.acquire(blocking=False):
            threading.Thread(target=self._ahead, args=(known,), daemon=True).start()
        self._server.serve()

    def answered(self, vmm: int) -> None:
        """The guest has answered: what it has touched by now is its working set.

        The keeper has no right any more to look at its VMM, so it is given what it needs for that, open.
        """
        opened: list[int] = []
        try:
            for name in ("maps", "pagemap"):
                opened.append(open_file(vmm, name))
            socket.send_fds(self._tell, [b"a"], opened)
        except OSError:
            return  # the VMM or the keeper is gone: nothing is lost but a hint
        finally:
            for fd in opened:
                os.close(fd)

    def descriptors(self) -> tuple[int, ...]:
        """What `serve` needs beside the image's."""
        return (self._server.device, self._hear.fileno())

    def close(self) -> None:
        """Let go of the sockets. The device is closed by who opened it."""
        self._tell.close()
        self._hear.close()

    def decrypted(self) -> int:
        """Chunks decrypted so far, from any process that shares this pager."""
        return int(_COUNT.unpack_from(self._shared)[0])

    def _decrypt(self, number: int) -> bytes | bytearray:
        chunk = self._image.read_chunk(number)
        # Threads may lose a count to each other; a statistic needs no lock on this path.
        _COUNT.pack_into(self._shared, 0, self.decrypted() + 1)
        return chunk

    def read(self, offset: int, size: int) -> list[bytes | memoryview]:
        """The bytes at `offset`, in pieces of at most a chunk. EIO where the image is damaged."""
        pieces: list[bytes | memoryview] = []
        end = offset + size
        while offset < end:
            number, start = divmod(offset, CHUNK)
            stop = min(CHUNK, start + end - offset)
            pieces.append(memoryview(self._chunk(number))[start:stop])
            offset += stop - start
        return pieces

    def _chunk(self, number: int) -> bytes | bytearray:
        # Read-around makes the kernel ask for the two halves of neighbouring chunks again and again.
        found = self._recent.get(number)
        if found is None:
            try:
                found = self._decrypt(number)
            except IntegrityError as error:
                raise OSError(errno.EIO, error.brief) from error
            while len(self._recent) >= _RECENT:
                try:
                    del self._recent[next(iter(self._recent))]
                except (KeyError, StopIteration, RuntimeError):
                    break  # the other thread was quicker
            self._recent[number] = found
        return found

    def _ahead(self, known: threading.Event) -> None:
        began = time.monotonic()
        wanted = by_chunk(load_working_set(self._image))
        numbers = list(wanted)
        if not known.wait(WINDOW_S):
            return
        threads = [
            threading.Thread(target=self._store, args=(numbers[n::_THREADS], wanted), daemon=True)
            for n in range(_THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            self._hear.settimeout(max(0.001, WINDOW_S - (time.monotonic() - began)))
            _, (maps, pagemap), *_ = socket.recv_fds(self._hear, 1, 2)
            touched = sealing.runs_of(mapped_pages(maps, pagemap, self._image.size))
            if touched:
                save_working_set(self._image, capped(touched, WORKING_SET_PAGES))
        except (OSError, MvmError, ValueError):
            return  # the VMM, the command or the snapshot is gone: nothing is lost but a hint

    def _store(self, numbers: list[int], wanted: dict[int, list[tuple[int, int]]]) -> None:
        """Place the wanted pages of these chunks in the kernel's cache."""
        try:
            for number in numbers:
                chunk = memoryview(self._decrypt(number))
                for first, count in wanted[number]:
                    data = chunk[first * PAGE : (first + count) * PAGE]
                    self._server.store(number * CHUNK + first * PAGE, data)
        except (OSError, IntegrityError):
            return  # unmounted, or damaged: who asks for such a page is told so


def by_chunk(runs: list[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Runs of pages of the image, as chunk number -> runs of pages of that chunk."""
    found: dict[int, list[tuple[int, int]]] = {}
    for first, count in runs:
        end = first + count
        while first < end:
            number, start = divmod(first, _PAGES_PER_CHUNK)
            stop = min(_PAGES_PER_CHUNK, start + end - first)
            found.setdefault(number, []).append((start, stop - start))
            first += stop - start
    return found


def capped(runs: list[tuple[int, int]], pages: int) -> list[tuple[int, int]]:
    """The first runs, of at most `pages` pages together."""
    kept = []
    for first, count in runs:
        if pages <= 0:
            break
        kept.append((first, min(count, pages)))
        pages -= count
    return kept


def mapped_pages(maps: int, pagemap: int, size: int) -> bytearray:
    """One byte a page of guest memory, 1 where the VMM has it mapped. Empty if its mapping is not found.

    `maps`, `pagemap`: these files of the VMM, open.
    """
    text = bytearray()
    while len(text) < _MAPS_BYTES and (part := os.read(maps, 1 << 16)):
        text += part
    found = find_mappings(text.decode("utf-8", "replace"), size)
    return bytearray().join(present_pages(pagemap, address, length) for address, length in found)


def find_mappings(maps: str, size: int) -> list[tuple[int, int]]:
    """(address, length) of what maps a FUSE root (inode 1, no real device) of `size` bytes, in the order of the file.

    Empty unless it is all of one file: QEMU maps it in one piece, Firecracker what is above 3 GiB apart.
    """
    files: dict[str, list[tuple[int, int, int]]] = {}
    for line in maps.splitlines():
        fields = line.split(None, 5)
        if len(fields) < 5 or fields[4] != str(ROOT_NODE) or not fields[3].startswith("00:"):
            continue
        start, end = (int(number, 16) for number in fields[0].split("-"))
        files.setdefault(fields[3], []).append((int(fields[2], 16), start, end - start))
    for pieces in files.values():
        pieces.sort()
        ends = [0, *(offset + length for offset, _, length in pieces)]
        if ends[-1] == size and all(piece[0] == end for piece, end in zip(pieces, ends, strict=False)):
            return [(address, length) for _, address, length in pieces]
    return []


def open_memory(image: SealedImage, uid: int, gid: int, mountpoint: Path) -> GuestMemory:
    """`image` as guest memory that only `uid` can open. `image` must stay open in the process that serves it.

    `mountpoint`: a file name for the moment of mounting. Raises MissingPrerequisite without FUSE.
    """
    mountpoint.touch(0o600)
    try:
        device = mount_file(mountpoint, uid=uid, gid=gid)
    except OSError as error:
        raise MissingPrerequisite(
            "the guest's memory cannot be served: FUSE does not work here",
            details=str(error),
            resolution="Load the kernel module: modprobe fuse",
        ) from error
    try:
        try:
            # A mount of its own, attached nowhere: it can be opened through the descriptor, and attached in a jail.
            handle = mount_tree.open_tree(str(mountpoint))
        finally:
            detach(mountpoint)
            mountpoint.unlink()
    except BaseException:
        os.close(device)
        raise
    pager = Pager(image, device, uid, gid)
    held = [device, handle]  # the last use of the file first: that unmounts it

    def handed_over() -> None:
        while held:
            os.close(held.pop())

    def close() -> None:
        handed_over()
        pager.close()

    return GuestMemory(
        handle,
        (*pager.descriptors(), *image.descriptors()),
        pager.serve,
        close,
        pager.decrypted,
        pager.answered,
        handed_over,
    )


def plain_memory(path: Path) -> GuestMemory:
    """An unencrypted image as guest memory: for measuring what encryption costs, never for a tenant."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return GuestMemory(fd, (), None, lambda: os.close(fd), lambda: 0, lambda vmm: None)
