"""The fake Firecracker as a process: command line, configuration file, logs, metrics, exit codes, seccomp, faults."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tests.support.fake_firecracker import Probe, elf_kernel, install
from tests.support.fake_firecracker.client import LOAD, Fake, read_answer, running
from tests.support.fake_firecracker.faults import Faults

from mvm.linux.process import Completed, run

EVERY_CODE = range(-64, 256)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("programs"))


def firecracker(programs: Path, *arguments: str, cwd: Path | None = None) -> Completed:
    return run([str(programs / "firecracker"), *arguments], timeout=20, ok=EVERY_CODE, cwd=cwd)


def test_version_and_help(programs: Path) -> None:
    found = firecracker(programs, "--version")
    assert (found.code, found.stdout.splitlines()[0]) == (0, b"Firecracker v1.16.1")
    found = firecracker(programs, "--nonsense", "--help")
    assert found.code == 0
    assert b"--api-sock <api-sock>" in found.stdout
    assert firecracker(programs, "--snapshot-version").stdout.startswith(b"v10.0.0\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--nonsense"], 153, b"Found argument 'nonsense' which wasn't expected"),
        (["stray"], 153, b"Found argument 'stray' which wasn't expected"),
        (["--id"], 153, b"The argument 'id' requires a value"),
        (["--id", "--no-api"], 153, b"The argument 'id' requires a value"),
        (["--id", "a", "--id", "b"], 153, b"provided more than once"),
        (["--id=a"], 153, b"wasn't expected"),
        (["--no-api"], 153, b"Argument 'config-file' required"),
        (["--no-seccomp", "--seccomp-filter", "f"], 153, b"cannot be used together"),
        (["--level", "loud"], 152, b"Invalid value for logger level"),
        (["--id", "under_score"], -signal.SIGABRT, b"Invalid instance ID"),
        (["--id", "x" * 65], -signal.SIGABRT, b"Invalid instance ID"),
        (["--config-file", "nothing"], -signal.SIGABRT, b"configuration file"),
        (["--log-path", "no/log"], 1, b"Could not initialize logger"),
        (["--metrics-path", "no/metrics"], 1, b"Could not initialize metrics"),
        (["--seccomp-filter", "nothing"], 1, b"Seccomp error"),
        (["--api-sock", "no/socket"], 1, b"Failed to bind and run the HTTP server"),
        (["--api-sock", "taken"], 1, b"Failed to open the API socket at: taken"),
        (["--describe-snapshot", "taken"], 1, b"Snapshot Data format"),
    ],
)
def test_what_ends_it_at_once(
    programs: Path, tmp_path: Path, arguments: list[str], code: int, words: bytes
) -> None:
    (tmp_path / "taken").touch()
    found = firecracker(programs, *arguments, cwd=tmp_path)
    assert found.code == code
    assert words in found.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drives": None}, b"invalid type: null"),
        ({"boot-source": {"kernel_image_path": "nothing"}}, b"kernel file cannot be opened"),
        ({"boot-source": {"kernel_image_path": "config"}}, b"Invalid Elf magic number"),
        ({"machine-config": {"vcpu_count": 1}}, b"missing field `mem_size_mib`"),
        ({"vsock": {"guest_cid": 3, "uds_path": "config"}}, b"Address already in use"),
        ({"entropy": {"unknown": 1}}, b"unknown field `unknown`"),
    ],
)
def test_a_configuration_file_that_is_wrong(
    programs: Path, tmp_path: Path, change: dict[str, object], words: bytes
) -> None:
    (tmp_path / "vmlinux").write_bytes(elf_kernel())
    config = {"boot-source": {"kernel_image_path": "vmlinux"}, "drives": [], **change}
    (tmp_path / "config").write_text(json.dumps(config))
    found = firecracker(programs, "--config-file", "config", "--api-sock", "s", cwd=tmp_path)
    assert found.code == 1
    assert words in found.stdout


def test_a_configuration_file_needs_its_kernel_and_its_drives(programs: Path, tmp_path: Path) -> None:
    for content, name in ((b"{}", b"drives"), (b'{"drives": []}', b"boot-source")):
        (tmp_path / "config").write_bytes(content)
        found = firecracker(programs, "--config-file", "config", "--no-api", cwd=tmp_path)
        assert found.code == 1
        assert b"missing field `" + name in found.stdout


def test_a_configuration_file_boots_at_once_and_unknown_parts_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(elf_kernel())
    config = {
        "boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0 reboot=k"},
        "drives": [],
        "vsock": {"guest_cid": 3, "uds_path": "v.sock"},
        "logger": {"log_path": "log"},
        "metrics": {"metrics_path": "metrics"},
        "serial": {"serial_out_path": "serial"},
        "ours": {"is": ["passed", "over"]},
    }
    (tmp_path / "config").write_text(json.dumps(config))
    with running(tmp_path, arguments=["--config-file", "config", "--id", "acme-1"]) as fake:
        found = fake.do("GET", "/").json  # answered when the start is done
        fake.do("GET", "/")  # the first may have come before the logger was set
        Probe(fake.uds).close()
        assert (found["id"], found["state"], found["app_name"]) == ("acme-1", "Running", "Firecracker")
        assert not (tmp_path / "serial").exists()
    assert "the fake guest boots" in (tmp_path / "words").read_text()
    assert "[acme-1:fc_api] The API server received" in (tmp_path / "log").read_text()


def test_logs_have_bodies_and_metrics_are_lines_of_json(tmp_path: Path) -> None:
    with running(tmp_path) as fake:
        fake.do("PUT", "/logger", {"log_path": "log", "level": "Info", "show_level": True})
        fake.do("PUT", "/metrics", {"metrics_path": "metrics"})
        fake.boot()
        fake.do("PUT", "/mmds", {"password": "not logged"})
        fake.do("PUT", "/actions", {"action_type": "FlushMetrics"})
    log = (tmp_path / "log").read_text()
    assert "reboot=k" in log
    assert "not logged" not in log
    lines = (tmp_path / "metrics").read_text().splitlines()
    assert len(lines) >= 2
    assert all("utc_timestamp_ms" in json.loads(line) for line in lines)


def filters(fake: Fake) -> dict[str, tuple[str, str]]:
    """Thread name -> (Seccomp, NoNewPrivs)."""
    found = {}
    for task in Path(f"/proc/{fake.child.pid}/task").iterdir():
        fields = dict(
            line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line
        )
        found[fields["Name"]] = (fields["Seccomp"], fields["NoNewPrivs"])
    return found


def test_each_thread_has_a_filter_the_vmms_own_from_the_start_on(tmp_path: Path) -> None:
    with running(tmp_path) as fake:
        fake.do("GET", "/")
        assert filters(fake) == {"firecracker": ("0", "0"), "fc_api": ("2", "1")}
        fake.boot()
        Probe(fake.uds).close()
        found = filters(fake)
        assert {"firecracker", "fc_api", "fc_vcpu 0"} <= set(found)
        assert set(found.values()) == {("2", "1")}


@pytest.mark.parametrize(
    ("arguments", "faults", "without"),
    [
        (["--no-seccomp"], [], {"firecracker", "fc_api", "fc_vcpu 0", "fc_vcpu 1", "fc_vsock"}),
        ([], ["no filter"], {"firecracker", "fc_api", "fc_vcpu 0", "fc_vcpu 1", "fc_vsock"}),
        ([], ["vcpu without filter"], {"fc_vcpu 0", "fc_vcpu 1"}),
    ],
)
def test_threads_without_filter(
    tmp_path: Path, arguments: list[str], faults: list[str], without: set[str]
) -> None:
    with running(tmp_path, arguments=arguments, faults=faults) as fake:
        fake.boot()
        Probe(fake.uds).close()
        assert {name for name, (mode, _) in filters(fake).items() if mode == "0"} == without


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, -15), (signal.SIGKILL, -9), (signal.SIGHUP, 156), (signal.SIGXCPU, 154),
        (signal.SIGILL, 157), (signal.SIGSYS, 148), (signal.SIGXFSZ, 151),
    ],
)  # fmt: skip
def test_signals(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with running(tmp_path) as fake:
        fake.do("GET", "/")
        fake.child.send_signal(number)
        assert fake.code() == code


# Faults


def test_a_fault_that_is_none_is_refused(tmp_path: Path) -> None:
    for line in ("nonsense", "hang", "hang PUT", "hang POST /x", "exit PUT /x", "refuse PUT x", "slow start"):
        with pytest.raises(ValueError):
            install(tmp_path, faults=[line])
    assert Faults(["exit after 3 PATCH /vm Paused"]).of_request("PATCH", "/vm", b'{"state":"Paused"}') == (
        "exit after",
        3,
    )


def test_faults_at_the_start(tmp_path: Path) -> None:
    with running(tmp_path, faults=["exit at start 7"], wait=False) as fake:
        assert fake.code() == 7
    with running(tmp_path, faults=["no socket"], wait=False) as fake:
        assert fake.child.wait(0.5) is None
        assert not fake.api.exists()
    with running(tmp_path, faults=["slow start 0.2"]) as fake:
        fake.do("GET", "/")
    programs = install(tmp_path / "p", faults=["version Something else"])
    assert firecracker(programs, "--version").stdout.startswith(b"Something else\n")


def test_faults_of_requests(tmp_path: Path) -> None:
    with running(tmp_path, faults=["refuse PATCH /vm Paused", "late GET /version"]) as fake:
        fake.boot()
        assert fake("PATCH", "/vm", {"state": "Paused"}).status == 400
        fake.state("Resumed")
        fake.do("GET", "/version")
    for line, code in (
        ("exit 148 PUT /entropy", 148),
        ("exit after 3 PUT /entropy", 3),
        (f"signal {signal.SIGKILL} PUT /entropy", -9),
    ):
        with running(tmp_path, faults=[line]) as fake:
            if "after" in line:
                fake.do("PUT", "/entropy", {})
            else:
                with pytest.raises(OSError):
                    fake("PUT", "/entropy", {})
            assert fake.code() == code


@pytest.mark.parametrize("what", ["garbage", "cut"])
def test_an_answer_that_is_none(tmp_path: Path, what: str) -> None:
    with running(tmp_path, faults=[f"{what} GET /version"]) as fake, fake.connect() as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\n\r\n")
        with pytest.raises((OSError, ValueError, IndexError)):
            read_answer(sock)


def test_faults_of_snapshots(tmp_path: Path) -> None:
    with running(tmp_path, faults=["no space", "resume fails"]) as fake:
        fake.boot()
        fake.state("Paused")
        assert "No space left on device (os error 28)" in fake.snapshot().fault
        assert fake("PATCH", "/vm", {"state": "Resumed"}).status == 400
        assert fake.do("GET", "/").json["state"] == "Paused"
    for fault in ("load fails", "no kvm"):
        (tmp_path / "v.sock").unlink(missing_ok=True)
        with running(tmp_path) as fake:
            fake.boot()
            fake.state("Paused")
            assert fake.snapshot().status == 204
        (tmp_path / "v.sock").unlink()
        with running(tmp_path, faults=[fault]) as fake:
            assert fake("PUT", "/snapshot/load", LOAD).status == 400
            assert fake.code() == 1


def test_faults_of_the_guest(tmp_path: Path) -> None:
    with running(tmp_path, faults=["no guest"]) as fake:
        fake.boot()
        with pytest.raises(ConnectionError):
            Probe(fake.uds)
    (tmp_path / "v.sock").unlink()
    with running(tmp_path, faults=["silent guest", "ignore sigterm"]) as fake:
        fake.boot()
        probe = Probe(fake.uds, 0.3)
        with pytest.raises(TimeoutError):
            probe.count()
        probe.close()
        fake.child.send_signal(signal.SIGTERM)
        assert fake.child.wait(0.3) is None


def test_the_program_needs_nothing_beside_it(tmp_path: Path) -> None:
    programs = install(tmp_path / "made")
    (tmp_path / "alone").mkdir()
    os.rename(programs / "firecracker", tmp_path / "alone" / "fc")
    found = run([str(tmp_path / "alone" / "fc"), "--version"], timeout=20)
    assert found.stdout.startswith(b"Firecracker v1.16.1\n")
