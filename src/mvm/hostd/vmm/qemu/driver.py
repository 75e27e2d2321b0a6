"""The QEMU driver.

Sleep asks QEMU for device state only (`xen-save-devices-state`, present in every build, about 10 kB in 1 ms) and takes
memory from outside through `mvm.linux.procmem`; no migration state machine is entered, so an aborted sleep is `cont`.
Wake starts a QEMU whose memory maps the image privately, loads that state with `migrate-incoming` and
`x-ignore-shared`, and leaves the vCPUs stopped for the caller to resume.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mvm.core.errors import MissingPrerequisite, VmmError
from mvm.core.record import ProcessIdentity
from mvm.core.snapshot import ArtifactHash, Fingerprint
from mvm.hostd.bounded_log import tail
from mvm.hostd.guest_channel.ports import socket_path
from mvm.hostd.keeper import Program, last_words, launch
from mvm.hostd.vmm.driver import CHANNELS, Capabilities, GuestMemory, Machine, Wants
from mvm.hostd.vmm.qemu import command as layout
from mvm.hostd.vmm.qemu.jail import jail
from mvm.hostd.vmm.qemu.probe import Acceleration, choose_acceleration
from mvm.hostd.vmm.qemu.qmp import Qmp
from mvm.linux import machine as host
from mvm.linux.pidfd import is_alive, terminate
from mvm.linux.process import find_program, run
from mvm.linux.procmem import ProcessMemory
from mvm.linux.sockets import listen_unix
from mvm.linux.tsc import tsc_khz

QEMU = "qemu-system-x86_64"
QMP_SOCKET = "qmp.sock"
_STATE_MAX = 64 << 20
_START_S, _CALL_S, _LOAD_S = 30.0, 10.0, 30.0
_VERSION = re.compile(r"version (\d+\.\d+\.\d+)(?: \(([^)]{1,80})\))?")
_ADDRESS = re.compile(r"is 0x([0-9a-f]+)")


def parse_version(text: str) -> str:
    """`7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)` from what `--version` prints. Raises VmmError."""
    found = _VERSION.search(text)
    if found is None:
        raise VmmError("QEMU's version is not readable", details=text[:200])
    return found[1] if found[2] is None else f"{found[1]} ({found[2]})"


class QemuDriver:
    """`cache`: a directory for what is probed once per host and kernel. `confined`: baseline mode, in which a probe
    is not started without jail and control group either."""

    name = "qemu"
    wants = Wants()

    def __init__(self, cache: Path, *, confined: bool = False) -> None:
        self._cache = cache
        self._confined = confined
        self._version = ""

    def program(self) -> str:
        found = find_program(QEMU)
        if found is None:
            raise MissingPrerequisite(
                "QEMU is not installed",
                details=f"There is no {QEMU}.",
                resolution="install it: apt-get install --no-install-recommends qemu-system-x86",
            )
        return found

    def version(self) -> str:
        if not self._version:
            program = self.program()
            # Running it costs as much as a tenth of a wake; the file's identity says whether the answer still holds.
            seen = os.stat(program)
            key = f"{seen.st_dev}:{seen.st_ino}:{seen.st_size}:{seen.st_mtime_ns}"
            cached = self._cache / "qemu-version"
            try:
                known, _, version = cached.read_text().partition("\n")
            except OSError:
                known = version = ""
            if known != key or not version:
                version = parse_version(run([program, "--version"], timeout=10).stdout.decode())
                self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
                cached.write_text(f"{key}\n{version}")
            self._version = version
        return self._version

    def acceleration(self, kernel: Path, initrd: Path) -> Acceleration:
        return choose_acceleration(
            self.program(), self.version(), kernel, initrd, self._cache, confined=self._confined
        )

    def capabilities(self, kernel: Path, initrd: Path) -> Capabilities:
        chosen = self.acceleration(kernel, initrd)
        return Capabilities(incremental=True, accel=chosen.accel, accel_reason=chosen.reason)

    def fingerprint(self, machine: Machine) -> Fingerprint:
        accel = self.acceleration(machine.kernel, machine.initrd).accel
        hardware = accel == "kvm"
        return Fingerprint(
            vmm=self.name,
            vmm_version=self.version(),
            machine="microvm",
            accel=accel,
            # Software emulation shows the guest the same CPU wherever it runs; hardware shows it this one.
            cpu_model=host.cpu_model().name if hardware else "qemu max",
            host_kernel=host.kernel_release() if hardware else "",
            vcpus=machine.vcpus,
            mem_mib=machine.mem_mib,
            artifacts=tuple(ArtifactHash(name, sha256) for name, sha256 in machine.artifact_hashes),
        )

    def start(self, machine: Machine) -> QemuVm:
        vm = self._launch(machine, None)
        try:
            vm.resume()
        except BaseException:
            vm.stop(0)
            raise
        return vm

    def restore(self, machine: Machine, memory: GuestMemory) -> QemuVm:
        return self._launch(machine, memory)

    def adopt(self, identity: ProcessIdentity, machine_name: str, mem_mib: int, runtime: Path) -> QemuVm:
        if not is_alive(identity):
            raise VmmError(f"the VMM of {machine_name} is gone", details=f"Process {identity.pid}.")
        return QemuVm(identity, None, mem_mib << 20, runtime)

    def _launch(self, machine: Machine, memory: GuestMemory | None) -> QemuVm:
        accel = self.acceleration(machine.kernel, machine.initrd).accel
        # A restored guest's kernel has read its arguments already.
        extra = layout.kernel_args(accel, tsc_khz() if accel == "tcg" else 0) if memory is None else ""
        argv = layout.command(self.program(), machine, accel, extra=extra, restored=memory is not None)
        groups = [os.stat("/dev/kvm").st_gid] if accel == "kvm" else []
        opened: list[int] = []
        sockets: list[socket.socket] = []
        console_ours, console_theirs = socket.socketpair()
        try:
            fds: dict[int, int] = {layout.CONSOLE_FD: console_theirs.fileno()}
            names = [(layout.QMP_FD, machine.runtime / QMP_SOCKET)]
            names += [(layout.CHANNEL_FD + n, socket_path(machine.runtime, n)) for n in range(CHANNELS)]
            for number, path in names:
                sockets.append(listen_unix(path))
                fds[number] = sockets[-1].fileno()
            for n, drive in enumerate(machine.drives):
                flags = os.O_RDONLY if drive.read_only else os.O_RDWR
                opened.append(os.open(drive.path, flags | os.O_CLOEXEC))
                fds[layout.DRIVE_FD + n] = opened[-1]
                if drive.key_fd is not None:
                    fds[layout.KEY_FD + n] = drive.key_fd
            if machine.nic is not None and machine.nic.fd is not None:
                fds[layout.TAP_FD] = machine.nic.fd
            if memory is not None:
                fds[layout.MEMORY_FD] = memory.fd
            else:
                for number, file in ((layout.KERNEL_FD, machine.kernel), (layout.INITRD_FD, machine.initrd)):
                    opened.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
                    fds[number] = opened[-1]
            vmm, keeper = launch(
                Program(
                    argv,
                    fds,
                    machine.uid,
                    machine.gid,
                    groups,
                    served=layout.MEMORY_FD if memory is not None and memory.serve is not None else None,
                    jail=None
                    if machine.jail is None
                    else jail(self.program(), machine.jail, accel, required=machine.confined),
                    cgroup=machine.cgroup,
                    file_max=_file_max(machine, fds),
                ),
                runtime=machine.runtime,
                console=console_ours,
                errors=machine.runtime / "logs" / "vmm.log",
                serve=memory.serve if memory is not None else None,
                keep=list(memory.keep) if memory is not None else (),
            )
        finally:
            for sock in (*sockets, console_ours, console_theirs):
                sock.close()
            for fd in opened:
                os.close(fd)
        return QemuVm(vmm, keeper, machine.mem_bytes, machine.runtime)


class QemuVm:
    """One QEMU process. The monitor is connected when it is first needed."""

    def __init__(
        self, vmm: ProcessIdentity, keeper: ProcessIdentity | None, size: int, runtime: Path
    ) -> None:
        self._vmm = vmm
        self._keeper = keeper
        self._size = size
        self._runtime = runtime
        self._qmp: Qmp | None = None

    @property
    def identity(self) -> ProcessIdentity:
        return self._vmm

    def is_alive(self) -> bool:
        return is_alive(self._vmm)

    def _call(
        self, command: str, *, timeout: float = _CALL_S, fds: tuple[int, ...] = (), **arguments: object
    ) -> object:
        try:
            if self._qmp is None:
                self._qmp = Qmp(self._runtime / QMP_SOCKET, timeout=_START_S)
            return self._qmp.call(command, fds=fds, timeout=timeout, **arguments)
        except VmmError as error:
            if self._qmp is not None and self._qmp.broken:
                self.close()
            if self.is_alive():
                raise
            raise VmmError(
                "QEMU ended unexpectedly",
                details="\n".join(filter(None, [error.details, self._last_words()])),
                resolution=f"See {self._runtime / 'logs' / 'vmm.log'}.",
            ) from error

    def _last_words(self) -> str:
        errors = self._runtime / "logs" / "vmm.log"
        return tail(errors) if self.is_alive() else last_words(self._runtime, errors)

    def pause(self) -> None:
        self._call("stop")

    def resume(self) -> None:
        self._call("cont")

    def save_state(self) -> bytearray:
        reader = os.memfd_create("mvm-state", os.MFD_CLOEXEC)
        try:
            # A descriptor set hands out only what matches the access mode asked for, and QEMU opens write-only.
            writer = os.open(f"/proc/self/fd/{reader}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                # A set of its own: one that a save cut short left behind still names that save's file.
                added = self._call("add-fd", fds=(writer,))
            finally:
                os.close(writer)
            number = added.get("fdset-id") if isinstance(added, Mapping) else None
            if not isinstance(number, int):
                raise VmmError("QEMU did not take the file for its device state", details=repr(added)[:200])
            try:
                self._call("xen-save-devices-state", filename=f"/dev/fdset/{number}", live=False)
            finally:
                if self.is_alive():
                    self._call("remove-fd", fdset_id=number)
            return _read_bounded(reader)
        finally:
            os.close(reader)

    def load_state(self, state: bytes) -> None:
        """Load device state into a VM started for restoring; it stays paused."""
        fd = os.memfd_create("mvm-state", os.MFD_CLOEXEC)
        try:
            view = memoryview(state)
            while view:
                view = view[os.write(fd, view) :]
            os.lseek(fd, 0, os.SEEK_SET)
            self._call(
                "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}]
            )
            self._call("getfd", fds=(fd,), fdname="state")
            self._call("migrate-incoming", uri="fd:state")
        finally:
            os.close(fd)
        deadline = time.monotonic() + _LOAD_S
        pause = 0.0005
        while True:
            status = self._call("query-status")
            name = status.get("status") if isinstance(status, Mapping) else ""
            if name in ("paused", "prelaunch"):
                return
            if name != "inmigrate" or time.monotonic() > deadline:
                raise VmmError(
                    "QEMU did not take the snapshot's device state",
                    details=f"It is {name}. {self._last_words()}",
                    resolution="The snapshot fits another QEMU; start the instance cold.",
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.01)

    @contextmanager
    def memory(self) -> Iterator[ProcessMemory]:
        told = str(self._call("human-monitor-command", command_line="gpa2hva 0"))
        found = _ADDRESS.search(told)
        if found is None:
            raise VmmError("QEMU does not say where the guest's memory is", details=told[:200])
        try:
            memory = ProcessMemory(self._vmm.pid, int(found[1], 16), self._size)
        except ValueError as error:
            raise VmmError(
                "QEMU names an impossible address for the guest's memory", details=told[:200]
            ) from error
        except OSError as error:
            raise VmmError("QEMU's memory cannot be read", details=str(error)) from error
        with memory:
            # Opened by number: if that changed hands before, what is open now is a stranger's memory.
            if not self.is_alive():
                raise VmmError("QEMU ended before its memory could be read", details=self._last_words())
            try:
                yield memory
            except OSError as error:
                if self.is_alive():
                    raise
                raise VmmError("QEMU ended while its memory was read", details=str(error)) from error

    def stop(self, grace_s: float) -> None:
        self.close()
        terminate(self._vmm, grace_s)
        if self._keeper is not None:
            # It ends by itself once the VMM is reaped; waiting means that its last write is done.
            _wait_gone(self._keeper)

    def close(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None


def _file_max(machine: Machine, fds: Mapping[int, int]) -> int | None:
    """An image is as large as it may be, and QEMU has the right to write to it: one that was taken over could fill the
    host's disk through it. What else QEMU writes, its device state, is smaller. None where it has no image."""
    images = [
        fds[layout.DRIVE_FD + n]
        for n, drive in enumerate(machine.drives)
        if not drive.read_only and not drive.device
    ]
    return max((os.fstat(fd).st_size for fd in images), default=None)


def _wait_gone(keeper: ProcessIdentity) -> None:
    deadline = time.monotonic() + 2.0
    while is_alive(keeper) and time.monotonic() < deadline:
        time.sleep(0.001)
    if is_alive(keeper):
        terminate(keeper, 0)


def _read_bounded(fd: int) -> bytearray:
    size = os.fstat(fd).st_size
    if not 0 < size <= _STATE_MAX:
        raise VmmError("QEMU's device state is not of a plausible size", details=f"{size} bytes.")
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = os.preadv(fd, [view[at:]], at)
        if count == 0:
            raise VmmError("QEMU's device state ended early")
        at += count
    return data
