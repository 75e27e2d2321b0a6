"""Data disks on a host without dm-crypt, opened by QEMU's own tools. With dm-crypt: tests/node/test_volumes.py."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mvm.core.errors import (
    CommandFailed,
    Conflict,
    IntegrityError,
    InvalidInput,
    MissingPrerequisite,
    NotFound,
    ResourceExhausted,
)
from mvm.core.ids import InstanceId
from mvm.hostd.keys.development import DevelopmentKeyProvider
from mvm.hostd.resources import dm_crypt, volume
from mvm.linux import files, memfd, process
from mvm.linux.secret import SecretBytes

ACME = InstanceId("acme", "default", 0)
SIZE = 8 << 20

needs_qemu = pytest.mark.skipif(process.find_program("qemu-io") is None, reason="needs qemu-io (qemu-utils)")


@pytest.fixture(autouse=True)
def without_dm_crypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dm_crypt, "unavailable", lambda: "not here")


@pytest.fixture
def provider(tmp_path: Path) -> DevelopmentKeyProvider:
    provider = DevelopmentKeyProvider(tmp_path / "state")
    provider.create(ACME.tenant).close()
    return provider


@pytest.fixture
def image(tmp_path: Path, provider: DevelopmentKeyProvider) -> Path:
    (tmp_path / "volumes").mkdir()
    path = tmp_path / "volumes" / volume.IMAGE_NAME
    volume.create(path, SIZE, provider, ACME)
    return path


def qemu_io(image: Path, secret: int, *commands: str) -> bytes:
    argv = [
        "qemu-io", "--object", f"secret,id=k,file={memfd.proc_path(secret)}", "--image-opts",
        f"driver=luks,key-secret=k,file.driver=file,file.filename={image}",
    ]  # fmt: skip
    for command in commands:
        argv += ["-c", command]
    done = process.run(argv, pass_fds=[secret], timeout=30)
    if b"failed" in done.stdout:  # qemu-io's status says nothing about a pattern that differs
        raise CommandFailed("qemu-io", details=done.stdout.decode())
    return done.stdout


@needs_qemu
@pytest.mark.req("K1", "S3")
def test_qemu_writes_no_plain_text_and_reads_it_back(image: Path, provider: DevelopmentKeyProvider) -> None:
    secret = volume.open_key(image, provider, ACME)
    try:
        qemu_io(image, secret, "write -P 0x4d 1M 256k")
        assert b"\x4d" * 64 not in image.read_bytes()
        qemu_io(image, secret, "read -P 0x4d 1M 256k", "read -v 0 512")
        with pytest.raises(CommandFailed):
            qemu_io(image, secret, "read -P 0x4e 1M 256k")
    finally:
        os.close(secret)


@needs_qemu
@pytest.mark.req("K1")
def test_qemu_refuses_another_key(image: Path, provider: DevelopmentKeyProvider) -> None:
    with SecretBytes.from_random(32) as other, volume.passphrase(other) as phrase:
        secret = memfd.of_bytes("k", phrase.view())
    try:
        with pytest.raises(CommandFailed, match="exited") as caught:
            qemu_io(image, secret, "read 0 512")
        assert "Invalid password" in caught.value.details
    finally:
        os.close(secret)


@needs_qemu
@pytest.mark.req("K1")
def test_qemu_describes_the_header_as_written(image: Path) -> None:
    import json

    argv = ["qemu-img", "info", "--output", "json", str(image)]
    info = json.loads(process.run(argv, timeout=30).stdout)
    assert (info["format"], info["virtual-size"], info["encrypted"]) == ("luks", SIZE, True)
    data = info["format-specific"]["data"]
    assert [data[k] for k in ("cipher-alg", "cipher-mode", "hash-alg", "payload-offset")] == [
        "aes-256", "xts", "sha256", volume.PAYLOAD_OFFSET,
    ]  # fmt: skip
    assert [slot["active"] for slot in data["slots"]] == [True] + [False] * 7
    assert data["slots"][0]["iters"] == 1000


@pytest.mark.req("K1")
def test_a_disk_is_given_as_a_file_and_a_passphrase(image: Path, provider: DevelopmentKeyProvider) -> None:
    with volume.attach(image, provider, ACME) as attached:
        assert (attached.path, attached.device) == (str(image), False)
        assert attached.key_fd is not None
        assert len(os.pread(attached.key_fd, 100, 0)) == 64
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(attached.key_fd)
    assert not volume.lock(image, ACME)


@pytest.mark.req("K1")
@pytest.mark.skipif(process.find_program("cryptsetup") is None, reason="needs cryptsetup")
def test_a_luks2_disk_has_its_payload_where_it_is_looked_for_and_needs_dm_crypt(
    image: Path, provider: DevelopmentKeyProvider
) -> None:
    import json

    image.write_bytes(b"")
    os.truncate(image, SIZE + volume.PAYLOAD_OFFSET)
    with SecretBytes.from_random(32) as key, volume.passphrase(key) as phrase:
        argv = volume.render_format(image, 2)
        process.run(argv, stdin=bytes(phrase.view()), timeout=30, env=dm_crypt.WITHOUT_UDEV)
    argv = ["cryptsetup", "luksDump", "--disable-locks", "--dump-json-metadata", str(image)]
    header = json.loads(process.run(argv, timeout=30).stdout)
    segment = header["segments"]["0"]
    assert (segment["offset"], segment["encryption"], segment["sector_size"]) == (
        str(volume.PAYLOAD_OFFSET), "aes-xts-plain64", 4096,
    )  # fmt: skip
    assert header["keyslots"]["0"]["kdf"]["iterations"] == 1000
    assert (volume.version(image), volume.payload_size(image)) == (2, SIZE)
    volume.grow(image, 2 * SIZE)
    assert volume.payload_size(image) == 2 * SIZE
    with pytest.raises(MissingPrerequisite) as caught, volume.attach(image, provider, ACME):
        pass
    assert "not here" in caught.value.details
    assert "modprobe" in caught.value.resolution


@pytest.mark.root
@pytest.mark.req("K1")
@pytest.mark.skipif(process.find_program("cryptsetup") is None, reason="needs cryptsetup")
def test_cryptsetup_takes_the_key_too(image: Path, provider: DevelopmentKeyProvider) -> None:
    secret = volume.open_key(image, provider, ACME)
    try:
        argv = ["cryptsetup", "open", "--test-passphrase", "--key-file", memfd.proc_path(secret), str(image)]
        process.run(argv, pass_fds=[secret], timeout=30)
    finally:
        os.close(secret)


@pytest.mark.req("K1", "K2")
def test_the_disk_is_sparse_and_the_key_wrapped(image: Path, provider: DevelopmentKeyProvider) -> None:
    assert image.stat().st_size == SIZE + volume.PAYLOAD_OFFSET
    # Of the header cryptsetup writes all, and of the payload the ends are blanked.
    written = volume.PAYLOAD_OFFSET + volume._BLANK_HEAD + volume._BLANK_TAIL
    assert image.stat().st_blocks * 512 <= written < image.stat().st_size
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    secret = volume.open_key(image, provider, ACME)
    phrase = os.pread(secret, 100, 0)
    assert memfd.seals(secret) == memfd.SEAL_ALL
    os.close(secret)
    assert len(phrase) == 64
    stored = volume.key_path(image).read_bytes() + image.read_bytes()
    assert phrase not in stored
    assert bytes.fromhex(phrase.decode()) not in stored
    assert sorted(os.listdir(image.parent)) == [volume.IMAGE_NAME, volume.KEY_NAME]


@pytest.mark.req("S4", "K1")
def test_the_key_of_another_instance_is_refused(image: Path, provider: DevelopmentKeyProvider) -> None:
    with pytest.raises(IntegrityError):
        volume.open_key(image, provider, InstanceId("acme", "default", 1))
    provider.create(InstanceId("other", "default", 0).tenant).close()
    with pytest.raises(IntegrityError):
        volume.open_key(image, provider, InstanceId("other", "default", 0))


@pytest.mark.req("K1")
def test_damage_is_refused(image: Path, provider: DevelopmentKeyProvider) -> None:
    good = volume.key_path(image).read_bytes()
    for bad in (b"", good[:-1], good + b"x", b"x" * 5000, good[:-1] + bytes([good[-1] ^ 1])):
        volume.key_path(image).write_bytes(bad)
        with pytest.raises(IntegrityError):
            volume.open_key(image, provider, ACME)
    volume.key_path(image).unlink()
    with pytest.raises(NotFound):
        volume.open_key(image, provider, ACME)
    volume.key_path(image).write_bytes(good)
    os.truncate(image, 1000)
    with pytest.raises(IntegrityError):
        volume.open_key(image, provider, ACME)


@needs_qemu
@pytest.mark.req("K4")
def test_rotation_rewraps_without_touching_the_disk(image: Path, provider: DevelopmentKeyProvider) -> None:
    before = image.read_bytes()
    provider.rotate(ACME.tenant).close()
    assert volume.rewrap(image, provider, ACME)
    assert not volume.rewrap(image, provider, ACME)
    provider.retire(ACME.tenant, 2)
    secret = volume.open_key(image, provider, ACME)
    try:
        qemu_io(image, secret, "read 0 512")
    finally:
        os.close(secret)
    assert image.read_bytes() == before


@needs_qemu
def test_growing_keeps_what_is_there(image: Path, provider: DevelopmentKeyProvider) -> None:
    secret = volume.open_key(image, provider, ACME)
    try:
        qemu_io(image, secret, "write -P 0x21 7M 1M")
        volume.grow(image, 2 * SIZE)
        assert volume.payload_size(image) == 2 * SIZE
        qemu_io(image, secret, "read -P 0x21 7M 1M", "write -P 0x22 15M 1M")
    finally:
        os.close(secret)
    with pytest.raises(Conflict):
        volume.grow(image, SIZE)


@pytest.mark.req("L7", "S6")
def test_a_wipe_cut_short_leaves_a_whole_key_or_none(
    image: Path, monkeypatch: pytest.MonkeyPatch, provider: DevelopmentKeyProvider
) -> None:
    """A key that is there and opens nothing would keep an image for ever that no instance can start with."""

    class Killed(BaseException):
        pass

    def killed(fd: int) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(files, "_overwrite", killed)
        with pytest.raises(Killed):
            volume.wipe(image)
    assert not volume.key_path(image).exists()
    assert volume.is_wiping(image)
    volume.settle(image)
    assert os.listdir(image.parent) == []


@pytest.mark.req("L7", "S6")
def test_wipe_takes_the_key_first(
    image: Path, monkeypatch: pytest.MonkeyPatch, provider: DevelopmentKeyProvider
) -> None:
    order: list[str] = []
    real = files.wipe

    def spy(path: Path) -> None:
        order.append(path.name)
        real(path)

    monkeypatch.setattr(files, "wipe", spy)
    witness = image.parent.parent / "witness"
    os.link(image, witness)
    volume.wipe(image)
    assert order[0].startswith(f".tmp-{volume.KEY_NAME}")
    assert order[1:] == [volume.IMAGE_NAME]
    assert os.listdir(image.parent) == []
    assert witness.read_bytes() == bytes(SIZE + volume.PAYLOAD_OFFSET)
    volume.wipe(image)
    with pytest.raises(NotFound):
        volume.open_key(image, provider, ACME)


@pytest.mark.req("L3", "L4")
@pytest.mark.parametrize("step", ["ftruncate", "fsync", "rename"])
def test_a_crash_leaves_no_half_disk(
    tmp_path: Path, provider: DevelopmentKeyProvider, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A child dies at the step; the next creation succeeds and leaves nothing of the first."""
    path = tmp_path / "v" / volume.IMAGE_NAME
    path.parent.mkdir()
    pid = os.fork()
    if pid == 0:
        real = getattr(os, step)

        def die(*args: object, **kwargs: object) -> object:
            # Not at the key's own write, which comes before.
            if path.with_name(volume.NEW_KEY_NAME).exists():
                os._exit(9)
            return real(*args, **kwargs)

        setattr(os, step, die)
        volume.create(path, SIZE, provider, ACME)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not path.exists()
    volume.create(path, SIZE, provider, ACME)
    os.close(volume.open_key(path, provider, ACME))
    files.sweep_temporaries(path.parent)
    assert sorted(os.listdir(path.parent)) == [volume.IMAGE_NAME, volume.KEY_NAME]


