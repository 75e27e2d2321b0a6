"""Seal one sleep: a new snapshot directory with what changed since the parent, and links to the rest.

    with SealWriter(new_dir, identity, wrap, parent=image) as writer:
        writer.write_pages(source)
        writer.write_state(device_state)
        info = writer.finish()

The directory is made by the writer (0700, it must not exist) and is complete and durable when `finish`
returns; left without `finish`, by an error or not, it is removed. It becomes the instance's snapshot by
`commit`, not here.

Every snapshot has a new segment with a data key of its own, a complete index, and a snapshot key of its own.
Only dirty pages are read from the source: clean pages of a chunk that is rewritten come from the parent, so
a sleep never makes a lazily restored guest fault its memory in. Plain text stays in memory; the chunk buffers
are zeroed, what the compressor and the cipher allocate meanwhile is only freed.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, NamedTuple

from mvm.core.errors import Conflict, InvalidInput
from mvm.hostd.sealing.chunks import ChunkSealer, dirty_masks
from mvm.hostd.sealing.compaction import Usage, plan
from mvm.hostd.sealing.faults import damaged
from mvm.hostd.sealing.index import NO_SEGMENT, Columns, Index, Segment, render_index
from mvm.hostd.sealing.layout import (
    CHUNK,
    KEY_BYTES,
    KEY_NAME,
    MANIFEST_NAME,
    PAGE,
    STATE_MAGIC,
    STATE_MAX,
    STATE_NAME,
    WORKING_SET_NAME,
    SnapshotIdentity,
    render_key_file,
    render_manifest_header,
    segment_name,
    wrap_context,
)
from mvm.hostd.sealing.parallel import spread
from mvm.hostd.sealing.records import BoxCipher, compress
from mvm.hostd.sealing.segment import NewSegment
from mvm.hostd.sealing.working_set import load_working_set, seal_working_set
from mvm.linux.files import fsync_dir, raise_if_full, remove_tree, write_all
from mvm.linux.secret import SecretBytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import Self

    from mvm.hostd.sealing.index import Layer
    from mvm.hostd.sealing.key_slot import Wrap
    from mvm.hostd.sealing.reader import SealedImage
    from mvm.hostd.sealing.source import MemorySource

# Segment numbers move up by one: the new segment is number 0. "No segment" stays.
_UP_BY_ONE = bytes([*range(1, NO_SEGMENT), NO_SEGMENT - 1, NO_SEGMENT])


class SealedInfo(NamedTuple):
    """What a finished snapshot is and cost. All but the first and `segments` in bytes.

    `bytes_written`: all new files, compaction included, links not. `dirty_bytes`: what the source called
    dirty. `zero_bytes`: how much of that was zero and not stored. `compaction_bytes`: records copied out of
    old segments.
    """

    manifest_sha256: str
    bytes_written: int
    dirty_bytes: int
    zero_bytes: int
    segments: int
    compaction_bytes: int


class SealWriter:
    """Writes one snapshot into `directory`. Used from one thread; it uses `threads` in all.

    `wrap(key, context)` wraps the snapshot key under the tenant's key. `parent` is the open image the guest
    was woken from (it stays the caller's), None after a cold boot. ResourceExhausted: the disk is full.
    Conflict: `directory` exists. IntegrityError: the parent is damaged where it was needed; a sleep without
    it, from a source that calls every page dirty, still can succeed.
    """

    def __init__(
        self,
        directory: Path,
        identity: SnapshotIdentity,
        wrap: Wrap,
        *,
        parent: SealedImage | None = None,
        threads: int = 2,
    ) -> None:
        _check_parent(identity, parent)
        self._directory = directory
        self._identity = identity
        self._wrap = wrap
        self._parent = parent
        self._threads = threads
        self._chunk_count = 0
        self._layers: dict[int, Sequence[Layer]] = {}
        self._dirty_bytes = 0
        self._zero_bytes = 0
        self._state: bytes | None = None
        self._working_set: Iterable[tuple[int, int]] | None = None
        self._written = 0
        self._fd = -1
        self._over = False
        with _full_disk_named(directory):
            try:
                os.mkdir(directory, 0o700)
            except FileExistsError:
                raise Conflict("the new snapshot's directory exists", details=str(directory)) from None
            try:
                self._fd = self._create(segment_name(identity.snapshot))
                self._segment = NewSegment(self._fd, identity)
            except BaseException:
                self.abort()
                raise

    def write_pages(self, source: MemorySource) -> None:
        """Seal every dirty page of `source`. Required once."""
        if self._over or self._chunk_count:
            raise Conflict("the pages of this snapshot were written already")
        chunk_count, rest = divmod(source.size, CHUNK)
        if rest or not chunk_count:
            raise InvalidInput(f"{source.size} bytes of guest memory is not a multiple of {CHUNK}")
        if self._parent is not None and self._parent.chunk_count != chunk_count:
            raise InvalidInput(
                "the guest's memory has another size than its parent snapshot",
                details=f"{source.size} bytes, not {self._parent.size}",
            )
        render_manifest_header(self._identity, chunk_count)  # refuses what could not be finished
        masks = dirty_masks(source.dirty_runs(), chunk_count)
        self._chunk_count = chunk_count
        self._dirty_bytes = PAGE * sum(mask.bit_count() for mask in masks)
        sealers: list[ChunkSealer] = []

        def start() -> Callable[[tuple[int, int]], None]:
            sealer = ChunkSealer(self._segment, source, self._parent)
            sealers.append(sealer)
            return sealer.seal

        try:
            with _full_disk_named(self._directory):
                spread([(c, mask) for c, mask in enumerate(masks) if mask], self._threads, start)
        except BaseException:
            self.abort()
            raise
        finally:
            for sealer in sealers:
                sealer.wipe()
        for sealer in sealers:
            self._layers.update(sealer.layers)
            self._zero_bytes += sealer.zero_bytes

    def write_state(self, data: bytes | bytearray | memoryview) -> None:
        """The VMM's device state, opaque, 64 MiB at most. Required."""
        if len(data) > STATE_MAX:
            raise InvalidInput(f"a device state of {len(data)} bytes is larger than {STATE_MAX}")
        codec, body = compress(data)
        self._state = bytes([codec]) + len(data).to_bytes(4, "little") + body

    def write_working_set(self, runs: Iterable[tuple[int, int]]) -> None:
        """Runs (first page, count) that the last wake touched; without this call the parent's are carried over."""
        self._working_set = runs

    def finish(self) -> SealedInfo:
        """Compact if due, write index and key, make all of it durable. Ends the writer."""
        if self._over or not self._chunk_count or self._state is None:
            raise Conflict("a snapshot needs its pages and its device state before it is finished")
        try:
            with _full_disk_named(self._directory):
                info = self._finish(self._state)
        except BaseException:
            self.abort()
            raise
        self._over = True
        return info

    def abort(self) -> None:
        """Remove the directory. Harmless after `finish` or twice."""
        if self._over:
            return
        self._over = True
        self._close_segment()
        remove_tree(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()

    def _finish(self, state: bytes) -> SealedInfo:
        columns = self._merge()
        compacted = self._compact(columns)
        os.fsync(self._fd)
        self._close_segment()
        self._written += self._segment.end
        segments = [Segment(self._segment.id, self._segment.end, self._segment.key)]
        segments += self._link_parent(columns)

        header = render_manifest_header(self._identity, self._chunk_count)
        digest = hashlib.sha256(header).digest()
        used = self._working_set
        if used is None and self._parent is not None:
            used = load_working_set(self._parent)
        with SecretBytes.from_random(KEY_BYTES) as key:
            plain = render_index(Index(segments, columns))
            manifest = header + BoxCipher(key, b"index", digest).seal(plain)
            plain[:] = bytes(len(plain))
            self._put(STATE_NAME, STATE_MAGIC + BoxCipher(key, b"state", digest).seal(state))
            if used is not None:
                box = BoxCipher(key, b"working set", digest)
                self._put(WORKING_SET_NAME, seal_working_set(box, used, self._chunk_count))
            context = wrap_context(self._identity.instance, self._identity.snapshot)
            self._put(KEY_NAME, render_key_file(self._wrap(key, context)))
        self._put(MANIFEST_NAME, manifest)
        fsync_dir(self._directory)
        return SealedInfo(
            hashlib.sha256(manifest).hexdigest(),
            self._written,
            self._dirty_bytes,
            self._zero_bytes,
            len(segments),
            compacted,
        )

    def _merge(self) -> Columns:
        """The layers of all chunks, with the new segment as number 0 and the parent's after it."""
        old = Columns()
        if self._parent is None:
            old.counts += bytes(self._chunk_count)
        else:
            old.append_range(self._parent.index, 0, self._chunk_count)
            old.slots = old.slots.translate(_UP_BY_ONE)
        unchanged = Index([], old)
        merged = Columns()
        at = 0
        for chunk in sorted(self._layers):
            merged.append_range(unchanged, at, chunk)
            merged.append_chunk(self._layers[chunk])
            at = chunk + 1
        merged.append_range(unchanged, at, self._chunk_count)
        return merged

    def _compact(self, columns: Columns) -> int:
        """Copy the live records of the segments that `plan` gives up into the new one; bytes copied."""
        parent = self._parent
        if parent is None:
            return 0
        live = columns.live_bytes(1 + len(parent.segments))
        usage = [
            Usage(live[number], opened.segment.size - live[number])
            for number, opened in enumerate(parent.segments, start=1)
        ]
        victims = {number + 1 for number in plan(usage, live[0])}

        def move(item: tuple[int, int]) -> None:
            chunk, position = item
            layer = columns.layer(position)
            layer.slot -= 1
            codec, body = parent.open_layer(chunk, layer)
            offset, length = self._segment.append(chunk, layer.present, layer.zeroed, codec, body)
            columns.slots[position] = 0
            columns.offsets[position] = offset
            columns.lengths[position] = length

        moves = list(_layers_in(columns, victims))
        spread(moves, self._threads, lambda: move)
        return sum(live[number] for number in victims)

    def _link_parent(self, columns: Columns) -> list[Segment]:
        """Link the parent's segments still in use, and renumber the slots to the list returned."""
        parent = self._parent
        if parent is None:
            return []
        used = set(columns.slots)
        table = bytearray(range(256))
        kept: list[Segment] = []
        target = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for number, opened in enumerate(parent.segments, start=1):
                if number not in used:
                    continue
                _link_same(opened.fd, segment_name(opened.segment.id), parent.directory_fd, target)
                kept.append(opened.segment)
                table[number] = len(kept)
        finally:
            os.close(target)
        columns.slots = columns.slots.translate(table)
        return kept

    def _create(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._directory / name, flags, 0o600)

    def _put(self, name: str, data: bytes) -> None:
        fd = self._create(name)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._written += len(data)

    def _close_segment(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _full_disk_named:
    """Turns a full disk into ResourceExhausted for `path`; other errors pass."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise_if_full(error, self._path)


def _check_parent(identity: SnapshotIdentity, parent: SealedImage | None) -> None:
    if parent is None:
        return
    if parent.identity.instance != identity.instance:
        raise InvalidInput(
            f"a snapshot of {identity.instance} cannot build on one of {parent.identity.instance}"
        )
    if any(segment.id == identity.snapshot for segment in parent.index.segments):
        raise InvalidInput(f"the snapshot id {identity.snapshot} was used before")


def _layers_in(columns: Columns, slots: set[int]) -> Iterator[tuple[int, int]]:
    """(chunk, position) of every layer stored in one of the segments `slots`."""
    position = 0
    for chunk, count in enumerate(columns.counts):
        for at in range(position, position + count):
            if columns.slots[at] in slots:
                yield chunk, at
        position += count


def _link_same(fd: int, name: str, source: int, target: int) -> None:
    """Link `name` from one directory into another, and make sure that it is the file open as `fd`."""
    try:
        os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except FileNotFoundError:
        raise damaged("a segment of the parent snapshot is gone", name) from None
    if not os.path.samestat(os.stat(name, dir_fd=target, follow_symlinks=False), os.fstat(fd)):
        raise damaged("a segment of the parent snapshot was replaced while it was in use", name)
