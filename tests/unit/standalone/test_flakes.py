"""Renewing a lock: what is refused before anything is touched, and that a copy is a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mvm.builder.relock import Relocked
from mvm.core.errors import Conflict, InvalidInput
from mvm.standalone import flakes


@pytest.fixture
def flake(tmp_path: Path) -> Path:
    folder = tmp_path / "flake"
    (folder / "packages").mkdir(parents=True)
    (folder / "flake.nix").write_text("{}")
    (folder / "flake.lock").write_text("{}")
    for name in ("seeds.json", "packages.json"):
        (folder / "packages" / name).write_text("{}")
    return folder


@pytest.fixture
def relocked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen: list[Path] = []

    def record(folder: Path, **_: Any) -> Relocked:
        seen.append(folder)
        return Relocked({"libc6": ("1", "2")}, "ab" * 32)

    monkeypatch.setattr(flakes, "relock", record)
    return seen


@pytest.mark.req("B1")
def test_updates_in_place_or_in_a_copy(flake: Path, relocked: list[Path], tmp_path: Path) -> None:
    assert flakes.update(str(flake), tmp_path, copy_to=None)[0] == flake
    copy = tmp_path / "copy"
    for _ in range(2):
        folder, done = flakes.update(str(flake), tmp_path, copy_to=copy)
        assert folder == copy
        assert done.changes == {"libc6": ("1", "2")}
    assert relocked == [flake, copy, copy]
    assert (copy / "flake.nix").read_text() == "{}"


@pytest.mark.req("B1")
def test_refuses_what_it_cannot_lock(flake: Path, relocked: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    with pytest.raises(Conflict):
        flakes.update(str(flake), tmp_path, copy_to=tmp_path / "mine")
    assert (tmp_path / "mine/file").read_text() == "precious"
    with pytest.raises(InvalidInput):
        flakes.update("github:owner/name", tmp_path, copy_to=None)
    (flake / "packages/packages.json").unlink()
    with pytest.raises(InvalidInput):
        flakes.update(str(flake), tmp_path, copy_to=None)
    assert relocked == []
