"""Which driver this computer has: Lima on macOS, QEMU on Linux."""

from __future__ import annotations

import sys
from pathlib import Path

from mvm.core.errors import MissingPrerequisite
from mvm.dev.model import NodeDriver

FOLDER = "dev"
"""The node's directory below mvm's root."""
CACHE = Path("/var/cache/mvm")


def node(root: Path, platform: str = sys.platform) -> NodeDriver:
    """The node whose files are in `root`/dev. MissingPrerequisite on any other system."""
    from mvm.builder.flakes import embedded_flake_dir

    if platform == "linux":
        from mvm.dev.qemu import QemuNode

        return QemuNode(root / FOLDER, CACHE, embedded_flake_dir)
    if platform == "darwin":
        from mvm.dev.lima import LimaNode

        return LimaNode(root / FOLDER, embedded_flake_dir)
    raise MissingPrerequisite(
        f"there is no development node on {platform}",
        details="It needs Linux with QEMU, or macOS with Lima.",
        resolution="Use a Linux machine.",
    )
