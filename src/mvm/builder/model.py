"""What a build takes and gives, and the protocol every builder implements.

`HostNixBuilder` runs nix on this machine, for development. The same protocol is meant for a builder that starts a
fresh microVM per build, so nothing here says where the work is done: a request in, paths in the local nix store out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

LineSink = Callable[[str], None]
"""Takes one line of the build's log."""
ProgressSink = Callable[[str, float | None], None]
"""Takes the present step, for people to read, and its completed fraction (0 to 1), or None if that is not known."""


class BuildRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`flake_ref` as in builder.flakes; `lock_hash`: hex sha256 the flake's flake.lock must have, or None for any."""

    flake_ref: str
    profile: str
    lock_hash: str | None = None


class Artifacts(msgspec.Struct, frozen=True):
    """A finished build. Files are in the nix store, read-only; `flake_ref` and `lock_hash` say what was built."""

    kernel: Path
    initrd: Path
    rootfs: Path
    fc_base: Path
    store_paths: tuple[str, ...]
    flake_ref: str
    profile: str
    lock_hash: str


class Builder(Protocol):
    """Turns a flake into guest artifacts."""

    def build(
        self,
        request: BuildRequest,
        *,
        on_line: LineSink | None = None,
        on_progress: ProgressSink | None = None,
    ) -> Artifacts:
        """Build synchronously. Raises InvalidInput (profile, flake), Refused (another lock than asked for),
        ResourceExhausted (disk, before starting), MissingPrerequisite (nix, root) and BuildFailed (with the end of
        the log)."""
        ...
