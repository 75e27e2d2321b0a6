"""The chunks a wake touched, in the order it touched them, so that the next wake can decrypt them ahead.

A hint: it is stored beside the image, sealed for its snapshot (which memory a guest uses is its own business)
and never trusted to be there. Any damage reads as "nothing known".

    0  8  "MVMSEALW"
    8     sealed box: 4 bytes each, chunk numbers, no chunk twice
"""

from __future__ import annotations

import os
import sys
from array import array
from typing import TYPE_CHECKING

from mvm.core.errors import IntegrityError, InvalidInput
from mvm.hostd.sealing import plainfile
from mvm.hostd.sealing.layout import BOX_OVERHEAD, WORKING_SET_MAGIC, WORKING_SET_NAME
from mvm.linux.files import raise_if_full, write_all

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mvm.hostd.sealing.reader import SealedImage
    from mvm.hostd.sealing.records import BoxCipher


def seal_working_set(box: BoxCipher, chunks: Iterable[int], chunk_count: int) -> bytes:
    """The file's bytes. Repetitions are dropped; InvalidInput for a chunk that does not exist."""
    once = dict.fromkeys(chunks)
    if once and not 0 <= min(once) <= max(once) < chunk_count:
        raise InvalidInput(f"a working set names chunks of 0 to {chunk_count - 1}")
    ordered = array("I", once)
    if sys.byteorder == "big":
        ordered.byteswap()
    return WORKING_SET_MAGIC + box.seal(ordered.tobytes())


def save_working_set(image: SealedImage, chunks: Iterable[int]) -> None:
    """Replace the working set of an open image, atomically. Not synced: a lost hint costs time, not data."""
    sealed = seal_working_set(image.working_set_box, chunks, image.chunk_count)
    temporary = f".tmp-{WORKING_SET_NAME}-{os.urandom(6).hex()}"
    handle = image.directory_fd
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(temporary, flags, 0o600, dir_fd=handle)
        try:
            write_all(fd, sealed)
        finally:
            os.close(fd)
        os.rename(temporary, WORKING_SET_NAME, src_dir_fd=handle, dst_dir_fd=handle)
    except OSError as error:
        try:
            os.unlink(temporary, dir_fd=handle)
        except FileNotFoundError:
            pass
        raise_if_full(error, _shown(handle))
        raise


def load_working_set(image: SealedImage) -> array[int]:
    """Chunk numbers, first touched first; empty if none was saved or what is there is not sound."""
    limit = len(WORKING_SET_MAGIC) + BOX_OVERHEAD + 4 * image.chunk_count
    try:
        raw = plainfile.read_all(image.directory_fd, WORKING_SET_NAME, limit, "the working set")
        if not raw.startswith(WORKING_SET_MAGIC):
            return array("I")
        data = image.working_set_box.open(memoryview(raw)[len(WORKING_SET_MAGIC) :], "the working set")
    except (IntegrityError, OSError):
        return array("I")
    if len(data) % 4:
        return array("I")
    chunks = array("I", data)
    if sys.byteorder == "big":
        chunks.byteswap()
    return chunks if not chunks or max(chunks) < image.chunk_count else array("I")


def _shown(handle: int) -> Path:
    from pathlib import Path

    return Path(os.readlink(f"/proc/self/fd/{handle}")) / WORKING_SET_NAME
