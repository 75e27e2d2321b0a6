"""The workshop of a development machine: nix on this host, revisions below the state root."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from mvm.builder import host as host_builder
from mvm.builder.flakes import EMBEDDED_ALIASES, embedded_flake_dir, local_flake_dir
from mvm.builder.model import BuildRequest
from mvm.builder.revisions import RevisionStore
from mvm.core.snapshot import ArtifactHash
from mvm.standalone.ports import Built

if TYPE_CHECKING:
    from mvm.core.ids import RevisionId
    from mvm.standalone.ports import LineSink, StepSink


class HostWorkshop:
    """Implements `mvm.standalone.ports.Workshop`. `root`: the state root; `cache`: nix's evaluation cache."""

    notice = host_builder.NOTICE

    def __init__(self, root: Path, cache: Path) -> None:
        self._revisions = RevisionStore(root)
        self._cache = cache

    def resolve(self, flake_ref: str, cwd: Path) -> str:
        folder = local_flake_dir(flake_ref, cwd)
        if folder is None:
            return flake_ref
        if flake_ref.rstrip("/") in EMBEDDED_ALIASES and os.path.samefile(folder, embedded_flake_dir()):
            # The one shipped with mvm, wherever a later version is installed.
            return flake_ref.rstrip("/")
        return str(folder)

    def build(
        self, flake_ref: str, profile: str, lock_sha256: str | None, *, on_line: LineSink, on_step: StepSink
    ) -> Built:
        request = BuildRequest(flake_ref=flake_ref, profile=profile, lock_hash=lock_sha256)
        # Relative references were resolved when they were given; what is left means the same everywhere.
        builder = host_builder.HostNixBuilder(self._cache, cwd=Path("/"))
        artifacts = builder.build(request, on_line=on_line, on_progress=on_step)
        on_step("keeping the revision", None)
        revision, reused = self._revisions.import_artifacts(artifacts)
        return Built(
            revision=revision.id,
            flake_ref=artifacts.flake_ref,
            lock_sha256=revision.lock_hash,
            store_paths=revision.store_paths,
            artifacts=tuple(ArtifactHash(name, sha256) for name, sha256 in revision.sha256.items()),
            reused=reused,
        )

    def collect(self, keep: Collection[RevisionId]) -> list[RevisionId]:
        return self._revisions.collect(keep)
