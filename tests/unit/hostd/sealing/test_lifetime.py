"""A snapshot directory from its first byte to its last: aborts, full disks, commits, crashes, rotation, removal."""

from __future__ import annotations

import errno
import itertools
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.hostd.sealing.memory import (
    KEY,
    MARKER,
    Memory,
    Sleep,
    contents,
    everything,
    identity,
    sleep,
    some_memory,
    tenant_key,
)

from mvm.core.errors import Conflict, IntegrityError, InvalidInput, ResourceExhausted
from mvm.core.ids import InstanceId
from mvm.hostd.sealing import (
    PAGE,
    SealWriter,
    bytes_on_disk,
    commit,
    destroy,
    load_working_set,
    peek,
    recover,
    rewrap,
    runs_of,
    save_working_set,
)
from mvm.hostd.sealing import directory as module
from mvm.linux.files import fsync_dir, wipe
from mvm.linux.secret import SecretBytes


def snapshot_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Writing


@pytest.mark.req("S3")
def test_no_plain_text_in_any_file(tmp_path: Path) -> None:
    data = some_memory(8)
    assert data.count(MARKER) > 100
    first = sleep(tmp_path / "a", everything(data), working_set=[(1, 1)])
    data[: 3 * PAGE] = (MARKER * PAGE)[: 3 * PAGE]
    with first.open() as parent:
        second = sleep(tmp_path / "b", Memory(data, {0, 1, 2}), parent=parent)
    files = snapshot_files(first.directory) | snapshot_files(second.directory)
    assert len(files) >= 6
    for raw in files.values():
        assert MARKER not in raw
        assert b"\x28\xb5\x2f\xfd" * 2 not in raw


