"""Whether hardware acceleration is believed: by what QEMU does with it, not by the look of /dev/kvm."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.core.addressing import UID_BASE
from mvm.core.errors import MissingPrerequisite, VmmError
from mvm.core.record import ProcessIdentity
from mvm.hostd.jail import Jail
from mvm.hostd.resources import cgroup
from mvm.hostd.vmm.qemu import probe
from mvm.hostd.vmm.qemu.command import CONSOLE_FD
from mvm.hostd.vmm.qemu.jail import jail
from mvm.linux.pidfd import is_alive

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
    monkeypatch.setattr(probe, "jail", sees_the_host)
    for name in ("vmlinux", "initrd"):
        (tmp_path / name).write_text(name)
    return device


def sees_the_host(program: str, root: Path, accel: str, *, required: bool) -> Jail:
    """QEMU's, but that a script's interpreter is there to be found."""
    real = jail("/bin/sh", root, "tcg", required=required)
    return Jail(root=root, namespaces=real.namespaces, pivot=False, required=required)


def qemu(folder: Path, script: str) -> str:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\nexec >&{CONSOLE_FD}\necho run >> {folder}/runs\n{script}\n")
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
    program = qemu(tmp_path, f"echo MVM-PROBE; exec sleep 1000.{os.getpid()}")
    assert choose(tmp_path, program).accel == "tcg"
    assert runs(tmp_path) == 1
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in running if f"1000.{os.getpid()}".encode() in line]
    assert not (tmp_path / "cache" / "probe").exists(), "nothing of it is left"


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
    [file] = (tmp_path / "cache").glob("accel-*")
    file.write_text(content)
    assert choose(tmp_path, program).accel == "kvm"
    assert runs(tmp_path) == 2
    assert json.loads(file.read_text())["accel"] == "kvm"


@pytest.mark.req("O1")
def test_it_is_the_kernels_content_that_is_asked_about(tmp_path: Path, kvm: Path) -> None:
    """Every revision has a file of its own."""
    program = qemu(tmp_path, "echo MVM-PROBE-OK; sleep 100")
    choose(tmp_path, program)
    (tmp_path / "vmlinux").rename(tmp_path / "before")
    (tmp_path / "vmlinux").write_bytes((tmp_path / "before").read_bytes())
    assert choose(tmp_path, program).accel == "kvm"
    assert probe.known_acceleration(VERSION, tmp_path / "before", tmp_path / "cache")
    assert runs(tmp_path) == 1
    (tmp_path / "vmlinux").write_text("another")
    assert probe.known_acceleration(VERSION, tmp_path / "vmlinux", tmp_path / "cache") is None
    assert choose(tmp_path, program).accel == "kvm"
    assert runs(tmp_path) == 2


def test_a_kernel_that_is_known_is_not_read_again(
    tmp_path: Path, kvm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = qemu(tmp_path, "echo MVM-PROBE-OK; sleep 100")
    first = choose(tmp_path, program)
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert choose(tmp_path, program) == first
    for content in ("{", "[]", "null", '{"x": 1}'):
        monkeypatch.undo()
        monkeypatch.setattr(probe, "KVM", str(kvm))
        (tmp_path / "cache" / "kernels.json").write_text(content)
        assert choose(tmp_path, program) == first


def test_what_is_kept_of_kernels_is_bounded(
    tmp_path: Path, kvm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "KERNELS_MAX", 3)
    program = qemu(tmp_path, "echo MVM-PROBE-OK; sleep 100")
    for number in range(5):
        (tmp_path / f"kernel-{number}").write_text("the same")
        probe.choose_acceleration(
            program, VERSION, tmp_path / f"kernel-{number}", tmp_path / "initrd", tmp_path / "cache"
        )
    assert len(json.loads((tmp_path / "cache" / "kernels.json").read_text())) == 3
    assert runs(tmp_path) == 1


@pytest.mark.req("O1")
def test_a_probe_that_was_killed_says_nothing(
    tmp_path: Path, kvm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = qemu(tmp_path, "echo MVM-PRO; sleep 100")

    def killing(vmm: ProcessIdentity) -> bool:
        os.kill(vmm.pid, signal.SIGKILL)
        while is_alive(vmm):
            pass
        return False

    monkeypatch.setattr(probe, "is_alive", killing)
    with pytest.raises(VmmError, match="was killed"):
        choose(tmp_path, program)
    monkeypatch.setattr(probe, "is_alive", is_alive)
    assert choose(tmp_path, qemu(tmp_path, "echo MVM-PROBE-OK")).accel == "kvm"


@pytest.mark.req("H4", "H5")
def test_a_tenants_kernel_is_probed_in_a_jail(tmp_path: Path, kvm: Path) -> None:
    kinds = ("mnt", "net", "pid")
    look = "; ".join(f"readlink /proc/self/ns/{kind} >> {tmp_path}/seen" for kind in kinds)
    choose(tmp_path, qemu(tmp_path, look))
    seen = (tmp_path / "seen").read_text().split()
    ours = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]
    assert len(seen) == 3
    assert not set(seen) & set(ours)


@pytest.mark.req("H4", "H5", "K1")
def test_in_baseline_no_kernel_is_probed_without_bounds(
    tmp_path: Path, kvm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = qemu(tmp_path, "echo MVM-PROBE-OK")
    monkeypatch.setattr(cgroup, "groups", lambda root: cgroup.Groups(root, ""))
    with pytest.raises(MissingPrerequisite, match="control group"):
        probe.choose_acceleration(
            program, VERSION, tmp_path / "vmlinux", tmp_path / "initrd", tmp_path / "cache", confined=True
        )
    assert runs(tmp_path) == 0
    assert choose(tmp_path, program).accel == "kvm", "development mode does with what there is"


@pytest.mark.req("H4", "O1")
def test_a_tenants_kernel_is_probed_by_a_uid_that_owns_nothing(tmp_path: Path, kvm: Path) -> None:
    program = qemu(tmp_path, f'id -u > {tmp_path}/uid; cat "$0" > /dev/null; echo $* > {tmp_path}/arguments')
    choose(tmp_path, program)
    assert (tmp_path / "uid").read_text().strip() == str(UID_BASE)
    assert "-sandbox on" in (tmp_path / "arguments").read_text()
    assert str(tmp_path) not in (tmp_path / "arguments").read_text(), "files come as descriptors"
