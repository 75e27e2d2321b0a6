"""Renewing what a flake of Debian packages is locked to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from mvm.builder.flakes import is_package_flake, local_flake_dir
from mvm.builder.relock import Relocked, relock
from mvm.core.errors import Conflict, InvalidInput


def update(
    flake_ref: str, cwd: Path, *, copy_to: Path | None, on_line: Callable[[str], None] | None = None
) -> tuple[Path, Relocked]:
    """Lock the flake to the versions the archive offers now; (its directory, what changed).

    `copy_to`: leave the flake as it is and do this in a copy there, replaced if an earlier update made it (Conflict if
    anything else is there). InvalidInput for a flake that is not local or holds no package lock.
    """
    source = local_flake_dir(flake_ref, cwd)
    if source is None or not is_package_flake(source):
        raise InvalidInput(
            f"{flake_ref!a} is no flake whose packages mvm locks",
            details="It needs packages/seeds.json and packages/packages.json beside its flake.nix, on this machine.",
            resolution="For any other flake use: nix flake update",
        )
    target = source
    if copy_to is not None:
        target = copy_to.absolute()
        if target.exists() and not is_package_flake(target):
            raise Conflict(
                f"{target} is in the way",
                details="It is there and is no copy of a flake.",
                resolution="Name another directory.",
            )
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    return target, relock(target, on_line=on_line)
