"""The Firecracker driver.

A start is: a jail (`jail`), the jailer in it, the API's socket, the machine's parts one by one, InstanceStart. A wake
is: a jail with the pager's file in it, the jailer, and one request that loads the device state; memory comes as the
guest touches it, and a pager that dies takes the VMM with it (SIGBUS), never leaving a guest that waits.

There is no start without a jail: where the kernel refuses to build one, QEMU is what runs.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import msgspec

from mvm.core.errors import MissingPrerequisite, Refused, VmmError
from mvm.core.record import ProcessIdentity
from mvm.core.snapshot import ArtifactHash, Fingerprint
from mvm.core.spec import SeccompPolicy
from mvm.hostd import jailed_run
from mvm.hostd.keeper import Program, launch
from mvm.hostd.resources import cgroup
from mvm.hostd.vmm.driver import Capabilities, Drive, GuestMemory, Machine, Wants
from mvm.hostd.vmm.firecracker import jail, programs
from mvm.hostd.vmm.firecracker import requests as rq
from mvm.hostd.vmm.firecracker.probe import PROBE_MIB, probe, probe_machine
from mvm.hostd.vmm.firecracker.version import Version, caution, features
from mvm.hostd.vmm.firecracker.vm import CALL_S, LOG_FILE, SAVED_FILE, UNFILTERED_FILE, FirecrackerVm
from mvm.hostd.vmm.probe_room import probe_room
from mvm.hostd.vmm.qemu.probe import Acceleration, known_acceleration, remember
from mvm.linux import machine as host
from mvm.linux.files import ensure_dir, remove_tree
from mvm.linux.pidfd import is_alive

START_S: Final = 60.0
_MEMORY_FD: Final = 3
_MICROCODE: Final = re.compile(r"^microcode\s*:\s*(\S{1,32})", re.MULTILINE)


class Filter(msgspec.Struct, frozen=True):
    """A compiled seccomp filter for one version of Firecracker: `version` as 1.16.1, `sha256` of the file."""

    version: str
    path: Path
    sha256: str


class FirecrackerDriver:
    """`folder`: where firecracker and jailer are. `cache`: a directory for what is asked once per host and program.

    `pins`: program -> sha256 that it must have. `confined`: baseline mode, in which nothing may be missing.
    `strict_filters`: what tenants with `seccomp = "strict"` run under; there is none by default.
    """

    name = "firecracker"
    wants = Wants(tap_by_name=True, paths=jail.PATHS)

    def __init__(
        self,
        cache: Path,
        folder: Path,
        *,
        pins: Mapping[str, str] | None = None,
        confined: bool = False,
        strict_filters: tuple[Filter, ...] = (),
    ) -> None:
        self._cache = cache
        self._folder = folder
        self._pins = dict(pins or {})
        self._confined = confined
        self._strict_filters = strict_filters

    def facts(self) -> programs.Facts:
        return programs.inspect(self._folder, self._cache, pins=self._pins, confined=self._confined)

    def version(self) -> str:
        return str(Version(*self.facts().version))

    def acceleration(self, kernel: Path, initrd: Path) -> Acceleration:
        """Whether a guest of this kernel boots here: `kvm`, or `none` and why."""
        key = f"firecracker {self.facts().sha256['firecracker']}"
        try:
            return remember(key, kernel, self._cache, lambda: self._probe(kernel, initrd), otherwise="none")
        except VmmError as error:
            # A start that failed may have failed for what is mended by tomorrow, so nothing is remembered of it.
            said = " ".join(error.details.split())[-200:]
            return Acceleration(
                "none", f"Firecracker does not start here: {error.brief}; {said}".rstrip("; ")
            )

    def _probe(self, kernel: Path, initrd: Path) -> Acceleration:
        size = {"mem_mib": PROBE_MIB, "vcpus": 1}
        with probe_room(self._cache, confined=self._confined, **size) as room:
            # Whoever had the room before may have found out the same.
            return self.known(kernel) or probe(self.start, probe_machine(kernel, initrd, room))

    def known(self, kernel: Path) -> Acceleration | None:
        """What `acceleration` would say, if it is known without booting anything."""
        key = f"firecracker {self.facts().sha256['firecracker']}"
        return known_acceleration(key, kernel, self._cache, otherwise="none")

    def capabilities(self, kernel: Path, initrd: Path) -> Capabilities:
        chosen = self.acceleration(kernel, initrd)
        warning = caution(Version(*self.facts().version))
        reason = "; ".join(filter(None, [chosen.reason, warning]))
        return Capabilities(incremental=True, accel=chosen.accel, accel_reason=reason)

    def fingerprint(self, machine: Machine) -> Fingerprint:
        facts = self.facts()
        microcode = _MICROCODE.search(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        return Fingerprint(
            vmm=self.name,
            vmm_version=str(Version(*facts.version)),
            vmm_sha256=facts.sha256["firecracker"],
            machine=f"device state {facts.format}",
            accel="kvm",
            cpu_model=host.cpu_model().name,
            microcode=microcode[1] if microcode else "",
            host_kernel=host.kernel_release(),
            vcpus=machine.vcpus,
            mem_mib=machine.mem_mib,
            artifacts=tuple(ArtifactHash(name, sha256) for name, sha256 in machine.artifact_hashes),
        )

    def start(self, machine: Machine) -> FirecrackerVm:
        vm = self._launch(machine, None)
        try:
            for call in rq.boot(machine.config):
                if call.path == "/actions":
                    vm.take_nodes()  # it has opened them, and runs nothing of the guest's yet
                vm.ask(call, timeout=START_S if call.path == "/actions" else CALL_S)
            vm.check_filters()
        except BaseException:
            vm.stop(0)
            raise
        return vm

    def restore(self, machine: Machine, memory: GuestMemory) -> FirecrackerVm:
        vm = self._launch(machine, memory)
        try:
            for call in rq.collect(machine.config):
                vm.ask(call)
        except BaseException:
            vm.stop(0)
            raise
        return vm

    def adopt(
        self, identity: ProcessIdentity, machine_name: str, mem_mib: int, runtime: Path
    ) -> FirecrackerVm:
        if not is_alive(identity):
            raise VmmError(f"the VMM of {machine_name} is gone", details=f"Process {identity.pid}.")
        place = jailed_run.find(runtime)
        if place is None:
            raise VmmError(f"the VMM of {machine_name} has no sockets", details=str(runtime))
        known = features(Version(*self.facts().version))
        return FirecrackerVm(identity, None, mem_mib << 20, runtime, place.uid, known)

    def _launch(self, machine: Machine, memory: GuestMemory | None) -> FirecrackerVm:
        if machine.jail is None:
            raise MissingPrerequisite(
                "Firecracker runs in a jail only", details="This machine was given none."
            )
        facts = self.facts()
        chosen = jail.Programs(
            self._folder / jail.EXECUTABLE, self._folder / "jailer", self._filter_for(machine, facts)
        )
        with ExitStack() as opened:
            logs = _make_run(machine, opened)
            ours, theirs = socket.socketpair()
            opened.callback(ours.close)
            opened.callback(theirs.close)
            devices = [_hold(drive, opened) for drive in machine.drives if drive.device]
            vmm, keeper = launch(
                Program(
                    jail.command(chosen, machine, machine.jail),
                    {1: theirs.fileno(), **({} if memory is None else {_MEMORY_FD: memory.fd})},
                    0,
                    0,
                    (),
                    served=_MEMORY_FD if memory is not None and memory.serve is not None else None,
                    jail=jail.jail(chosen, machine, machine.jail, None if memory is None else memory.fd),
                    cgroup=machine.cgroup,
                    owner=(machine.uid, machine.gid),
                    tied=True,
                    lock_fd=0,
                ),
                runtime=machine.runtime,
                console=ours,
                errors=machine.runtime / "logs" / "vmm.log",
                serve=None if memory is None else memory.serve,
                keep=[*devices, *(() if memory is None else memory.keep)],
                logs=logs,
            )
        vm = FirecrackerVm(
            vmm, keeper, machine.mem_bytes, machine.runtime, machine.uid, features(Version(*facts.version)),
            strict=self._confined or machine.confined or machine.seccomp == SeccompPolicy.STRICT,
            nodes=tuple(drive.id for drive in machine.drives if drive.device),
        )  # fmt: skip
        try:
            vm.await_api()
            jailed_run.note(machine.runtime, jailed_run.Place(vmm, machine.uid))
            if machine.cgroup is not None:
                cgroup.require_member(machine.cgroup, vmm.pid)
        except BaseException:
            vm.stop(0)
            raise
        return vm

    def _filter_for(self, machine: Machine, facts: programs.Facts) -> Path | None:
        if machine.seccomp != SeccompPolicy.STRICT:
            return None
        version = str(Version(*facts.version))
        for one in self._strict_filters:
            if one.version == version:
                if not one.path.exists():
                    raise MissingPrerequisite(
                        f"the strict seccomp filter for Firecracker {version} is gone",
                        details=str(one.path),
                        resolution="Restore the file; one that mvm made, by: mvm bootstrap",
                    )
                if programs.sha256(one.path) != one.sha256:
                    raise Refused(
                        "the strict seccomp filter is not the file that was pinned",
                        details=f"{one.path}: expected sha256 {one.sha256}",
                        resolution="Restore the file, or pin the one that is there.",
                    )
                return one.path
        raise MissingPrerequisite(
            f"there is no strict seccomp filter for Firecracker {version}",
            details="A filter is compiled for one version, and none of that version was given.",
            resolution='Give hostd one, or set seccomp to "baseline" in the tenant\'s definition.',
        )


def _hold(drive: Drive, opened: ExitStack) -> int:
    """A descriptor of a device for the keeper: the device goes with its last user, and must not go before the VMM, or
    its number would be free for the next tenant's disk."""
    fd = os.open(drive.path, os.O_RDONLY | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return fd


def _make_run(machine: Machine, opened: ExitStack) -> dict[int, Path]:
    """The directory of the pipes that are bound into the jail, without anything of an earlier life.

    Returns descriptors of pipes -> logs.
    """
    run = machine.runtime / jailed_run.FOLDER
    remove_tree(run)
    for stale in (UNFILTERED_FILE, SAVED_FILE):
        (machine.runtime / stale).unlink(missing_ok=True)
    os.mkdir(run, 0o700)
    found: dict[int, Path] = {}
    wanted = ((jail.LOG, Path("logs") / LOG_FILE), (jail.METRICS, Path("metrics") / "vmm.json"))
    for name, log in wanted:
        os.mkfifo(run / name, 0o600)
        os.chown(run / name, machine.uid, machine.gid, follow_symlinks=False)
        # For writing too, so that it is never at its end.
        fd = os.open(run / name, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        opened.callback(os.close, fd)
        found[fd] = machine.runtime / log
    ensure_dir(machine.runtime / "metrics")
    return found
