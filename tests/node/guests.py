"""Tenants in the node whose guest was built on this computer: the node has no network to fetch packages from."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tests.node.conftest import Rig

STATE = "/var/lib/mvm"
SIZE = ("--profile", "minimal", "--mem", "192", "--data-disk", "64")
RUN_S = 300
BUILD_S = 900


class Guests:
    """`create` makes a tenant by the node's own command and gives it the revision."""

    def __init__(self, rig: Rig, here: Path) -> None:
        self._rig = rig
        self._built = Rig(here)
        self._built.mvm("tenant", "create", "acme", "--flake", "nix/embedded", *SIZE)
        self._built.mvm("tenant", "build", "acme", timeout=BUILD_S)

    @property
    def revision(self) -> Path:
        """The directory of the revision on this computer."""
        (folder,) = (self._built.root / "revisions").iterdir()
        return folder

    def create(self, tenant: str) -> str:
        self._rig.sh(f"mvm tenant create {tenant} --flake nix/embedded {' '.join(SIZE)}")
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            root = self._built.root
            archive.add(root / "revisions", arcname="revisions")
            history = f"tenants/{tenant}/revisions.json"
            archive.add(root / "tenants" / "acme" / "revisions.json", arcname=history)
        # Synced: tar does not, and a test takes the power away.
        self._rig.sh(f"tar -x -C {STATE} --no-same-owner -p; sync -f {STATE}", stdin=out.getvalue())
        return tenant


def shown(rig: Rig, tenant: str) -> dict[str, Any]:
    """`mvm tenant show`, by the node's root."""
    found: dict[str, Any] = json.loads(rig.sh(f"mvm tenant show {tenant} --output json"))
    return found


def state(rig: Rig, tenant: str) -> str:
    return str(shown(rig, tenant)["instances"][0]["state"])


def vmms(rig: Rig) -> list[int]:
    """The node's VMMs, whatever their program."""
    out = rig.sh("ps -eo pid=,comm= | grep -E ' (qemu-system|firecracker)' || true")
    return [int(line.split()[0]) for line in out.splitlines()]
