"""The fake Firecracker's API: HTTP, validation, what is allowed before and after the start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_firecracker.client import LOAD, Fake, message, read_answer, running
from tests.support.world import World, network_namespace

PRE = "The requested operation is not supported before starting the microVM."
POST = "The requested operation is not supported after starting the microVM."


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    with running(tmp_path) as made:
        yield made


def raw(fake: Fake, data: bytes) -> bytes:
    with fake.connect() as sock:
        sock.sendall(data)
        return sock.recv(4096)


# HTTP


def test_a_success_without_data_has_no_length_and_no_reason(fake: Fake) -> None:
    assert raw(fake, message("PUT", "/entropy", b"{}")) == (
        b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
    )


def test_a_connection_serves_many_requests_also_sent_at_once(fake: Fake) -> None:
    with fake.connect() as sock:
        sock.sendall(message("GET", "/version", None) + message("GET", "/nothing", None))
        both = b""
        while both.count(b"}") < 2:
            both += sock.recv(4096)
        assert both.startswith(b"HTTP/1.1 200 ")
        assert both.index(b'"1.16.1"') < both.index(b"HTTP/1.1 400 ") < both.index(b"GET nothing")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"POST /vm HTTP/1.1\r\n\r\n", b"Unsupported HTTP method"),
        (b"get / HTTP/1.1\r\n\r\n", b"Unsupported HTTP method"),
        (b"GET / HTTP/2\r\n\r\n", b"Unsupported HTTP version"),
        (b"GET /\r\n\r\n", b"Invalid request"),
        (b"GET  HTTP/1.1\r\n\r\n", b"Empty URI"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"incorrectly formatted"),
        (b"PUT / HTTP/1.1\r\nContent-Length: many\r\n\r\n", b"Invalid value"),
        (b"PUT / HTTP/1.1\r\nContent-Length: 51201\r\n\r\n", b"larger than the limit of 51200"),
        (b"GET /" + b"a" * 1100 + b" HTTP/1.1\r\n\r\n", b"Invalid request"),
    ],
)
def test_what_is_no_http_gets_an_error_that_is_no_json(fake: Fake, data: bytes, words: bytes) -> None:
    answer = raw(fake, data)
    assert answer.startswith(b"HTTP/1.1 400 ")
    body = answer.partition(b"\r\n\r\n")[2]
    assert body.startswith(b'{ "error": "')
    assert words in body
    with pytest.raises(ValueError):
        json.loads(body)


def test_a_body_may_have_51200_bytes(fake: Fake) -> None:
    body = b'{"boot_args": "' + b"x" * (51200 - 17) + b'"}'
    assert len(body) == 51200
    assert "missing field `kernel_image_path`" in fake("PUT", "/boot-source", body).fault


def test_expect_is_answered_before_the_body_is_sent(fake: Fake) -> None:
    with fake.connect() as sock:
        sock.sendall(b"PUT /entropy HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert read_answer(sock).status == 100
        sock.sendall(b"{}")
        assert read_answer(sock).status == 204


def test_the_eleventh_connection_is_turned_away(fake: Fake) -> None:
    socks = [fake.connect() for _ in range(10)]
    for sock in socks:  # each has been accepted
        sock.sendall(message("GET", "/version", None))
        assert read_answer(sock).status == 200
    with fake.connect() as late:
        assert read_answer(late).status == 503
        assert late.recv(1) == b""
    for sock in socks:
        sock.close()


def test_while_one_request_takes_long_nobody_is_heard(tmp_path: Path) -> None:
    with running(tmp_path, faults=["hang GET /version"]) as fake:
        with fake.connect() as first, fake.connect() as second:
            first.sendall(message("GET", "/version", None))
            second.settimeout(0.5)
            # The order in which one thread sees both is not given, the hanging request comes for certain.
            for _ in range(2):
                second.sendall(message("GET", "/", None))
                try:
                    second.recv(4096)
                except TimeoutError:
                    return
            pytest.fail("two answers while the thread is busy")


# Validation


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("PUT", "/machine-config", {"vcpu_count": 1}, "missing field `mem_size_mib`"),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64, "x": 1}, "unknown field `x`"),
        ("PUT", "/machine-config", {"vcpu_count": "1", "mem_size_mib": 64}, "expected u8"),
        ("PUT", "/machine-config", {"vcpu_count": True, "mem_size_mib": 64}, "expected u8"),
        ("PUT", "/machine-config", {"vcpu_count": 1.0, "mem_size_mib": 64}, "floating point"),
        ("PUT", "/machine-config", {"vcpu_count": 256, "mem_size_mib": 64}, "expected u8"),
        ("PUT", "/machine-config", {"vcpu_count": -1, "mem_size_mib": 64}, "expected u8"),
        ("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 64}, "number of vCPUs"),
        ("PUT", "/machine-config", {"vcpu_count": 3, "mem_size_mib": 64, "smt": True}, "number of vCPUs"),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 0}, "memory size"),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 3, "huge_pages": "2M"}, "memory size"),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64, "smt": None}, "null"),
        ("PUT", "/machine-config", b'{"vcpu_count":1,"vcpu_count":1,"mem_size_mib":64}', "duplicate field"),
        ("PUT", "/machine-config", b"{", "deserializing"),
        ("PUT", "/machine-config", b"[1, 64]", "deserializing"),
        ("PUT", "/machine-config", b"\xff\xfe", "deserializing"),
        ("PUT", "/machine-config", None, "Empty PUT request."),
        ("PATCH", "/machine-config", None, "Empty PATCH request."),
        ("PATCH", "/machine-config", {}, "Empty PATCH request."),
        ("GET", "/machine-config", b"x", "GET request cannot have a body."),
        ("PUT", "/nonsense", {}, "Invalid request method and/or path: PUT nonsense."),
        ("GET", "/nonsense", None, "Invalid request method and/or path: GET nonsense."),
        ("PUT", "/vm/config", {}, "Invalid request method and/or path"),
        ("PUT", "/snapshot", {}, "Missing snapshot operation type."),
        ("PUT", "/snapshot/other", {}, "Invalid request method and/or path"),
        ("PUT", "/drives", {"drive_id": "a", "is_root_device": False}, "The ID cannot be empty."),
        ("PUT", "/drives/a-b", {"drive_id": "a-b", "is_root_device": False}, "alphanumeric"),
        ("PUT", "/drives/a", {"drive_id": "b", "is_root_device": False}, "does not match the id"),
        ("PUT", "/network-interfaces/a", {"iface_id": "b", "host_dev_name": "t"}, "does not match the id"),
        ("PUT", "/pmem/a", {"id": "b", "path_on_host": "t"}, "does not match the id"),
        ("PUT", "/drives/a", {"drive_id": "a", "is_root_device": False}, "Invalid block config."),
        ("PUT", "/actions", {"action_type": "Reboot"}, "unknown variant `Reboot`"),
        ("PUT", "/logger", {"level": "loud"}, "Invalid LevelFilter"),
        ("PUT", "/entropy", {"rate_limiter": {"speed": 1}}, "unknown field `speed`"),
        ("PUT", "/entropy", {"rate_limiter": {"ops": {"size": 1}}}, "missing field `refill_time`"),
        ("PUT", "/snapshot/load", {"snapshot_path": "s"}, "either `mem_backend` or `mem_file_path`"),
        ("PUT", "/snapshot/load", {**LOAD, "mem_file_path": "m"}, "exclusively"),
        ("PUT", "/snapshot/load", {**LOAD, "resume": True}, "unknown field `resume`"),
        ("PUT", "/boot-source", {"kernel_image_path": "nothing"}, "kernel file cannot be opened"),
        ("PUT", "/boot-source", {"kernel_image_path": "words", "initrd_path": "nothing"}, "initrd file"),
        ("PUT", "/boot-source", {"kernel_image_path": "words", "boot_args": "x" * 2048}, "command line"),
        ("PUT", "/drives/a", {"drive_id": "a", "is_root_device": False, "is_read_only": True,
                              "path_on_host": "nothing"}, "No such file"),
        ("PUT", "/balloon", {"amount_mib": 129, "deflate_on_oom": True}, "too large"),
        ("GET", "/balloon", None, "No balloon device found"),
        ("PUT", "/mmds/config", {"network_interfaces": []}, "is empty"),
        ("PUT", "/mmds/config", {"network_interfaces": ["eth0"]}, "any existing network interface"),
        ("PUT", "/metrics", {"metrics_path": "no/such/folder"}, "No such file"),
        ("PUT", "/logger", {"log_path": "no/such/folder"}, "No such file"),
    ],
)  # fmt: skip
def test_refused_before_the_start(fake: Fake, method: str, path: str, body: Any, words: str) -> None:
    assert words in fake(method, path, body).fault
    assert fake.do("GET", "/").json["state"] == "Not started"


def test_all_that_can_be_configured_is_shown(fake: Fake) -> None:
    fake.configure()
    bucket = {"size": 1000, "one_time_burst": None, "refill_time": 100}
    fake.do("PUT", "/balloon", {"amount_mib": 8, "deflate_on_oom": True, "stats_polling_interval_s": 1})
    fake.do("PUT", "/entropy", {"rate_limiter": {"bandwidth": {"size": 1000, "refill_time": 100}}})
    fake.do("PUT", "/drives/data", {
        "drive_id": "data", "is_root_device": False, "is_read_only": False, "path_on_host": "disk",
        "cache_type": "Writeback", "io_engine": "Sync", "rate_limiter": {"ops": {**bucket, "one_time_burst": 1}},
    })  # fmt: skip
    fake.do("PUT", "/serial", {"serial_out_path": "serial"})
    fake.do("PUT", "/cpu-config", {"kvm_capabilities": [], "cpuid_modifiers": [], "msr_modifiers": []})
    fake.do("PUT", "/hotplug/memory", {"total_size_mib": 256})
    # The published description has PATCH need what PUT needs; the program does not.
    fake.do("PATCH", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 32, "track_dirty_pages": True})
    shown = fake.do("GET", "/vm/config").json
    assert [drive["drive_id"] for drive in shown["drives"]] == ["rootfs", "data"]
    assert shown["drives"][1]["cache_type"] == "Writeback"
    assert shown["machine-config"] == fake.do("GET", "/machine-config").json
    assert shown["machine-config"]["track_dirty_pages"] is True
    assert shown["balloon"] == fake.do("GET", "/balloon").json
    assert shown["vsock"] == {"guest_cid": 3, "uds_path": "v.sock"}
    assert shown["boot-source"]["kernel_image_path"] == "vmlinux"


def test_there_is_one_root_drive(fake: Fake) -> None:
    fake.configure()
    drive = {"drive_id": "b", "is_root_device": True, "is_read_only": True, "path_on_host": "disk"}
    assert "A root block device already exists!" in fake("PUT", "/drives/b", drive).fault
    fake.do("PUT", "/drives/rootfs", {**drive, "drive_id": "rootfs"})


def test_metrics_go_to_one_place_for_good(fake: Fake) -> None:
    fake.do("PUT", "/metrics", {"metrics_path": "metrics"})
    assert "Reinitialization of metrics not allowed" in fake("PUT", "/metrics", {"metrics_path": "m"}).fault


def test_what_is_deprecated_is_said(fake: Fake) -> None:
    answer = fake.do("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock", "vsock_id": "old"})
    assert answer.headers["deprecation"] == "true"
    assert "deprecation" not in fake.do("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"}).headers


def test_a_name_that_is_taken_is_no_vsock(fake: Fake) -> None:
    (fake.folder / "v.sock").touch()
    assert "Address already in use" in fake("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"}).fault


@pytest.mark.parametrize(
    ("version", "has", "lacks"),
    [
        ("1.16.0", ("clock_realtime", "vsock_override", "track_dirty_pages", "network_overrides"), ()),
        ("1.15.1", ("clock_realtime", "track_dirty_pages", "network_overrides"), ("vsock_override",)),
        ("1.15.0", ("track_dirty_pages", "network_overrides"), ("vsock_override", "clock_realtime")),
        ("1.14.4", ("clock_realtime", "track_dirty_pages"), ("vsock_override",)),
        ("1.13.0", ("track_dirty_pages", "network_overrides"), ("vsock_override", "clock_realtime")),
        ("1.12.0", ("enable_diff_snapshots", "network_overrides"), ("track_dirty_pages", "clock_realtime")),
    ],
)
def test_fields_of_a_load_depend_on_the_version(
    tmp_path: Path, version: str, has: tuple[str, ...], lacks: tuple[str, ...]
) -> None:
    values: dict[str, object] = {"network_overrides": [], "vsock_override": None}
    with running(tmp_path, version=version) as fake:
        # Something is configured, so a load of the right form is refused for that, and is not fatal.
        fake.do("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
        for name in has:
            assert (
                "not allowed after"
                in fake("PUT", "/snapshot/load", {**LOAD, name: values.get(name, True)}).fault
            )
        for name in lacks:
            assert (
                f"unknown field `{name}`"
                in fake("PUT", "/snapshot/load", {**LOAD, name: values.get(name, True)}).fault
            )


def test_before_1_14_there_is_no_serial_and_a_log_has_to_be_there(tmp_path: Path) -> None:
    with running(tmp_path, version="1.13.0") as fake:
        assert "Invalid request method and/or path" in fake("PUT", "/serial", {}).fault
        assert "No such file" in fake("PUT", "/logger", {"log_path": "log"}).fault
        (tmp_path / "log").touch()
        fake.do("PUT", "/logger", {"log_path": "log"})


# States


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "/vm", {"state": "Paused"}),
        ("PATCH", "/vm", {"state": "Resumed"}),
        ("PUT", "/snapshot/create", {"snapshot_path": "s", "mem_file_path": "m"}),
        ("PATCH", "/drives/rootfs", {"drive_id": "rootfs"}),
        ("PATCH", "/network-interfaces/eth0", {"iface_id": "eth0"}),
        ("PATCH", "/balloon", {"amount_mib": 1}),
        ("PATCH", "/balloon/statistics", {"stats_polling_interval_s": 1}),
        ("GET", "/balloon/statistics", None),
        ("PUT", "/actions", {"action_type": "FlushMetrics"}),
        ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}),
        ("GET", "/hotplug/memory", None),
    ],
)
def test_only_after_the_start(fake: Fake, method: str, path: str, body: Any) -> None:
    assert fake(method, path, body).fault == PRE


def test_only_before_the_start(fake: Fake) -> None:
    fake.boot()
    for path, body in (
        ("/boot-source", {"kernel_image_path": "vmlinux"}),
        ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}),
        ("/vsock", {"guest_cid": 3, "uds_path": "other.sock"}),
        ("/balloon", {"amount_mib": 1, "deflate_on_oom": True}),
        ("/entropy", {}),
        ("/logger", {}),
        ("/metrics", {"metrics_path": "m"}),
        ("/serial", {}),
        ("/cpu-config", {}),
        ("/mmds/config", {"network_interfaces": ["eth0"]}),
        ("/hotplug/memory", {"total_size_mib": 128}),
        ("/snapshot/load", LOAD),
        ("/actions", {"action_type": "InstanceStart"}),
    ):
        assert fake("PUT", path, body).fault == POST, path
    assert fake("PATCH", "/machine-config", {"mem_size_mib": 1}).fault == POST
    drive = {"drive_id": "b", "is_root_device": False, "is_read_only": True, "path_on_host": "disk"}
    assert fake("PUT", "/drives/b", drive).fault == "PCI is not enabled"


def test_at_any_time(fake: Fake) -> None:
    for _ in range(2):
        for path in ("/", "/version", "/vm/config", "/machine-config", "/mmds"):
            fake.do("GET", path)
        fake.do("PUT", "/mmds", {"a": {"b": 1}})
        fake.do("PATCH", "/mmds", {"a": {"b": None, "c": 2}})
        assert fake.do("GET", "/mmds").json == {"a": {"c": 2}}
        if fake.do("GET", "/").json["state"] == "Not started":
            fake.boot()


def test_mmds_has_a_limit(tmp_path: Path) -> None:
    with running(tmp_path, arguments=["--mmds-size-limit", "100"]) as fake:
        fake.do("PUT", "/mmds", {"a": "x" * 80})
        assert fake("PUT", "/mmds", {"a": "x" * 100}).status == 413
        assert fake("PATCH", "/mmds", {"b": "x" * 80}).status == 413


def test_a_start_that_fails_can_be_tried_again(fake: Fake) -> None:
    start = {"action_type": "InstanceStart"}
    assert "without kernel configuration" in fake("PUT", "/actions", start).fault
    fake.configure()
    (fake.folder / "bzImage").write_bytes(bytes(0x202) + b"HdrS" + bytes(100))
    fake.do("PUT", "/boot-source", {"kernel_image_path": "bzImage"})
    assert "Invalid Elf magic number" in fake("PUT", "/actions", start).fault
    fake.do("PUT", "/boot-source", {"kernel_image_path": "vmlinux"})
    fake.do("PUT", "/actions", start)
    assert fake.do("GET", "/").json["state"] == "Running"


def test_pause_and_resume_may_be_repeated(fake: Fake) -> None:
    fake.boot()
    for wanted, state in (("Paused", "Paused"), ("Resumed", "Running")) * 2:
        fake.state(wanted)
        fake.state(wanted)
        assert fake.do("GET", "/").json["state"] == state


def test_a_running_drive_and_balloon_can_be_changed(fake: Fake) -> None:
    fake.configure()
    fake.do("PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": 1})
    fake.do("PUT", "/actions", {"action_type": "InstanceStart"})
    (fake.folder / "other").write_bytes(bytes(512))
    fake.do("PATCH", "/drives/rootfs", {"drive_id": "rootfs", "path_on_host": "other"})
    assert fake.do("GET", "/vm/config").json["drives"][0]["path_on_host"] == "other"
    assert (
        "No such file" in fake("PATCH", "/drives/rootfs", {"drive_id": "rootfs", "path_on_host": "no"}).fault
    )
    assert "not found" in fake("PATCH", "/drives/none", {"drive_id": "none", "path_on_host": "other"}).fault
    fake.do("PATCH", "/balloon", {"amount_mib": 8})
    found = fake.do("GET", "/balloon/statistics").json
    assert (found["target_mib"], found["actual_mib"]) == (8, 8)
    fake.do("PATCH", "/balloon/statistics", {"stats_polling_interval_s": 2})
    assert "cannot be enabled" in fake("PATCH", "/balloon/statistics", {"stats_polling_interval_s": 0}).fault
    assert "less than" in fake("PATCH", "/balloon", {"amount_mib": 33}).fault


@pytest.mark.root
@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="needs /dev/net/tun")
def test_a_tap_is_opened_at_once_and_by_one(tmp_path: Path) -> None:
    nic = {"iface_id": "eth0", "host_dev_name": "fc0", "guest_mac": "06:00:00:00:00:01"}
    with network_namespace():
        with running(tmp_path) as fake:
            fake.do("PUT", "/network-interfaces/eth0", nic)
            assert "fc0" in World.links()
            again = {**nic, "iface_id": "eth1", "guest_mac": "06:00:00:00:00:02"}
            assert "Device or resource busy" in fake("PUT", "/network-interfaces/eth1", again).fault
            same = {**nic, "iface_id": "eth1", "host_dev_name": "other"}
            assert "already in use" in fake("PUT", "/network-interfaces/eth1", same).fault
            long = {"iface_id": "eth1", "host_dev_name": "a" * 16}
            assert "Invalid interface name" in fake("PUT", "/network-interfaces/eth1", long).fault
        assert "fc0" not in World.links()
