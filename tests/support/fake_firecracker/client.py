"""What the fake's own tests use: raw HTTP over the socket, and one fake in a directory of its own."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.openapi import Description

from mvm.linux.process import Child, start
from mvm.linux.sockets import connect_unix

from . import elf_kernel, install

DESCRIPTION_FILE = "MVM_FIRECRACKER_OPENAPI"
"""Environment: the published description of the API, for 1.16.1. With it, whatever the fake takes has to fit it."""
LOAD = {"snapshot_path": "state", "mem_backend": {"backend_type": "File", "backend_path": "mem"}}


@cache
def description() -> Description:
    return Description(Path(os.environ[DESCRIPTION_FILE]))


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def fault(self) -> str:
        assert self.status == 400, self
        return str(self.json["fault_message"])


def read_answer(sock: socket.socket) -> Answer:
    """ConnectionError when the peer closes before it is complete."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += _receive(sock)
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    while len(body) < int(headers.get("content-length", "0")):
        body += _receive(sock)
    return Answer(int(lines[0].split(" ")[1]), headers, body)


def _receive(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 16)
    if not data:
        raise ConnectionResetError("closed before an answer")
    return data


def message(method: str, path: str, body: bytes | None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + (body or b"")


class Fake:
    """A running firecracker whose working directory is `folder`; relative paths in requests are below it."""

    def __init__(self, folder: Path, child: Child) -> None:
        self.folder, self.child = folder, child
        self.api = folder / "api.sock"
        self.uds = folder / "v.sock"
        self._sock: socket.socket | None = None

    def connect(self) -> socket.socket:
        sock = connect_unix(self.api, 20)  # whose path may be longer than sun_path
        sock.settimeout(20)
        return sock

    def __call__(self, method: str, path: str, body: object = None) -> Answer:
        if self._sock is None:
            self._sock = self.connect()
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self._sock.sendall(message(method, path, raw))
        answer = read_answer(self._sock)
        if answer.status < 300 and DESCRIPTION_FILE in os.environ:
            assert description().check(method, path, raw) == [], (method, path, raw)
        return answer

    def do(self, method: str, path: str, body: object = None) -> Answer:
        """Which has to succeed."""
        answer = self(method, path, body)
        assert answer.status in (200, 204), answer
        return answer

    def state(self, wanted: str) -> None:
        self.do("PATCH", "/vm", {"state": wanted})

    def snapshot(self, kind: str = "Full") -> Answer:
        return self(
            "PUT",
            "/snapshot/create",
            {"snapshot_path": "state", "mem_file_path": "mem", "snapshot_type": kind},
        )

    def configure(self, *, mem_mib: int = 32) -> None:
        (self.folder / "vmlinux").write_bytes(elf_kernel())
        (self.folder / "disk").write_bytes(bytes(8192))
        self.do(
            "PUT", "/boot-source", {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0 reboot=k"}
        )
        self.do("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": mem_mib})
        self.do(
            "PUT",
            "/drives/rootfs",
            {
                "drive_id": "rootfs",
                "is_root_device": True,
                "is_read_only": True,
                "path_on_host": "disk",
                "cache_type": "Writeback",
            },
        )
        self.do("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"})

    def boot(self, *, mem_mib: int = 32) -> None:
        self.configure(mem_mib=mem_mib)
        self.do("PUT", "/actions", {"action_type": "InstanceStart"})

    def code(self) -> int:
        """The exit status of a process that has to end (minus a signal's number)."""
        found = self.child.wait(20)
        assert found is not None, "it goes on"
        return found

    def end(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self.child.stop(0)
        self.child.close()


@contextmanager
def running(
    folder: Path,
    *,
    version: str = "1.16.1",
    faults: Iterable[str] = (),
    arguments: Sequence[str] = (),
    wait: bool = True,
) -> Iterator[Fake]:
    """One fake, ended at the end. A stale API socket of an earlier one is removed, its other files stay."""
    programs = install(folder / f"programs-{os.urandom(4).hex()}", version=version, faults=faults)
    (folder / "api.sock").unlink(missing_ok=True)
    with (folder / "words").open("ab") as words:
        child = start(
            [str(programs / "firecracker"), "--api-sock", "api.sock", *arguments],
            cwd=folder,
            stdout=words.fileno(),
            stderr=words.fileno(),
        )
    fake = Fake(folder, child)
    try:
        until = time.monotonic() + 20
        while wait and child.wait(0) is None:
            try:
                fake.connect().close()
                break
            except OSError:
                assert time.monotonic() < until, "no API socket"
                time.sleep(0.005)
        yield fake
    finally:
        fake.end()
