"""Where guest memory is, read off tables as a real Firecracker's process showed them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import VmmError
from mvm.hostd.vmm.firecracker.memory import find, parse_maps
from mvm.linux.procmem import Span

MIB, GIB = 1 << 20, 1 << 30
AT = 0x7F4AAC000000
RSDP = struct.Struct("<8sB6sBIIQB3x")


def line(
    start: int, size: int, *, offset: int = 0, device: str = "00:00", inode: int = 0, name: str = ""
) -> str:
    return f"{start:x}-{start + size:x} rw-p {offset:08x} {device} {inode}   {name}\n"


def memory(*bases: int) -> dict[int, bytes]:
    """What a booted guest's memory has at these addresses of the process."""
    raw = bytearray(RSDP.pack(b"RSD PTR ", 0, b"FIRECK", 2, 0, RSDP.size, 0xA0000, 0))
    raw[8] = -sum(raw[:20]) % 256
    raw[32] = -sum(raw) % 256
    return {base + at: data for base in bases for at, data in ((0xE0000, bytes(raw)), (0xA0000, b"XSDT"))}


def found(maps: str, size: int, content: dict[int, bytes] | None = None) -> list[Span]:
    return find(maps, size, lambda at, count: (content or {}).get(at, b"\0" * count)[:count])


def test_a_booted_guest_joined_with_a_heap() -> None:
    maps = line(AT - GIB, 64 * MIB) + line(AT, 256 * MIB + 0x21000) + line(AT + GIB, 8 * MIB)
    assert found(maps, 256 * MIB, memory(AT)) == [Span(0, AT, 256 * MIB)]
    low = line(AT - 0x4000, 256 * MIB + 0x4000)
    assert found(low, 256 * MIB, memory(AT)) == [Span(0, AT, 256 * MIB)]


def test_a_booted_guest_with_both_parts_joined() -> None:
    maps = line(AT, 4 * GIB + 0x21000)
    assert found(maps, 4 * GIB, memory(AT + GIB)) == [Span(0, AT + GIB, 3 * GIB), Span(3 * GIB, AT, GIB)]


def test_a_booted_guest_with_its_parts_apart() -> None:
    maps = line(AT, GIB) + line(AT + 16 * GIB, 3 * GIB)
    expected = [Span(0, AT + 16 * GIB, 3 * GIB), Span(3 * GIB, AT, GIB)]
    assert found(maps, 4 * GIB, memory(AT + 16 * GIB)) == expected


def test_without_a_mark_only_an_exact_mapping_will_do() -> None:
    assert found(line(AT, 256 * MIB), 256 * MIB) == [Span(0, AT, 256 * MIB)]
    for maps in (line(AT, 257 * MIB), line(AT, 256 * MIB) + line(AT + GIB, 256 * MIB), "", line(AT, MIB)):
        with pytest.raises(VmmError):
            found(maps, 256 * MIB)


def test_two_places_with_the_mark_are_no_place() -> None:
    with pytest.raises(VmmError):
        found(line(AT, 512 * MIB), 256 * MIB, memory(AT, AT + 4096))


def test_a_restored_guest_is_where_its_file_is() -> None:
    maps = line(AT, 3 * GIB, device="00:3f", inode=1, name="/memory") + line(
        AT + 8 * GIB, GIB, offset=3 * GIB, device="00:3f", inode=1, name="/memory"
    )
    assert found(maps, 4 * GIB) == [Span(0, AT, 3 * GIB), Span(3 * GIB, AT + 8 * GIB, GIB)]
    library = line(AT + 32 * GIB, 0x2000, offset=0x1D0000, device="fe:00", inode=7, name="/lib/libc.so")
    assert found(maps + library, 4 * GIB)[0] == Span(0, AT, 3 * GIB)


def test_what_a_balloon_took_is_still_memory() -> None:
    """Giving back pages of a file's mapping puts anonymous memory over them."""
    file = {"device": "00:3f", "inode": 1}
    maps = (
        line(AT, 64 * MIB)
        + line(AT + 64 * MIB, 64 * MIB, offset=64 * MIB, **file)  # type: ignore[arg-type]
        + line(AT + 128 * MIB, 128 * MIB)
    )
    assert found(maps, 256 * MIB) == [Span(0, AT, 256 * MIB)]


def test_names_of_the_kernels_own_are_passed_over() -> None:
    assert (
        list(parse_maps("00400000-00500000 rw-p 0 00:00 0   [heap]\n00600000-00700000 r--p 0 00:00 0\n"))
        == []
    )


@given(st.text(max_size=300))
def test_whatever_the_table_says_it_is_an_answer_or_an_error(text: str) -> None:
    try:
        found(text, 256 * MIB)
    except (VmmError, ValueError):
        pass
