"""Nix's content addressing, computed here: which store path a file will have, and which hash flake.lock pins.

Knowing a path before nix does lets the builder ask for what is missing and nothing else, and lets a relock write
flake.lock without running nix. The formats are those of the Nix manual ("File System Object", "Store Path").
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STORE = "/nix/store"
_ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
_NAME_OK = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-._?=")
_NAME_MAX = 211


def store_name(name: str) -> str:
    """`name` with every character nix does not allow in a store path replaced by '-'."""
    return "".join(c if c in _NAME_OK else "-" for c in name)[:_NAME_MAX].lstrip(".")


def nix_base32(digest: bytes) -> str:
    """Nix's own base 32: most significant digit first, alphabet without e, o, t and u."""
    length = (len(digest) * 8 - 1) // 5 + 1
    number = int.from_bytes(digest, "little")
    return "".join(_ALPHABET[number >> (5 * i) & 31] for i in reversed(range(length)))


def _make(kind: str, inner: str, name: str) -> str:
    full = hashlib.sha256(f"{kind}:sha256:{inner}:{STORE}:{name}".encode()).digest()
    folded = bytearray(20)
    for index, byte in enumerate(full):
        folded[index % 20] ^= byte
    return f"{STORE}/{nix_base32(bytes(folded))}-{name}"


def flat_path(sha256: str, name: str) -> str:
    """Store path of a file with this content hash (hex), as `nix-store --add-fixed sha256` makes it."""
    return _make("output:out", hashlib.sha256(f"fixed:out:sha256:{sha256}:".encode()).hexdigest(), name)


def recursive_path(nar_sha256: str, name: str) -> str:
    """Store path of a tree with this NAR hash (hex), as `nix store add-path` makes it."""
    return _make("source", nar_sha256, name)


def nar_sha256(path: Path) -> str:
    """Hex sha256 of the NAR of a file or tree: names, contents, symbolic links and the execute bit."""
    digest = hashlib.sha256()
    digest.update(_string(b"nix-archive-1"))
    for part in _node(path):
        digest.update(part)
    return digest.hexdigest()


def sri(hex_sha256: str) -> str:
    """`sha256-...` as flake.lock writes it."""
    return "sha256-" + base64.b64encode(bytes.fromhex(hex_sha256)).decode()


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def _node(path: Path) -> Iterator[bytes]:
    mode = path.lstat().st_mode
    yield _string(b"(") + _string(b"type")
    if stat.S_ISLNK(mode):
        yield _string(b"symlink") + _string(b"target") + _string(os.fsencode(os.readlink(path)))
    elif stat.S_ISDIR(mode):
        yield _string(b"directory")
        for name in sorted(os.listdir(path), key=os.fsencode):
            yield (
                _string(b"entry")
                + _string(b"(")
                + _string(b"name")
                + _string(os.fsencode(name))
                + _string(b"node")
            )
            yield from _node(path / name)
            yield _string(b")")
    else:
        yield _string(b"regular")
        if mode & stat.S_IXUSR:
            yield _string(b"executable") + _string(b"")
        yield _string(b"contents") + _string(path.read_bytes())
    yield _string(b")")
