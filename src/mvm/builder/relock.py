"""Renews a package lock from what the archive offers now.

Reads `packages/seeds.json`, resolves every set on an empty system, and rewrites `packages/packages.json` and
`flake.lock` together. The outcome is a function of the seeds and the archive: neither what this host has installed
nor its other package sources take part.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mvm.builder.apt import private_apt
from mvm.builder.bootstrap import extract_busybox
from mvm.builder.flakes import lock_hash_of
from mvm.builder.package_lock import (
    BOOTSTRAP_PACKAGE,
    FORMAT,
    LOCK_MAX,
    Bootstrap,
    Package,
    PackageLock,
    package_file,
    parse_lock,
    parse_seeds,
    render_flake_lock,
    render_lock,
)
from mvm.builder.store_path import nar_sha256
from mvm.core.errors import BuildFailed, InvalidInput, NotFound
from mvm.linux.files import read_bounded, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from mvm.builder.apt import Version
    from mvm.builder.package_lock import Seed


class Relocked(NamedTuple):
    """What a relock did: name -> (old version or None, new version or None) where they differ, and the new hash."""

    changes: dict[str, tuple[str | None, str | None]]
    lock_hash: str


def select(seed: Seed, resolved: dict[str, str]) -> list[str]:
    """The names of one set that go into the lock."""
    only = re.compile(seed.only) if seed.only else None
    kept = [name for name in resolved if name not in seed.exclude and (only is None or only.fullmatch(name))]
    if not kept:
        raise InvalidInput(
            "a package set resolves to nothing",
            details=f"seed: {seed}",
            resolution="correct packages/seeds.json",
        )
    return sorted(kept)


def assemble(sets: dict[str, list[str]], versions: dict[str, Version], bootstrap_nar: str) -> PackageLock:
    used = sorted({name for names in sets.values() for name in names} | {BOOTSTRAP_PACKAGE})
    packages = {
        name: Package(
            version=versions[name].version, size=versions[name].size, sha256=versions[name].sha256,
            file=package_file(name, versions[name].version),
        )
        for name in used
    }  # fmt: skip
    return PackageLock(
        format=FORMAT,
        bootstrap=Bootstrap(nar_sha256=bootstrap_nar),
        packages=packages,
        sets={key: tuple(names) for key, names in sorted(sets.items())},
    )


def relock(flake_dir: Path, *, on_line: Callable[[str], None] | None = None) -> Relocked:
    """Rewrite the package lock and flake.lock of the flake in `flake_dir` (which must be writable).

    Raises NotFound (no seeds there), BuildFailed (archive unreachable or without a package that is needed).
    """
    seeds_path, lock_path = flake_dir / "packages/seeds.json", flake_dir / "packages/packages.json"
    if not seeds_path.is_file():
        raise NotFound(
            f"{flake_dir} is not a flake of Debian packages",
            details=f"{seeds_path} does not exist",
            resolution="relock other flakes with: nix flake update",
        )
    seeds = parse_seeds(read_bounded(seeds_path, LOCK_MAX))
    old = parse_lock(read_bounded(lock_path, LOCK_MAX)).packages if lock_path.exists() else {}
    with tempfile.TemporaryDirectory(prefix="mvm-relock-") as name:
        scratch = Path(name)
        scratch.chmod(0o755)
        with private_apt(scratch) as apt:
            apt.update(on_line)
            sets: dict[str, list[str]] = {}
            resolved: dict[str, str] = {}
            for key, seed in sorted(seeds.items()):
                found = apt.resolve(seed.install)
                sets[key] = select(seed, found)
                resolved.update({name: found[name] for name in sets[key]})
            if BOOTSTRAP_PACKAGE not in resolved:
                resolved[BOOTSTRAP_PACKAGE] = apt.resolve([BOOTSTRAP_PACKAGE])[BOOTSTRAP_PACKAGE]
            versions = apt.show(resolved.items())
            missing = sorted(resolved.keys() - versions.keys())
            if missing:
                raise BuildFailed(
                    "the archive gives no sha256 for some packages",
                    details=", ".join(missing),
                    resolution="check the machine's apt sources with: apt-get update",
                )
            into = scratch / "download"
            into.mkdir()
            files = apt.download([(BOOTSTRAP_PACKAGE, resolved[BOOTSTRAP_PACKAGE])], into)
            extract_busybox(files[BOOTSTRAP_PACKAGE], scratch / "bootstrap")
            lock = assemble(sets, versions, nar_sha256(scratch / "bootstrap"))
    # packages.json first: a crash in between leaves a flake.lock that does not match, which nix refuses.
    write_atomic(lock_path, render_lock(lock), mode=0o644)
    write_atomic(flake_dir / "flake.lock", render_flake_lock(nar_sha256(flake_dir / "packages")), mode=0o644)
    names = sorted(old.keys() | lock.packages.keys())
    changes = {
        name: (
            old[name].version if name in old else None,
            lock.packages[name].version if name in lock.packages else None,
        )
        for name in names
        if (old.get(name) and old[name].sha256) != (lock.packages.get(name) and lock.packages[name].sha256)
    }
    return Relocked(changes, lock_hash_of(flake_dir))
