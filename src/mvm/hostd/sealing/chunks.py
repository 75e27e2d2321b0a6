"""Turn the dirty pages of one chunk into layers: the rule that decides what a sleep writes.

With `dirty` the mask of pages that may have changed and the parent's layers oldest first:
- layers whose every page is dirty are hidden and dropped;
- a chunk with other layers left is written whole if half of its pages or more are dirty, or if LAYERS_MAX
  layers are left; the clean pages then come from the parent;
- zero pages are never stored: they are named in `zeroed` where an older layer would show through, else not
  at all. A chunk that is all zero ends up with no layer.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from mvm.core.errors import InvalidInput
from mvm.hostd.sealing.index import LAYERS_MAX, NO_SEGMENT, Layer
from mvm.hostd.sealing.layout import CHUNK, FULL, PAGE, PAGES_PER_CHUNK, runs
from mvm.hostd.sealing.records import RAW, compress

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mvm.hostd.sealing.reader import SealedImage
    from mvm.hostd.sealing.segment import NewSegment
    from mvm.hostd.sealing.source import MemorySource

_ZERO_PAGE = bytes(PAGE)
_ZERO_CHUNK = bytes(CHUNK)
_WHOLE_FROM = PAGES_PER_CHUNK // 2


def dirty_masks(dirty_runs: Iterable[tuple[int, int]], chunk_count: int) -> array[int]:
    """One page mask for each chunk. Runs may come in any order and overlap; InvalidInput beyond the end."""
    masks = array("I", bytes(4 * chunk_count))
    for first, count in dirty_runs:
        end = first + count
        if first < 0 or count < 0 or end > chunk_count * PAGES_PER_CHUNK:
            raise InvalidInput(f"pages {first} to {end} are outside the guest's memory")
        while first < end:
            chunk, page = divmod(first, PAGES_PER_CHUNK)
            whole = (end - first) // PAGES_PER_CHUNK
            if page == 0 and whole:
                masks[chunk : chunk + whole] = array("I", b"\xff" * (4 * whole))
                first += whole * PAGES_PER_CHUNK
                continue
            taken = min(PAGES_PER_CHUNK - page, end - first)
            masks[chunk] |= ((1 << taken) - 1) << page
            first += taken
    return masks


class ChunkSealer:
    """Seals chunks one after the other; one per thread. `layers` collects the result by chunk."""

    def __init__(self, segment: NewSegment, source: MemorySource, parent: SealedImage | None) -> None:
        self.layers: dict[int, Sequence[Layer]] = {}
        self.zero_bytes = 0
        self._segment = segment
        self._source = source
        self._parent = parent
        self._buffer = bytearray(CHUNK)
        self._view = memoryview(self._buffer)

    def seal(self, item: tuple[int, int]) -> None:
        """`item`: (chunk, dirty mask, not 0)."""
        chunk, dirty = item
        for first, count in runs(dirty):
            at = first * PAGE
            self._source.read_into(chunk * CHUNK + at, self._view[at : at + count * PAGE])
        zero = self._zero_pages(dirty)
        self.zero_bytes += zero.bit_count() * PAGE
        below = self._left_below(chunk, dirty)
        if below and (dirty.bit_count() >= _WHOLE_FROM or len(below) >= LAYERS_MAX):
            zero |= self._fill_clean(chunk, FULL & ~dirty)
            dirty, below = FULL, []
        shown = 0
        for layer in below:
            shown |= layer.present
        present, zeroed = dirty & ~zero, zero & shown
        if present or zeroed:
            below.append(self._store(chunk, present, zeroed))
        self.layers[chunk] = below

    def wipe(self) -> None:
        """Zero the plain text held here."""
        self._buffer[:] = _ZERO_CHUNK

    def _left_below(self, chunk: int, dirty: int) -> list[Layer]:
        """The parent's layers that still show something, their segment numbers moved up by the new one."""
        if self._parent is None:
            return []
        left = [layer for layer in self._parent.index.layers(chunk) if layer.cover & ~dirty]
        for layer in left:
            if layer.slot != NO_SEGMENT:
                layer.slot += 1
        return left

    def _fill_clean(self, chunk: int, clean: int) -> int:
        """Take the clean pages from the parent; the mask of those that are zero."""
        if self._parent is not None and clean:
            pages = memoryview(self._parent.read_chunk(chunk))
            for first, count in runs(clean):
                at, end = first * PAGE, (first + count) * PAGE
                self._view[at:end] = pages[at:end]
        return self._zero_pages(clean)

    def _zero_pages(self, mask: int) -> int:
        buffer = self._buffer
        if mask == FULL and buffer == _ZERO_CHUNK:
            return FULL
        zero = 0
        for first, count in runs(mask):
            for page in range(first, first + count):
                if buffer.startswith(_ZERO_PAGE, page * PAGE):  # a memcmp, no copy
                    zero |= 1 << page
        return zero

    def _store(self, chunk: int, present: int, zeroed: int) -> Layer:
        if not present:
            return Layer(NO_SEGMENT, RAW, 0, zeroed, 0, 0)
        if present == FULL:
            codec, body = compress(self._buffer)
        else:
            parts = [self._view[f * PAGE : (f + n) * PAGE] for f, n in runs(present)]
            codec, body = compress(b"".join(parts))
        offset, length = self._segment.append(chunk, present, zeroed, codec, body)
        return Layer(0, codec, present, zeroed, length, offset)
