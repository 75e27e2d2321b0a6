"""Atomic writes, wiping, removal and bounded reads, against a real directory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvm.core.errors import Busy, Conflict, InvalidInput, ResourceExhausted
from mvm.linux import files


@pytest.mark.req("L4")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(old=st.binary(max_size=200), new=st.binary(max_size=200))
def test_write_atomic_replaces_everything(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "f"
    files.write_atomic(path, old)
    files.write_atomic(path, memoryview(new), 0o640)
    assert path.read_bytes() == new
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.req("L4")
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    files.write_atomic(path, b"old")

    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ResourceExhausted):
        files.write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.req("L4")
def test_sweep_takes_only_what_interrupted_writers_left(tmp_path: Path) -> None:
    (tmp_path / "keep").write_bytes(b"")
    left = files.temporary_beside(tmp_path / "keep")
    left.write_bytes(b"half")
    assert files.sweep_temporaries(tmp_path) == [left.name]
    assert os.listdir(tmp_path) == ["keep"]


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_read_bounded_takes_up_to_the_limit(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * size)
    assert files.read_bounded(path, 10) == b"x" * size


def test_read_bounded_refuses_more_and_other_things(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 11)
    with pytest.raises(InvalidInput):
        files.read_bounded(path, 10)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidInput):  # and does not hang
        files.read_bounded(tmp_path / "fifo", 10)
    with pytest.raises(InvalidInput):
        files.read_bounded(tmp_path, 10)


def test_ensure_dir_sets_the_mode_and_refuses_a_link(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    files.ensure_dir(path, 0o750)
    path.chmod(0o777)
    files.ensure_dir(path, 0o750)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(Conflict):
        files.ensure_dir(tmp_path / "link", 0o700)


@pytest.mark.req("L7", "S6")
def test_wipe_overwrites_before_it_unlinks(tmp_path: Path) -> None:
    path, other = tmp_path / "f", tmp_path / "other"
    with path.open("wb") as file:
        file.write(b"secret" * 1000)
        file.truncate(10 << 20)
    os.link(path, other)  # still shows the blocks after the name is gone
    blocks = other.stat().st_blocks
    files.wipe(path)
    files.wipe(path)
    assert not path.exists()
    assert other.read_bytes() == bytes(10 << 20)
    assert other.stat().st_blocks <= blocks + 8, "holes stay holes"


@pytest.mark.req("L7")
def test_wipe_and_remove_tree_do_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "dir").symlink_to(outside)
    (tree / "file").symlink_to(outside / "precious")
    (tree / "deep" / "own").write_bytes(b"")
    files.wipe(tree / "file")
    files.remove_tree(tree)
    files.remove_tree(tree)
    assert not tree.exists()
    assert (outside / "precious").read_bytes() == b"precious"


def test_remove_tree_takes_it_well_that_another_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keeper that has just ended renames its last file while its directory is removed."""
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    for name in ("a", "b", "below/c"):
        (tree / name).write_text(name)
    listed = os.listdir

    def with_one_too_many(path: int) -> list[str]:
        found = listed(path)
        return [".tmp-gone", *found] if found else found

    monkeypatch.setattr(os, "listdir", with_one_too_many)
    files.remove_tree(tree)
    assert not tree.exists()


@pytest.mark.req("L7")
def test_remove_tree_has_no_limit_of_depth(tmp_path: Path) -> None:
    """More levels than this process may have open files or frames, each with a file."""
    tree = tmp_path / "tree"
    tree.mkdir()
    at = os.open(tree, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=at)
        os.close(os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=at))
        deeper = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = deeper
    os.close(at)
    files.remove_tree(tree)
    assert os.listdir(tmp_path) == []


def test_remove_tree_stops_at_a_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    # /proc is a mount in every place this runs, and nothing in it may be touched.
    removed: list[object] = []
    monkeypatch.setattr(os, "unlink", lambda *a, **k: removed.append(a))
    monkeypatch.setattr(os, "rmdir", lambda *a, **k: removed.append(a))
    with pytest.raises(Conflict):
        files.remove_tree(Path("/proc"))
    assert removed == []


@pytest.mark.req("L5")
def test_a_lock_excludes_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.locked(path, wait=0):
        with pytest.raises(Busy) as caught, files.locked(path, wait=0.01):
            pass
        assert str(os.getpid()) in caught.value.details
    with files.locked(path, wait=0, shared=True), files.locked(path, wait=0, shared=True):
        with pytest.raises(Busy), files.locked(path, wait=0):
            pass
    with files.locked(path, wait=0):
        pass


def test_a_lock_on_a_removed_file_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and flock the file is replaced: whoever opens the new one must still be excluded."""
    import fcntl

    path = tmp_path / "lock"
    real, calls = fcntl.flock, 0

    def racing(fd: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", racing)
    with files.locked(path, wait=0):
        monkeypatch.undo()
        with pytest.raises(Busy), files.locked(path, wait=0):
            pass
