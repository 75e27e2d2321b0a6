"""The package lock of a Debian-based flake: which packages, which versions, which bytes.

`packages/seeds.json` is written by people: per set, what to install and what to leave out (packages that only
maintainer scripts or documentation need, since no maintainer script runs). `packages/packages.json` is written by a
relock: every package with version, size and sha256, and per set the names in use. Rendering is a function of the
content alone, so relocking against the same archive gives the same bytes, and flake.lock pins them by narHash.
"""

from __future__ import annotations

import json
import re
from typing import Final

import msgspec

from mvm.builder.store_path import flat_path, recursive_path, sri, store_name
from mvm.core.errors import InvalidInput

FORMAT: Final = 1
BOOTSTRAP_NAME: Final = "bootstrap-busybox"
BOOTSTRAP_PACKAGE: Final = "busybox-static"
LOCK_MAX: Final = 4 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]{0,127}")
_VERSION = re.compile(r"[A-Za-z0-9.+:~-]{1,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Seed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One set as people write it. `only`: a regular expression; of the resolved names, just those are kept."""

    install: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    only: str | None = None


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One binary package. `size` in bytes, `sha256` in hex, `file` its name in the nix store."""

    version: str
    size: int
    sha256: str
    file: str


class Bootstrap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one binary that is taken out of its package before nix runs: `bin/busybox` as a tree, by NAR hash."""

    nar_sha256: str


class PackageLock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of packages.json."""

    format: int
    bootstrap: Bootstrap
    packages: dict[str, Package]
    sets: dict[str, tuple[str, ...]]

    def wanted(self, sets: tuple[str, ...]) -> dict[str, Package]:
        """The packages of these sets, by name, plus the bootstrap's."""
        names = {BOOTSTRAP_PACKAGE} | {name for key in sets for name in self.sets.get(key, ())}
        return {name: self.packages[name] for name in sorted(names)}


def package_file(name: str, version: str) -> str:
    return store_name(f"{name}_{version}_amd64.deb")


def package_path(package: Package) -> str:
    """Where the .deb is in the nix store once it has been added."""
    return flat_path(package.sha256, package.file)


def bootstrap_path(lock: PackageLock) -> str:
    return recursive_path(lock.bootstrap.nar_sha256, BOOTSTRAP_NAME)


def parse_lock(untrusted: bytes) -> PackageLock:
    """Raises InvalidInput, naming the place, for anything that is not a complete lock."""
    if len(untrusted) > LOCK_MAX:
        raise InvalidInput("packages.json is too large", resolution=_RELOCK)
    try:
        lock = msgspec.json.decode(untrusted, type=PackageLock)
    except msgspec.DecodeError as error:
        raise InvalidInput(
            "packages.json is not a package lock", details=str(error), resolution=_RELOCK
        ) from error
    problem = _problem(lock)
    if problem:
        raise InvalidInput("packages.json is not a package lock", details=problem, resolution=_RELOCK)
    return lock


_RELOCK = "restore the file, or write a new one with: mvm flake update"


def _problem(lock: PackageLock) -> str:
    if lock.format != FORMAT:
        return f"format {lock.format} is not the {FORMAT} this version reads"
    if not _SHA256.fullmatch(lock.bootstrap.nar_sha256):
        return "bootstrap.nar_sha256 is not a sha256"
    if BOOTSTRAP_PACKAGE not in lock.packages:
        return f"{BOOTSTRAP_PACKAGE} is missing"
    for name, package in lock.packages.items():
        if (
            not _NAME.fullmatch(name)
            or not _VERSION.fullmatch(package.version)
            or not _SHA256.fullmatch(package.sha256)
        ):
            return f"package {ascii(name)[:80]} has a malformed name, version or sha256"
        if package.file != package_file(name, package.version) or package.size < 0:
            return f"package {name} has a wrong file name or size"
    for key, names in lock.sets.items():
        missing = sorted(set(names) - lock.packages.keys())
        if missing:
            return f"set {ascii(key)[:80]} names packages without an entry: {', '.join(missing)[:200]}"
    return ""


def parse_seeds(untrusted: bytes) -> dict[str, Seed]:
    try:
        return msgspec.json.decode(untrusted, type=dict[str, Seed])
    except msgspec.DecodeError as error:
        raise InvalidInput(
            "seeds.json is malformed", details=str(error), resolution="compare it with the one shipped"
        ) from error


def render_lock(lock: PackageLock) -> bytes:
    """One package per line, sorted: a relock's diff reads as a list of upgrades."""
    plain = msgspec.to_builtins(lock)
    lines = [
        f"    {json.dumps(k)}: {json.dumps(plain['packages'][k], sort_keys=True)}"
        for k in sorted(plain["packages"])
    ]
    sets = [f"    {json.dumps(k)}: {json.dumps(sorted(plain['sets'][k]))}" for k in sorted(plain["sets"])]
    return (
        "{\n"
        f'  "format": {lock.format},\n'
        f'  "bootstrap": {json.dumps(plain["bootstrap"])},\n'
        '  "packages": {\n' + ",\n".join(lines) + "\n  },\n"
        '  "sets": {\n' + ",\n".join(sets) + "\n  }\n}\n"
    ).encode()


def render_flake_lock(packages_nar_sha256: str) -> bytes:
    """flake.lock as nix writes it for a flake whose only input is the relative path ./packages."""
    locked = {"lastModified": 1, "narHash": sri(packages_nar_sha256), "path": "./packages", "type": "path"}
    node = {"flake": False, "locked": locked, "original": {"path": "./packages", "type": "path"}}
    whole = {
        "nodes": {"packages": node, "root": {"inputs": {"packages": "packages"}}},
        "root": "root",
        "version": 7,
    }
    return (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode()
