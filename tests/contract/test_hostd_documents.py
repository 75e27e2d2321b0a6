"""What the unit and the documents say of mvm-hostd is what the code does."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mvm.hostd import confine, settings
from mvm.hostd.vmm.driver import Machine
from mvm.hostd.vmm.firecracker import jail as firecracker
from mvm.hostd.vmm.qemu import jail as qemu
from mvm.wire.hostd_api import VERBS

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "systemd" / "mvm-hostd.service"
FIRECRACKER = ROOT / "systemd" / "10-firecracker.conf"


@pytest.mark.req("H3")
def test_documented_capabilities() -> None:
    text = (ROOT / "docs" / "privileges.md").read_text()
    documented = dict(re.findall(r"^\| `CAP_(\w+)` \| (.*) \|$", text, re.MULTILINE))
    assert documented == {**confine.CAPABILITIES, **confine.DRIVERS["firecracker"]}


@pytest.mark.req("H3", "H7")
def test_the_units_capabilities() -> None:
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert set(line.split()) == {f"CAP_{name}" for name in (*confine.CAPABILITIES, "SETPCAP")}
    (more,) = re.findall(r"^CapabilityBoundingSet=(.*)$", FIRECRACKER.read_text(), re.MULTILINE)
    assert set(more.split()) == {f"CAP_{name}" for name in confine.DRIVERS["firecracker"]}


@pytest.mark.req("H4", "H7")
def test_the_units_namespaces_are_those_of_jails() -> None:
    (base,) = re.findall(r"^RestrictNamespaces=(.*)$", UNIT.read_text(), re.MULTILINE)
    (more,) = re.findall(r"^RestrictNamespaces=(.*)$", FIRECRACKER.read_text(), re.MULTILINE)
    machine = Machine(
        name="acme--default-0", vcpus=1, mem_mib=128, kernel=Path("k"), initrd=Path("i"), boot_args="", drives=(),
        nic=None, uid=1, gid=1, runtime=Path("r"),
    )  # fmt: skip
    programs = firecracker.Programs(Path("firecracker"), Path("jailer"))
    firecrackers = firecracker.jail(programs, machine, Path("jail"), None).namespaces
    qemus = qemu.jail("/usr/bin/true", Path("jail"), "kvm", required=True).namespaces
    named = {"mnt" if kind == "mount" else kind for kind in (*firecrackers, *qemus)}
    assert set(base.split()) == {"mnt" if kind == "mount" else kind for kind in qemus}
    assert {*base.split(), *more.split()} == named


@pytest.mark.req("H3")
def test_a_driver_that_needs_more_adds_to_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert confine.wanted_by(["qemu"]) == tuple(confine.CAPABILITIES)
    monkeypatch.setitem(
        confine.DRIVERS, "other", {"MKNOD": "mknod(2) of its devices", "KILL": "as everybody"}
    )
    assert confine.wanted_by(["qemu", "other"]) == (*confine.CAPABILITIES, "MKNOD")
    assert "MKNOD" not in confine.wanted_by(["qemu"])


@pytest.mark.req("H2")
def test_documented_verbs() -> None:
    text = (ROOT / "docs" / "formats" / "hostd-protocol.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \| (yes|no) \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    expected = [
        (v.name, f"{v.timeout_s:g}", "yes" if v.changes else "no", v.where.value, v.purpose)
        for v in VERBS.values()
    ]
    assert rows == expected


def test_the_documented_settings_are_valid() -> None:
    text = (ROOT / "docs" / "privileges.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert settings.parse(example).limits.running == 200


@pytest.mark.req("H7")
@pytest.mark.parametrize("setting", [
    "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes", "RestrictSUIDSGID=yes",
    "MemoryDenyWriteExecute=yes", "KillMode=process",
])  # fmt: skip
def test_the_unit_says(setting: str) -> None:
    assert setting in UNIT.read_text().splitlines()


# What `systemd-analyze security` may say at most of the unit with each of its drop-ins, and docs/privileges.md says.
EXPOSURE = {"": 3.0, "10-firecracker.conf": 3.5, "10-emulation.conf": 3.0}


@pytest.mark.req("H7")
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("more", EXPOSURE)
def test_exposure(more: str, tmp_path: Path) -> None:
    units = tmp_path / "etc" / "systemd" / "system"
    (units / f"{UNIT.name}.d").mkdir(parents=True)
    for path in UNIT.parent.glob("mvm*"):
        shutil.copy(path, units)
    if more:
        shutil.copy(UNIT.parent / more, units / f"{UNIT.name}.d")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--root={tmp_path}", "--no-pager", UNIT.name],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.search(r"exposure level for mvm-hostd.service: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= EXPOSURE[more]


@pytest.mark.req("H7")
def test_the_documented_exposure() -> None:
    text = (ROOT / "docs" / "privileges.md").read_text()
    said = dict(re.findall(r"^\| (.*) \| (\d\.\d) \|", text, re.MULTILINE))
    assert {drop_in: f"{value:.1f}" for drop_in, value in EXPOSURE.items()} == {
        "": said["the unit"],
        "10-firecracker.conf": said["with `10-firecracker.conf`"],
        "10-emulation.conf": said["with `10-emulation.conf`"],
    }
