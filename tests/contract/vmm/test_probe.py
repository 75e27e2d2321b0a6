"""Whether hardware acceleration is believed: by what QEMU does with it, not by the look of /dev/kvm."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.core.addressing import UID_BASE
from mvm.hostd.vmm.qemu import probe

VERSION = "7.2.0"
pytestmark = pytest.mark.root


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """The probe's QEMU runs as a uid of its own, to which pytest's directories are closed."""
    with tempfile.TemporaryDirectory(prefix="mvm-probe-") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.fixture
def kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that can be opened in the place of /dev/kvm; the guest's files; nothing cached."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(probe, "KVM", str(device))
    for name in ("vmlinux", "initrd"):
        (tmp_path / name).write_text(name)
    return device


def qemu(folder: Path, script: str) -> str:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\necho run >> {folder}/runs\n{script}\n")
    path.chmod(0o755)
    return str(path)


def choose(folder: Path, program: str, version: str = VERSION) -> probe.Acceleration:
    return probe.choose_acceleration(
        program, version, folder / "vmlinux", folder / "initrd", folder / "cache"
    )


def runs(folder: Path) -> int:
    return (folder / "runs").read_text().count("run") if (folder / "runs").exists() else 0


@pytest.mark.req("O1")
def test_a_kernel_that_boots_is_believed_once(tmp_path: Path, kvm: Path) -> None:
    program = qemu(tmp_path, "echo noise; echo MVM-PROBE-OK; sleep 100")
    for _ in range(3):
        assert choose(tmp_path, program).accel == "kvm"
    assert runs(tmp_path) == 1
    assert choose(tmp_path, program, "8.0.0").accel == "kvm"
    assert runs(tmp_path) == 2, "another QEMU is another question"


@pytest.mark.req("O1")
def test_a_qemu_that_fails_is_not_believed_and_quoted(tmp_path: Path, kvm: Path) -> None:
    program = qemu(tmp_path, "echo booting; echo 'error: failed to set MSR 0x10a' >&2; exit 1")
    chosen = choose(tmp_path, program)
    assert chosen.accel == "tcg"
    assert "failed to set MSR 0x10a" in chosen.reason
    assert choose(tmp_path, program) == chosen
    assert runs(tmp_path) == 1


@pytest.mark.req("O1")
def test_a_kernel_that_hangs_is_given_up_and_ended(
    tmp_path: Path, kvm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PROBE_S", 0.3)
    program = qemu(tmp_path, f"echo $$ > {tmp_path}/pid; echo MVM-PROBE; exec sleep 1000")
    assert choose(tmp_path, program).accel == "tcg"
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_a_marker_that_comes_in_pieces_is_seen(tmp_path: Path, kvm: Path) -> None:
    program = qemu(tmp_path, "printf MVM-PRO; sleep 0.2; printf BE-OK; sleep 100")
    assert choose(tmp_path, program).accel == "kvm"


def test_a_marker_just_before_the_end_is_seen(tmp_path: Path, kvm: Path) -> None:
    for turn in range(5):
        assert choose(tmp_path, qemu(tmp_path, "echo MVM-PROBE-OK"), f"7.2.{turn}").accel == "kvm"


@pytest.mark.req("O1")
def test_without_the_device_nothing_is_started(tmp_path: Path, kvm: Path) -> None:
    kvm.unlink()
    chosen = choose(tmp_path, qemu(tmp_path, "echo MVM-PROBE-OK"))
    assert chosen.accel == "tcg"
    assert str(kvm) in chosen.reason
    assert runs(tmp_path) == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', '{"accel": "kvm"}', "null"])
def test_a_damaged_answer_is_found_out_again(tmp_path: Path, kvm: Path, content: str) -> None:
    program = qemu(tmp_path, "echo MVM-PROBE-OK; sleep 100")
    choose(tmp_path, program)
    [file] = (tmp_path / "cache").iterdir()
    file.write_text(content)
    assert choose(tmp_path, program).accel == "kvm"
    assert runs(tmp_path) == 2
    assert json.loads(file.read_text())["accel"] == "kvm"


@pytest.mark.req("H4", "O1")
def test_a_tenants_kernel_is_probed_by_a_uid_that_owns_nothing(tmp_path: Path, kvm: Path) -> None:
    program = qemu(tmp_path, f'id -u > {tmp_path}/uid; cat "$0" > /dev/null; echo $* > {tmp_path}/arguments')
    choose(tmp_path, program)
    assert (tmp_path / "uid").read_text().strip() == str(UID_BASE)
    assert "-sandbox on" in (tmp_path / "arguments").read_text()
    assert str(tmp_path) not in (tmp_path / "arguments").read_text(), "files come as descriptors"
