"""The device state's file: a magic number, the format's version, JSON, CRC. The layout is the fake's own.

8 bytes magic | 16 bytes version, padded with zeros | JSON | 4 bytes CRC32 of all before
"""

from __future__ import annotations

import json
import os
import struct
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAGIC = b"FAKEFC\0\1"
_HEADER = struct.Struct("<8s16s")
_LIMIT = 10_000_000


class BadSnapshot(Exception):
    """The file is no device state that this version can load."""


def encode(state: dict[str, Any], format_version: str) -> bytes:
    body = _HEADER.pack(MAGIC, format_version.encode()) + json.dumps(state).encode()
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode(raw: bytes, format_version: str) -> dict[str, Any]:
    """Raises BadSnapshot. Another major number, or a newer minor one, is another format."""
    found = read_version(raw)
    ours = [int(part) for part in format_version.split(".")]
    theirs = [int(part) for part in found.split(".")]
    if theirs[0] != ours[0] or theirs[1] > ours[1]:
        raise BadSnapshot(f"Invalid data version: {found}")
    if zlib.crc32(raw[:-4]).to_bytes(4, "little") != raw[-4:]:
        raise BadSnapshot("CRC64 validation failed")
    state = json.loads(raw[_HEADER.size : -4])
    assert isinstance(state, dict)
    return state


def read_version(raw: bytes) -> str:
    if len(raw) > _LIMIT:
        raise BadSnapshot(f"Snapshot size exceeds limit of {_LIMIT} bytes")
    if len(raw) < _HEADER.size + 4:
        raise BadSnapshot("IO Error: File too short to contain CRC")
    magic, version = _HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise BadSnapshot("An error occurred during bitcode serialization: bitcode error")
    return str(version.rstrip(b"\0"), "ascii", "replace")


def load(path: str, format_version: str) -> dict[str, Any]:
    """OSError, BadSnapshot."""
    return decode(read(path), format_version)


def read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 1 << 20):
            pieces.append(piece)
            if len(pieces) > _LIMIT >> 20 and sum(map(len, pieces)) > _LIMIT:
                break
        return b"".join(pieces)
    finally:
        os.close(fd)
