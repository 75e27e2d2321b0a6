"""The segment a sleep is writing: hands out offsets, each once, and puts sealed records there."""

from __future__ import annotations

import hashlib
import os
import threading
from typing import TYPE_CHECKING

from mvm.hostd.sealing.layout import KEY_BYTES, TAG_BYTES, SnapshotIdentity, render_segment_header
from mvm.hostd.sealing.records import SegmentCipher
from mvm.linux.files import write_all

if TYPE_CHECKING:
    from mvm.core.ids import SnapshotId


class NewSegment:
    """Named after the snapshot that writes it, under a data key made here. `fd` stays the caller's."""

    def __init__(self, fd: int, identity: SnapshotIdentity) -> None:
        header = render_segment_header(identity.instance, identity.snapshot)
        self.id: SnapshotId = identity.snapshot
        self.key = os.urandom(KEY_BYTES)
        self.end = len(header)
        self._fd = fd
        self._cipher = SegmentCipher(self.key, hashlib.sha256(header).digest())
        self._lock = threading.Lock()
        write_all(fd, header)

    def append(self, chunk: int, present: int, zeroed: int, codec: int, body: bytes) -> tuple[int, int]:
        """Seal and write one record; (offset, length). Thread-safe.

        The offset is the nonce, so it is taken for good before anything can fail.
        """
        length = len(body) + TAG_BYTES
        with self._lock:
            offset = self.end
            self.end += length
        sealed = memoryview(self._cipher.seal(offset, chunk, present, zeroed, codec, body))
        at = offset
        while sealed:
            written = os.pwrite(self._fd, sealed, at)
            sealed, at = sealed[written:], at + written
        return offset, length
