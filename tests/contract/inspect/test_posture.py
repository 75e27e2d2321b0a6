"""`mvm posture` as a process, on a node without VMs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.contract.inspect.test_host import cli

from mvm.core.posture import GUARANTEES


@pytest.mark.req("O6")
def test_every_guarantee_is_answered_and_the_mode_is_last(tmp_path: Path) -> None:
    done = cli(tmp_path / "root", "posture", "--output", "json")
    assert done.returncode == 0, done.stderr
    *rows, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in rows] == [guarantee.id for guarantee in GUARANTEES]
    for row, guarantee in zip(rows, GUARANTEES, strict=True):
        assert (row["status"] == "not-there") == (not guarantee.there)
    assert last["mode"] in ("development", "baseline", "hardened")
    assert not (tmp_path / "root").exists(), "looking makes nothing"


@pytest.mark.req("O6")
def test_a_mode_can_be_required(tmp_path: Path) -> None:
    assert cli(tmp_path / "root", "posture", "--require", "development").returncode == 0
    refused = cli(tmp_path / "root", "posture", "--require", "hardened")
    if any(not guarantee.there for guarantee in GUARANTEES):
        assert refused.returncode == 13
        assert "not in hardened mode" in refused.stderr
