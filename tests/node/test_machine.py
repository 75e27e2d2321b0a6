"""That everything a production node has is real in the development node."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import termios

import pytest
from tests.node.conftest import Rig

pytestmark = [pytest.mark.node, pytest.mark.req("O4")]


def test_systemd_runs_the_node_and_nothing_failed(rig: Rig) -> None:
    assert rig.sh("cat /proc/1/comm").strip() == "systemd"
    assert rig.sh("systemctl is-system-running").strip() == "running"


def test_cgroups_are_unified_and_have_the_controllers(rig: Rig) -> None:
    assert rig.sh("stat -f -c %T /sys/fs/cgroup").strip() == "cgroup2fs"
    assert {"cpuset", "cpu", "io", "memory", "pids"} <= set(
        rig.sh("cat /sys/fs/cgroup/cgroup.controllers").split()
    )


def test_an_emulated_kernel_has_no_reason_to_rewrite_itself_for_a_guest(rig: Rig) -> None:
    """From the first guest to the last: what would be patched for one is held (`mvm.dev.node.steady`)."""
    if rig.sh("systemd-detect-virt || true").strip() != "qemu":
        pytest.skip("this node's processors are not emulated")
    unit = "mvm-node-steady.service"
    pid, quota = rig.sh(f"systemctl show -P MainPID -P CPUQuotaPerSecUSec {unit}").split()
    assert quota != "infinity"
    held = rig.sh(f"find /proc/{pid}/fd -lname 'anon_inode:*' -printf '%l\\n'")
    assert "anon_inode:kvm-vm" in held
    assert "anon_inode:kvm-vcpu" in held
    before, hosts = (
        int(rig.sh(f"systemctl show -P ActiveEnterTimestampMonotonic {name}"))
        for name in (unit, "mvm-hostd.service")
    )
    assert 0 < before < hosts


def test_a_cgroup_limit_holds(rig: Rig) -> None:
    """Four times the memory it may have: the kernel ends it."""
    out = rig.sh(
        "systemd-run --quiet --wait --collect -p MemoryMax=32M -p MemorySwapMax=0 "
        "python3 -c 'x = bytearray(128 << 20); print(len(x))' && echo survived || echo ended"
    )
    assert out.strip() == "ended"


def test_a_luks_volume_opens_and_closes(rig: Rig) -> None:
    out = rig.sh(
        """
        cd /state; truncate -s 32M volume
        head -c 32 /dev/urandom >key
        cryptsetup -q luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 volume key
        cryptsetup open --key-file key volume probe
        dmsetup table probe | cut -d' ' -f3
        echo content >/dev/mapper/probe; head -c 8 /dev/mapper/probe
        cryptsetup close probe
        ! grep -q content volume && echo 'not in the file'
        rm volume key; ls /dev/mapper
        """
    )
    assert out.split("\n")[:-1] == ["crypt", "content", "not in the file", "control"]


def test_vsock_reaches_guests_and_no_guest_reaches_the_agent(rig: Rig) -> None:
    """The device is there; the node's agent, which is root, does not listen where guests could connect."""
    script = """
import fcntl, os, socket
fd = os.open("/dev/vhost-vsock", os.O_RDWR)
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.settimeout(5)
from mvm.guest.proto import VSOCK_PORT
try:
    s.connect((1, VSOCK_PORT))
    print("connected")
except OSError as error:
    print("refused")
"""
    done = rig.mvm("shell", "--", "/opt/mvm/bin/python", "-c", script)
    assert done.stdout.strip() == b"refused"
    assert "vsock" not in rig.sh("ss -lnx --vsock | grep vsock || true").lower()


def test_the_node_has_no_network_and_nothing_of_this_computer(rig: Rig) -> None:
    assert rig.sh("ls /sys/class/net").split() == ["lo"]
    assert (
        rig.sh("find /etc/apt/sources.list* /etc/apt/apt.conf.d/99mmdebstrap -type f 2>/dev/null || true")
        == ""
    )
    assert rig.sh("test -e /etc/resolv.conf && echo there || true") == ""


def test_the_installed_mvm_is_the_one_that_started_the_node(rig: Rig) -> None:
    ours = rig.mvm("--version").stdout
    assert rig.mvm("shell", "--", "mvm", "--version").stdout == ours
    # pip's own record of what is installed names every file with its hash.
    checked = rig.sh(
        "/opt/mvm/bin/python -m pip --disable-pip-version-check check; readlink -f $(command -v mvm)"
    )
    assert checked.split("\n")[:2] == ["No broken requirements found.", "/opt/mvm/bin/mvm"]


@pytest.mark.req("O1")
def test_the_node_says_what_it_is(rig: Rig) -> None:
    info = json.loads(rig.sh("mvm node info --output json"))
    assert info["host"]["environment"] == "mvm-node"


@pytest.mark.req("O1", "O4")
def test_the_node_is_fit_for_tenants(rig: Rig) -> None:
    lines = rig.mvm("shell", "--", "mvm", "doctor", "--output", "json", code=None).stdout.splitlines()
    checks = [json.loads(line) for line in lines]
    assert {c["result"] for c in checks} >= {"ok"}
    assert [c for c in checks if c["result"] == "fail"] == []


@pytest.mark.req("O4", "L5")
def test_status_tells_what_runs(rig: Rig) -> None:
    node = json.loads(rig.mvm("status", "--output", "json").stdout)["node"]
    assert node["driver"] == "qemu"
    assert node["state"] == "running"
    assert node["accel"] in ("kvm", "tcg")
    assert re.fullmatch("[0-9a-f]{16}", node["image"])
    assert node["pid"] > 0
    assert rig.mvm("status").stdout.startswith(b"The development node is running")


def test_starting_twice_changes_nothing(rig: Rig) -> None:
    before = rig.node.status().pid
    again = json.loads(rig.mvm("start", "--output", "json").stdout)
    assert again["changed"] is False
    assert again["node"]["pid"] == before


def test_another_size_is_refused_while_it_runs(rig: Rig) -> None:
    done = rig.mvm("start", "--cpus", "3", code=11)
    assert b"mvm stop" in done.stderr


def test_shell_passes_exit_code_input_and_both_outputs(rig: Rig) -> None:
    done = rig.mvm("shell", "--", "sh", "-c", "cat; echo problem >&2; exit 7", stdin=b"a line\n", code=7)
    assert done.stdout == b"a line\n"
    assert done.stderr == b"problem\n"


def test_shell_on_a_terminal_is_a_terminal(rig: Rig) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (33, 99))
    argv = [
        sys.executable,
        "-m",
        "mvm.cli",
        "--root",
        str(rig.root),
        "shell",
        "--",
        "sh",
        "-c",
        "stty size; tty; exit 3",
    ]
    with subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        seen = b""
        try:
            while data := os.read(ours, 4096):
                seen += data
        except OSError:
            pass  # the terminal's end
        assert process.wait(60) == 3
    os.close(ours)
    assert seen.startswith(b"33 99\r\n/dev/pts/")


def test_what_a_session_started_outlives_the_agent(rig: Rig) -> None:
    rig.sh("systemd-run --quiet --unit=probe sleep 600; nohup sleep 601 >/dev/null 2>&1 & echo started")
    rig.mvm("shell", "--", "systemctl", "restart", "mvm-node-agent", code=None)
    assert rig.sh("pgrep -x sleep | wc -l; systemctl stop probe; pkill -x sleep").strip() == "2"
