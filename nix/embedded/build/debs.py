"""Reads Debian packages without dpkg: an `ar` archive whose `data.tar.*` member is the file tree.

No maintainer script is ever run. What they would have set up and a guest needs is done by rootfs.py, in the open.
"""

from __future__ import annotations

import io
import lzma
import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple


class Entry(NamedTuple):
    """One file of the guest tree. `kind`: "d", "f" or "l" (symlink). `data`: content or link target."""

    kind: str
    mode: int
    uid: int
    gid: int
    data: bytes


def _data_member(path: str) -> bytes:
    with open(path, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise SystemExit(f"{path}: not a Debian package")
        while header := file.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                body = file.read(size)
                if name.endswith(".xz"):
                    return lzma.decompress(body)
                if name.endswith(".tar"):
                    return body
                raise SystemExit(
                    f"{path}: {name} is compressed in a way this build does not read (xz or none)"
                )
            file.seek(size + size % 2, io.SEEK_CUR)
    raise SystemExit(f"{path}: has no data.tar member")


_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def merged(path: str) -> str:
    """The path on a merged-/usr system: what ships in /bin, /sbin or /lib* lives below /usr."""
    top = path.partition("/")[0]
    return f"usr/{path}" if top in _MERGED else path


def entries(path: str) -> Iterator[tuple[str, Entry]]:
    """(path relative to the root, entry) of every file in the package, on a merged-/usr layout."""
    with tarfile.open(fileobj=io.BytesIO(_data_member(path)), mode="r:") as tar:
        regular: dict[str, Entry] = {}
        for member in tar:
            name = os.path.normpath(member.name).lstrip("/")
            if name in (".", "") or name in _MERGED:
                continue
            name = merged(name)
            if member.isdir():
                entry = Entry("d", member.mode, member.uid, member.gid, b"")
            elif member.issym():
                entry = Entry("l", 0o777, 0, 0, member.linkname.encode())
            elif member.islnk():
                # A hard link becomes a copy: the image is read-only, so the two can never differ.
                entry = regular[merged(os.path.normpath(member.linkname).lstrip("/"))]
            elif member.isreg():
                stream = tar.extractfile(member)
                assert stream is not None
                entry = regular[name] = Entry("f", member.mode, member.uid, member.gid, stream.read())
            else:
                raise SystemExit(f"{path}: {name} is a device or fifo; guests get those from the kernel")
            yield name, entry
