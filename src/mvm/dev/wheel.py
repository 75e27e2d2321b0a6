"""This very mvm as a wheel: from a checkout or from an installed package, the same bytes for the same files.

The build backend is not needed (an installed mvm has none) and its result would carry the time. The layout is the
wheel format's (PEP 427): `mvm/...`, and `mvm-<version>.dist-info/` with METADATA, WHEEL, entry_points.txt and RECORD.
The embedded flake goes to `mvm/_data/nix/embedded`, where `mvm.builder.flakes` looks for it, the service's files to
`mvm/_data/systemd`, for `mvm.hostd.install`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import os
import stat
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from mvm.core.errors import NotFound
from mvm.hostd.install import units

_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_WHEEL: Final = "Wheel-Version: 1.0\nGenerator: mvm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_FLAKE: Final = "mvm/_data/nix/embedded"
_SERVICE: Final = "mvm/_data/systemd"
_SKIPPED: Final = frozenset({"__pycache__", ".mypy_cache", ".ruff_cache", "result"})


def package_dir() -> Path:
    """The package `mvm`, wherever it was imported from."""
    return Path(__file__).resolve().parents[1]


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of every regular file, in order of name, without what tools leave behind."""
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix()):
        inside = path.relative_to(folder)
        if not _SKIPPED.intersection(inside.parts) and path.is_file() and not path.is_symlink():
            yield inside.as_posix(), path


def contents(package: Path, flake: Path, service: Path) -> dict[str, tuple[bytes, bool]]:
    """name in the wheel -> (bytes, executable), without the metadata. `service`: units and what belongs to them."""
    found = {f"mvm/{name}": _read(path) for name, path in files_below(package)}
    for place, folder in ((_FLAKE, flake), (_SERVICE, service)):
        found.update({f"{place}/{name}": _read(path) for name, path in files_below(folder)})
    return found


def _read(path: Path) -> tuple[bytes, bool]:
    return path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR)


def metadata() -> tuple[str, dict[str, bytes]]:
    """(version, files of dist-info) of the mvm that runs. NotFound if it runs without being installed."""
    try:
        distribution = importlib.metadata.distribution("mvm")
    except importlib.metadata.PackageNotFoundError as error:
        raise NotFound(
            "this mvm is not installed",
            details="It runs from a directory that pip knows nothing of, so there is no metadata for its wheel.",
            resolution="install it, for example with scripts/setup in a checkout",
        ) from error
    texts = {name: distribution.read_text(name) or "" for name in ("METADATA", "entry_points.txt")}
    if (folder := checkout()) is not None:
        # An editable install knows the commands of the day it was made.
        scripts = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
        lines = (f"{name} = {target}\n" for name, target in sorted(scripts.items()))
        texts["entry_points.txt"] = "[console_scripts]\n" + "".join(lines)
    return distribution.version, {name: text.encode() for name, text in texts.items()}


def assemble(version: str, info: Mapping[str, bytes], files: Mapping[str, tuple[bytes, bool]]) -> bytes:
    """The archive. Times, order and modes are fixed, so equal files give equal bytes."""
    folder = f"mvm-{version}.dist-info"
    everything = dict(files)
    everything.update({f"{folder}/{name}": (data, False) for name, data in info.items()})
    everything[f"{folder}/WHEEL"] = (_WHEEL.encode(), False)
    record = "".join(
        f"{name},{_digest(data)},{len(data)}\n" for name, (data, _) in sorted(everything.items())
    )
    everything[f"{folder}/RECORD"] = ((record + f"{folder}/RECORD,,\n").encode(), False)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, (data, executable) in sorted(everything.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3  # Unix: the mode below means something
            entry.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return out.getvalue()


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def build(flake: Path) -> tuple[str, bytes]:
    """(file name, bytes) of the wheel of the running mvm, with the embedded flake at `flake`."""
    version, info = metadata()
    return f"mvm-{version}-py3-none-any.whl", assemble(
        version, info, contents(package_dir(), flake, units.shipped_dir())
    )


def checkout() -> Path | None:
    """The directory of the checkout this mvm runs from, None for an installed one."""
    folder = package_dir().parents[1]
    return folder if os.path.exists(folder / "pyproject.toml") else None


def requirements() -> str:
    """What the node's environment gets beside mvm, as pip reads it.

    A checkout has the lock with its hashes. An installed mvm pins what it is itself running with, and what is installed
    beside it that its dependencies need on other Pythons only.
    """
    folder = checkout()
    if folder is not None and (folder / "requirements.lock").is_file():
        return (folder / "requirements.lock").read_text(encoding="utf-8")
    pins: dict[str, str] = {}
    todo = ["mvm"]
    while todo:
        distribution = importlib.metadata.distribution(todo.pop())
        for line in distribution.requires or ():
            name = _required_name(line)
            if name and name not in pins:
                try:
                    pins[name] = importlib.metadata.version(name)
                except importlib.metadata.PackageNotFoundError:
                    continue  # for another platform
                todo.append(name)
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def _required_name(line: str) -> str:
    """The project a Requires-Dist line names; empty for one that only an extra asks for."""
    spec, _, marker = line.partition(";")
    if "extra" in marker:
        return ""
    length = next((i for i, c in enumerate(spec) if not (c.isalnum() or c in "-_.")), len(spec))
    return spec[:length].lower().replace("_", "-")
