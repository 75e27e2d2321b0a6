"""The pager: a sealed image as a file whose pages are decrypted when the guest touches them.

`open_memory` mounts a one-file FUSE system, keeps only a descriptor to it and takes the mount out of the tree again, so
there is never a mount to clean up: the file system lives exactly as long as the VMM maps it and the keeper answers for
it. Only the instance's uid can open the file; root cannot, short of tracing the VMM.

A wake touches about the same chunks every time. The image carries the list of those (the working set), and one thread
places them in the kernel's page cache ahead of the guest (`FUSE_NOTIFY_STORE`), while QEMU is still starting. What the
guest asks for besides within WINDOW_S seconds is added to the list for the next wake.

Decrypted pages are in the kernel's page cache, in the few chunks of `_recent`, and in the VMM; all of it in memory, all
of it gone when the VMM is.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
import time
from pathlib import Path

from mvm.core.errors import IntegrityError, MissingPrerequisite
from mvm.hostd.sealing import CHUNK, SealedImage, load_working_set, save_working_set
from mvm.hostd.vmm.driver import GuestMemory
from mvm.linux.fuse import FileServer, mount_file
from mvm.linux.mount import detach

WINDOW_S = 3.0
WORKING_SET_CHUNKS = 1024
"""128 MiB: what is decrypted ahead at most."""
_RECENT = 8
_COUNT = struct.Struct("<Q")


class Pager:
    """Answers for the pages of one image. `serve` runs in the keeper, in several threads at once."""

    def __init__(self, image: SealedImage, device: int, uid: int, gid: int) -> None:
        self._image = image
        self._server = FileServer(device, image.size, uid, gid, self.read)
        self._recent: dict[int, bytes | bytearray] = {}
        self._touched: dict[int, None] = {}
        self._first = threading.Lock()
        self._until = 0.0
        # Shared with the process that forks the keeper, which reads it for the receipt.
        self._decrypted = mmap.mmap(-1, mmap.PAGESIZE)

    def serve(self) -> None:
        if self._first.acquire(blocking=False):
            self._until = time.monotonic() + WINDOW_S
            threading.Thread(target=self._ahead, daemon=True).start()
        self._server.serve()

    def decrypted(self) -> int:
        """Chunks decrypted so far, from any process that shares this pager."""
        return int(_COUNT.unpack_from(self._decrypted)[0])

    def _decrypt(self, number: int) -> bytes | bytearray:
        chunk = self._image.read_chunk(number)
        # Threads may lose a count to each other; a statistic needs no lock on this path.
        _COUNT.pack_into(self._decrypted, 0, self.decrypted() + 1)
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
            if number not in self._touched and time.monotonic() < self._until:
                self._touched[number] = None
        return found

    def _ahead(self) -> None:
        known = load_working_set(self._image)
        try:
            for number in known[:WORKING_SET_CHUNKS]:
                if number not in self._touched:
                    self._server.store(number * CHUNK, self._decrypt(number))
            left = self._until - time.monotonic()
            if left > 0:
                time.sleep(left)
            merged = dict.fromkeys([*known, *self._touched.copy()])
            if len(merged) != len(known):
                save_working_set(self._image, list(merged)[:WORKING_SET_CHUNKS])
        except (OSError, IntegrityError):
            return  # unmounted, or the snapshot is gone: nothing is lost but a hint


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
            handle = os.open(mountpoint, os.O_PATH | os.O_CLOEXEC)
        finally:
            detach(mountpoint)
            mountpoint.unlink()
    except BaseException:
        os.close(device)
        raise
    pager = Pager(image, device, uid, gid)

    def close() -> None:
        os.close(handle)
        os.close(device)

    return GuestMemory(handle, (device, *image.descriptors()), pager.serve, close, pager.decrypted)


def plain_memory(path: Path) -> GuestMemory:
    """An unencrypted image as guest memory: for measuring what encryption costs, never for a tenant."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return GuestMemory(fd, (), None, lambda: os.close(fd), lambda: 0)
