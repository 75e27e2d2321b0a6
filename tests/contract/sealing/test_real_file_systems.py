"""What only a real file system can show: a disk that is full, and one call that swaps two directories."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.hostd.sealing.memory import Memory, Sleep, contents, everything, identity, sleep

from mvm.core.errors import ResourceExhausted
from mvm.hostd.sealing import CHUNK, commit, destroy, recover
from mvm.hostd.sealing import directory as module


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """2 MiB."""
    target = tmp_path / "disk"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "none", target], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.mark.root
@pytest.mark.req("S1", "S3")
def test_a_full_disk_leaves_the_last_snapshot_and_nothing_else(small_disk: Path) -> None:
    data = bytearray(os.urandom(4 * CHUNK)) + bytes(28 * CHUNK)
    who = identity()
    first = sleep(small_disk / f".new-{who.snapshot}", everything(data), who=who)
    commit(first.directory, small_disk / "latest")
    first = Sleep(small_disk / "latest", first.identity, first.info)
    before = bytes(data)
    data[:] = os.urandom(len(data))
    with first.open() as parent:
        with pytest.raises(ResourceExhausted) as full:
            sleep(small_disk / ".new-2", everything(data), parent=parent)
        assert full.value.resolution
        assert os.listdir(small_disk) == ["latest"]
        assert contents(parent) == before
        # The space is free again: a smaller sleep fits.
        data[:] = before
        data[:4096] = b"x" * 4096
        who = identity()
        second = sleep(small_disk / f".new-{who.snapshot}", Memory(data, {0}), parent=parent, who=who)
    displaced = commit(second.directory, small_disk / "latest")
    assert displaced is not None
    destroy(displaced)
    with Sleep(small_disk / "latest", second.identity, second.info).open() as image:
        assert contents(image) == data
    assert recover(small_disk) == []


@pytest.mark.req("S1")
def test_the_exchange_is_one_call(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    try:
        module._exchange(tmp_path / "a", tmp_path / "b")
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            pytest.skip("the file system of the temporary directory cannot exchange")
        raise
    assert os.listdir(tmp_path / "a") == ["b"]
    assert os.listdir(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        module._exchange(tmp_path / "a", tmp_path / "missing")
