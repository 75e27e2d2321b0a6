"""What `mvm sync` sends: a directory as one archive whose bytes depend on its content alone.

In a git work tree that is what git knows or would add (ignored files stay behind), elsewhere everything but
repositories and what tools leave behind. A name, the bytes, a link's target and the executable bit are kept; owners,
times and other mode bits are not. The archive's SHA-256 is the tree's id: equal trees have equal ids on every computer.

In the node the directory is replaced as a whole: unpacked beside its place, synced, renamed. A file that is gone here
is gone there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from mvm.core.errors import InvalidInput, NotFound, ResourceExhausted
from mvm.dev.archive import Entry, tar
from mvm.dev.model import SOURCE_AREA

MAX_BYTES: Final = 512 << 20
MAX_FILES: Final = 50_000
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
_SKIPPED: Final = frozenset(
    {".git", ".hg", ".jj", ".venv", "__pycache__", "node_modules", ".direnv", "result"}
)
_CACHES: Final = re.compile(r"\.[a-z]+_cache\Z")

Capture = Callable[[list[str]], tuple[int, bytes]]
"""Runs a program: (exit status, standard output)."""


class Tree(NamedTuple):
    """`id`: SHA-256 of `data`, in hex. `files` counts links too."""

    data: bytes
    id: str
    files: int


def target(name: str) -> str:
    """Where a directory of this name is in the node. InvalidInput for a name that is not one."""
    if not _NAME.match(name):
        raise InvalidInput(
            f"{name[:80]!a} is not a name for the node's source area",
            details="A name is lower case letters, digits, '.', '_' and '-', at most 63, and starts with a letter or"
            " digit.",
            resolution="Choose one with --name.",
        )
    return f"{SOURCE_AREA}/{name}"


def default_name(folder: Path) -> str:
    """The directory's own name, made to fit."""
    words = re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._")
    return words[:63].rstrip("-._") or "src"


def pack(folder: Path, capture: Capture) -> Tree:
    """The archive of `folder`. NotFound, InvalidInput (a special file), ResourceExhausted (too large)."""
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a directory", resolution="Name the directory to copy into the node.")
    names = _known_to_git(folder, capture)
    entries = _entries(folder, _walk(folder) if names is None else names)
    data = tar(entries)
    return Tree(data, hashlib.sha256(data).hexdigest(), len(entries))


def _known_to_git(folder: Path, capture: Capture) -> list[str] | None:
    if shutil.which("git") is None:
        return None
    code, inside = capture(["git", "-C", str(folder), "rev-parse", "--is-inside-work-tree"])
    if code != 0 or inside.strip() != b"true":
        return None
    argv = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    code, listing = capture(argv)
    # A repository that git refuses to read (somebody else's) is copied like any directory.
    return None if code != 0 else sorted({os.fsdecode(name) for name in listing.split(b"\0") if name})


def _walk(folder: Path) -> list[str]:
    found: list[str] = []
    for where, folders, files in os.walk(folder):
        base = Path(where).relative_to(folder)
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in links and not _left_behind(name)]
        found += [(base / name).as_posix() for name in [*files, *links] if not _left_behind(name)]
    return sorted(found)


def _left_behind(name: str) -> bool:
    return name in _SKIPPED or bool(_CACHES.match(name)) or name.endswith(".pyc")


def _entries(folder: Path, names: Iterable[str]) -> list[Entry]:
    entries: list[Entry] = []
    total = 0
    for name in names:
        path = folder / name
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue  # known to git and deleted
        if stat.S_ISLNK(found.st_mode):
            entries.append(Entry(name, link=os.readlink(path)))
        elif stat.S_ISREG(found.st_mode):
            total += found.st_size
            _bound(folder, total, len(entries))
            entries.append(Entry(name, path.read_bytes(), bool(found.st_mode & stat.S_IXUSR)))
        elif not stat.S_ISDIR(found.st_mode):
            raise InvalidInput(
                f"{path} is neither a file nor a link",
                details="Sockets, pipes and devices cannot be copied.",
                resolution="Remove it, or have git ignore it.",
            )
    _bound(folder, total, len(entries))
    return entries


def _bound(folder: Path, size: int, files: int) -> None:
    if size > MAX_BYTES or files > MAX_FILES:
        raise ResourceExhausted(
            f"{folder} is too large to copy into the node",
            details=f"More than {MAX_BYTES >> 20} MiB or {MAX_FILES} files.",
            resolution="Have git ignore what the node does not need, or name a smaller directory.",
        )


_RECEIVE: Final = """\
set -eu
place=$1 id=$2
mkdir -p "${place%/*}"
rm -rf "$place.new" "$place.old"
mkdir "$place.new"
tar -x -C "$place.new" --no-same-owner
sync -f "$place.new"
[ ! -e "$place" ] || mv "$place" "$place.old"
mv "$place.new" "$place"
echo "$id" >"$place.id"
rm -rf "$place.old"
sync -f "${place%/*}"
"""


def receive_command(name: str, tree: Tree) -> list[str]:
    """What runs in the node, with the archive on its standard input."""
    return ["/bin/sh", "-c", _RECEIVE, "mvm-sync", target(name), tree.id]
