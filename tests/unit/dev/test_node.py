"""The node's size, its command line, and what Lima is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.cli import dev
from mvm.core.errors import Conflict, MissingPrerequisite, ResourceExhausted
from mvm.core.record import ProcessIdentity
from mvm.dev import choose, disks, image, lima, machine, qemu, recipe, sources
from mvm.dev.model import NodeSpec, NodeStatus, Quiet, StartOptions
from mvm.dev.qemu import UID, wanted_spec
from mvm.linux import machine as host


def test_options_go_over_what_was_kept_over_the_defaults() -> None:
    assert wanted_spec(None, StartOptions(), running=False) == NodeSpec()
    kept = NodeSpec(vcpus=3, mem_mib=2048, disk_gib=8)
    assert wanted_spec(kept, StartOptions(mem_mib=1024), running=False) == NodeSpec(3, 1024, 8)


def test_a_running_node_keeps_its_size() -> None:
    kept = NodeSpec()
    assert wanted_spec(kept, StartOptions(vcpus=kept.vcpus), running=True) == kept
    for options in (StartOptions(vcpus=7), StartOptions(rebuild=True)):
        with pytest.raises(Conflict):
            wanted_spec(kept, options, running=True)


def test_a_state_disk_keeps_its_size() -> None:
    with pytest.raises(Conflict, match="state disk"):
        wanted_spec(NodeSpec(disk_gib=8), StartOptions(disk_gib=9), running=False)


@pytest.mark.req("O4")
def test_qemu_opens_nothing_by_name() -> None:
    boot = machine.boot_args("tcg", 2_000_000, "0" * 32)
    argv = machine.command("/usr/bin/qemu", vcpus=2, mem_mib=4096, accel="tcg", boot_args=boot)
    paths = [word for word in argv[1:] if "/" in word and not word.startswith("root=")]
    assert all("/dev/fdset/" in p or "/proc/self/fd/" in p or "/dev/urandom" in p for p in paths)
    assert "tsc_early_khz=2000000" in boot
    assert argv[argv.index("-cpu") : argv.index("-cpu") + 2] == ["-cpu", "EPYC,+svm,+npt"]
    assert not any("netdev" in word or "9p" in word or "virtiofs" in word for word in argv)


def test_the_seed_cannot_be_written() -> None:
    argv = machine.command("q", vcpus=1, mem_mib=1024, accel="kvm", boot_args="")
    (seed,) = (word for word in argv if "node-name=seed" in word)
    assert "read-only=on" in seed
    assert "tsc_early_khz" not in machine.boot_args("kvm", 0, "0" * 32)


def test_the_nodes_uid_is_no_instances() -> None:
    from mvm.core import addressing

    assert UID < addressing.UID_BASE


@pytest.mark.req("O4")
def test_limas_template_is_what_its_schema_has() -> None:
    """The fields of Lima's instance file that are used, with the types its published template gives them."""
    read = json.loads(lima.render(NodeSpec(vcpus=3, mem_mib=2048, disk_gib=9)))
    types = {
        "minimumLimaVersion": str, "base": str, "vmType": str, "nestedVirtualization": bool, "cpus": int, "memory": str,
        "disk": str, "mounts": list, "containerd": dict, "ssh": dict, "provision": list,
    }  # fmt: skip
    assert {key: type(value) for key, value in read.items()} == types
    assert (read["cpus"], read["memory"], read["disk"]) == (3, "2048MiB", "9GiB")
    assert read["mounts"] == [], "nothing of the computer is shared"
    assert read["vmType"] in ("vz", "qemu")
    assert [set(step) for step in read["provision"]] == [{"mode", "script"}]
    assert read["provision"][0]["mode"] == "system"
    assert read["ssh"] == {"loadDotSSHPubKeys": False, "forwardAgent": False}


@given(st.binary(max_size=300))
def test_whatever_lima_lists_is_read_or_ignored(output: bytes) -> None:
    lima.parse_list(output)


def test_limas_list_is_one_object_a_line() -> None:
    output = b'{"name":"other","status":"Running"}\n{"name":"mvm","status":"Stopped"}\n'
    assert lima.parse_list(output) == {"name": "mvm", "status": "Stopped"}
    assert lima.parse_list(b"") is None


def test_the_platform_chooses() -> None:
    assert choose.node(Path("/r"), "linux").name == "qemu"
    assert choose.node(Path("/r"), "darwin").name == "lima"
    with pytest.raises(MissingPrerequisite):
        choose.node(Path("/r"), "win32")


def test_too_little_memory_or_disk_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "memory_available", lambda: 1 << 30)
    with pytest.raises(ResourceExhausted, match="memory") as caught:
        qemu._require_memory(NodeSpec())
    assert "--memory" in caught.value.resolution
    with pytest.raises(ResourceExhausted, match="disk"):
        disks.require_space(tmp_path, 1 << 60)


def test_missing_programs_are_named_with_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        image, "find_program", lambda name: None if name == "mmdebstrap" else f"/usr/bin/{name}"
    )
    made = recipe.make(sources.from_mirror("https://mirror.example/debian"), "")
    with pytest.raises(MissingPrerequisite) as caught:
        image.obtain(made, tmp_path, Quiet())
    assert caught.value.resolution.endswith("apt-get install --no-install-recommends mmdebstrap")
    assert list(tmp_path.iterdir()) == []


def test_anybody_but_root_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    node = choose.node(tmp_path, "linux")
    for act in (node.status, lambda: node.start(StartOptions(), Quiet())):
        with pytest.raises(MissingPrerequisite, match="root"):
            act()


def test_a_record_of_a_process_that_is_gone_means_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another's by now: start time and boot decide."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "dev" / "runtime").mkdir(parents=True)
    kept = qemu.Kept(NodeSpec(), "0" * 32, "abc")
    (tmp_path / "dev" / "node.json").write_bytes(msgspec.json.encode(kept))
    stranger = ProcessIdentity(pid=1, start_ticks=2**40, boot_id="0" * 8 + "-0000-0000-0000-" + "0" * 12)
    record = qemu.Running(stranger, 0, "tcg", "", ready=True)
    (tmp_path / "dev" / "runtime" / "process.json").write_bytes(msgspec.json.encode(record))
    assert choose.node(tmp_path, "linux").status().state == "stopped"


def test_status_for_people() -> None:
    status = NodeStatus(
        driver="qemu", state="running", accel="tcg", accel_reason="/dev/kvm is missing", image="abc",
        vcpus=2, mem_mib=4096, disk_gib=16, disk_used_bytes=900 << 20, uptime_s=3700, pid=7,
    )  # fmt: skip
    text = "\n".join(dev.describe(status))
    assert text.startswith("The development node is running (process 7).")
    assert "1 h 1 min" in text
    assert "900 MiB" in text
    assert "mvm start" in dev.describe(NodeStatus("qemu", "absent"))[0]
