"""`FakeDriver`: a VMM driver without virtual machines, for tests of everything around a VMM.

Real: the keeper, the processes and their uid, memory and how it is read, sealed and paged, sockets, tap, descriptors,
the guest's agent. Not there: a processor that runs a kernel, and disks. See tests/support/fake_vmm.py.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tests.support import fake_vmm

import mvm
from mvm.core.errors import VmmError
from mvm.core.record import ProcessIdentity
from mvm.core.snapshot import ArtifactHash, Fingerprint
from mvm.hostd.guest_channel import socket_path
from mvm.hostd.keeper import Program, launch
from mvm.hostd.vmm.driver import CHANNELS, Capabilities, GuestMemory, Machine, Wants
from mvm.linux.pidfd import is_alive, terminate
from mvm.linux.procmem import ProcessMemory
from mvm.linux.sockets import connect_unix, listen_unix

MONITOR_SOCKET = "monitor.sock"
PROGRAM_FD, DRIVE_FD, KEY_FD, TAP_FD = 60, 20, 40, 6


@cache
def interpreter() -> str:
    """A Python that any uid can start: a virtual environment may lie where only its owner can go."""
    real = Path(sys.executable).resolve()
    if all(folder.stat().st_mode & 0o001 for folder in [real, *real.parents]):
        return str(real)
    return "/usr/bin/python3"


@cache
def archive() -> bytes:
    """The fake VMM and the guest's agent as one zip archive."""
    package = Path(mvm.__file__).parent
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as target:
        target.write(fake_vmm.__file__, "__main__.py")
        target.writestr("mvm/__init__.py", "")
        for path in sorted((package / "guest").glob("*.py")):
            target.write(path, f"mvm/guest/{path.name}")
    return made.getvalue()


class FakeDriver:
    """Implements `mvm.hostd.vmm.driver.Driver`. `timeout`: seconds the monitor may take to answer."""

    name = "fake"
    wants = Wants()

    def __init__(self, *, version: str = "1.0", timeout: float = 10.0, ignore_sigterm: bool = False) -> None:
        self._version = version
        self._timeout = timeout
        self._ignore_sigterm = ignore_sigterm

    def version(self) -> str:
        return self._version

    def capabilities(self, kernel: Path, initrd: Path) -> Capabilities:
        return Capabilities(incremental=True, accel="none", accel_reason="a fake has no processor")

    def fingerprint(self, machine: Machine) -> Fingerprint:
        return Fingerprint(
            vmm=self.name,
            vmm_version=self._version,
            machine="fake",
            accel="none",
            cpu_model="none",
            vcpus=machine.vcpus,
            mem_mib=machine.mem_mib,
            artifacts=tuple(ArtifactHash(name, sha256) for name, sha256 in machine.artifact_hashes),
        )

    def start(self, machine: Machine) -> FakeVm:
        vm = self._launch(machine, None)
        try:
            vm.resume()
        except BaseException:
            vm.stop(0)
            raise
        return vm

    def restore(self, machine: Machine, memory: GuestMemory) -> FakeVm:
        return self._launch(machine, memory)

    def adopt(self, identity: ProcessIdentity, machine_name: str, mem_mib: int, runtime: Path) -> FakeVm:
        if not is_alive(identity):
            raise VmmError(f"the VMM of {machine_name} is gone", details=f"Process {identity.pid}.")
        return FakeVm(identity, None, mem_mib << 20, runtime, self._timeout)

    def _launch(self, machine: Machine, memory: GuestMemory | None) -> FakeVm:
        wish = {
            "name": machine.name,
            "mem_bytes": machine.mem_bytes,
            "restored": memory is not None,
            "ignore_sigterm": self._ignore_sigterm,
        }
        opened: list[int] = []
        sockets: list[socket.socket] = []
        ours, theirs = socket.socketpair()
        try:
            fds: dict[int, int] = {fake_vmm.CONSOLE_FD: theirs.fileno()}
            names = [(fake_vmm.MONITOR_FD, machine.runtime / MONITOR_SOCKET)]
            names += [(fake_vmm.CHANNEL_FD + n, socket_path(machine.runtime, n)) for n in range(CHANNELS)]
            for number, path in names:
                sockets.append(listen_unix(path))
                fds[number] = sockets[-1].fileno()
            for n, drive in enumerate(machine.drives):
                flags = os.O_RDONLY if drive.read_only else os.O_RDWR
                opened.append(os.open(drive.path, flags | os.O_CLOEXEC))
                fds[DRIVE_FD + n] = opened[-1]
                if drive.key_fd is not None:
                    fds[KEY_FD + n] = drive.key_fd
            if machine.nic is not None and machine.nic.fd is not None:
                fds[TAP_FD] = machine.nic.fd
            if memory is not None:
                fds[fake_vmm.MEMORY_FD] = memory.fd
            opened.append(os.memfd_create("fake-vmm", os.MFD_CLOEXEC))
            os.write(opened[-1], archive())
            fds[PROGRAM_FD] = opened[-1]
            argv = [interpreter(), "-I", "-S", "-B", f"/proc/self/fd/{PROGRAM_FD}", json.dumps(wish)]
            served = fake_vmm.MEMORY_FD if memory is not None and memory.serve is not None else None
            vmm, keeper = launch(
                Program(argv, fds, machine.uid, machine.gid, (), served=served, cgroup=machine.cgroup),
                runtime=machine.runtime,
                console=ours,
                errors=machine.runtime / "logs" / "vmm.log",
                serve=memory.serve if memory is not None else None,
                keep=list(memory.keep) if memory is not None else (),
            )
        finally:
            for sock in (*sockets, ours, theirs):
                sock.close()
            for fd in opened:
                os.close(fd)
        return FakeVm(vmm, keeper, machine.mem_bytes, machine.runtime, self._timeout)


