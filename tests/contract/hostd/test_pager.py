"""Sealed memory as a file that one uid maps: what it reads, who else can, and what a damaged page does."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import MissingPrerequisite
from mvm.core.ids import InstanceId, SnapshotId, TenantId
from mvm.hostd import pager
from mvm.hostd.keys.development import DevelopmentKeyProvider
from mvm.hostd.sealing import CHUNK, PAGE, SealedImage, SealWriter, SnapshotIdentity, load_working_set
from mvm.hostd.vmm.driver import GuestMemory
from mvm.linux import mount as mounts

pytestmark = pytest.mark.root
UID = 1_900_123_456
CHUNKS = 64
SIZE = CHUNKS * CHUNK


class Source:
    """Memory in which every page says its number, every fifth chunk is zero, and every page is dirty."""

    def __init__(self) -> None:
        self.size = SIZE
        self.bytes = b"".join(
            bytes(4096) if page // 32 % 5 == 0 else page.to_bytes(8, "little") * 512
            for page in range(SIZE // 4096)
        )

    def dirty_runs(self) -> Iterator[tuple[int, int]]:
        yield 0, SIZE // 4096

    def present_pages(self) -> bytearray:
        return bytearray(b"\1" * (SIZE // 4096))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.bytes[offset : offset + len(buffer)]


class Sealed:
    def __init__(self, root: Path) -> None:
        self.keys = DevelopmentKeyProvider(root)
        self.keys.create(TenantId("acme")).close()
        self.instance = InstanceId.parse("acme/default-0")
        self.identity = SnapshotIdentity(self.instance, SnapshotId("0a" * 16), b"a=b\n")
        self.folder = root / ".new-x"
        self.source = Source()
        with self.keys.tenant_key(TenantId("acme")) as key:
            with SealWriter(self.folder, self.identity, key.wrap) as writer:
                writer.write_pages(self.source)
                writer.write_state(b"state")
                self.digest = writer.finish().manifest_sha256

    def open(self) -> SealedImage:
        with self.keys.tenant_key(TenantId("acme")) as key:
            return SealedImage.open(self.folder, self.identity, key.unwrap, self.digest)


@pytest.fixture
def sealed(tmp_path: Path) -> Sealed:
    return Sealed(tmp_path)


@pytest.fixture
def memory(sealed: Sealed, tmp_path: Path) -> Iterator[GuestMemory]:
    with sealed.open() as image:
        made = pager.open_memory(image, UID, UID, tmp_path / "memory")
        assert made.serve is not None
        known = threading.Event()
        for _ in range(2):
            threading.Thread(target=made.serve, args=(known,), daemon=True).start()
        try:
            yield made
        finally:
            made.close()
            time.sleep(0.01)


def as_uid(uid: int, act: Callable[[], int]) -> int:
    """What `act` returns, or minus the signal that ended it, in a child of this uid."""
    child = os.fork()
    if child == 0:
        code = 99
        faulthandler.disable()  # a child that is to die of a signal need not report it
        try:
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            code = act()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def opened(memory: GuestMemory) -> mmap.mmap:
    fd = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDWR)
    return mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.req("S2", "S3")
def test_the_instances_uid_reads_what_was_sealed(sealed: Sealed, memory: GuestMemory) -> None:
    assert as_uid(UID, lambda: int(opened(memory)[:] != sealed.source.bytes)) == 0
    assert memory.decrypted() > 0


@pytest.mark.req("S2")
def test_only_what_is_touched_is_decrypted(sealed: Sealed, memory: GuestMemory) -> None:
    def touch() -> int:
        area = opened(memory)
        area.madvise(mmap.MADV_RANDOM)
        return int(area[7 * CHUNK + 5] != sealed.source.bytes[7 * CHUNK + 5])

    assert as_uid(UID, touch) == 0
    assert memory.decrypted() < CHUNKS // 2


@pytest.mark.req("S3", "S4")
@pytest.mark.parametrize("uid", [0, UID + 1])
def test_nobody_else_can_open_it(memory: GuestMemory, uid: int) -> None:
    def attempt() -> int:
        try:
            os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY)
        except PermissionError:
            return 7
        return 0

    assert as_uid(uid, attempt) == 7


@pytest.mark.req("S2")
def test_writing_into_the_mapping_changes_no_image(sealed: Sealed, memory: GuestMemory) -> None:
    before = {path.name: path.read_bytes() for path in sealed.folder.iterdir()}

    def scribble() -> int:
        area = opened(memory)
        for at in range(0, SIZE, 4096):
            area[at] = 0xFF
        fd = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDWR)
        try:
            os.pwrite(fd, b"x", 0)
        except OSError:
            return 0
        return 1

    assert as_uid(UID, scribble) == 0
    assert as_uid(UID, lambda: int(opened(memory)[:] != sealed.source.bytes)) == 0
    assert {name: (sealed.folder / name).read_bytes() for name in before} == before


@pytest.mark.req("S4")
def test_a_damaged_page_ends_the_reader_and_only_it(sealed: Sealed, memory: GuestMemory) -> None:
    [segment] = sealed.folder.glob("segment-*")
    data = bytearray(segment.read_bytes())
    with sealed.open() as image:
        layer = image.index.layers(42)[0]
    data[layer.offset + 3] ^= 1
    with segment.open("r+b") as file:  # in place: what is open stays open
        file.write(data)

    assert as_uid(UID, lambda: touch(sealed, memory, [42])) == -signal.SIGBUS
    assert as_uid(UID, lambda: touch(sealed, memory, [43])) == 0


@pytest.mark.req("S3", "L7")
def test_no_mount_is_left_at_any_time(sealed: Sealed, memory: GuestMemory, tmp_path: Path) -> None:
    assert mounts.mounts_below(tmp_path) == []
    assert not (tmp_path / "memory").exists()


_KEPT: list[mmap.mmap] = []


def touch(sealed: Sealed, memory: GuestMemory, chunks: list[int], *, keep: bool = False) -> int:
    area = opened(memory)
    area.madvise(mmap.MADV_RANDOM)
    if keep:
        _KEPT.append(area)
    return int(any(area[n * CHUNK] != sealed.source.bytes[n * CHUNK] for n in chunks))


@pytest.mark.req("S7")
def test_the_next_wake_decrypts_ahead_what_this_one_touched(
    sealed: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process takes the VMM's part: it maps the memory, touches it, and stays until the pager has looked."""
    touched = [3, 17, 44]
    for turn in range(2):
        with sealed.open() as image:
            assert bool(load_working_set(image)) == bool(turn)
            memory = pager.open_memory(image, UID, UID, tmp_path / "memory")
            begin, tell = os.pipe()
            done, report = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.close(tell)
                    os.setgroups([])
                    os.setresgid(UID, UID, UID)
                    os.setresuid(UID, UID, UID)
                    assert os.fstat(memory.fd).st_size == SIZE
                    os.write(report, b"s")
                    os.read(begin, 1)
                    os.write(report, b"%d" % touch(sealed, memory, touched, keep=True))
                    os.read(begin, 1)
                finally:
                    os._exit(0)
            assert memory.serve is not None
            known = threading.Event()
            for _ in range(2):
                threading.Thread(target=memory.serve, args=(known,), daemon=True).start()
            os.close(report)
            assert os.read(done, 1) == b"s"
            assert memory.decrypted() == 0, "nothing is stored before the kernel knows the size"
            known.set()
            if turn:
                wait_for(lambda memory=memory: memory.decrypted() >= len(touched))  # type: ignore[misc]
            (sealed.folder / "working-set").unlink(missing_ok=True)
            os.write(tell, b"1")
            assert os.read(done, 1) == b"0"
            memory.answered(child)
            wait_for((sealed.folder / "working-set").exists)
            for fd in (begin, tell, done):
                os.close(fd)
            os.waitpid(child, 0)
            memory.close()
    with sealed.open() as image:
        pages = {page for first, count in load_working_set(image) for page in range(first, first + count)}
    assert {number * CHUNK // PAGE for number in touched} <= pages
    assert len(pages) < image.chunk_count * CHUNK // PAGE // 2


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=20))
def test_runs_are_cut_at_chunks_and_nothing_is_lost(gaps: list[tuple[int, int]]) -> None:
    runs, at = [], 0
    for gap, count in gaps:
        runs.append((at + gap, count))
        at += gap + count
    cut = pager.by_chunk(runs)
    flat = [
        n * 32 + page
        for n, parts in cut.items()
        for first, count in parts
        for page in range(first, first + count)
    ]
    assert flat == [page for first, count in runs for page in range(first, first + count)]
    assert all(
        first >= 0 and count > 0 and first + count <= 32 for parts in cut.values() for first, count in parts
    )
    kept = pager.capped(runs, 100)
    assert sum(count for _, count in kept) == min(100, sum(count for _, count in runs))


