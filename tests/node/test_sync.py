"""Directories in the node's source area."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.node.conftest import Rig

pytestmark = [pytest.mark.node, pytest.mark.req("B8")]


def sync(rig: Rig, folder: Path, name: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(
        rig.mvm("sync", str(folder), "--name", name, "--output", "json").stdout
    )
    return found


def test_what_arrives_is_what_is_here(rig: Rig, tmp_path: Path) -> None:
    folder = tmp_path / "flake"
    (folder / "sub").mkdir(parents=True)
    (folder / "flake.nix").write_text("{ }\n")
    (folder / "sub" / "run").write_text("#!/bin/sh\necho ran\n")
    (folder / "sub" / "run").chmod(0o755)
    (folder / "link").symlink_to("flake.nix")
    (folder / "old").write_text("goes away")
    first = sync(rig, folder, "probe")
    assert first["place"] == "/srv/mvm/probe"
    assert rig.sh("cd /srv/mvm/probe; cat flake.nix; sub/run; readlink link; cat ../probe.id").split("\n")[:-1] == [
        "{ }", "ran", "flake.nix", first["id"],
    ]  # fmt: skip

    os.utime(folder / "flake.nix", (1, 1))
    assert sync(rig, folder, "probe")["id"] == first["id"], "times do not count"

    (folder / "old").unlink()
    assert sync(rig, folder, "probe")["id"] != first["id"]
    assert rig.sh("cd /srv/mvm/probe; find . | sort").split() == [
        ".",
        "./flake.nix",
        "./link",
        "./sub",
        "./sub/run",
    ]


def test_a_name_that_leads_elsewhere_is_refused(rig: Rig, tmp_path: Path) -> None:
    rig.mvm("sync", str(tmp_path), "--name", "../etc", code=2)


def test_the_embedded_flake_arrives_whole(rig: Rig) -> None:
    sync(rig, Path("nix/embedded"), "flake")
    assert rig.sh("cd /srv/mvm/flake; ls flake.nix flake.lock").split() == ["flake.lock", "flake.nix"]
