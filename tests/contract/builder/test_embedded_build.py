"""The embedded flake with real nix and real packages."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest

from mvm.builder.flakes import embedded_flake_dir
from mvm.builder.host import HostNixBuilder
from mvm.builder.model import Artifacts, BuildRequest
from mvm.builder.package_lock import parse_lock, render_lock
from mvm.builder.relock import relock
from mvm.builder.revisions import RevisionStore
from mvm.builder.store_path import nar_sha256
from mvm.core.errors import BuildFailed, InvalidInput, Refused
from mvm.linux import process

pytestmark = [pytest.mark.build, pytest.mark.root]


@pytest.fixture(scope="module")
def flake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with a fresh lock: the archive may have dropped what the shipped one names."""
    copy = tmp_path_factory.mktemp("flake") / "embedded"
    shutil.copytree(embedded_flake_dir(), copy)
    relock(copy)
    return copy


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> HostNixBuilder:
    return HostNixBuilder(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def minimal(flake: Path, builder: HostNixBuilder) -> Artifacts:
    return builder.build(BuildRequest(str(flake), "minimal"))


def hashes(artifacts: Artifacts) -> list[str]:
    files = (artifacts.kernel, artifacts.initrd, artifacts.rootfs, artifacts.fc_base)
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


@pytest.mark.req("B1", "B3")
def test_a_build_yields_bootable_forms(minimal: Artifacts) -> None:
    kernel = minimal.kernel.read_bytes()
    assert kernel[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", kernel, 18) == (62,)  # x86-64
    assert minimal.initrd.read_bytes()[:6] == b"070701"
    assert minimal.rootfs.read_bytes()[0x438:0x43A] == b"\x53\xef"
    config = json.loads(minimal.fc_base.read_text())
    assert config["machine-config"]["smt"] is False
    assert Path(config["boot-source"]["kernel_image_path"]) == minimal.kernel
    assert Path(config["boot-source"]["initrd_path"]) == minimal.initrd


@pytest.mark.req("B1")
def test_nix_builds_the_same_bytes_again(minimal: Artifacts, builder: HostNixBuilder) -> None:
    """`--check` builds once more and fails if anything differs."""
    for path in minimal.store_paths:
        process.run(
            ["nix-store", "--realise", "--check", _deriver(path)],
            timeout=600,
            env={"NIX_CONFIG": "build-users-group =\nsubstituters ="},
        )


def _deriver(path: str) -> str:
    return process.run(["nix-store", "--query", "--deriver", path], timeout=60).stdout.decode().strip()


@pytest.mark.req("B5")
def test_another_checkout_gives_the_same_revision(
    tmp_path: Path, flake: Path, minimal: Artifacts, builder: HostNixBuilder
) -> None:
    copy = tmp_path / "elsewhere/flake"
    shutil.copytree(flake, copy)
    other = builder.build(BuildRequest(str(copy), "minimal", minimal.lock_hash))
    assert hashes(other) == hashes(minimal)
    store = RevisionStore(tmp_path)
    assert store.import_artifacts(other).revision.id == store.import_artifacts(minimal).revision.id


@pytest.mark.req("B1")
def test_generic_outputs_are_the_minimal_ones(flake: Path) -> None:
    source = (flake / "flake.nix").read_text()
    assert 'tenant-rootfs = rootfs "minimal";' in source
    assert 'tenant-fc-base = fcBase "minimal";' in source


@pytest.mark.req("B1", "B3")
@pytest.mark.parametrize("profile", ["baseline", "python"])
def test_every_profile_builds(flake: Path, builder: HostNixBuilder, profile: str) -> None:
    assert builder.build(BuildRequest(str(flake), profile)).rootfs.stat().st_size < 250 << 20


@pytest.mark.req("B1")
def test_image_has_no_ssh_server_and_no_password(minimal: Artifacts) -> None:
    def show(command: str) -> str:
        argv = ["debugfs", "-R", command, str(minimal.rootfs)]
        return process.run(argv, timeout=60).stdout.decode()

    accounts = show("cat /etc/shadow").splitlines()
    assert accounts
    assert {line.split(":")[1] for line in accounts} == {"*"}
    assert "sshd" not in show("ls -p /usr/sbin")
    assert "dropbear" not in show("ls -p /usr/sbin")


@pytest.mark.req("B5")
def test_another_lock_than_asked_for_is_refused(flake: Path, builder: HostNixBuilder) -> None:
    with pytest.raises(Refused):
        builder.build(BuildRequest(str(flake), "minimal", "0" * 64))


def test_packages_that_flake_lock_does_not_pin_are_refused(
    tmp_path: Path, flake: Path, builder: HostNixBuilder
) -> None:
    copy = tmp_path / "flake"
    shutil.copytree(flake, copy)
    seeds = copy / "packages/seeds.json"
    seeds.write_text(seeds.read_text() + " ")
    with pytest.raises(InvalidInput, match="does not pin"):
        builder.build(BuildRequest(str(copy), "minimal"))


@pytest.mark.req("B3")
def test_a_version_the_archive_dropped_names_the_way_out(
    tmp_path: Path, flake: Path, builder: HostNixBuilder
) -> None:
    copy = tmp_path / "flake"
    shutil.copytree(flake, copy)
    path = copy / "packages/packages.json"
    document = json.loads(path.read_text())
    zlib = document["packages"]["zlib1g"]
    zlib.update(version="1:0.0-0", sha256="0" * 64, file="zlib1g_1-0.0-0_amd64.deb")
    path.write_bytes(render_lock(parse_lock(json.dumps(document).encode())))
    old = (flake / "flake.lock").read_text()
    from mvm.builder.store_path import sri

    before, after = sri(nar_sha256(flake / "packages")), sri(nar_sha256(copy / "packages"))
    (copy / "flake.lock").write_text(old.replace(before, after))
    with pytest.raises(BuildFailed) as caught:
        builder.build(BuildRequest(str(copy), "minimal"))
    assert "zlib1g 1:0.0-0: no longer offered" in caught.value.details
    assert "mvm flake update" in caught.value.resolution
    relock(copy)
    assert (copy / "flake.lock").read_text() == old


def test_a_failing_build_shows_the_end_of_its_log(
    tmp_path: Path, flake: Path, builder: HostNixBuilder
) -> None:
    copy = tmp_path / "flake"
    shutil.copytree(flake, copy)
    script = copy / "build/fc_base.py"
    script.write_text('raise SystemExit("the reason is here")\n')
    lines: list[str] = []
    with pytest.raises(BuildFailed) as caught:
        builder.build(BuildRequest(str(copy), "minimal"), on_line=lines.append)
    assert "the reason is here" in caught.value.details
    assert any("the reason is here" in line for line in lines)
    assert caught.value.resolution
