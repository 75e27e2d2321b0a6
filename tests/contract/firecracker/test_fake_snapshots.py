"""The fake Firecracker's snapshots, its vsock device and the guest behind it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_firecracker import AGENT_PORT, COUNTER, Probe, vsock_connect
from tests.support.fake_firecracker.client import LOAD, Fake, running

from mvm.hostd.guest_channel.channel import GuestChannel
from mvm.hostd.vmm.firecracker.memory import find
from mvm.linux.procmem import ProcessMemory

FLUSH = {"action_type": "FlushMetrics"}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    with running(tmp_path) as made:
        made.boot()
        yield made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a snapshot in it, and nothing that is in the way of loading it."""
    with running(tmp_path) as made:
        made.boot()
        probe = Probe(made.uds)
        while probe.count() < 3:
            pass
        probe.ask("write", pages=[300], fill="before the sleep ")
        made.state("Paused")
        assert made.snapshot().status == 204
        probe.close()
    (tmp_path / "v.sock").unlink()
    return tmp_path


def counted(memory: bytes) -> int:
    return int.from_bytes(memory[COUNTER : COUNTER + 8], "little")


def test_a_snapshot_needs_a_paused_vm(fake: Fake) -> None:
    assert "save/restore unavailable while running" in fake.snapshot().fault
    assert not (fake.folder / "state").exists()


def test_a_full_snapshot_has_all_memory_and_a_wake_goes_on(saved: Path) -> None:
    memory = (saved / "mem").read_bytes()
    assert len(memory) == 32 << 20
    with running(saved) as fake:
        fake.do("PUT", "/snapshot/load", LOAD)
        assert fake.do("GET", "/").json["state"] == "Paused"
        fake.state("Resumed")
        probe = Probe(fake.uds)
        found = probe.ask("status")
        assert found["restored"]
        assert found["count"] >= counted(memory) > 0
        assert b"before the sleep" in bytes.fromhex(probe.ask("read", page=300)["data"])
        probe.ask("write", pages=[300], fill="after")
        probe.close()
    assert (saved / "mem").read_bytes() == memory, "the mapping is private"


def test_a_load_may_resume_at_once(saved: Path) -> None:
    with running(saved) as fake:
        fake.do("PUT", "/snapshot/load", {**LOAD, "resume_vm": True})
        assert fake.do("GET", "/").json["state"] == "Running"
        Probe(fake.uds).close()


def test_the_memory_that_a_snapshot_came_from_can_be_its_target(saved: Path) -> None:
    with running(saved) as fake:
        fake.do("PUT", "/snapshot/load", LOAD)
        fake.state("Resumed")
        Probe(fake.uds).close()
        fake.state("Paused")
        assert fake.snapshot().status == 204
        assert counted((saved / "mem").read_bytes()) > 0


