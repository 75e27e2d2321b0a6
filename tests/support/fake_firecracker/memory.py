"""Guest memory: private mappings, anonymous at a boot, of the snapshot's file at a restore, read only as it is touched.

Guest memory has a hole below 4 GiB, so from 3 GiB on there are two mappings; offsets here, as in a memory file, count
through both.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
_LOW_BYTES = 3 << 30
_ROOT_AT, _TABLE_AT = 0xE0000, 0xA0000
_ROOT = struct.Struct("<8sB6sBIIQB3x")
_HIGH_AT = 4 << 30
_MAP_NORESERVE, _MAP_FIXED, _MADV_DONTNEED = 0x4000, 0x10, 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Region:
    def __init__(self, guest_address: int, offset: int, size: int, fd: int) -> None:
        self.guest_address, self.offset, self.size = guest_address, offset, size
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if fd < 0:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            self.map = mmap.mmap(-1, size, flags=flags, prot=protection)
        else:
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            self.map = mmap.mmap(fd, size, flags=flags, prot=protection, offset=offset)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))


class GuestMemory:
    """`track`: name the pages written since the last snapshot exactly. `fd`: the memory file of a restore."""

    def __init__(self, size: int, *, track: bool, fd: int = -1) -> None:
        self.size = size
        self.track = track
        self._from_file = fd >= 0
        self._written: set[int] = set()
        if fd >= 0 and os.fstat(fd).st_size < size:
            raise ValueError("Memory offset is too large.")
        low = min(size, _LOW_BYTES)
        self.regions = [Region(0, 0, low, fd)]
        if size > low:
            self.regions.append(Region(_HIGH_AT, low, size - low, fd))

    def _spans(self, offset: int, length: int) -> Iterator[tuple[Region, int, int]]:
        for region in self.regions:
            start = max(offset, region.offset)
            end = min(offset + length, region.offset + region.size)
            if start < end:
                yield region, start - region.offset, end - start

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(region.map[at : at + count] for region, at, count in self._spans(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        done = 0
        for region, at, count in self._spans(offset, len(data)):
            region.map[at : at + count] = data[done : done + count]
            done += count
        if self.track:
            self._written.update(range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1))

    def write_tables(self) -> None:
        """What a boot leaves below 1 MiB for ACPI, where the real one leaves it: the root pointer and its table."""
        self.write(_TABLE_AT, b"XSDT".ljust(36, b"\0"))
        raw = bytearray(_ROOT.pack(b"RSD PTR ", 0, b"FAKEFC", 2, 0, _ROOT.size, _TABLE_AT, 0))
        raw[8] = -sum(raw[:20]) % 256
        raw[32] = -sum(raw) % 256
        self.write(_ROOT_AT, bytes(raw))

    def discard(self, offset: int, length: int) -> None:
        """Give pages back; they are zero from then on. Over a file's mapping this takes a new mapping on top."""
        for region, at, count in self._spans(offset, length):
            if self._from_file:
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
                _libc.mmap(region.address + at, count, protection, flags, -1, 0)
            else:
                _libc.madvise(region.address + at, count, _MADV_DONTNEED)
        if self.track:
            self._written.update(range(offset // PAGE, (offset + length) // PAGE))

    def dump(self, fd: int) -> None:
        """All of it, in order."""
        for region in self.regions:
            self._write_out(fd, region, 0, region.size)
        self._written.clear()

    def dump_dirty(self, fd: int) -> None:
        """What was written since the last snapshot (or, untracked, what is in memory), each page at its place."""
        pages = sorted(self._written) if self.track else list(self._resident())
        for page in pages:
            for region, at, count in self._spans(page * PAGE, PAGE):
                os.lseek(fd, page * PAGE, os.SEEK_SET)
                self._write_out(fd, region, at, count)
        self._written.clear()

    @staticmethod
    def _write_out(fd: int, region: Region, at: int, count: int) -> None:
        with memoryview(region.map) as view:
            while count > 0:
                done = os.write(fd, view[at : at + count])
                at, count = at + done, count - done

    def _resident(self) -> Iterator[int]:
        for region in self.regions:
            pages = region.size // PAGE
            there = ctypes.create_string_buffer(pages)
            if _libc.mincore(region.address, region.size, there) != 0:
                raise OSError(ctypes.get_errno(), "mincore")
            first = region.offset // PAGE
            for number, found in enumerate(there.raw):
                if found & 1:
                    yield first + number
