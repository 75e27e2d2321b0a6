"""Records and sealed boxes: what turns pages into ciphertext and back.

A record holds the pages of one chunk that one layer provides: those of its `present` mask, ascending, end to
end, compressed as one zstd frame (codec 1, no content size, no checksum) or, where that does not save a
sixteenth, as they are (codec 0). It is AES-256-GCM under its segment's data key with

    nonce            4 bytes zero, 8 bytes the record's offset in the segment file
    associated data  32 SHA-256 of the segment's header, 8 chunk, 4 present, 4 zeroed, 1 codec

A segment is written once, under a key made for it, and no two records start at the same offset: a nonce
cannot repeat. Nothing else is encrypted under that key.

A sealed box (index, device state, working set) is AES-256-GCM under HMAC-SHA256(snapshot key, purpose) with a
random nonce in front; the associated data is the SHA-256 of the manifest's header.

zstd level 1 was chosen by measurement (docs/formats/sealed-memory.md).
"""

from __future__ import annotations

import hmac
import os
import struct
import threading
from typing import TYPE_CHECKING

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mvm.hostd.sealing.faults import damaged
from mvm.hostd.sealing.layout import BOX_OVERHEAD, NONCE_BYTES

if TYPE_CHECKING:
    from mvm.linux.secret import SecretBytes

RAW = 0
ZSTD = 1
_LEVEL = 1
_NONCE = struct.Struct("<IQ")
_BOUND = struct.Struct("<QIIB")

_contexts = threading.local()


def compress(pages: bytes | bytearray | memoryview) -> tuple[int, bytes]:
    """(codec, body). Safe in any thread: zstd contexts are per thread."""
    context: zstandard.ZstdCompressor | None = getattr(_contexts, "compressor", None)
    if context is None:
        context = zstandard.ZstdCompressor(
            level=_LEVEL, write_content_size=False, write_checksum=False, write_dict_id=False
        )
        _contexts.compressor = context
    body = context.compress(pages)
    if len(body) + len(pages) // 16 > len(pages):
        return RAW, bytes(pages)
    return ZSTD, body


def decompress(codec: int, body: bytes, size: int) -> bytes:
    """Exactly `size` bytes, or IntegrityError."""
    if codec == ZSTD:
        context: zstandard.ZstdDecompressor | None = getattr(_contexts, "decompressor", None)
        if context is None:
            context = _contexts.decompressor = zstandard.ZstdDecompressor()
        try:
            body = context.decompress(body, max_output_size=size)
        except zstandard.ZstdError as error:
            raise damaged("a record of the snapshot does not decompress", str(error)) from None
    elif codec != RAW:
        raise damaged("a record of the snapshot uses an unknown compression", f"codec {codec}")
    if len(body) != size:
        raise damaged("a record of the snapshot has the wrong size", f"{len(body)} bytes, not {size}")
    return body


class SegmentCipher:
    """Seals and opens the records of one segment. Thread-safe."""

    __slots__ = ("_aead", "_digest")

    def __init__(self, key: bytes, header_digest: bytes) -> None:
        self._aead = AESGCM(key)
        self._digest = header_digest

    def seal(self, offset: int, chunk: int, present: int, zeroed: int, codec: int, body: bytes) -> bytes:
        bound = self._digest + _BOUND.pack(chunk, present, zeroed, codec)
        return self._aead.encrypt(_NONCE.pack(0, offset), body, bound)

    def open(self, offset: int, chunk: int, present: int, zeroed: int, codec: int, sealed: bytes) -> bytes:
        bound = self._digest + _BOUND.pack(chunk, present, zeroed, codec)
        try:
            return self._aead.decrypt(_NONCE.pack(0, offset), sealed, bound)
        except InvalidTag:
            raise damaged("the snapshot's memory is damaged", f"chunk {chunk} does not decrypt") from None


class BoxCipher:
    """Seals and opens the boxes of one snapshot for one purpose. Thread-safe."""

    __slots__ = ("_aead", "_digest")

    def __init__(self, snapshot_key: SecretBytes, purpose: bytes, header_digest: bytes) -> None:
        with snapshot_key.view() as view:
            self._aead = AESGCM(hmac.digest(view, b"mvm sealed memory 1 " + purpose, "sha256"))
        self._digest = header_digest

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, data, self._digest)

    def open(self, sealed: bytes | memoryview, what: str) -> bytes:
        """The contents; IntegrityError names `what` ("the index")."""
        if len(sealed) < BOX_OVERHEAD:
            raise damaged(f"{what} of the snapshot is truncated")
        try:
            return self._aead.decrypt(bytes(sealed[:NONCE_BYTES]), sealed[NONCE_BYTES:], self._digest)
        except InvalidTag:
            raise damaged(
                f"{what} of the snapshot is damaged or foreign",
                "it does not decrypt under this snapshot's key",
            ) from None