@pytest.mark.req("S1")
def test_leaving_without_finish_removes_everything(tmp_path: Path) -> None:
    with SealWriter(tmp_path / "a", identity(), KEY.wrap) as writer:
        writer.write_pages(everything(some_memory(2)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Conflict):
        writer.finish()


@pytest.mark.req("S1", "S3")
def test_a_full_disk_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: dict[str, Any] = {name: getattr(os, name) for name in ("pwrite", "write", "fsync", "open", "mkdir")}
    left = 0

    def limited(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            writes = name != "open" or args[1] & os.O_CREAT
            if writes and not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left -= bool(writes)
            return real[name](*args, **kwargs)

        return call

    data = some_memory(4)
    descriptors = len(os.listdir("/proc/self/fd"))
    for allowed in range(200):
        left = allowed
        with monkeypatch.context() as patched:
            for name in real:
                patched.setattr(os, name, limited(name))
            try:
                made = sleep(tmp_path / "a", everything(data))
            except ResourceExhausted:
                made = None
        if made is not None:
            break
        assert list(tmp_path.iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) == descriptors
    else:
        pytest.fail("never finished")
    assert allowed > 10
    with made.open() as image:
        assert contents(image) == data


@pytest.mark.req("S1")
def test_everything_is_synced_before_finish_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file after its last byte, then the directory that names them all."""
    synced: dict[str, int] = {}
    real = os.fsync

    def recording(fd: int) -> None:
        synced[os.readlink(f"/proc/self/fd/{fd}")] = os.fstat(fd).st_size
        real(fd)

    monkeypatch.setattr(os, "fsync", recording)
    made = sleep(tmp_path / "a", everything(some_memory(2)), working_set=[(1, 1)])
    order = list(synced)
    assert order[-1] == str(made.directory)
    assert {name: synced[str(made.directory / name)] for name in os.listdir(made.directory)} == {
        path.name: path.stat().st_size for path in made.directory.iterdir()
    }


@pytest.mark.req("S4", "K2")
def test_the_wrapped_key_is_bound_to_instance_and_snapshot(tmp_path: Path) -> None:
    contexts = []

    def wrap(key: SecretBytes, context: bytes) -> bytes:
        contexts.append(context)
        return KEY.wrap(key, context)

    who = identity()
    with SealWriter(tmp_path / "a", who, wrap) as writer:
        writer.write_pages(everything(some_memory(1)))
        writer.write_state(b"")
        writer.finish()
    assert contexts == [f"snapshot/{who.snapshot}/acme/default-0".encode()]


def test_an_error_of_the_source_is_passed_on(tmp_path: Path) -> None:
    class Broken(Memory):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise RuntimeError("the VMM is gone")

    with pytest.raises(RuntimeError, match="gone"):
        sleep(tmp_path / "a", Broken(some_memory(4), range(128)))
    assert list(tmp_path.iterdir()) == []


def test_misuse_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = some_memory(2)
    made = sleep(tmp_path / "a", everything(data))
    with pytest.raises(Conflict):
        sleep(tmp_path / "a", everything(data))
    assert peek(tmp_path / "a") == (made.identity, made.info.manifest_sha256)
    with pytest.raises(InvalidInput):
        sleep(tmp_path / "b", everything(bytearray(PAGE)))
    with pytest.raises(InvalidInput):
        sleep(tmp_path / "b", everything(bytearray(len(data) + PAGE)))
    with made.open() as parent:
        with pytest.raises(InvalidInput, match="another size"):
            sleep(tmp_path / "b", everything(some_memory(1)), parent=parent)
        with pytest.raises(InvalidInput, match="cannot build on"):
            other = identity(InstanceId.parse("acme/default-1"))
            sleep(tmp_path / "b", everything(data), parent=parent, who=other)
        with pytest.raises(InvalidInput, match="used before"):
            sleep(tmp_path / "b", everything(data), parent=parent, who=made.identity)
    with pytest.raises(InvalidInput, match="outside"):

        class Beyond(Memory):
            def dirty_runs(self) -> list[tuple[int, int]]:
                return [(0, 65)]

        sleep(tmp_path / "b", Beyond(data, ()))
    with SealWriter(tmp_path / "b", identity(), KEY.wrap) as writer, pytest.raises(Conflict):
        writer.write_pages(everything(data))
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# Commit and recovery


class Crash(BaseException):
    """The machine stops here: nothing cleans up."""


def two_snapshots(folder: Path) -> tuple[Sleep, Sleep]:
    data = some_memory(2)
    who = identity()
    old = sleep(folder / f".new-{who.snapshot}", everything(data), who=who)
    assert commit(old.directory, folder / "latest") is None
    old.directory = folder / "latest"
    data[:PAGE] = b"x" * PAGE
    who = identity()
    with old.open() as parent:
        new = sleep(folder / f".new-{who.snapshot}", Memory(data, {0}), parent=parent, who=who)
    return old, new


@pytest.mark.req("S1")
@pytest.mark.parametrize("can_exchange", [True, False])
def test_commit_replaces_and_returns_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    old, new = two_snapshots(tmp_path)
    if not can_exchange:
        monkeypatch.setattr(module, "_exchange", _refuse_exchange)
    displaced = commit(new.directory, tmp_path / "latest")
    assert displaced is not None
    Sleep(displaced, old.identity, old.info).open().close()
    destroy(displaced)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    with Sleep(tmp_path / "latest", new.identity, new.info).open() as image:
        image.verify_all()


def _refuse_exchange(new: Path, latest: Path) -> None:
    raise OSError(errno.EINVAL, "this file system cannot")


@pytest.mark.req("S1")
@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_step_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool, after: bool
) -> None:
    """`after`: the step still happened. Recovery leaves exactly one of the two, whole."""
    outcomes = []
    for step in range(10):
        folder = tmp_path / str(step)
        folder.mkdir()
        old, new = two_snapshots(folder)
        count = 0
        finished = False

        def crashing(real: Any, step: int = step) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count - 1 == step:
                    if after:
                        real(*args, **kwargs)
                    raise Crash
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", crashing(os.rename))
            patched.setattr(module, "fsync_dir", crashing(fsync_dir))
            exchange = module._exchange if can_exchange else _refuse_exchange
            patched.setattr(module, "_exchange", crashing(exchange) if can_exchange else exchange)
            try:
                commit(new.directory, folder / "latest")
                finished = True
            except Crash:
                pass
        recover(folder)
        assert [path.name for path in folder.iterdir()] == ["latest"]
        found, digest = peek(folder / "latest")
        winner = new if found == new.identity else old
        assert digest == winner.info.manifest_sha256
        with Sleep(folder / "latest", winner.identity, winner.info).open() as image:
            image.verify_all()
        outcomes.append(winner is new)
        assert recover(folder) == []
        if finished:
            break
    assert outcomes[-1] is True
    assert outcomes == sorted(outcomes), "once the new one has won it stays"


@pytest.mark.req("S1", "S6")
def test_recover_removes_what_was_being_written(tmp_path: Path) -> None:
    old, new = two_snapshots(tmp_path)
    (new.directory / "manifest").unlink()
    (tmp_path / "stray").write_bytes(b"x")
    (old.directory / ".tmp-key-0011").write_bytes(b"wrapped")
    assert recover(tmp_path) == [new.directory.name, "stray"]
    assert sorted(p.name for p in old.directory.iterdir())[0] == "key"
    with old.open() as image:
        image.verify_all()


def test_commit_wants_neighbours(tmp_path: Path) -> None:
    with pytest.raises(Conflict):
        commit(tmp_path / "a" / ".new-1", tmp_path / "latest")
    with pytest.raises(Conflict):
        commit(tmp_path / "other", tmp_path / "latest")


@pytest.mark.req("S1")
def test_an_open_image_outlives_its_directory(tmp_path: Path) -> None:
    data = some_memory(2)
    made = sleep(tmp_path / "a", everything(data))
    with made.open() as image:
        made.directory.rename(tmp_path / "b")
        assert contents(image) == data
        save_working_set(image, [(1, 1)])
        assert (tmp_path / "b" / "working-set").exists()


# Rotation and removal


@pytest.mark.req("K4")
def test_rotation_changes_the_key_file_only(tmp_path: Path) -> None:
    made = sleep(tmp_path / "a", everything(some_memory(2)), working_set=[(0, 1)])
    before = {p.name: (p.stat().st_ino, p.read_bytes()) for p in made.directory.iterdir()}
    newer = tenant_key(version=2)
    with made.open() as image:
        rewrap(made.directory, KEY.unwrap, newer.wrap)
        image.verify_all()
    after = {p.name: (p.stat().st_ino, p.read_bytes()) for p in made.directory.iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["key"]
    assert before.keys() == after.keys()
    with pytest.raises(IntegrityError):
        made.open(KEY)
    with made.open(newer) as image:
        image.verify_all()
        assert load_working_set(image) == [(0, 1)]


@pytest.mark.req("K4", "S6")
def test_rotation_overwrites_the_old_blob_and_survives_a_refusal(tmp_path: Path) -> None:
    made = sleep(tmp_path / "a", everything(some_memory(1)))
    os.link(made.directory / "key", tmp_path / "watched")

    def refuse(key: SecretBytes, context: bytes) -> bytes:
        raise ResourceExhausted("the vault is sealed")

    with pytest.raises(ResourceExhausted):
        rewrap(made.directory, KEY.unwrap, refuse)
    made.open().close()
    rewrap(made.directory, KEY.unwrap, tenant_key(version=2).wrap)
    assert not any((tmp_path / "watched").read_bytes())


@pytest.mark.req("S6")
def test_destroy_takes_the_key_first_and_spares_shared_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two_snapshots(tmp_path)
    wiped: list[str] = []
    real = wipe

    def recording(path: Path) -> None:
        wiped.append(path.name)
        real(path)

    monkeypatch.setattr(module, "wipe", recording)
    destroy(old.directory)
    assert wiped[0] == "key"
    assert not any(name.startswith("segment-") for name in wiped), "its only segment is linked by the new one"
    with new.open() as image:
        image.verify_all()
    wiped.clear()
    destroy(new.directory)
    assert wiped[0] == "key"
    assert len([name for name in wiped if name.startswith("segment-")]) == 2
    assert list(tmp_path.iterdir()) == []
    destroy(new.directory)


@pytest.mark.req("S6")
def test_destroy_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"kept")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "key").symlink_to(outside / "file")
    (inside / "folder").symlink_to(outside)
    (tmp_path / "link").symlink_to(outside)
    destroy(inside)
    destroy(tmp_path / "link")
    assert (outside / "file").read_bytes() == b"kept"
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


@pytest.mark.req("S6")
def test_a_destroyed_snapshot_cannot_be_opened_even_from_a_copy_without_its_key(tmp_path: Path) -> None:
    old, new = two_snapshots(tmp_path)
    key = new.directory / "key"
    key.write_bytes((old.directory / "key").read_bytes())
    with pytest.raises(IntegrityError):
        new.open()
    key.unlink()
    with pytest.raises(IntegrityError):
        new.open()


def test_bytes_on_disk(tmp_path: Path) -> None:
    made = sleep(tmp_path / "a", everything(some_memory(4)))
    size = sum(path.stat().st_size for path in made.directory.iterdir())
    assert size == made.info.bytes_written
    assert size <= bytes_on_disk(made.directory) < size + 6 * 65536
    assert bytes_on_disk(tmp_path / "none") == 0


# Working set


@pytest.mark.req("S1")
def test_a_working_set_is_kept_and_carried_over(tmp_path: Path) -> None:
    data = some_memory(4)
    first = sleep(tmp_path / "a", everything(data))
    used = [(0, 1), (3, 40), (127, 1)]
    with first.open() as image:
        assert load_working_set(image) == []
        save_working_set(image, used)
        assert load_working_set(image) == used
        for wrong in ([(128, 1)], [(127, 2)], [(-1, 1)], [(0, 0)], [(3, 2), (5, 1)], [(3, 1), (1, 1)]):
            with pytest.raises(InvalidInput):
                save_working_set(image, wrong)
        second = sleep(tmp_path / "b", Memory(data, {0}), parent=image)
        third = sleep(tmp_path / "c", Memory(data, {0}), parent=image, working_set=[(2, 5)])
    with second.open() as image:
        assert load_working_set(image) == used
    with third.open() as image:
        assert load_working_set(image) == [(2, 5)]
    assert not [name for name in os.listdir(first.directory) if name.startswith(".tmp-")]


def test_an_authentic_but_impossible_working_set_is_nothing(tmp_path: Path) -> None:
    from mvm.hostd.sealing.working_set import seal_working_set

    with sleep(tmp_path / "a", everything(some_memory(4))).open() as image:
        path = tmp_path / "a" / "working-set"
        path.write_bytes(seal_working_set(image.working_set_box, [(0, 3)], 4))
        assert load_working_set(image) == [(0, 3)]
        path.write_bytes(seal_working_set(image.working_set_box, [(0, 3), (128, 1)], 5))
        assert load_working_set(image) == []
        for odd in (
            b"123",
            b"",
            bytes(8),
            struct.pack("=4I", 5, 1, 5, 1),
            struct.pack("=2I", 2**32 - 1, 2**32 - 1),
        ):
            path.write_bytes(b"MVMSEALW" + image.working_set_box.seal(odd))
            assert load_working_set(image) == []


@given(st.binary(max_size=200).map(lambda marks: bytes(mark & 1 for mark in marks)))
def test_runs_cover_exactly_the_marked(marks: bytes) -> None:
    runs = runs_of(bytearray(marks))
    covered = [page for first, count in runs for page in range(first, first + count)]
    assert covered == [page for page, mark in enumerate(marks) if mark]
    assert all(b[0] > a[0] + a[1] for a, b in itertools.pairwise(runs))
