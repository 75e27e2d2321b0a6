"""The wheel carries what mvm needs at run time. Built with the locked backend, without the network."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    done = subprocess.run(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("mvm-*.whl")
    return zipfile.ZipFile(path)


def below(folder: Path) -> set[str]:
    return {
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


def test_carries_the_package(wheel: zipfile.ZipFile) -> None:
    shipped = set(wheel.namelist())
    assert {f"mvm/{name}" for name in below(ROOT / "src" / "mvm")} <= shipped


@pytest.mark.req("B3")
def test_carries_the_embedded_flake_unchanged(wheel: zipfile.ZipFile) -> None:
    flake = ROOT / "nix" / "embedded"
    prefix = "mvm/_data/nix/embedded/"
    assert {n.removeprefix(prefix) for n in wheel.namelist() if n.startswith(prefix)} == below(flake)
    for name in below(flake):
        assert wheel.read(prefix + name) == (flake / name).read_bytes(), name


@pytest.mark.req("H7")
def test_carries_the_services_files_unchanged(wheel: zipfile.ZipFile) -> None:
    prefix = "mvm/_data/systemd/"
    assert {n.removeprefix(prefix) for n in wheel.namelist() if n.startswith(prefix)} == below(
        ROOT / "systemd"
    )
    for name in below(ROOT / "systemd"):
        assert wheel.read(prefix + name) == (ROOT / "systemd" / name).read_bytes(), name


def test_carries_the_guest_and_the_command(wheel: zipfile.ZipFile) -> None:
    assert "mvm/guest/__init__.py" in wheel.namelist()
    (entry,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    commands = wheel.read(entry).decode()
    assert "mvm = mvm.cli.__main__:main" in commands
    assert "mvm-hostd = mvm.hostd.__main__:main" in commands


def test_carries_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"mvm"}
