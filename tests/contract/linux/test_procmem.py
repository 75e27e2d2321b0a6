"""Another process's memory, for real: what it wrote is named and read, what it only read or never touched is not."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.linux import procmem
from mvm.linux.process import wait_readable
from mvm.linux.procmem import PAGE, ProcessMemory

PAGES = 4096

# Maps a file privately, does what it is told on one line of input, and says where the mapping is.
CHILD = """
import ctypes, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR) if sys.argv[1] else -1
flags = mmap.MAP_PRIVATE if sys.argv[1] else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
area = mmap.mmap(fd, int(sys.argv[2]), flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
area.madvise(mmap.MADV_NOHUGEPAGE)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    what, *pages = line.split()
    for page in map(int, pages):
        if what == "write":
            area[page * 4096] = 0x5A
        else:
            area[page * 4096]
    print("done", flush=True)
"""


class Child:
    def __init__(self, path: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, path, str(PAGES * PAGE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())

    def tell(self, what: str, *pages: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, *pages, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def memory(self) -> ProcessMemory:
        return ProcessMemory(self.process.pid, self.address, PAGES * PAGE)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"".join(page.to_bytes(8, "little") * (PAGE // 8) for page in range(PAGES)))
    return path


@pytest.fixture(params=["file", "anonymous"])
def child(request: pytest.FixtureRequest, image: Path) -> Iterator[Child]:
    made = Child(str(image) if request.param == "file" else "")
    try:
        yield made
    finally:
        made.end()


@pytest.mark.req("S5")
def test_written_pages_and_no_others_are_named(child: Child) -> None:
    with child.memory() as memory:
        assert list(memory.dirty_runs()) == []
        child.tell("write", 0, 1, 2, 1000, PAGES - 1)
        assert list(memory.dirty_runs()) == [(0, 3), (1000, 1), (PAGES - 1, 1)]
        present = memory.present_pages()
        assert [page for page in (0, 1, 2, 1000, PAGES - 1) if not present[page]] == []
        assert len(present) == PAGES
        child.tell("write", 999)
        assert list(memory.dirty_runs())[1] == (999, 2)


@pytest.mark.req("S5")
def test_pages_that_were_only_read_are_not_named(image: Path) -> None:
    child = Child(str(image))
    try:
        child.tell("read", *range(0, PAGES, 7))
        child.tell("write", 5)
        with child.memory() as memory:
            assert list(memory.dirty_runs()) == [(5, 1)]
            assert sum(memory.present_pages()) >= PAGES // 7
    finally:
        child.end()


@pytest.mark.req("S1")
def test_content_is_read_as_the_process_sees_it(child: Child, image: Path) -> None:
    child.tell("write", 7)
    buffer = bytearray(3 * PAGE)
    with child.memory() as memory:
        memory.read_into(6 * PAGE, memoryview(buffer))
        for offset, size in ((-1, 1), (PAGES * PAGE - 1, 2), (PAGES * PAGE, 1)):
            with pytest.raises(ValueError, match="outside"):
                memory.read_into(offset, bytearray(size))
    assert buffer[PAGE] == 0x5A
    assert image.read_bytes()[7 * PAGE] == 7, "the file below is as it was"


def test_a_process_that_is_gone_is_an_error_and_never_another_one(child: Child) -> None:
    memory = child.memory()
    child.end()
    with memory:
        with pytest.raises(OSError, match=r"."):
            memory.read_into(0, bytearray(PAGE))
        with pytest.raises(OSError, match=r"."):
            list(memory.dirty_runs())
        with pytest.raises(OSError, match=r"."):
            memory.present_pages()
    with pytest.raises(OSError, match=r"."):
        child.memory()


def test_a_span_must_be_of_pages() -> None:
    for address, size in ((1, PAGE), (PAGE, 1)):
        with pytest.raises(ValueError, match="aligned"):
            ProcessMemory(os.getpid(), address, size)


def test_runs_are_joined_across_reads(monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
    from mvm.linux import procmem

    monkeypatch.setattr(procmem, "_ENTRIES_AT_ONCE", 10)
    child = Child(str(image))
    try:
        child.tell("write", *range(5, 45), 100)
        with child.memory() as memory:
            assert list(memory.dirty_runs()) == [(5, 40), (100, 1)]
    finally:
        child.end()
    assert mmap.PAGESIZE == PAGE


@pytest.mark.root
@pytest.mark.req("L3", "H2")
def test_who_reads_anothers_memory_still_dies_with_its_parent() -> None:
    """To open a VMM's files its uid is taken on for a moment, and by that the kernel forgets the death signal."""
    libc = ctypes.CDLL(None)
    victim = subprocess.Popen(["sleep", "60"], user=1_900_123_456)
    ours, theirs = os.pipe()
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            libc.prctl(1, signal.SIGKILL, 0, 0, 0)
            os.close(procmem.open_file(victim.pid, "maps"))
            os.write(theirs, str(os.getpid()).encode())
            time.sleep(60)
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    reader = os.pidfd_open(int(os.read(ours, 20)))
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    try:
        assert wait_readable(reader, 10)
    finally:
        for fd in (ours, theirs, reader):
            os.close(fd)
        victim.kill()
        victim.wait()
