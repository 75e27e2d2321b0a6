"""Where flakes are found, and what a staged flake consists of."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvm.builder.flakes import embedded_flake_dir, is_package_flake, local_flake_dir, lock_hash_of, stage
from mvm.builder.host import check_profile, check_space, collect
from mvm.builder.store_path import nar_sha256
from mvm.core.errors import BuildFailed, InvalidInput, NotFound, ResourceExhausted


def flake(path: Path) -> Path:
    (path / "packages").mkdir(parents=True)
    (path / "flake.nix").write_text("{ }")
    (path / "flake.lock").write_text("{}")
    (path / "packages/packages.json").write_text("{}")
    return path


def agent(path: Path) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "__main__.py").write_text("pass\n")
    (path / "inner/a.py").write_text("a = 1\n")
    return path


@pytest.mark.req("B3")
@pytest.mark.parametrize("alias", ["nix/embedded", "embedded", "nix/embedded/"])
def test_the_alias_means_the_shipped_flake_anywhere(tmp_path: Path, alias: str) -> None:
    assert local_flake_dir(alias, tmp_path) == embedded_flake_dir()
    assert is_package_flake(embedded_flake_dir())


def test_a_directory_wins_over_the_alias(tmp_path: Path) -> None:
    own = flake(tmp_path / "nix/embedded")
    assert local_flake_dir("nix/embedded", tmp_path) == own
    assert local_flake_dir(f"path:{own}", Path("/")) == own


@pytest.mark.parametrize("ref", ["", "a\0b", "/nonexistent", "./x", "path:nowhere", "some/where"])
def test_a_reference_to_nothing_is_refused(tmp_path: Path, ref: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        local_flake_dir(ref, tmp_path)
    assert caught.value.resolution


def test_other_references_are_left_to_nix(tmp_path: Path) -> None:
    assert local_flake_dir("git+file:///somewhere?dir=nix", tmp_path) is None


@pytest.mark.req("B5", "B8")
def test_staging_depends_on_content_alone(tmp_path: Path) -> None:
    one, other = flake(tmp_path / "one"), flake(tmp_path / "deeper/other")
    guest, same = agent(tmp_path / "guest"), agent(tmp_path / "same")
    (other / "flake.nix").chmod(0o600)
    (other / "result").symlink_to("/nowhere")
    (other / ".git").mkdir()
    (other / "guest").mkdir()
    (other / "guest/stale.py").write_text("x")
    (same / "__pycache__").mkdir()
    (same / "__pycache__/a.pyc").write_bytes(b"x")
    (same / "notes.txt").write_text("x")
    stage(one, guest, tmp_path / "s1")
    stage(other, same, tmp_path / "s2")
    assert nar_sha256(tmp_path / "s1") == nar_sha256(tmp_path / "s2")
    assert (tmp_path / "s1/guest/inner/a.py").is_file()
    (guest / "inner/a.py").write_text("a = 2\n")
    stage(one, guest, tmp_path / "s3")
    assert nar_sha256(tmp_path / "s3") != nar_sha256(tmp_path / "s1")


def test_staging_without_an_agent_or_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        stage(flake(tmp_path / "f"), tmp_path / "none", tmp_path / "s")
    (tmp_path / "f/flake.lock").unlink()
    with pytest.raises(InvalidInput):
        lock_hash_of(tmp_path / "f")


def test_profile_and_space_are_checked_first(tmp_path: Path) -> None:
    check_profile("minimal")
    with pytest.raises(InvalidInput) as caught:
        check_profile("minimla")
    assert "baseline, minimal, python" in caught.value.details
    check_space(tmp_path / "not/there/yet", 1)
    with pytest.raises(ResourceExhausted):
        check_space(tmp_path, 1 << 62)


def test_outputs_are_recognised_by_what_they_hold(tmp_path: Path) -> None:
    for folder, files in (("b", ["vmlinux", "initrd"]), ("c", ["rootfs.ext4"]), ("a", ["fc-base.json"])):
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).write_text(name)
    outputs = [tmp_path / name for name in "abc"]
    artifacts = collect(outputs, "ref", "minimal", "0" * 64)
    assert artifacts.kernel == tmp_path / "b/vmlinux"
    assert artifacts.rootfs == tmp_path / "c/rootfs.ext4"
    with pytest.raises(BuildFailed):
        collect(outputs[:2], "ref", "minimal", "0" * 64)
