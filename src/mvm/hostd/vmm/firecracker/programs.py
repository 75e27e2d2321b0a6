"""The binaries: where they are, what they say they are, and whether they are the ones that were meant.

Asking a program for its version costs as much as a wake's smaller parts, and hashing it too, so the answers are kept
with the file's identity (device, inode, size, time of change) beside them.

Nothing is executed before it is known to be what was meant: first who could have written it, then its hash, then the
questions that only the program answers.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from mvm.core.errors import MissingPrerequisite, Refused
from mvm.hostd.vmm.firecracker.version import (
    Version,
    parse_snapshot_format,
    parse_version,
    require_supported,
)
from mvm.linux.files import ensure_dir, write_atomic
from mvm.linux.process import run

NAMES: Final = ("firecracker", "jailer")
_TIMEOUT_S: Final = 10.0


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`format`: of the device state; `sha256`: of each program."""

    version: tuple[int, int, int]
    jailer: tuple[int, int, int]
    format: str
    sha256: dict[str, str]
    seen: str


def require_there(folder: Path) -> None:
    """MissingPrerequisite unless both programs are in `folder`."""
    missing = [name for name in NAMES if not os.access(folder / name, os.X_OK)]
    if missing:
        raise MissingPrerequisite(
            "Firecracker is not installed",
            details=f"There is no {' and no '.join(missing)} in {folder}.",
            resolution="Install a release of it (firecracker and jailer of one version), or use QEMU.",
        )


def inspect(folder: Path, cache: Path, *, pins: Mapping[str, str], confined: bool) -> Facts:
    """What the programs are. MissingPrerequisite if they are not there, too old or not of one version; Refused if they
    are not the pinned ones, or, where `confined`, if anybody but root could have written or replaced them."""
    require_there(folder)
    if confined:
        for name in NAMES:
            require_owned(folder / name)
    seen = " ".join(_identity(folder / name) for name in NAMES)
    kept = cache / f"firecracker-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
    facts = _known(kept, seen)
    hashes = {name: sha256(folder / name) for name in NAMES} if facts is None else facts.sha256
    for name, expected in pins.items():
        if hashes.get(name) != expected:
            raise Refused(
                f"{folder / name} is not the program that was pinned",
                details=f"sha256 {hashes.get(name)}, expected {expected}",
                resolution="Install the right one, or correct the settings if it was replaced on purpose.",
            )
    if facts is None:
        facts = _ask(folder, hashes, seen)
        ensure_dir(cache)
        write_atomic(kept, msgspec.json.encode(facts))
    if facts.jailer != facts.version:
        raise MissingPrerequisite(
            "firecracker and jailer are not of one version",
            details=f"firecracker {Version(*facts.version)}, jailer {Version(*facts.jailer)}",
            resolution="Install both from one release.",
        )
    require_supported(Version(*facts.version))
    return facts


def _known(kept: Path, seen: str) -> Facts | None:
    try:
        facts = msgspec.json.decode(kept.read_bytes(), type=Facts)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return facts if facts.seen == seen else None


def _ask(folder: Path, hashes: dict[str, str], seen: str) -> Facts:
    def said(name: str, option: str) -> str:
        return run([str(folder / name), option], timeout=_TIMEOUT_S).stdout.decode("utf-8", "replace")

    return Facts(
        version=parse_version(said("firecracker", "--version")),
        jailer=parse_version(said("jailer", "--version")),
        format=parse_snapshot_format(said("firecracker", "--snapshot-version")),
        sha256=hashes,
        seen=seen,
    )


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(path: Path) -> str:
    found = os.stat(path)
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def require_owned(path: Path) -> None:
    """Refused unless `path`, what it leads to, and every directory on the way to either are root's alone to change."""
    for end in (path.resolve(strict=True), Path(os.path.abspath(path))):
        for place in (end, *end.parents):
            found = os.stat(place)
            # In a sticky directory others make names, and cannot change those that are root's.
            open_to_others = stat.S_IMODE(found.st_mode) & 0o022 and not (
                stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
            )
            if found.st_uid != 0 or open_to_others:
                raise Refused(
                    "Firecracker could be replaced by others than root",
                    details=f"{place}: owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}",
                    resolution=f"Check what it is, then: chown root {place} && chmod go-w {place}",
                )
