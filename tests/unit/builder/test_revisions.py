"""Revisions: named by content, whole or absent, never silently damaged."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.builder.model import Artifacts
from mvm.builder.revisions import RevisionStore
from mvm.core.errors import IntegrityError, InvalidInput, MvmError, NotFound
from mvm.core.ids import RevisionId
from mvm.core.revision import FILES, Revision, decode_revision, encode_revision, make_revision


def build(folder: Path, kernel: str = "kernel", ref: str = "/flake") -> Artifacts:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, file in FILES.items():
        path = paths[name] = folder / file
        path.write_text(kernel if name == "kernel" else name)
        path.chmod(0o444)
    return Artifacts(
        kernel=paths["kernel"], initrd=paths["initrd"], rootfs=paths["rootfs"], fc_base=paths["fc-base"],
        store_paths=("/nix/store/b", "/nix/store/a"), flake_ref=ref, profile="minimal", lock_hash="0" * 64,
    )  # fmt: skip


def document() -> Revision:
    return make_revision(
        flake_ref="/flake", profile="minimal", lock_hash="0" * 64, store_paths=("/nix/store/a",),
        sha256=dict.fromkeys(FILES, "1" * 64),
    )  # fmt: skip


@pytest.mark.req("B5")
def test_the_same_build_is_one_revision(tmp_path: Path) -> None:
    store = RevisionStore(tmp_path)
    first = store.import_artifacts(build(tmp_path / "x"))
    again = store.import_artifacts(build(tmp_path / "y", ref="/elsewhere/flake"))
    assert (first.reused, again.reused) == (False, True)
    assert first.revision.id == again.revision.id
    assert [found.id for found in store.list()] == [first.revision.id]
    assert store.import_artifacts(build(tmp_path / "z", "other")).revision.id != first.revision.id


@pytest.mark.req("B5")
def test_what_is_stored_is_whole_read_only_and_verifies(tmp_path: Path) -> None:
    store = RevisionStore(tmp_path)
    revision = store.import_artifacts(build(tmp_path / "x")).revision
    folder = store.directory(revision.id)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES.values(), "revision.json"])
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}
    assert store.verify(revision.id) == store.load(revision.id) == revision


@pytest.mark.req("B5")
@pytest.mark.parametrize("file", FILES.values())
def test_damage_is_found(tmp_path: Path, file: str) -> None:
    store = RevisionStore(tmp_path)
    revision = store.import_artifacts(build(tmp_path / "x")).revision
    path = store.directory(revision.id) / file
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(IntegrityError):
        store.verify(revision.id)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(IntegrityError) as caught:
        store.verify(revision.id)
    assert file in caught.value.brief


@pytest.mark.req("B5")
def test_collect_keeps_what_is_named_and_the_last(tmp_path: Path) -> None:
    store = RevisionStore(tmp_path)
    ids = []
    for number in range(5):
        revision = store.import_artifacts(build(tmp_path / f"x{number}", f"kernel {number}")).revision
        os.utime(store.directory(revision.id), ns=(number, number))
        ids.append(revision.id)
    (tmp_path / "revisions/.new-crashed").mkdir()
    (tmp_path / "revisions/.del-crashed").mkdir()
    assert store.collect({ids[0]}, keep_last=2) == [ids[1], ids[2]]
    assert sorted(path.name for path in (tmp_path / "revisions").iterdir()) == sorted(
        [ids[0], ids[3], ids[4]]
    )
    assert store.collect(set(), keep_last=0) == [ids[0], ids[3], ids[4]]
    assert store.list() == []


def test_absent_and_misplaced_revisions(tmp_path: Path) -> None:
    store = RevisionStore(tmp_path)
    assert store.list() == []
    assert store.collect(set()) == []
    with pytest.raises(NotFound):
        store.load(RevisionId("0" * 64))
    revision = store.import_artifacts(build(tmp_path / "x")).revision
    store.directory(revision.id).rename(store.directory(RevisionId("0" * 64)))
    with pytest.raises(IntegrityError):
        store.load(RevisionId("0" * 64))


@pytest.mark.req("B5")
def test_an_altered_document_is_refused() -> None:
    revision = document()
    assert decode_revision(encode_revision(revision)) == revision
    for change in (
        {"lock_hash": "2" * 64},
        {"profile": "python"},
        {"store_paths": ()},
        {"sha256": dict.fromkeys(FILES, "3" * 64)},
        {"sha256": {"kernel": "1" * 64}},
        {"id": RevisionId("4" * 64)},
    ):
        with pytest.raises(IntegrityError):
            decode_revision(encode_revision(msgspec.structs.replace(revision, **change)))
    moved = msgspec.structs.replace(revision, flake_ref="/other")
    assert decode_revision(encode_revision(moved)).id == revision.id


@given(st.binary(max_size=300))
def test_any_bytes_give_a_revision_or_a_typed_error(data: bytes) -> None:
    try:
        decode_revision(data)
    except MvmError:
        pass


def test_a_malformed_hash_is_refused() -> None:
    with pytest.raises(InvalidInput):
        make_revision(flake_ref="/f", profile="p", lock_hash="x", store_paths=(), sha256={})
