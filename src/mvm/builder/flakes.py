"""Where a flake is and what a build reads of it.

A flake reference is a local directory, the alias `nix/embedded` (or `embedded`) for the flake shipped with mvm, or
anything else, which nix interprets. A Debian-based flake (it has `packages/packages.json`) is staged before a build:
a copy of its directory with the guest agent's source in `guest/`, names sorted, modes normalised, nothing else, so
that checkout and installed wheel give nix the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Final

from mvm.core.errors import InvalidInput, NotFound
from mvm.linux.files import read_bounded

EMBEDDED_ALIASES: Final = ("nix/embedded", "embedded")
PROFILES: Final = ("baseline", "minimal", "python")
_FLAKE_LOCK_MAX = 4 << 20
_FILE_MAX = 16 << 20


def embedded_flake_dir() -> Path:
    """The flake shipped with mvm: package data in an installed wheel, `nix/embedded` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "_data/nix/embedded", package.parents[1] / "nix/embedded"):
        if (candidate / "flake.nix").is_file():
            return candidate
    raise NotFound(
        "the embedded flake is not part of this installation",
        details=f"looked below {package}",
        resolution="install mvm from its wheel or run it from a checkout",
    )


def guest_source_dir() -> Path:
    """The guest agent's source."""
    return Path(__file__).resolve().parents[1] / "guest"


def local_flake_dir(flake_ref: str, cwd: Path) -> Path | None:
    """The directory `flake_ref` names, or None if it is not a local one.

    Raises InvalidInput for a path that holds no flake.
    """
    if not flake_ref or "\0" in flake_ref or len(flake_ref) > 4096:
        raise InvalidInput(
            "the flake reference is empty or malformed", resolution="use, for example, nix/embedded"
        )
    text = flake_ref.removeprefix("path:")
    path = Path(os.path.normpath(cwd / text))
    if (path / "flake.nix").is_file():
        return path
    if text.rstrip("/") in EMBEDDED_ALIASES:
        return embedded_flake_dir()
    looks_local = flake_ref != text or text.startswith(("/", ".")) or path.exists()
    if looks_local:
        raise InvalidInput(
            f"{flake_ref} holds no flake",
            details=f"{path / 'flake.nix'} does not exist",
            resolution="name a directory with a flake.nix, or use nix/embedded",
        )
    if ":" not in text and "#" not in text and "/" in text:
        raise InvalidInput(
            f"{flake_ref} does not exist",
            details=f"neither {path} nor a flake reference with a scheme",
            resolution="name a directory with a flake.nix, a reference such as git+https://..., or nix/embedded",
        )
    return None


def is_package_flake(flake_dir: Path) -> bool:
    return (flake_dir / "packages/packages.json").is_file()


def lock_hash_of(flake_dir: Path) -> str:
    """Hex sha256 of flake.lock. Raises InvalidInput if there is none: an unpinned flake has no revision."""
    path = flake_dir / "flake.lock"
    if not path.is_file():
        raise InvalidInput(
            f"{flake_dir} is not pinned",
            details=f"{path} does not exist",
            resolution="create it with: nix flake lock",
        )
    return hashlib.sha256(read_bounded(path, _FLAKE_LOCK_MAX)).hexdigest()


def stage(flake_dir: Path, guest_dir: Path, target: Path) -> None:
    """Copy the flake and the agent's Python files into the new directory `target`."""
    if not (guest_dir / "__main__.py").is_file():
        raise NotFound(
            "the guest agent's source is missing",
            details=f"{guest_dir / '__main__.py'} does not exist",
            resolution="reinstall mvm",
        )
    _copy(flake_dir, target, python_only=False, skip=frozenset({"guest"}))
    _copy(guest_dir, target / "guest", python_only=True, skip=frozenset())


def _ignored(name: str) -> bool:
    return name in ("__pycache__", "result") or name.startswith((".", "result-")) or name.endswith("~")


def _copy(source: Path, target: Path, *, python_only: bool, skip: frozenset[str]) -> None:
    target.mkdir(mode=0o755)
    for entry in sorted(os.scandir(source), key=lambda item: item.name):
        if _ignored(entry.name) or entry.name in skip:
            continue
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            _copy(Path(entry.path), target / entry.name, python_only=python_only, skip=frozenset())
        elif stat.S_ISREG(mode) and (not python_only or entry.name.endswith(".py")):
            copy = target / entry.name
            copy.write_bytes(read_bounded(Path(entry.path), _FILE_MAX))
            copy.chmod(0o644)
