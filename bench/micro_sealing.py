"""Measure the sealed memory format: size, speed of a sleep, time to open, time to read one chunk.

    python bench/micro_sealing.py DIRECTORY [--image FILE [--later FILE]] [--mib N]

DIRECTORY gets the snapshots and is left as found; its file system is part of what is measured. FILE is a raw copy
of a guest's memory, LATER another of the same guest after it went on. Without one, memory is made up of the
interpreter's own libraries, text and noise, two thirds zero: good for comparing machines, not for
compression ratios.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mvm.core.ids import InstanceId, SnapshotId
from mvm.hostd.keys import LocalTenantKey
from mvm.hostd.sealing import CHUNK, PAGE, SealedImage, SealedInfo, SealWriter, SnapshotIdentity, destroy
from mvm.linux.secret import SecretBytes

INSTANCE = InstanceId.parse("bench/default-0")
KEY = LocalTenantKey(INSTANCE.tenant, 1, SecretBytes.from_random(32))


class Memory:
    def __init__(self, data: bytes, dirty: Iterable[tuple[int, int]]) -> None:
        self.size = len(data)
        self._data = memoryview(data)
        self._dirty = dirty

    def dirty_runs(self) -> Iterable[tuple[int, int]]:
        return self._dirty

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]


def made_up(size: int) -> bytes:
    """A third of `size` filled, in runs of 1 MiB between zeros."""
    library = Path(sysconfig.get_path("stdlib"))
    parts: list[bytes] = []
    filled = 0
    for path in sorted([*library.glob("*.py"), *library.glob("lib-dynload/*.so")]):
        parts.append(path.read_bytes())
        filled += len(parts[-1])
        if filled > size // 4:
            break
    text = b"".join(parts)
    text = (text * (size // 4 // len(text) + 1))[: size // 4] + os.urandom(size // 12)
    out = bytearray()
    for at in range(0, len(text), 1 << 20):
        out += text[at : at + (1 << 20)] + bytes(2 << 20)
    return bytes(out[:size].ljust(size, b"\0"))


def seal(
    directory: Path, memory: Memory, parent: SealedImage | None, threads: int
) -> tuple[SnapshotIdentity, SealedInfo, float]:
    identity = SnapshotIdentity(INSTANCE, SnapshotId(os.urandom(16).hex()), b"bench=1\n")
    start = time.perf_counter()
    with SealWriter(directory, identity, KEY.wrap, parent=parent, threads=threads) as writer:
        writer.write_pages(memory)
        writer.write_state(bytes(100_000))
        info = writer.finish()
    return identity, info, time.perf_counter() - start


def microseconds(samples: list[float]) -> str:
    ordered = sorted(samples)
    mean = sum(ordered) / len(ordered)
    p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return f"mean {mean * 1e6:.0f} us, median {p50 * 1e6:.0f} us, 99th percentile {p99 * 1e6:.0f} us"


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def changed_pages(before: bytes, after: bytes) -> Iterator[tuple[int, int]]:
    for at in range(0, len(before), PAGE):
        if before[at : at + PAGE] != after[at : at + PAGE]:
            yield at // PAGE, 1


@contextmanager
def removed_afterwards(directory: Path) -> Iterator[Path]:
    try:
        yield directory
    finally:
        destroy(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--later", type=Path)
    parser.add_argument("--mib", type=int, default=512)
    given = parser.parse_args()
    data = given.image.read_bytes() if given.image else made_up(given.mib << 20)
    later = given.later.read_bytes() if given.later else data
    everything = [(0, len(data) // PAGE)]
    for threads in (1, 2):
        with removed_afterwards(given.directory / f".bench-{threads}") as directory:
            identity, info, seconds = seal(directory, Memory(data, everything), None, threads)
            resident = len(data) - info.zero_bytes
            print(
                f"full sleep, {threads} threads: {seconds:.3f} s, {resident / seconds / 1e6:.0f} MB/s of "
                f"{resident / 1e6:.0f} MB not zero, written {info.bytes_written / resident:.3f} of it"
            )
            if threads == 1:
                continue
            opens = []
            for _ in range(20):
                start = time.perf_counter()
                image = SealedImage.open(directory, identity, KEY.unwrap, info.manifest_sha256)
                opens.append(time.perf_counter() - start)
                image.close()
            print(f"open: {microseconds(opens)}")
            with SealedImage.open(directory, identity, KEY.unwrap, info.manifest_sha256) as image:
                chunks = [chunk for chunk in range(len(data) // CHUNK) if not image.is_zero(chunk)]
                reads = [timed(partial(image.read_chunk, chunk)) for chunk in chunks]
                print(f"read one of {len(chunks)} chunks: {microseconds(reads)}")
                dirty = list(changed_pages(data, later)) or [(page, 1) for page in range(0, 40_000, 97)]
                with removed_afterwards(given.directory / ".bench-next") as following:
                    _, info, seconds = seal(following, Memory(later, dirty), image, threads)
                    print(
                        f"incremental sleep of {len(dirty)} pages: {seconds * 1e3:.1f} ms, "
                        f"{info.bytes_written} bytes written"
                    )


if __name__ == "__main__":
    main()
