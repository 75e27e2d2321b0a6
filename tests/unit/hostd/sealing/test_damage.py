"""Every byte counts: flipped, cut, appended, swapped or missing, and the image is refused as a whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.hostd.sealing.memory import (
    FINGERPRINT,
    INSTANCE,
    KEY,
    Memory,
    Sleep,
    everything,
    identity,
    sleep,
    some_memory,
    tenant_key,
)

from mvm.core.errors import IntegrityError, InvalidInput, NotFound
from mvm.core.ids import InstanceId
from mvm.hostd.sealing import PAGE, FingerprintMismatch, load_working_set, peek, render_fingerprint
from mvm.hostd.sealing.index import Columns, Index, Layer, Segment, parse_index, render_index
from mvm.hostd.sealing.layout import fingerprint_differences, parse_key_file, parse_manifest_header
from mvm.hostd.sealing.records import RAW, ZSTD, decompress

SMALL = 2000


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sleep:
    """Two generations, so that two segments, overlays and a working set are there."""
    folder = tmp_path_factory.mktemp("sealed")
    data = some_memory(3)
    first = sleep(folder / "a", everything(data))
    data[PAGE : 2 * PAGE] = os.urandom(PAGE)
    with first.open() as parent:
        return sleep(folder / "b", Memory(data, {1}), parent=parent, working_set=[(0, 3), (70, 1)])


def use(target: Sleep) -> None:
    with target.open() as image:
        image.verify_all()


def changed(sealed: Sleep, name: str, change: Callable[[bytearray], None]) -> None:
    """Change a file (a fresh inode: segments are linked), use the image, put the file back."""
    path = sealed.directory / name
    saved = path.with_name("saved")
    path.rename(saved)
    try:
        data = bytearray(saved.read_bytes())
        change(data)
        path.write_bytes(data)
        if name == "working-set":
            with sealed.open() as image:
                image.verify_all()
                assert list(load_working_set(image)) == []
            return
        with pytest.raises(IntegrityError) as refused:
            use(sealed)
        assert refused.value.brief
        assert refused.value.resolution
    finally:
        saved.replace(path)


def names(sealed: Sleep) -> list[str]:
    return sorted(path.name for path in sealed.directory.iterdir())


@pytest.mark.req("S4")
def test_the_files_of_a_snapshot(sealed: Sleep) -> None:
    use(sealed)
    found = names(sealed)
    assert [name for name in found if not name.startswith("segment-")] == [
        "key",
        "manifest",
        "state",
        "working-set",
    ]
    assert len(found) == 6
    assert sealed.directory.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in sealed.directory.iterdir())


@pytest.mark.req("S4")
def test_any_byte_of_the_small_files(sealed: Sleep) -> None:
    for name in names(sealed):
        size = (sealed.directory / name).stat().st_size
        for at in range(size if size <= SMALL else 160):

            def flip(data: bytearray, at: int = at) -> None:
                data[at] ^= 0x40

            changed(sealed, name, flip)


@pytest.mark.req("S4")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.data())
def test_any_change_anywhere(sealed: Sleep, draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(names(sealed)))
    size = (sealed.directory / name).stat().st_size
    at = draw.draw(st.integers(0, size - 1))
    kind = draw.draw(st.sampled_from(["flip", "cut", "insert", "append", "zero the rest"]))

    def change(data: bytearray) -> None:
        before = bytes(data)
        if kind == "flip":
            data[at] ^= draw.draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = b"\x00"
        elif kind == "append":
            data += b"\x00"
        else:
            data[at:] = bytes(len(data) - at)
        if bytes(data) == before:
            data[0] ^= 1

    changed(sealed, name, change)


@pytest.mark.req("S4")
def test_a_manifest_forged_together_with_its_digest(sealed: Sleep) -> None:
    """Who could also rewrite the instance record still lacks the key: header and index are authentic by themselves."""
    path = sealed.directory / "manifest"
    good = path.read_bytes()
    try:
        for at in range(len(good)):
            bad = bytearray(good)
            bad[at] ^= 1
            path.write_bytes(bad)
            info = sealed.info._replace(manifest_sha256=hashlib.sha256(bad).hexdigest())
            try:
                who = parse_manifest_header(bytes(bad)).identity
            except IntegrityError:
                who = sealed.identity
            with pytest.raises(IntegrityError):
                use(Sleep(sealed.directory, who, info))
    finally:
        path.write_bytes(good)


@pytest.mark.req("S4")
def test_a_missing_or_odd_file(sealed: Sleep) -> None:
    for name in names(sealed):
        path = sealed.directory / name
        saved = path.with_name("saved")
        for replace in (None, os.mkfifo, os.mkdir, partial(os.symlink, saved)):
            path.rename(saved)
            if replace is not None:
                replace(path)
            try:
                if name == "working-set":
                    with sealed.open() as image:
                        assert list(load_working_set(image)) == []
                else:
                    with pytest.raises(IntegrityError):
                        use(sealed)
            finally:
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
                saved.replace(path)


@pytest.mark.req("S4")
def test_files_of_another_snapshot_instance_or_tenant(tmp_path: Path, sealed: Sleep) -> None:
    """Same memory, same fingerprint, same key bytes: only the owner, or the snapshot, differs."""
    data = some_memory(3)
    for other in (INSTANCE, InstanceId.parse("acme/default-1"), InstanceId.parse("evil/default-0")):
        who = identity(other)
        key = tenant_key(tenant=other.tenant)
        theirs = sleep(tmp_path / who.snapshot, everything(data), who=who, key=key, working_set=[(1, 1)])
        mine = sleep(tmp_path / f"mine-{who.snapshot}", everything(data), working_set=[(1, 1)])
        segments = [f"segment-{s.identity.snapshot}" for s in (theirs, mine)]
        for theirs_name, mine_name in [
            ("key", "key"),
            ("manifest", "manifest"),
            ("state", "state"),
            segments,
        ]:
            path = mine.directory / mine_name
            own = path.read_bytes()
            path.write_bytes((theirs.directory / theirs_name).read_bytes())
            with pytest.raises(IntegrityError):
                use(mine)
            path.write_bytes(own)
        use(mine)
        shutil.copy(theirs.directory / "working-set", mine.directory / "working-set")
        with mine.open() as image:
            assert list(load_working_set(image)) == []
        # The whole directory, with the digest that belongs to it.
        with pytest.raises(IntegrityError) as refused:
            use(Sleep(theirs.directory, mine.identity, theirs.info))
        assert ("another instance" in refused.value.brief) == (other != INSTANCE)


@pytest.mark.req("S4")
def test_an_older_snapshot_of_the_same_instance(tmp_path: Path) -> None:
    data = some_memory(2)
    old = sleep(tmp_path / "old", everything(data))
    with old.open() as parent:
        new = sleep(tmp_path / "new", Memory(data, {0}), parent=parent)
    with pytest.raises(IntegrityError, match="not the one the instance fell asleep with"):
        use(Sleep(old.directory, new.identity, new.info))
    # Even under the same snapshot id, the digest tells them apart.
    again = sleep(tmp_path / "again", everything(data), who=new.identity)
    with pytest.raises(IntegrityError, match="damaged or was replaced"):
        use(Sleep(again.directory, new.identity, new.info))
    assert peek(again.directory) == (again.identity, again.info.manifest_sha256)


@pytest.mark.req("S4")
def test_a_record_moved_to_another_chunk(tmp_path: Path) -> None:
    """Somebody who can rewrite the index still cannot pass one chunk off as another."""
    data = some_memory(2)
    with sleep(tmp_path / "a", everything(data)).open() as image:
        layer = image.index.layers(0)[-1]
        image.open_layer(0, layer)
        with pytest.raises(IntegrityError):
            image.open_layer(1, layer)
        layer.present ^= 1
        with pytest.raises(IntegrityError):
            image.open_layer(0, layer)


@pytest.mark.req("S4")
def test_another_fingerprint_is_told_apart_and_named(tmp_path: Path) -> None:
    made = sleep(tmp_path / "a", everything(some_memory(1)))
    now = render_fingerprint({"vmm": "qemu 8.0", "cpu": "EPYC", "initrd": "cd"})
    who = made.identity._replace(fingerprint=now)
    with pytest.raises(FingerprintMismatch) as refused:
        use(Sleep(made.directory, who, made.info))
    assert refused.value.differences == (
        ("initrd", "", "cd"),
        ("kernel", "ab" * 32, ""),
        ("vmm", "qemu 7.2", "qemu 8.0"),
    )
    assert "sealed under qemu 7.2, now qemu 8.0" in refused.value.details
    assert fingerprint_differences(b"\xff", FINGERPRINT)[0][0] == "fingerprint"


@pytest.mark.req("S4")
def test_another_tenant_key(tmp_path: Path) -> None:
    made = sleep(tmp_path / "a", everything(some_memory(1)))
    with pytest.raises(IntegrityError):
        made.open(tenant_key(fill=90))
    with pytest.raises(NotFound):
        Sleep(tmp_path / "nowhere", made.identity, made.info).open(KEY)
    with made.open() as image, pytest.raises(InvalidInput):
        image.read_chunk(1)


@given(st.binary(max_size=300))
def test_parsers_answer_with_integrity_errors_only(raw: bytes) -> None:
    for parse in (parse_manifest_header, parse_key_file, lambda data: parse_index(data, 4)):
        for data in (raw, b"MVMSEALM\x01\x00" + raw, b"MVMSEALK\x01\x00" + raw, b"\x00\x00\x00\x00" + raw):
            try:
                parse(data)
            except IntegrityError:
                pass


@given(st.integers(0, 3), st.binary(max_size=200), st.integers(0, 5000))
def test_decompression_answers_with_integrity_errors_only(codec: int, body: bytes, size: int) -> None:
    try:
        assert len(decompress(codec, body, size)) == size
    except IntegrityError:
        pass


@settings(max_examples=200)
@given(draw=st.data())
def test_an_authentic_but_wrong_index_is_refused_not_followed(sealed: Sleep, draw: st.DataObject) -> None:
    with sealed.open() as image:
        raw = render_index(image.index)
        for _ in range(draw.draw(st.integers(1, 4))):
            raw[draw.draw(st.integers(0, len(raw) - 1))] = draw.draw(st.integers(0, 255))
        try:
            image.index = parse_index(bytes(raw), image.chunk_count)
            for chunk in range(image.chunk_count):
                image.read_chunk(chunk)
        except IntegrityError:
            pass


def test_an_index_survives_rendering() -> None:
    columns = Columns()
    columns.append_chunk([Layer(0, ZSTD, 5, 2, 100, 1 << 40), Layer(255, RAW, 0, 1, 0, 0)])
    columns.append_chunk([])
    index = Index([Segment(identity().snapshot, 123, bytes(32))], columns)
    back = parse_index(bytes(render_index(index)), 2)
    assert render_index(back) == render_index(index)
    assert "00" * 8 not in repr(back.segments[0])
