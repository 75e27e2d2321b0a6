"""Which pages a process wrote, read from pagemap entries, against a model that looks at one page at a time."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.linux.mount import parse_mountinfo
from mvm.linux.procmem import written_runs

PRESENT, SWAPPED, FILE, EXCLUSIVE, SOFT_DIRTY = (1 << bit for bit in (63, 62, 61, 56, 55))
FRAME = 0x12345
KINDS = {
    "never touched": 0,
    "written": PRESENT | EXCLUSIVE | FRAME,
    "written, shared after a fork": PRESENT | FRAME,
    "written, swapped out": SWAPPED | 77,
    "of the file below": PRESENT | FILE | FRAME,
    "of the file below, marked dirty by nobody": PRESENT | FILE | SOFT_DIRTY,
}
WRITTEN = {name for name in KINDS if name.startswith("written")}


@pytest.mark.req("S5")
@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=300), st.integers(0, 1 << 30))
def test_runs_are_what_a_page_by_page_look_finds(kinds: list[str], first: int) -> None:
    runs = list(written_runs(array("Q", [KINDS[kind] for kind in kinds]), first))
    found = [page for start, count in runs for page in range(start, start + count)]
    assert found == [first + n for n, kind in enumerate(kinds) if kind in WRITTEN]
    # Joined as far as possible, in order, none empty.
    assert all(count > 0 for _, count in runs)
    assert all(a + b < c for (a, b), (c, _) in pairwise(runs))


@pytest.mark.req("S5")
@given(st.integers(0, 2**64 - 1))
def test_a_page_is_left_out_only_if_it_cannot_have_been_written(entry: int) -> None:
    left_out = not list(written_runs(array("Q", [entry])))
    present, swapped, file = entry >> 63 & 1, entry >> 62 & 1, entry >> 61 & 1
    assert left_out == (not swapped and (not present or bool(file)))


LINE = "36 35 98:0 / {point} rw,noatime shared:1 - {kind} /dev/root rw,errors=continue"


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=30), st.sampled_from(["ext4", "fuse.mvm-memory", "tmpfs"]))
    )
)
def test_mount_points_of_any_name_are_read_back(mounts: list[tuple[str, str]]) -> None:
    escapes = {"\\": "\\134", " ": "\\040", "\t": "\\011", "\n": "\\012"}
    made = [("/" + name, kind) for name, kind in mounts]
    text = "".join(
        LINE.format(point="".join(escapes.get(c, c) for c in point), kind=kind) + "\n" for point, kind in made
    )
    assert parse_mountinfo(text) == made


@given(st.text())
def test_any_text_is_read_as_mounts_or_as_none(text: str) -> None:
    for point, kind in parse_mountinfo(text):
        assert isinstance(point, str)
        assert " " not in kind
