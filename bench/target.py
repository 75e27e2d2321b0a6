"""What is measured: which VMM, with which programs, and guests from where.

A revision is built by nix where there is nix; a node that has none is given the directory of a finished revision.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mvm.builder.model import Artifacts
from mvm.builder.revisions import RevisionStore
from mvm.core import revision as revisions
from mvm.core.snapshot import ArtifactHash
from mvm.hostd.vmm.choice import PROGRAMS
from mvm.standalone.ports import Built

if TYPE_CHECKING:
    from mvm.core.ids import RevisionId
    from mvm.hostd.vmm.driver import Driver


class Target(NamedTuple):
    """`vmm`: `qemu` or `firecracker`; `programs`: the directory of Firecracker's; `revision`: a directory, or None for
    one that is built."""

    vmm: str = "qemu"
    programs: Path = Path(PROGRAMS)
    revision: Path | None = None

    def driver(self, cache: Path) -> Driver:
        if self.vmm == "firecracker":
            from mvm.hostd.vmm.firecracker.driver import FirecrackerDriver

            return FirecrackerDriver(cache, self.programs)
        from mvm.hostd.vmm.qemu.driver import QemuDriver

        return QemuDriver(cache)

    def environment(self) -> dict[str, str]:
        """For commands of mvm: do the work yourself, with this VMM."""
        return {"MVM_HOSTD": "", "MVM_VMM": self.vmm, "MVM_FIRECRACKER": str(self.programs)}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vmm", choices=("qemu", "firecracker"), default="qemu")
    parser.add_argument(
        "--firecracker",
        type=Path,
        default=Path(os.environ.get("MVM_FIRECRACKER") or PROGRAMS),
        metavar="DIR",
        help="where its programs are (default $MVM_FIRECRACKER, or where mvm looks for them)",
    )
    parser.add_argument(
        "--revision", type=Path, metavar="DIR", help="a finished revision, where nothing can be built"
    )


def of_options(options: argparse.Namespace) -> Target:
    return Target(options.vmm, options.firecracker.resolve(), options.revision)


class Given:
    """Implements `mvm.standalone.ports.Workshop` with one finished revision, whatever is asked for."""

    notice = "the guests are of a revision that was built elsewhere"

    def __init__(self, root: Path, folder: Path) -> None:
        self._store = RevisionStore(root)
        self._folder = folder

    def resolve(self, flake_ref: str, cwd: Path) -> str:
        return flake_ref

    def build(
        self,
        flake_ref: str,
        profile: str,
        lock_sha256: str | None,
        *,
        on_line: Callable[[str], object],
        on_step: Callable[[str, float | None], object],
    ) -> Built:
        given = revisions.decode_revision((self._folder / revisions.DOCUMENT).read_bytes())
        made, reused = self._store.import_artifacts(
            Artifacts(
                kernel=self._folder / revisions.KERNEL,
                initrd=self._folder / revisions.INITRD,
                rootfs=self._folder / revisions.ROOTFS,
                fc_base=self._folder / revisions.FC_BASE,
                store_paths=given.store_paths,
                flake_ref=given.flake_ref,
                profile=given.profile,
                lock_hash=given.lock_hash,
            )
        )
        hashes = tuple(ArtifactHash(name, sha256) for name, sha256 in made.sha256.items())
        return Built(made.id, made.flake_ref, made.lock_hash, made.store_paths, hashes, reused)

    def collect(self, keep: Collection[RevisionId]) -> list[RevisionId]:
        return self._store.collect(keep)