def test_the_mapping_is_found_by_size_and_inode() -> None:
    maps = (
        "7f0000000000-7f0010000000 rw-p 00000000 fe:00 1    /somewhere\n"
        "7f1000000000-7f1000001000 rw-p 00000000 00:2e 1    /\n"
        "7f2000000000-7f2010000000 rw-p 00000000 00:00 0 \n"
        "short\n"
        "7f3000000000-7f3010000000 rw-p 00000000 00:2f 1    /\n"
    )
    assert pager.find_mappings(maps, 0x10000000) == [(0x7F3000000000, 0x10000000)]
    assert pager.find_mappings(maps, 0x20000000) == []


@pytest.mark.req("S7")
def test_a_guest_above_3_gib_is_found_in_both_its_parts() -> None:
    maps = (
        "7f2000000000-7f2040000000 rw-p c0000000 00:2f 1    /memory\n"
        "7f3000000000-7f30c0000000 rw-p 00000000 00:2f 1    /memory\n"
    )
    found = [(0x7F3000000000, 3 << 30), (0x7F2000000000, 1 << 30)]
    assert pager.find_mappings(maps, 4 << 30) == found
    assert pager.find_mappings(maps, 3 << 30) == []
    assert pager.find_mappings(maps.replace("c0000000 00", "c0001000 00"), (4 << 30) + 4096) == []


def test_without_fuse_the_error_says_what_to_do(
    sealed: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> int:
        raise OSError(2, "No such file or directory", "/dev/fuse")

    monkeypatch.setattr(pager, "mount_file", none)
    with sealed.open() as image, pytest.raises(MissingPrerequisite, match="FUSE") as caught:
        pager.open_memory(image, UID, UID, tmp_path / "memory")
    assert "modprobe fuse" in caught.value.resolution
