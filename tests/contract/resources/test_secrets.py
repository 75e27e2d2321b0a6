"""Secrets: parsed, sealed at rest, and shown on a disk in memory, read back by e2fsprogs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvm.core import limits
from mvm.core.errors import IntegrityError, InvalidInput
from mvm.core.ids import TenantId
from mvm.hostd.keys.development import DevelopmentKeyProvider
from mvm.hostd.resources import secrets_disk, secrets_store
from mvm.linux import memfd, process
from mvm.linux.secret import SecretBytes

ACME, OTHER = TenantId("acme"), TenantId("other")
NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True).filter(lambda n: n not in (".", ".."))
SECRETS = st.dictionaries(NAMES, st.binary(max_size=200), max_size=8)


def plain(secrets: dict[str, SecretBytes]) -> dict[str, bytes]:
    return {name: bytes(value.view()) for name, value in secrets.items()}


def taken(secrets: dict[str, bytes]) -> dict[str, SecretBytes]:
    return {name: SecretBytes.copy_of(value) for name, value in secrets.items()}


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> DevelopmentKeyProvider:
    provider = DevelopmentKeyProvider(tmp_path_factory.mktemp("state"))
    provider.create(ACME).close()
    provider.create(OTHER).close()
    return provider


@pytest.mark.req("K3")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(secrets=SECRETS)
def test_what_is_saved_is_loaded(
    tmp_path: Path, provider: DevelopmentKeyProvider, secrets: dict[str, bytes]
) -> None:
    path = tmp_path / secrets_store.STORE_NAME
    before = secrets_store.version(path)
    assert secrets_store.save(path, provider, ACME, taken(secrets)) == before + 1
    assert plain(secrets_store.load(path, provider, ACME)) == secrets
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for value in secrets.values():
        assert len(value) < 8 or value not in path.read_bytes()


@pytest.mark.req("K3")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_any_change_is_refused(tmp_path: Path, provider: DevelopmentKeyProvider, data: st.DataObject) -> None:
    path = tmp_path / secrets_store.STORE_NAME
    secrets_store.save(path, provider, ACME, taken({"A": b"1", "B": b"2"}))
    stored = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(stored) - 1))
    if data.draw(st.booleans()):
        stored[at] ^= data.draw(st.integers(1, 255))
    else:
        del stored[at:]
    path.write_bytes(stored)
    with pytest.raises(IntegrityError):
        secrets_store.load(path, provider, ACME)
    path.unlink()


@pytest.mark.req("K3", "K4")
def test_bound_to_the_tenant_and_rewrapped(tmp_path: Path, provider: DevelopmentKeyProvider) -> None:
    path = tmp_path / secrets_store.STORE_NAME
    assert secrets_store.load(path, provider, ACME) == {}
    assert secrets_store.version(path) == 0
    assert not secrets_store.rewrap(path, provider, ACME)
    secrets_store.save(path, provider, ACME, taken({"A": b"1"}))
    with pytest.raises(IntegrityError):
        secrets_store.load(path, provider, OTHER)
    provider.rotate(ACME).close()
    assert secrets_store.rewrap(path, provider, ACME)
    assert not secrets_store.rewrap(path, provider, ACME)
    provider.retire(ACME, provider.versions(ACME)[-1])
    assert plain(secrets_store.load(path, provider, ACME)) == {"A": b"1"}
    assert secrets_store.version(path) == 1


@pytest.mark.req("K3")
def test_sources_of_every_form(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("# comment\n\nexport A='1 2'\nB=x=y \nC=\n")
    (tmp_path / "json").write_text(' {"A": "1 2", "B": "x=y", "C": ""}')
    (tmp_path / "dir").mkdir()
    for name, value in (("A", "1 2"), ("B", "x=y"), ("C", "")):
        (tmp_path / "dir" / name).write_text(value)
    for source in ("env", "json", "dir"):
        assert plain(secrets_store.read_source(tmp_path / source)) == {"A": b"1 2", "B": b"x=y", "C": b""}


@pytest.mark.req("K3")
@pytest.mark.parametrize(
    "bad",
    [
        b"novalue-hunter2", b"A=hunter2\nA=hunter2", b"a/b=hunter2", b"..=hunter2", b"{hunter2", b'{"A": 12345}',
        b'{"A/B": "hunter2"}', b"\xff=hunter2", b"A" * 65 + b"=hunter2",
        b"A=" + b"x" * (limits.SECRET_FILE_BYTES + 1),
        b"\n".join(b"A%d=x" % i for i in range(limits.SECRET_FILES + 1)),
        b"\n".join(b"A%d=" % i + b"x" * limits.SECRET_FILE_BYTES for i in range(9)),
    ],
)  # fmt: skip
def test_bad_sources_are_refused_and_never_quoted(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "f").write_bytes(bad)
    with pytest.raises(InvalidInput) as caught:
        secrets_store.read_source(tmp_path / "f")
    error = caught.value
    assert "hunter2" not in error.brief + error.details + error.resolution
    assert error.__cause__ is None


@given(st.binary(max_size=300))
def test_any_source_is_taken_or_invalid(data: bytes) -> None:
    for parse in (secrets_store.parse_env, secrets_store.parse_json):
        try:
            secrets_store.check_bounds({name: len(value) for name, value in parse(data).items()})
        except InvalidInput:
            pass


def debugfs(fd: int, command: str) -> bytes:
    argv = ["debugfs", "-R", command, memfd.proc_path(fd)]
    return process.run(argv, pass_fds=[fd], timeout=30).stdout


def names_on(fd: int) -> dict[str, tuple[str, str, str]]:
    """name -> (mode, uid, gid)"""
    found = {}
    for line in debugfs(fd, "ls -p").decode().splitlines():
        if line:
            _, _, mode, uid, gid, name, _, _ = line.split("/")
            found[name] = (mode, uid, gid)
    return {name: found[name] for name in found if name not in (".", "..")}


@pytest.mark.req("K3")
@settings(max_examples=15, deadline=None)
@given(secrets=SECRETS)
def test_the_disk_holds_exactly_the_secrets(secrets: dict[str, bytes]) -> None:
    fd = secrets_disk.build(taken(secrets))
    try:
        assert names_on(fd) == dict.fromkeys(secrets, ("100400", "0", "0"))
        for name, value in secrets.items():
            assert debugfs(fd, f"cat {name}") == value
    finally:
        os.close(fd)


@pytest.mark.req("K3")
@pytest.mark.parametrize("count", [1, limits.SECRET_FILES])
def test_the_disk_is_sound_sealed_and_of_one_size(count: int) -> None:
    size = min(limits.SECRET_FILE_BYTES, limits.SECRETS_TOTAL_BYTES // count)
    names = [f"{i:02d}".ljust(limits.SECRET_NAME_MAX, "x") for i in range(count)]
    fd = secrets_disk.build({name: SecretBytes(size) for name in names})
    try:
        assert os.fstat(fd).st_size == secrets_disk.SIZE
        assert memfd.seals(fd) == memfd.SEAL_ALL
        process.run(["e2fsck", "-fn", memfd.proc_path(fd)], pass_fds=[fd], timeout=30)
        info = process.run(["dumpe2fs", "-h", memfd.proc_path(fd)], pass_fds=[fd], timeout=30).stdout
        assert b"mvm-secrets" in info
        assert b"has_journal" not in info
    finally:
        os.close(fd)


@pytest.mark.req("K3")
def test_the_disk_of_no_secrets_is_blank_and_of_the_same_size() -> None:
    from mvm.guest import disks

    fd = secrets_disk.build({})
    try:
        assert os.pread(fd, secrets_disk.SIZE + 1, 0) == bytes(secrets_disk.SIZE)
        assert memfd.seals(fd) == memfd.SEAL_ALL
        assert disks.used_by(memfd.proc_path(fd)) is None
    finally:
        os.close(fd)


@pytest.mark.req("K3")
def test_the_disk_takes_the_largest_few(tmp_path: Path) -> None:
    count = limits.SECRETS_TOTAL_BYTES // limits.SECRET_FILE_BYTES
    big = {f"n{i}": SecretBytes.copy_of(os.urandom(limits.SECRET_FILE_BYTES)) for i in range(count)}
    fd = secrets_disk.build(big)
    try:
        assert debugfs(fd, "cat n3") == bytes(big["n3"].view())
    finally:
        os.close(fd)
    with pytest.raises(InvalidInput):
        secrets_disk.build({**big, "more": SecretBytes(1)})


@pytest.mark.req("K2", "K3")
def test_neither_names_nor_values_are_in_an_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = process.run

    def spy(argv: list[str], **options: object) -> process.Completed:
        seen.extend([*argv, *(options.get("env") or {}).values()])  # type: ignore[attr-defined]
        return real(argv, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(process, "run", spy)
    os.close(secrets_disk.build(taken({"DATABASE": b"hunter2"})))
    assert seen
    assert not any("DATABASE" in part or "hunter2" in part for part in seen)


@pytest.mark.parametrize(
    ("stdout", "stderr", "count", "sound"),
    [
        (b"Allocated inode: 11\n", b"debugfs 1.47.0 (5-Feb-2023)\n", 1, True),
        (b"", b"debugfs 1.46.5 (30-Dec-2021)\n", 0, True),
        (b"Allocated inode: 11\n", b"debugfs 1.47.0\n", 2, False),
        (b"Allocated inode: 11\n", b"debugfs 1.47.0\nwrite: Could not allocate block\n", 1, False),
    ],
)
def test_debugfs_is_read_because_its_status_says_nothing(
    stdout: bytes, stderr: bytes, count: int, sound: bool
) -> None:
    assert (secrets_disk.check_output(stdout, stderr, count) == "") == sound
