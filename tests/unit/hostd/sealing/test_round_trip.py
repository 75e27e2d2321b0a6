"""Many sleeps and wakes against a plain bytearray: what is read is what was there, and disk use is bounded."""

from __future__ import annotations

import random
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.hostd.sealing.memory import STATE, Memory, contents, everything, sleep, some_memory

from mvm.hostd.sealing import CHUNK, PAGE, SealedImage, destroy
from mvm.hostd.sealing.index import LAYERS_MAX, SEGMENTS_MAX
from mvm.hostd.sealing.layout import segment_name

PAGES = CHUNK // PAGE

# (first page in the chunk, pages, what is written there: None for zeros)
Write = tuple[int, int, int, int | None]


def writes(chunks: int) -> st.SearchStrategy[list[Write]]:
    one = st.tuples(
        st.integers(0, chunks - 1),
        st.integers(0, PAGES - 1),
        st.sampled_from([1, 1, 1, 2, 5, 17, PAGES]),
        st.one_of(st.none(), st.integers(0, 255)),
    )
    return st.lists(one, max_size=12)


def apply(data: bytearray, change: Write) -> set[int]:
    chunk, first, count, seed = change
    pages = range(chunk * PAGES + first, chunk * PAGES + min(first + count, PAGES))
    for page in pages:
        content = bytes(PAGE) if seed is None else random.Random(seed * 1000 + page).randbytes(64) * 64
        data[page * PAGE : (page + 1) * PAGE] = content
    return set(pages)


def check(image: SealedImage, data: bytearray) -> None:
    assert contents(image) == data
    assert image.state() == STATE
    image.verify_all()
    assert max(image.index.columns.counts) <= LAYERS_MAX
    assert len(image.segments) <= SEGMENTS_MAX
    for chunk in range(image.chunk_count):
        if image.is_zero(chunk):
            assert not any(data[chunk * CHUNK : (chunk + 1) * CHUNK])


def check_offsets(image: SealedImage, seen: dict[tuple[str, bytes, int], int]) -> None:
    """A nonce is an offset under a segment's key: one offset, one record, for ever."""
    columns = image.index.columns
    taken: dict[int, list[tuple[int, int]]] = {}
    for position, slot in enumerate(columns.slots):
        if columns.present[position]:
            segment, offset = image.segments[slot].segment, columns.offsets[position]
            length = columns.lengths[position]
            assert seen.setdefault((segment.id, segment.key, offset), length) == length
            taken.setdefault(slot, []).append((offset, offset + length))
    for ranges in taken.values():
        ranges.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(ranges))


def check_bounded(image: SealedImage) -> None:
    live = image.index.columns.live_bytes(len(image.segments))
    old = sum(opened.segment.size for opened in image.segments[1:]) - sum(live[1:])
    assert 2 * old <= sum(live)


@pytest.mark.req("S1", "S4")
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(start=writes(6), later=st.lists(writes(6), max_size=14))
def test_any_history_of_sleeps_reads_back(start: list[Write], later: list[list[Write]]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        data = bytearray(6 * CHUNK)
        for change in start:
            apply(data, change)
        current = sleep(folder / "0", everything(data))
        seen: dict[tuple[str, bytes, int], int] = {}
        for number, changes in enumerate(later, start=1):
            with current.open() as image:
                check(image, data)
                check_offsets(image, seen)
                check_bounded(image)
                dirty: set[int] = set()
                for change in changes:
                    dirty |= apply(data, change)
                following = sleep(folder / str(number), Memory(data, dirty), parent=image)
            destroy(current.directory)
            current = following
        with current.open() as image:
            check(image, data)
            check_offsets(image, seen)
            check_bounded(image)
    finally:
        shutil.rmtree(folder)


@pytest.mark.req("S1")
def test_an_incremental_sleep_writes_what_changed(tmp_path: Path) -> None:
    data = some_memory(64)
    first = sleep(tmp_path / "a", everything(data))
    data[5 * PAGE : 6 * PAGE] = random.Random(3).randbytes(PAGE)
    with first.open() as parent:
        second = sleep(tmp_path / "b", Memory(data, {5}), parent=parent)
    assert second.info.dirty_bytes == PAGE
    assert second.info.segments == 2
    assert second.info.bytes_written < 12 * PAGE < first.info.bytes_written // 20
    name = segment_name(first.identity.snapshot)
    assert (tmp_path / "a" / name).samefile(tmp_path / "b" / name)
    with second.open() as image:
        check(image, data)


@pytest.mark.req("S1")
def test_pages_dirtied_again_and_again_replace_their_layer(tmp_path: Path) -> None:
    data = some_memory(2)
    current = sleep(tmp_path / "0", everything(data))
    for number in range(1, 6):
        data[:PAGE] = random.Random(number).randbytes(PAGE)
        with current.open() as parent:
            current = sleep(tmp_path / str(number), Memory(data, {0}), parent=parent)
    with current.open() as image:
        assert image.index.columns.counts[0] == 2
        check(image, data)


@pytest.mark.req("S1")
def test_memory_that_became_zero_is_not_stored(tmp_path: Path) -> None:
    data = some_memory(4)
    first = sleep(tmp_path / "a", everything(data))
    data[:] = bytes(len(data))
    with first.open() as parent:
        second = sleep(tmp_path / "b", everything(data), parent=parent)
    assert second.info.zero_bytes == second.info.dirty_bytes == len(data)
    assert second.info.segments == 1
    with second.open() as image:
        assert all(image.is_zero(chunk) for chunk in range(4))
        check(image, data)


@pytest.mark.req("S1")
def test_compaction_is_reported_and_keeps_every_byte(tmp_path: Path) -> None:
    draw = random.Random(1)
    data = bytearray(draw.randbytes(16 * CHUNK))
    current = sleep(tmp_path / "0", everything(data))
    compacted = 0
    for number in range(1, 25):
        chunk = number % 11
        data[chunk * CHUNK : (chunk + 1) * CHUNK] = draw.randbytes(CHUNK)
        pages = range(chunk * PAGES, (chunk + 1) * PAGES)
        with current.open() as parent:
            current = sleep(tmp_path / str(number), Memory(data, pages), parent=parent)
        compacted += current.info.compaction_bytes
        with current.open() as image:
            check(image, data)
            check_bounded(image)
    assert compacted > 0


@pytest.mark.req("S1")
def test_many_threads_may_read_at_once(tmp_path: Path) -> None:
    import threading

    data = some_memory(16)
    wrong: list[int] = []
    with sleep(tmp_path / "a", everything(data)).open() as image:

        def read(first: int) -> None:
            for step in range(32):
                chunk = (first + step * 5) % 16
                if image.read_chunk(chunk) != data[chunk * CHUNK : (chunk + 1) * CHUNK]:
                    wrong.append(chunk)

        threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
