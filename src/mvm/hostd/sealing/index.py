"""The index: where the contents of every chunk are. Stored encrypted, because it shows which memory was busy.

A chunk is a stack of layers over zeros, oldest first. A layer provides the pages of `present`, stored as one
record, and sets the pages of `zeroed` to zero; the masks are disjoint and not both empty. A layer that covers
every page is a full copy and hides all below it. A chunk without layers is zero.

    0   2  S, number of segments
    2   2  zero
    4   4  L, number of layers
    8   56 S times: 16 segment id, 8 file size, 32 data key
    ..  C  layers per chunk, one byte each, C = chunk count
    ..  L  segment number of each layer, 255 for a layer without pages (no record)
    ..  L  codec
    ..  4L present
    ..  4L zeroed
    ..  4L length of the record, tag included
    ..  8L offset of the record in its segment

Columns, not rows, so that 16,384 chunks decode with a handful of copies and no object per chunk. The index is
authentic once decrypted; what is checked here keeps a bug in a writer from becoming a wrong read.
"""

from __future__ import annotations

import struct
import sys
from array import array
from itertools import accumulate
from typing import TYPE_CHECKING

from mvm.core.ids import SnapshotId
from mvm.hostd.sealing.faults import damaged
from mvm.hostd.sealing.layout import CHUNKS_MAX, KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

LAYERS_MAX: Final = 4
"""Layers of one chunk: a full copy and three on top."""
SEGMENTS_MAX: Final = 8
"""Segments of one image; also descriptors an open image holds."""
NO_SEGMENT: Final = 255

_HEAD = struct.Struct("<HHI")
_SEGMENT = struct.Struct(f"<16sQ{KEY_BYTES}s")
_LAYER_BYTES = 1 + 1 + 4 + 4 + 4 + 8

INDEX_MAX: Final = _HEAD.size + SEGMENTS_MAX * _SEGMENT.size + CHUNKS_MAX * (1 + LAYERS_MAX * _LAYER_BYTES)


class Segment:
    """One segment file as the index names it. `size` in bytes, header included."""

    __slots__ = ("id", "key", "size")

    def __init__(self, id: SnapshotId, size: int, key: bytes) -> None:
        self.id = id
        self.size = size
        self.key = key

    def __repr__(self) -> str:
        return f"<Segment {self.id}, {self.size} bytes>"


class Layer:
    """One layer of one chunk; see the module's contract."""

    __slots__ = ("codec", "length", "offset", "present", "slot", "zeroed")

    def __init__(self, slot: int, codec: int, present: int, zeroed: int, length: int, offset: int) -> None:
        self.slot = slot
        self.codec = codec
        self.present = present
        self.zeroed = zeroed
        self.length = length
        self.offset = offset

    @property
    def cover(self) -> int:
        return self.present | self.zeroed


class Columns:
    """The layers of consecutive chunks, column by column. Appended to by a writer, read-only in an image."""

    __slots__ = ("codecs", "counts", "lengths", "offsets", "present", "slots", "zeroed")

    def __init__(self) -> None:
        self.counts = bytearray()
        self.slots = bytearray()
        self.codecs = bytearray()
        self.present = array("I")
        self.zeroed = array("I")
        self.lengths = array("I")
        self.offsets = array("Q")

    def append_chunk(self, layers: Iterable[Layer]) -> None:
        count = 0
        for layer in layers:
            self.slots.append(layer.slot)
            self.codecs.append(layer.codec)
            self.present.append(layer.present)
            self.zeroed.append(layer.zeroed)
            self.lengths.append(layer.length)
            self.offsets.append(layer.offset)
            count += 1
        self.counts.append(count)

    def append_range(self, other: Index, first: int, end: int) -> None:
        """The chunks `first` to `end` of `other`, unchanged; slots keep their numbers."""
        low, high = other.starts[first], other.starts[end]
        self.counts += other.columns.counts[first:end]
        self.slots += other.columns.slots[low:high]
        self.codecs += other.columns.codecs[low:high]
        self.present += other.columns.present[low:high]
        self.zeroed += other.columns.zeroed[low:high]
        self.lengths += other.columns.lengths[low:high]
        self.offsets += other.columns.offsets[low:high]

    def layer(self, position: int) -> Layer:
        return Layer(
            self.slots[position],
            self.codecs[position],
            self.present[position],
            self.zeroed[position],
            self.lengths[position],
            self.offsets[position],
        )

    def live_bytes(self, slots: int) -> list[int]:
        """Bytes of records in use, by segment number."""
        live = [0] * 256
        for slot, length in zip(self.slots, self.lengths, strict=True):
            live[slot] += length
        return live[:slots]


