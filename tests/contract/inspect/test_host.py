"""The facts, read from this machine, whatever it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.hostd import settings
from mvm.hostd.inspect.doctor import Acceleration, Facts, Result, diagnose
from mvm.hostd.inspect.host import path_facts, read_host, state_paths
from mvm.hostd.inspect.tools import OPTIONAL, PROGRAMS, read_nft, read_tools

MVM = Path(sys.executable).with_name("mvm")


@pytest.mark.req("O1")
def test_this_machine_can_be_judged(tmp_path: Path) -> None:
    host, tools = read_host(tmp_path / "not" / "there"), read_tools()
    assert host.mem_total >= host.mem_available > 0
    assert host.disk_total >= host.disk_free > 0
    assert host.cpus >= 1
    assert set(PROGRAMS) < set(tools)
    checks = diagnose(Facts(str(tmp_path), host, tools, read_nft(), Acceleration("", "not probed yet")))
    assert all(check.seen for check in checks)
    assert all(check.fix for check in checks if check.result in (Result.FAIL, Result.WARNING))


@pytest.mark.root
def test_firecracker_is_looked_for_where_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("firecracker", "jailer"):
        (folder / name).write_text(f"#!/bin/sh\n: >{tmp_path}/executed\necho 'Program v1.16.1'\n")
        (folder / name).chmod(0o755)
    (tmp_path / "hostd.toml").write_text(f'[vmm]\ndirectory = "{folder}"\n')
    (tmp_path / "hostd.toml").chmod(0o644)
    monkeypatch.setattr(settings, "FILE", tmp_path / "hostd.toml")
    tools = read_tools()
    assert [(tools[n].path, tools[n].version) for n in OPTIONAL] == [
        (f"{folder}/{n}", "1.16.1") for n in OPTIONAL
    ]
    # What others could have put there is not executed, perhaps by root, to ask it what it is.
    (tmp_path / "executed").unlink()
    folder.chmod(0o777)
    tools = read_tools()
    assert [(tools[n].version, tools[n].problem) for n in OPTIONAL] == [
        ("", f"others can change {folder}")
    ] * 2
    assert not (tmp_path / "executed").exists()
    (tmp_path / "hostd.toml").write_text("nonsense")
    assert set(read_tools()) == set(tools), "an invalid file is the daemon's to complain about"


@pytest.mark.root
@pytest.mark.req("O1")
def test_the_dry_run_changes_no_rule() -> None:
    before = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True, timeout=20).stdout
    found = read_nft()
    after = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True, timeout=20).stdout
    assert b"mvm-doctor" not in after
    assert before == after
    assert "syntax error" not in found.problem


def test_paths_are_seen_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(folder)
    seen = path_facts(folder)
    assert seen is not None
    assert (seen.kind, seen.uid, seen.mode) == ("directory", os.geteuid(), 0o700)
    link = path_facts(tmp_path / "link")
    assert link is not None
    assert link.kind == "link"
    assert path_facts(tmp_path / "absent") is None
    assert [path.path for path in state_paths(folder)][-1] == "/"


def cli(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(MVM), *words, "--root", str(root)],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.req("O1")
def test_doctor_says_by_its_exit_code_whether_something_fails(tmp_path: Path) -> None:
    done = cli(tmp_path / "root", "doctor", "--output", "json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [row["id"] for row in rows if row["result"] == "fail"]
    assert done.returncode == (15 if failed else 0)
    assert not (tmp_path / "root").exists(), "looking makes nothing"
    text = cli(tmp_path / "root", "doctor").stdout
    assert all(row["what"] in text for row in rows)


@pytest.mark.req("O1", "S5")
def test_node_info_of_a_node_without_anything(tmp_path: Path) -> None:
    done = cli(tmp_path / "root", "node", "info", "--output", "json")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["node_id"] == ""
    assert seen["instances"] == {}
    assert seen["vmm"]["accel"] == ""
    assert seen["key_provider"] == "development"
    assert "unencrypted" in seen["key_warning"]
    assert not (tmp_path / "root").exists(), "looking makes nothing"
    assert "environment" in cli(tmp_path / "root", "node", "info").stdout


@pytest.mark.root
@pytest.mark.req("O1")
def test_a_probe_needs_a_kernel(tmp_path: Path) -> None:
    done = cli(tmp_path / "root", "node", "info", "--probe")
    assert done.returncode == 10
    assert "mvm tenant build" in done.stderr


@pytest.fixture
def outside() -> Iterator[Path]:
    """A directory that everybody can enter, which pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="mvm-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.root
@pytest.mark.req("O1", "O6")
@pytest.mark.parametrize("words", [("node", "info"), ("doctor",), ("posture",)], ids=" ".join)
def test_without_root_less_is_seen_and_that_is_said(outside: Path, words: tuple[str, ...]) -> None:
    root = outside / "root"
    assert cli(root, "tenant", "create", "acme", "--flake", "nix/embedded").returncode == 0
    # The interpreter stays ours; only its rights go, so that the test needs no user who could read the source tree.
    script = (
        "import os, sys, json\n"
        "from mvm.cli.root import root\n"
        "import mvm.cli.node, mvm.cli.doctor, mvm.cli.posture, mvm.hostd.inspect.guarantees, mvm.hostd.inspect.scene\n"
        "import mvm.hostd.inspect.node, mvm.hostd.vmm.qemu.driver, mvm.standalone.compose, mvm.hostd.keys.development\n"
        "import mvm.hostd.vmm.qemu.probe, subprocess\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "root.main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "--root", str(root)],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == (15 if words == ("doctor",) and "FAIL" in done.stdout else 0), done.stderr
    assert "only root can" in done.stdout or "sudo mvm" in done.stdout
    assert "Traceback" not in done.stderr
