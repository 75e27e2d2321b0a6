"""The node's parts against the real tools: pip takes the wheel, mke2fs makes the disk, git says what belongs."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mvm.builder.flakes import embedded_flake_dir
from mvm.dev import disks, programs, sync, wheel

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, data = wheel.build(embedded_flake_dir())
    path = tmp_path_factory.mktemp("wheel") / name
    path.write_bytes(data)
    return path


def run(*argv: str, cwd: Path | None = None) -> str:
    return subprocess.run(argv, check=True, capture_output=True, timeout=120, cwd=cwd).stdout.decode()


@pytest.mark.req("O4")
def test_pip_installs_the_wheel_and_it_is_this_mvm(built: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    argv = ("install", "--quiet", "--no-index", "--no-deps", "--target", str(target), str(built))
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *argv)
    code = "import mvm, mvm.cli.__main__; print(mvm.__file__)"
    found = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {code}")
    assert Path(found.strip()).is_relative_to(target)
    package = ROOT / "src" / "mvm"
    for name, path in wheel.files_below(package):
        assert (target / "mvm" / name).read_bytes() == path.read_bytes(), name


def test_the_wheel_has_what_the_backends_has(built: Path, tmp_path: Path) -> None:
    argv = ("-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path))
    run(sys.executable, *argv, cwd=ROOT)
    (theirs,) = tmp_path.glob("mvm-*.whl")
    assert theirs.name == built.name

    def contents(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            return {
                n: archive.read(n) for n in archive.namelist() if n.startswith("mvm/") and not n.endswith("/")
            }

    assert contents(built) == contents(theirs)


def test_building_twice_gives_the_same_bytes(built: Path) -> None:
    assert wheel.build(embedded_flake_dir())[1] == built.read_bytes()


def test_an_installed_mvm_pins_what_it_runs_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the lock names, since this environment was made from it; markers are left to pip."""
    locked = {line.split(" ")[0] for line in wheel.requirements().splitlines() if line[:1].isalnum()}
    assert "--hash=" in wheel.requirements()
    monkeypatch.setattr(wheel, "checkout", lambda: None)
    assert set(wheel.requirements().split()) >= locked


@pytest.mark.req("O4")
def test_the_state_disk_is_a_file_system_with_its_places(tmp_path: Path) -> None:
    disk = tmp_path / "state.ext4"
    disks.make_state(disk, 2)
    assert disk.stat().st_size == 2 << 30
    assert disks.allocated(disk) < 256 << 20
    run("e2fsck", "-fn", str(disk))
    listing = run("debugfs", "-R", "ls -p /", str(disk))
    assert {line.split("/")[5] for line in listing.splitlines() if line} >= {"mvm", "nix", "src"}
    assert [p.name for p in tmp_path.iterdir()] == ["state.ext4"]


def test_a_sparse_copy_keeps_bytes_and_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with source.open("wb") as file:
        file.seek(3 << 20)
        file.write(b"middle" * 1000)
        file.truncate(64 << 20)
    disks.copy_sparse(source, target)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (source, target)]
    assert digests[0] == digests[1]
    assert disks.allocated(target) < 1 << 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.req("B8")
def test_what_git_ignores_stays_behind(tmp_path: Path) -> None:
    run("git", "init", "--quiet", str(tmp_path))
    (tmp_path / ".gitignore").write_text("secret\n")
    for name in ("tracked", "new", "secret", "deleted"):
        (tmp_path / name).write_text(name)
    run("git", "-C", str(tmp_path), "add", "tracked", "deleted")
    (tmp_path / "deleted").unlink()
    tree = sync.pack(tmp_path, programs.capture)
    assert tree.files == 3  # .gitignore, tracked, new
    assert b"secret\n" in tree.data
    assert tree == sync.pack(tmp_path, programs.capture)


def test_programs_return_output_and_how_they_ended() -> None:
    assert programs.capture(["sh", "-c", "echo out; exit 3"]) == (3, b"out\n")
    assert programs.execute(["sh", "-c", "kill -9 $$"]) == 137


@pytest.mark.req("O4")
def test_the_nodes_installer_does_what_pip_would(built: Path, tmp_path: Path) -> None:
    """pip itself then finds the package whole, and takes it away whole."""
    environment = tmp_path / "env"
    run(sys.executable, "-m", "venv", str(environment))
    installer = ROOT / "src" / "mvm" / "dev" / "node" / "install.py"
    for _ in range(2):
        run("/usr/bin/python3", "-I", "-S", str(installer), str(built), str(environment))
    pip = (str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
    files = run(*pip, "show", "--files", "mvm").partition("Files:\n")[2].split()
    (site,) = environment.glob("lib/python3.*/site-packages")
    assert {"mvm/__init__.py", "../../../bin/mvm", "../../../bin/mvm-hostd"} <= set(files)
    assert all((site / name).is_file() for name in files)
    there = {p.relative_to(site).as_posix() for p in (site / "mvm").rglob("*") if p.is_file()}
    assert there == {name for name in files if name.startswith("mvm/")}
    for command in ("mvm", "mvm-hostd"):
        done = subprocess.run([environment / "bin" / command, "--help"], capture_output=True, timeout=60)
        # The environment has none of the dependencies: it gets as far as looking for the first.
        assert b"ModuleNotFoundError: No module named" in done.stderr
    run(*pip, "uninstall", "--yes", "mvm")
    assert not (site / "mvm" / "__init__.py").exists()
    assert not (environment / "bin" / "mvm").exists()