class Index:
    """A complete index. Chunk `i` has the layers `starts[i]` to `starts[i + 1]` of `columns`."""

    __slots__ = ("columns", "segments", "starts")

    def __init__(self, segments: list[Segment], columns: Columns) -> None:
        self.segments = segments
        self.columns = columns
        self.starts = array("I", accumulate(columns.counts, initial=0))

    def layers(self, chunk: int) -> list[Layer]:
        """Oldest first."""
        return [self.columns.layer(i) for i in range(self.starts[chunk], self.starts[chunk + 1])]


def render_index(index: Index) -> bytearray:
    """Mutable, because it holds keys: the caller zeroes it."""
    columns = index.columns
    out = bytearray(_HEAD.pack(len(index.segments), 0, len(columns.slots)))
    for segment in index.segments:
        out += _SEGMENT.pack(bytes.fromhex(segment.id), segment.size, segment.key)
    out += columns.counts + columns.slots + columns.codecs
    for column in (columns.present, columns.zeroed, columns.lengths, columns.offsets):
        out += _swapped(column).tobytes()
    return out


def parse_index(decrypted: bytes, chunk_count: int) -> Index:
    if len(decrypted) < _HEAD.size:
        raise damaged("the index of the snapshot is too short")
    segment_count, zero, layers = _HEAD.unpack_from(decrypted)
    expected = _HEAD.size + segment_count * _SEGMENT.size + chunk_count + layers * _LAYER_BYTES
    if zero or segment_count > SEGMENTS_MAX or len(decrypted) != expected:
        raise damaged("the index of the snapshot contradicts itself", "its counts do not fit its size")
    segments = []
    at = _HEAD.size
    for _ in range(segment_count):
        id_, size, key = _SEGMENT.unpack_from(decrypted, at)
        segments.append(Segment(SnapshotId(id_.hex()), size, key))
        at += _SEGMENT.size
    columns = Columns()
    columns.counts += decrypted[at : at + chunk_count]
    at += chunk_count
    columns.slots += decrypted[at : at + layers]
    at += layers
    columns.codecs += decrypted[at : at + layers]
    at += layers
    view = memoryview(decrypted)
    for column in (columns.present, columns.zeroed, columns.lengths, columns.offsets):
        size = layers * column.itemsize
        column.frombytes(view[at : at + size])
        at += size
        if sys.byteorder == "big":
            column.byteswap()
    index = Index(segments, columns)
    if index.starts[-1] != layers or max(columns.counts) > LAYERS_MAX:
        raise damaged("the index of the snapshot contradicts itself", "its layers do not add up")
    used = columns.slots.replace(b"\xff", b"")
    if used and max(used) >= segment_count:
        raise damaged("the index of the snapshot contradicts itself", "it names a segment it does not list")
    if len({segment.id for segment in segments}) != segment_count:
        raise damaged("the index of the snapshot contradicts itself", "it lists a segment twice")
    return index


def _swapped(column: array[int]) -> array[int]:
    if sys.byteorder == "little":
        return column
    copy = array(column.typecode, column)
    copy.byteswap()
    return copy