class FakeVm:
    """One fake VMM. `ask` reaches what a test does to the machine behind everybody's back."""

    def __init__(
        self,
        vmm: ProcessIdentity,
        keeper: ProcessIdentity | None,
        size: int,
        runtime: Path,
        timeout: float,
    ) -> None:
        self._vmm = vmm
        self.keeper = keeper
        self._size = size
        self._path = runtime / MONITOR_SOCKET
        self._timeout = timeout
        self._monitor: socket.socket | None = None

    @property
    def identity(self) -> ProcessIdentity:
        return self._vmm

    def is_alive(self) -> bool:
        return is_alive(self._vmm)

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """Run a monitor command (`do_*` in tests/support/fake_vmm.py). VmmError for everything that goes wrong."""
        try:
            if self._monitor is None:
                self._monitor = connect_unix(self._path, self._timeout)
            self._monitor.sendall(json.dumps({"do": command, **arguments}).encode() + b"\n")
            line = b""
            while not line.endswith(b"\n"):
                data = self._monitor.recv(1 << 16)
                if not data:
                    raise ConnectionResetError("it closed its monitor")
                line += data
        except OSError as error:
            self.close()
            raise VmmError("the fake VMM does not answer", details=f"{command}: {error}") from error
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise VmmError(f"the fake VMM refused {command}", details=answer["error"])
        return answer

    def pause(self) -> None:
        self.ask("pause")

    def resume(self) -> None:
        self.ask("resume")

    def save_state(self) -> bytearray:
        return bytearray(self.ask("save")["state"].encode())

    def load_state(self, state: bytes) -> None:
        self.ask("load", state=bytes(state).decode("utf-8", "replace"))

    @contextmanager
    def memory(self) -> Iterator[ProcessMemory]:
        with ProcessMemory(self._vmm.pid, self.ask("status")["address"], self._size) as memory:
            yield memory

    def stop(self, grace_s: float) -> None:
        self.close()
        terminate(self._vmm, grace_s)
        if self.keeper is not None:
            terminate_when_done(self.keeper)

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None


def terminate_when_done(keeper: ProcessIdentity) -> None:
    """A keeper ends by itself once its VMM is reaped."""
    from mvm.linux.pidfd import open_pidfd
    from mvm.linux.process import wait_readable

    fd = open_pidfd(keeper)
    if fd is None:
        return
    try:
        wait_readable(fd, 5.0)
    finally:
        os.close(fd)
    terminate(keeper, 0)