@pytest.mark.req("K1", "L3")
def test_a_key_is_never_replaced_by_another_disks(image: Path, provider: DevelopmentKeyProvider) -> None:
    key, away = volume.key_path(image).read_bytes(), image.with_name("moved")
    image.rename(away)
    with pytest.raises(Conflict, match="its key is still there"):
        volume.create(image, SIZE, provider, ACME)
    assert volume.key_path(image).read_bytes() == key
    away.rename(image)
    os.close(volume.open_key(image, provider, ACME))


@pytest.mark.req("K1", "L3")
def test_what_is_not_marked_is_not_settled(image: Path, provider: DevelopmentKeyProvider) -> None:
    names = {image.name, volume.KEY_NAME}
    volume.settle(image)
    assert set(os.listdir(image.parent)) == names
    volume.key_path(image).rename(image.with_name(volume.NEW_KEY_NAME))  # killed before the key got its name
    volume.settle(image)
    assert set(os.listdir(image.parent)) == names
    os.close(volume.open_key(image, provider, ACME))
    volume.key_path(image).unlink()
    volume.settle(image)
    assert os.listdir(image.parent) == [image.name]


@pytest.mark.req("K1")
def test_bad_requests_change_nothing(image: Path, provider: DevelopmentKeyProvider) -> None:
    key = volume.key_path(image).read_bytes()
    with pytest.raises(Conflict):
        volume.create(image, SIZE, provider, ACME)
    other = image.with_name("other") / volume.IMAGE_NAME
    other.parent.mkdir()
    for size in (0, -1, 1 << 20 | 1):
        with pytest.raises(InvalidInput):
            volume.create(other, size, provider, ACME)
    with pytest.raises(ResourceExhausted) as caught:
        volume.create(other, 1 << 60, provider, ACME)
    assert "MiB free" in caught.value.brief
    assert os.listdir(other.parent) == []
    assert volume.key_path(image).read_bytes() == key


@needs_qemu
@pytest.mark.req("K1")
def test_a_new_disk_reads_as_zeros_where_signatures_are_looked_for(
    image: Path, provider: DevelopmentKeyProvider
) -> None:
    """Noise there is taken for a file system about once in 32,000 disks."""
    from mvm.guest import disks

    last = max(offset + len(magic) for offset, magic in disks.SIGNATURES)
    assert last <= volume._BLANK_HEAD
    secret = volume.open_key(image, provider, ACME)
    try:
        for start, length in ((0, volume._BLANK_HEAD), (SIZE - volume._BLANK_TAIL, volume._BLANK_TAIL)):
            assert b"read" in qemu_io(image, secret, f"read -P 0 {start} {length}")
    finally:
        os.close(secret)
