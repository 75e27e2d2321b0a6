"""Reading another process's memory, and telling which of its pages it has written.

A private mapping (MAP_PRIVATE of a file, or anonymous memory) answers the question a snapshot asks: a page the process
wrote is anonymous (present or swapped, and not file backed), every other page still equals the file below it, or zero.
/proc/<pid>/pagemap tells the two apart (Documentation/admin-guide/mm/pagemap.rst) with no help from the process, no
dirty-log to arm beforehand, and on any kernel. The process must be stopped or paused by the caller while this runs.
Needs CAP_SYS_PTRACE or the same uid; its files are opened as their owner (CAP_SETUID), so that root needs no right to
read everybody's files for that.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

PAGE = 4096
_SWAPPED = 1 << 62
_PRESENT = 1 << 63
_FILE_OR_SHARED = 1 << 61
_ENTRIES_AT_ONCE = 32768
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


def written_runs(entries: array[int], first_page: int = 0) -> Iterator[tuple[int, int]]:
    """Runs (first page, page count) of anonymous pages among pagemap `entries`, in order.

    `entries` are the 64-bit values of consecutive pages, of which the first has the number `first_page`.
    """
    start = -1
    for page, entry in enumerate(entries, first_page):
        # 0b10x: present and not file backed; 0b01x: in swap, which only anonymous memory of ours can be.
        top = entry >> 61
        if top == 0b100 or top & 0b010:
            if start < 0:
                start = page
        elif start >= 0:
            yield start, page - start
            start = -1
    if start >= 0:
        yield start, first_page + len(entries) - start


def present_pages(pagemap: int, address: int, size: int) -> bytearray:
    """One byte a page of the span: 1 where it is mapped. `pagemap`: that file of the process, open. OSError."""
    pages = size // PAGE
    present = bytearray(pages)
    for first in range(0, pages, _ENTRIES_AT_ONCE):
        found = _entries(pagemap, address // PAGE + first, min(_ENTRIES_AT_ONCE, pages - first))
        for page, entry in enumerate(found, first):
            if entry >> 62:
                present[page] = 1
    return present


def _entries(pagemap: int, first: int, count: int) -> array[int]:
    entries = array("Q")
    entries.frombytes(os.pread(pagemap, count * 8, first * 8))
    if len(entries) != count:
        raise OSError(5, "pagemap ended early: the process is gone or has unmapped its memory")
    return entries


def open_file(pid: int, name: str) -> int:
    """/proc/<pid>/<name> for reading, as its owner. OSError; ESRCH or ENOENT when the process is gone."""
    path = f"/proc/{pid}/{name}"
    with _death_signal_kept():
        # Of this thread, and for files alone: setfsuid(2).
        own = _libc.setfsuid(os.stat(path).st_uid)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _libc.setfsuid(own)


@contextmanager
def _death_signal_kept() -> Iterator[None]:
    """A change of fsuid clears the signal that a process gets when its parent dies (prctl(2)), and without it a
    daemon's operation would outlive the daemon."""
    parent, found = os.getppid(), ctypes.c_int()
    _libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(found), 0, 0, 0)
    try:
        yield
    finally:
        if found.value:
            _libc.prctl(_PR_SET_PDEATHSIG, found.value, 0, 0, 0)
            if os.getppid() != parent:  # it died meanwhile
                os.kill(os.getpid(), found.value)


class ProcessMemory:
    """The span `[address, address + size)` of process `pid`, open for reading until `close`.

    Opened by descriptor at once, so that a pid reused later can never be read by mistake.
    Raises OSError (ESRCH, EIO) when the process is gone.
    """

    def __init__(self, pid: int, address: int, size: int) -> None:
        if address % PAGE or size % PAGE:
            raise ValueError("span is not page aligned")
        self.address = address
        self.size = size
        self._mem = open_file(pid, "mem")
        try:
            self._pagemap = open_file(pid, "pagemap")
        except BaseException:
            os.close(self._mem)
            raise

    def dirty_runs(self) -> Iterator[tuple[int, int]]:
        """Runs (first page, page count) written since the mapping was made, joined across reads, in order."""
        pending: tuple[int, int] | None = None
        pages = self.size // PAGE
        for first in range(0, pages, _ENTRIES_AT_ONCE):
            for start, count in written_runs(
                self._entries(first, min(_ENTRIES_AT_ONCE, pages - first)), first
            ):
                if pending is not None and pending[0] + pending[1] == start:
                    pending = (pending[0], pending[1] + count)
                    continue
                if pending is not None:
                    yield pending
                pending = (start, count)
        if pending is not None:
            yield pending

    def present_pages(self) -> bytearray:
        """One byte a page: 1 where the process has the page mapped (read or written), else 0."""
        return present_pages(self._pagemap, self.address, self.size)

    def _entries(self, first: int, count: int) -> array[int]:
        return _entries(self._pagemap, self.address // PAGE + first, count)

    def read_into(self, offset: int, buffer: memoryview | bytearray) -> None:
        """Fill `buffer` with the bytes at `offset` of the span."""
        view = memoryview(buffer)
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError("read outside the span")
        done = 0
        while done < len(view):
            count = os.preadv(self._mem, [view[done:]], self.address + offset + done)
            if count == 0:
                raise OSError(5, "memory ended early: the process is gone")
            done += count

    def close(self) -> None:
        os.close(self._mem)
        os.close(self._pagemap)

    def __enter__(self) -> ProcessMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Span(NamedTuple):
    """A part of somebody's memory: `size` bytes from `offset` on are at `address` in the process."""

    offset: int
    address: int
    size: int


class SpannedMemory:
    """Several spans of one process, each beginning where the one before ends, as one piece of memory.

    Same methods and errors as `ProcessMemory`. ValueError for spans that leave a gap.
    """

    def __init__(self, pid: int, spans: Sequence[Span]) -> None:
        self.size = 0
        self._parts: list[tuple[int, ProcessMemory]] = []
        with ExitStack() as opened:
            for span in spans:
                if span.offset != self.size:
                    raise ValueError("the spans leave a gap")
                part = opened.enter_context(ProcessMemory(pid, span.address, span.size))
                self._parts.append((span.offset, part))
                self.size += span.size
            self._opened = opened.pop_all()

    def dirty_runs(self) -> Iterator[tuple[int, int]]:
        """Runs (first page, page count), in order; none crosses from one span into the next."""
        for offset, part in self._parts:
            for first, count in part.dirty_runs():
                yield offset // PAGE + first, count

    def present_pages(self) -> bytearray:
        return bytearray().join(part.present_pages() for _, part in self._parts)

    def read_into(self, offset: int, buffer: memoryview | bytearray) -> None:
        view = memoryview(buffer)
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError("read outside the span")
        for start, part in self._parts:
            first, last = max(offset, start), min(offset + len(view), start + part.size)
            if first < last:
                part.read_into(first - start, view[first - offset : last - offset])

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> SpannedMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
