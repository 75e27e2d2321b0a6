"""Where a guest is booted to find out whether it boots: one at a time, in bounds as an instance's, and gone afterwards.

    <cache>/probe.lock    held while one is under way
    <cache>/probe/        there only then: runtime/ and jail/, as an instance has them

Its control group is called `mvm-probe`, and is of the cache directory as an instance's is of its state root. Nothing
depends on an orderly end: whoever comes next, and mvm-hostd when it starts, ends and removes what one that was killed
left behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from mvm.core.errors import Busy, MissingPrerequisite
from mvm.hostd import keeper
from mvm.hostd.resources import cgroup
from mvm.linux.files import ensure_dir, locked, remove_tree
from mvm.linux.mount import detach, mounts_below

NAME: Final = "mvm-probe"
"""Of the VM and its control group. No instance is called so: their names have a `--`."""
WAIT_S: Final = 60.0


class Room(msgspec.Struct, frozen=True):
    """`cgroup`: the group for the VMM, None where the host has none and nobody insists."""

    runtime: Path
    jail: Path
    cgroup: Path | None


@contextmanager
def probe_room(cache: Path, *, mem_mib: int, vcpus: int, confined: bool) -> Iterator[Room]:
    """An empty one, for a guest of this size; everything in it is ended and removed afterwards.

    `confined`: MissingPrerequisite where no control group can be made, as for an instance in baseline mode. Busy if
    another probe takes longer than WAIT_S.
    """
    ensure_dir(cache)
    with locked(cache / "probe.lock", wait=WAIT_S):
        _clear(cache)
        folder = _folder(cache)
        try:
            for needed in (folder, folder / "runtime", folder / "jail"):
                ensure_dir(needed)
            group = _group(cache, mem_mib, vcpus, confined)
            yield Room(folder / "runtime", folder / "jail", group)
        finally:
            _clear(cache)


def sweep(cache: Path) -> bool:
    """Whether there was something that a killed probe left, which is gone now. One that is under way is let be."""
    if not _folder(cache).exists():
        return False
    try:
        with locked(cache / "probe.lock", wait=0):
            return _clear(cache)
    except Busy:
        return False


def _folder(cache: Path) -> Path:
    return cache / "probe"


def _clear(cache: Path) -> bool:
    """The folder goes last: it says that there may be something."""
    folder = _folder(cache)
    if not folder.exists():
        return False
    keeper.end_leftovers(folder / "runtime")
    cgroup.groups(cache).remove(NAME)
    for point in mounts_below(folder):
        detach(point)
    remove_tree(folder)
    return True


def _group(cache: Path, mem_mib: int, vcpus: int, confined: bool) -> Path | None:
    groups = cgroup.groups(cache)
    missing = groups.available()
    if not missing:
        try:
            return groups.apply(NAME, cgroup.limits(mem_mib=mem_mib, vcpus=vcpus))
        except MissingPrerequisite as error:
            if confined:
                raise
            missing = error.details
    if confined:
        raise MissingPrerequisite("no control group can be made for the probe's VM", details=missing)
    return None
