"""Where in a Firecracker process the guest's memory is: read off /proc/<pid>/maps, without asking the process.

Guest memory has a hole of 1 GiB below 4 GiB, so from 3 GiB on it is two mappings; a memory file has one after the other
(offset 0 is guest address 0, and what is above the hole follows at 3 GiB).

A restored guest's memory is a private mapping of its memory file: file and offset tell all. A booted guest's is
anonymous, and the kernel joins anonymous mappings that happen to be neighbours (a heap's, as a rule, and both parts of
guest memory). Then what is at its guest address is found by content: Firecracker leaves the table that ACPI starts
from (ACPI 6.5, 5.2.5.3) at guest address 0xe0000, which is no memory to the guest's kernel. A guest that forges or
destroys it harms itself: what is read is the memory of its own VMM either way, which is no less its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from mvm.core.errors import VmmError
from mvm.linux.procmem import PAGE, Span

LOW_MAX: Final = 3 << 30
_ROOT_TABLE: Final = 0xE0000
_RSDP: Final = struct.Struct("<8sB6sBIIQB3x")
_CANDIDATES_MAX: Final = 1 << 17

Peek = Callable[[int, int], bytes]
"""(address, size) -> what is there; fewer bytes where nothing is."""


class Mapping(NamedTuple):
    start: int
    end: int
    offset: int
    file: tuple[str, int]
    """(device, inode); inode 0 for anonymous memory."""

    @property
    def size(self) -> int:
        return self.end - self.start


def parse_maps(text: str) -> Iterator[Mapping]:
    """The private writable mappings that have no name of the kernel's own ([heap], [stack])."""
    for line in text.splitlines():
        fields = line.split(None, 5)
        if len(fields) < 5 or fields[1] != "rw-p" or (len(fields) == 6 and fields[5].startswith("[")):
            continue
        start, _, end = fields[0].partition("-")
        yield Mapping(int(start, 16), int(end, 16), int(fields[2], 16), (fields[3], int(fields[4])))


def find(maps: str, size: int, peek: Peek) -> list[Span]:
    """Guest memory of `size` bytes, in guest order. VmmError if it cannot be told."""
    mappings = list(parse_maps(maps))
    found = _from_file(mappings, size)
    if found is None:
        found = _anonymous([m for m in mappings if m.file[1] == 0], size, peek)
    return found


def _from_file(mappings: list[Mapping], size: int) -> list[Span] | None:
    """Where a memory file is mapped; what a balloon took out of it is anonymous memory by now, at its place."""
    by_file: dict[tuple[str, int], list[Mapping]] = {}
    for mapping in mappings:
        if mapping.file[1] != 0:
            by_file.setdefault(mapping.file, []).append(mapping)
    fitting = [spans for parts in by_file.values() if (spans := _spans_of(parts, mappings, size))]
    if len(fitting) > 1:
        raise _unclear(size, f"{len(fitting)} files are mapped with that size")
    return fitting[0] if fitting else None


def _spans_of(parts: list[Mapping], mappings: list[Mapping], size: int) -> list[Span]:
    """The spans if these parts of a file are in the place of all guest memory, else nothing."""
    low = min(size, LOW_MAX)
    spans = []
    for offset, length in ((0, low), (low, size - low)):
        bases = {part.start - part.offset for part in parts if offset <= part.offset < offset + length}
        if length and (len(bases) != 1 or not _covered(mappings, min(bases) + offset, length)):
            return []
        if length:
            spans.append(Span(offset, min(bases) + offset, length))
    if any(part.offset + part.size > size for part in parts):
        return []
    return spans


def _covered(mappings: list[Mapping], start: int, size: int) -> bool:
    """Whether all of a range is mapped. `mappings` are in order of address, as the kernel lists them."""
    at = start
    for mapping in mappings:
        if mapping.start <= at < mapping.end:
            at = mapping.end
    return at >= start + size


def _anonymous(mappings: list[Mapping], size: int, peek: Peek) -> list[Span]:
    low = min(size, LOW_MAX)
    large = [mapping for mapping in mappings if mapping.size >= low]
    marked = [
        (mapping, base) for mapping in large for base in _bases(mapping, low) if _is_marked(peek, base, low)
    ]
    exact = [(mapping, mapping.start) for mapping in large if mapping.size == low]
    # Of a mapping that nothing was joined with, the place is known without a mark.
    candidates = marked or exact
    if len(candidates) != 1:
        raise _unclear(size, f"{len(large)} mappings are large enough, {len(marked)} places have the mark")
    mapping, base = candidates[0]
    spans = [Span(0, base, low)]
    if size > low:
        spans.append(Span(low, _high(mappings, mapping, base, size - low), size - low))
    return spans


def _high(mappings: list[Mapping], mapping: Mapping, low_base: int, size: int) -> int:
    """Where the part above the hole is: mapped after the other, so below it and joined to it, or on its own."""
    if mapping.start == low_base - size:
        return mapping.start
    alone = [other.start for other in mappings if other.size == size and other is not mapping]
    if len(alone) != 1:
        raise _unclear(size, f"{len(alone)} mappings could be the part above 3 GiB")
    return alone[0]


def _bases(mapping: Mapping, size: int) -> range:
    bases = range(mapping.start, mapping.end - size + 1, PAGE)
    return bases[-_CANDIDATES_MAX:]


def _is_marked(peek: Peek, base: int, size: int) -> bool:
    raw = peek(base + _ROOT_TABLE, _RSDP.size)
    if len(raw) != _RSDP.size or sum(raw[:20]) % 256 or sum(raw) % 256:
        return False
    signature, _, _, _, _, length, table, _ = _RSDP.unpack(raw)
    if signature != b"RSD PTR " or length != _RSDP.size or not 0 < table <= size - 4:
        return False
    return peek(base + table, 4) == b"XSDT"


def _unclear(size: int, seen: str) -> VmmError:
    return VmmError(
        "the guest's memory is not found in the VMM", details=f"{size >> 20} MiB are looked for; {seen}."
    )
