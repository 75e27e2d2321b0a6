"""The pages a wake touched until the guest answered, so that the next wake can decrypt them ahead.

A hint: it is stored beside the image, sealed for its snapshot (which memory a guest uses is its own business)
and never trusted to be there. Any damage reads as "nothing known". Pages, not chunks: of a chunk that is touched at all
a guest uses a third, and what is placed in its memory for nothing delays what is not.

    0  8  "MVMSEALW"
    8     sealed box: for each run 4 bytes first page, 4 bytes number of pages; ascending, apart from each other
"""

from __future__ import annotations

import os
import sys
from array import array
from typing import TYPE_CHECKING

from mvm.core.errors import IntegrityError, InvalidInput
from mvm.hostd.sealing import plainfile
from mvm.hostd.sealing.layout import BOX_OVERHEAD, CHUNK, PAGE, WORKING_SET_MAGIC, WORKING_SET_NAME
from mvm.linux.files import raise_if_full, write_all

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mvm.hostd.sealing.reader import SealedImage
    from mvm.hostd.sealing.records import BoxCipher

PAGES_PER_CHUNK = CHUNK // PAGE
_RUN = 8


def runs_of(marks: bytes | bytearray) -> list[tuple[int, int]]:
    """Runs (first page, count) of the pages whose byte in `marks` is 1."""
    runs = []
    start = marks.find(1)
    while start >= 0:
        end = marks.find(0, start)
        if end < 0:
            end = len(marks)
        runs.append((start, end - start))
        start = marks.find(1, end)
    return runs


def seal_working_set(box: BoxCipher, runs: Iterable[tuple[int, int]], chunk_count: int) -> bytes:
    """The file's bytes. InvalidInput unless the runs are ascending, apart, and inside the image."""
    flat = array("I")
    for first, count in runs:
        if not (first >= 0 and count > 0 and first + count <= chunk_count * PAGES_PER_CHUNK):
            raise InvalidInput(f"a working set has pages of 0 to {chunk_count * PAGES_PER_CHUNK - 1}")
        flat.extend((first, count))
    if not _ascending(flat):
        raise InvalidInput("the runs of a working set are ascending and apart")
    if sys.byteorder == "big":
        flat.byteswap()
    return WORKING_SET_MAGIC + box.seal(flat.tobytes())


def save_working_set(image: SealedImage, runs: Iterable[tuple[int, int]]) -> None:
    """Replace the working set of an open image, in place: half of one is not authentic and reads as none."""
    sealed = seal_working_set(image.working_set_box, runs, image.chunk_count)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = image.directory_fd
    try:
        fd = os.open(WORKING_SET_NAME, flags, 0o600, dir_fd=handle)
        try:
            write_all(fd, sealed)
        finally:
            os.close(fd)
    except OSError as error:
        raise_if_full(error, _shown(handle))
        raise


def load_working_set(image: SealedImage) -> list[tuple[int, int]]:
    """Runs (first page, count), ascending; empty if none was saved or what is there is not sound."""
    # Runs are apart, so there are at most half as many as pages.
    limit = len(WORKING_SET_MAGIC) + BOX_OVERHEAD + _RUN * image.chunk_count * PAGES_PER_CHUNK // 2
    try:
        raw = plainfile.read_all(image.directory_fd, WORKING_SET_NAME, limit, "the working set")
        if not raw.startswith(WORKING_SET_MAGIC):
            return []
        data = image.working_set_box.open(memoryview(raw)[len(WORKING_SET_MAGIC) :], "the working set")
    except (IntegrityError, OSError):
        return []
    if len(data) % _RUN:
        return []
    flat = array("I", data)
    if sys.byteorder == "big":
        flat.byteswap()
    if not flat:
        return []
    if not _ascending(flat) or flat[-2] + flat[-1] > image.chunk_count * PAGES_PER_CHUNK:
        return []
    return list(zip(flat[::2], flat[1::2], strict=True))


def _ascending(flat: array[int]) -> bool:
    end = -1
    for first, count in zip(flat[::2], flat[1::2], strict=True):
        if first <= end or not count:
            return False
        end = first + count
    return True


def _shown(handle: int) -> Path:
    from pathlib import Path

    return Path(os.readlink(f"/proc/self/fd/{handle}")) / WORKING_SET_NAME