def test_a_diff_has_what_was_written_since(tmp_path: Path) -> None:
    with running(tmp_path) as fake:
        fake.configure()
        fake.do("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 32, "track_dirty_pages": True})
        fake.do("PUT", "/actions", {"action_type": "InstanceStart"})
        fake.state("Paused")
        assert fake.snapshot().status == 204
        (tmp_path / "mem").unlink()
        fake.state("Resumed")
        probe = Probe(fake.uds)
        probe.ask("write", pages=[500], fill="new")
        fake.state("Paused")
        assert fake.snapshot("Diff").status == 204
        probe.close()
    memory = (tmp_path / "mem").read_bytes()
    assert memory[500 * 4096 :].startswith(b"newnew")
    assert (tmp_path / "mem").stat().st_blocks * 512 < 1 << 20, "the rest is a hole"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"snapshot_path": "no/such/state"}, "Cannot perform open on the snapshot backing file"),
        ({"mem_file_path": "/"}, "Cannot perform open on the memory backing file"),
        ({"mem_file_path": "/dev/null"}, "Cannot perform truncate on the memory backing file"),
        ({"snapshot_path": "/dev/full"}, "No space left on device"),
    ],
)
def test_a_snapshot_that_cannot_be_written(fake: Fake, target: dict[str, str], words: str) -> None:
    fake.state("Paused")
    body = {"snapshot_path": "state", "mem_file_path": "mem", **target}
    assert words in fake("PUT", "/snapshot/create", body).fault
    fake.state("Resumed")
    Probe(fake.uds, 5).close()  # the attempt reset the device all the same


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"snapshot_path": "nothing"}, "Failed to open snapshot file"),
        ({"snapshot_path": "disk"}, "Failed to load snapshot state from file"),
        ({"snapshot_path": "cut"}, "CRC64"),
        ({"snapshot_path": "older"}, "Invalid data version"),
        ({"mem_backend": {"backend_type": "File", "backend_path": "nothing"}}, "Failed to load guest memory"),
        ({"mem_backend": {"backend_type": "File", "backend_path": "disk"}}, "offset is too large"),
        ({"mem_backend": {"backend_type": "Uffd", "backend_path": "nothing"}}, "Failed to connect to UDS"),
        ({"network_overrides": [{"iface_id": "eth9", "host_dev_name": "t"}]}, "Unknown Network Device"),
        ({"vsock_override": {"uds_path": "disk"}}, "Address already in use"),
    ],
)
def test_a_load_that_fails_ends_the_process(saved: Path, change: dict[str, Any], words: str) -> None:
    state = (saved / "state").read_bytes()
    (saved / "cut").write_bytes(state[: len(state) // 2])
    (saved / "older").write_bytes(state[:8] + b"9.0.0\0" + state[14:])
    with running(saved) as fake:
        answer = fake("PUT", "/snapshot/load", {**LOAD, **change})
        assert answer.fault.startswith("Load snapshot error: Failed to restore from snapshot:")
        assert words in answer.fault
        assert fake.code() == 1


def test_a_load_fails_if_a_drive_or_the_sockets_name_is_gone(saved: Path) -> None:
    with running(saved) as fake:
        (saved / "v.sock").touch()
        assert "Address already in use" in fake("PUT", "/snapshot/load", LOAD).fault
        assert fake.code() == 1
    (saved / "v.sock").unlink()
    (saved / "disk").unlink()
    with running(saved) as fake:
        assert "No such file" in fake("PUT", "/snapshot/load", LOAD).fault
        assert fake.code() == 1


@pytest.mark.parametrize("version", ["1.15.1", "1.17.0"])
def test_a_state_of_another_version_is_refused(saved: Path, version: str) -> None:
    with running(saved, version=version) as fake:
        assert "Invalid data version: 10.0.0" in fake("PUT", "/snapshot/load", LOAD).fault
        assert fake.code() == 1


def test_a_load_is_only_for_what_was_not_configured(saved: Path) -> None:
    with running(saved) as fake:
        fake.do("PUT", "/logger", {"log_path": "log"})
        fake.do("PUT", "/metrics", {"metrics_path": "metrics"})
        fake.do("PUT", "/serial", {"serial_out_path": "serial"})
        fake.do("PUT", "/snapshot/load", {**LOAD, "vsock_override": {"uds_path": "other.sock"}})
        fake.state("Resumed")
        Probe(saved / "other.sock").close()
    with running(saved) as fake:
        fake.do("PUT", "/entropy", {})
        assert "not allowed after configuring" in fake("PUT", "/snapshot/load", LOAD).fault
        assert fake.do("GET", "/").json["state"] == "Not started", "this refusal is not fatal"


def test_memory_that_fails_under_the_guest_kills_the_vmm(saved: Path) -> None:
    with running(saved) as fake:
        fake.do("PUT", "/snapshot/load", LOAD)
        os.truncate(saved / "mem", 0)
        with contextlib.suppress(OSError):  # it may or may not come to answer
            fake.state("Resumed")
        assert fake.code() == 149


def test_guest_memory_can_be_read_from_outside(fake: Fake) -> None:
    probe = Probe(fake.uds)
    probe.ask("write", pages=[700], fill="seen from outside")
    probe.close()
    fake.state("Paused")
    pid = fake.child.pid
    mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    [span] = find(Path(f"/proc/{pid}/maps").read_text(), 32 << 20, lambda at, size: os.pread(mem, size, at))
    os.close(mem)
    with ProcessMemory(pid, span.address, span.size) as memory:
        written = {page for first, count in memory.dirty_runs() for page in range(first, first + count)}
        assert {16, 17, 700} <= written
        assert len(written) < 1000
        buffer = bytearray(4096)
        memory.read_into(700 * 4096, buffer)
        assert buffer.startswith(b"seen from outside")


def test_the_balloon_takes_only_what_the_guest_does_not_use(tmp_path: Path) -> None:
    with running(tmp_path) as fake:
        fake.configure()
        fake.do("PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": 1})
        fake.do("PUT", "/actions", {"action_type": "InstanceStart"})
        probe = Probe(fake.uds)
        probe.ask("noise", first=6000, count=1000)
        probe.ask("noise", first=7000, count=1000)
        probe.ask("free", first=7000, count=1000)
        fake.do("PATCH", "/balloon", {"amount_mib": 32})
        assert bytes.fromhex(probe.ask("read", page=7500)["data"]) == bytes(4096)
        assert bytes.fromhex(probe.ask("read", page=6500)["data"]) != bytes(4096)
        assert fake.do("GET", "/balloon/statistics").json["actual_pages"] == 4096 - 1000
        probe.close()


# vsock


def test_the_agent_answers_through_the_handshake(fake: Fake) -> None:
    with GuestChannel(vsock_connect(fake.uds, AGENT_PORT)) as channel:
        channel.hello(timeout=10)
        assert channel.status(timeout=10).memory_total_kib == 32 << 10


def test_local_ports_count_up_from_two_to_the_thirty(fake: Fake) -> None:
    found = []
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(f"/proc/self/fd/{os.open(fake.folder, os.O_PATH)}/v.sock")
            sock.sendall(b"connect %d\n" % AGENT_PORT)
            found.append(sock.recv(64))
    assert found == [b"OK %d\n" % (1 << 30), b"OK %d\n" % ((1 << 30) + 1)]


@pytest.mark.parametrize(
    "line", [b"CONNECT 99\n", b"CONNECT x12345\n", b"HELLO 5252\n", b"CONNECT 5", b"C\n"]
)
def test_an_unknown_port_or_line_is_closed_without_a_word(fake: Fake, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(f"/proc/self/fd/{os.open(fake.folder, os.O_PATH)}/v.sock")
        sock.sendall(line)
        try:
            assert sock.recv(64) == b""
        except ConnectionResetError:
            pass


def test_while_paused_nothing_moves(fake: Fake) -> None:
    probe = Probe(fake.uds)
    fake.state("Paused")
    probe._sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        probe.count()
    with pytest.raises(TimeoutError):
        Probe(fake.uds, 0.3)
    probe.close()


def test_a_snapshot_resets_connections(fake: Fake) -> None:
    probe = Probe(fake.uds)
    fake.state("Paused")
    assert fake.snapshot().status == 204
    fake.state("Resumed")
    with pytest.raises(OSError):
        probe.count()
    probe.close()
    Probe(fake.uds).close()


@pytest.mark.parametrize(
    ("version", "deaf"), [("1.15.1", False), ("1.16.0", True), ("1.16.1", True), ("1.17.0", False)]
)
def test_a_bare_pause_leaves_the_guest_deaf_in_1_16(tmp_path: Path, version: str, deaf: bool) -> None:
    with running(tmp_path, version=version) as fake:
        fake.boot()
        probe = Probe(fake.uds)
        fake.state("Paused")
        fake.state("Resumed")
        if not deaf:
            assert probe.count() >= 0
            probe.close()
            return
        for attempt in range(2):
            with pytest.raises(TimeoutError):
                Probe(fake.uds, 0.3)
            if attempt == 0:
                fake.state("Paused")
                fake.state("Resumed")
        fake.state("Paused")
        assert fake.snapshot().status == 204
        fake.state("Resumed")
        Probe(fake.uds).close()
        probe.close()


@pytest.mark.parametrize("reboots", [True, False])
def test_a_reboot_ends_the_vmm_and_a_poweroff_does_not(fake: Fake, reboots: bool) -> None:
    channel = GuestChannel(vsock_connect(fake.uds, AGENT_PORT))
    channel.hello(timeout=10)
    if reboots:
        channel.shutdown(timeout=10, reboot=True)
        assert fake.code() == 0
    else:
        channel.shutdown(timeout=10)
        assert fake.child.wait(0.3) is None
    channel._sock.close()


def test_ctrl_alt_del_ends_it(fake: Fake) -> None:
    fake.do("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
    assert fake.code() == 0
