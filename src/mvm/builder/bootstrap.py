"""Takes the static busybox out of its package, without dpkg: the one file nix builds start from.

A .deb is an `ar` archive; its `data.tar.xz` holds the file tree. Extraction gives the same bytes whoever does it, and
the result is pinned by its own hash in the package lock, so doing it here adds no trust.
"""

from __future__ import annotations

import io
import lzma
import os
import tarfile
from typing import TYPE_CHECKING

from mvm.core.errors import BuildFailed

if TYPE_CHECKING:
    from pathlib import Path

_BINARY_MAX = 16 << 20


def ar_member(archive: bytes, prefix: str) -> tuple[str, bytes]:
    """(name, content) of the first member whose name starts with `prefix`. Raises ValueError if damaged or absent."""
    if archive[:8] != b"!<arch>\n":
        raise ValueError("not an ar archive")
    position = 8
    while position + 60 <= len(archive):
        header = archive[position : position + 60]
        if header[58:] != b"`\n":
            raise ValueError("damaged ar header")
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        position += 60
        if size < 0 or position + size > len(archive):
            raise ValueError("truncated ar member")
        if name.startswith(prefix):
            return name, archive[position : position + size]
        position += size + size % 2
    raise ValueError(f"no member {prefix}")


def extract_busybox(deb: Path, target: Path) -> None:
    """Make `target/bin/busybox` from the package `deb`, nothing else in it."""
    try:
        name, data = ar_member(deb.read_bytes(), "data.tar")
        if name != "data.tar.xz":
            raise ValueError(f"{name} is not xz-compressed")
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data))) as tar:
            member = next(
                m for m in tar if m.isreg() and os.path.normpath(m.name).split("/")[-2:] == ["bin", "busybox"]
            )
            stream = tar.extractfile(member)
            if stream is None or member.size > _BINARY_MAX:
                raise ValueError("busybox has an unexpected form")
            binary = stream.read()
    except (ValueError, StopIteration, lzma.LZMAError, tarfile.TarError) as error:
        raise BuildFailed(
            f"{deb.name} holds no usable busybox",
            details=str(error),
            resolution="relock the flake: mvm flake update",
        ) from error
    (target / "bin").mkdir(parents=True)
    path = target / "bin/busybox"
    path.write_bytes(binary)
    os.chmod(path, 0o555)
