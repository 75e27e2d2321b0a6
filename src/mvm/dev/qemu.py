"""The node on Linux: one QEMU process under a keeper, as for guests, from files in one directory.

    <folder>/lock            one command at a time changes a node
    <folder>/node.json       what the node is (`Kept`): its size, its image, its machine id
    <folder>/root.ext4       a copy of the image; replaced when the image is another one
    <folder>/state.ext4      what stays: /var/lib/mvm, /nix, /srv/mvm in the node
    <folder>/vmlinuz, initrd of the image
    <folder>/seed.tar        what this start carries in (`mvm.dev.seed`)
    <folder>/runtime/        sockets, logs, `alive` (locked while anything runs), process.json

A node is found by its process identity (pid, start time, boot id), never by its pid alone. When QEMU is killed, that is
the node's power loss: the keeper ends with it and nothing else is left but names of sockets.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from mvm.core.errors import Conflict, GuestError, MissingPrerequisite, MvmError, ResourceExhausted, VmmError
from mvm.core.record import ProcessIdentity
from mvm.dev import disks, image, machine, recipe, seed, sources, wheel
from mvm.dev.model import NodeSpec, NodeStatus, StartOptions, Tell
from mvm.hostd.guest_channel import GuestChannel, acquire_session_port, connect, distrust_ports
from mvm.hostd.guest_channel.ports import socket_path
from mvm.hostd.keeper import Program, await_end, end_leftovers, launch
from mvm.hostd.vmm.driver import CHANNELS
from mvm.hostd.vmm.qemu import command as layout
from mvm.hostd.vmm.qemu.driver import QMP_SOCKET, QemuDriver
from mvm.linux import machine as host
from mvm.linux.files import ensure_dir, locked, read_bounded, remove_tree, write_atomic
from mvm.linux.pidfd import is_alive, open_pidfd, terminate
from mvm.linux.process import wait_readable
from mvm.linux.sockets import listen_unix
from mvm.linux.tsc import tsc_khz

_T = TypeVar("_T")
UID: Final = 1_899_999_999
"""QEMU's uid and gid, below those of instances (`mvm.core.addressing.UID_BASE`); it owns nothing."""
BOOT_S: Final = 300.0
"""Emulated on a busy machine; 25 s on an idle one."""
_LOCK_S: Final = 600.0
_FORCE_S: Final = 5.0
_SPARE_MEMORY: Final = 512 << 20
_FILE_MAX: Final = 1 << 16
_ASK_S: Final = 60.0


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """node.json. `image`: digest of the image that root.ext4 was copied from, empty before the first copy."""

    spec: NodeSpec
    machine_id: str
    image: str = ""


class Running(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """runtime/process.json. `ready`: the node answered once after this start."""

    vmm: ProcessIdentity
    started_ns: int
    accel: str
    accel_reason: str
    ready: bool = False


class QemuNode:
    """`folder`: the node's directory; `cache`: for images and probes, shared by all nodes of this computer.

    `flake`: the embedded flake that the node's mvm gets.
    """

    name = "qemu"

    def __init__(self, folder: Path, cache: Path, flake: Callable[[], Path]) -> None:
        self._folder = folder
        self._cache = cache
        self._flake = flake
        self.runtime = folder / "runtime"

    # start

    def start(self, options: StartOptions, tell: Tell) -> bool:
        _require_root()
        for parent in (self._folder, self.runtime, self.runtime / "logs"):
            ensure_dir(parent)
        tell.phase("waiting for another command")
        with locked(self._folder / "lock", wait=_LOCK_S):
            kept = self._kept()
            spec = wanted_spec(kept.spec if kept else None, options, self._running() is not None)
            began = False
            if self._running() is None:
                self._launch(spec, kept, options, tell)
                began = True
            running = self._running()
            if began or (running is not None and not running.ready):
                self._await(tell)
            return began

    def _launch(self, spec: NodeSpec, kept: Kept | None, options: StartOptions, tell: Tell) -> None:
        end_leftovers(self.runtime)
        _require_memory(spec)
        driver = QemuDriver(self._cache)
        driver.program()
        made = self._image(options, tell)
        kept = self._prepare_disks(spec, kept, made, options.rebuild, tell)
        tell.phase("this mvm")
        write_atomic(self._folder / "seed.tar", seed.build(self._flake()))
        tell.phase("looking at hardware acceleration")
        accel = driver.acceleration(made.kernel, made.initrd)
        tell.phase("starting")
        arguments = machine.boot_args(accel.accel, tsc_khz() if accel.accel == "tcg" else 0, kept.machine_id)
        argv = machine.command(
            driver.program(), vcpus=spec.vcpus, mem_mib=spec.mem_mib, accel=accel.accel, boot_args=arguments
        )
        distrust_ports(self.runtime)
        vmm = self._execute(argv, [os.stat("/dev/kvm").st_gid] if accel.accel == "kvm" else [])
        self._save(Running(vmm, time.time_ns(), accel.accel, accel.reason))

    def _image(self, options: StartOptions, tell: Tell) -> image.Image:
        tell.phase("finding package sources")
        chosen = sources.from_mirror(options.mirror) if options.mirror else sources.of_this_machine()
        return image.obtain(
            recipe.make(chosen, wheel.requirements()), self._cache / "dev", tell, rebuild=options.rebuild
        )

    def _prepare_disks(
        self, spec: NodeSpec, kept: Kept | None, made: image.Image, replace: bool, tell: Tell
    ) -> Kept:
        state, root = self._folder / "state.ext4", self._folder / "root.ext4"
        identity = kept.machine_id if kept else os.urandom(16).hex()
        if not state.exists():
            tell.phase("making the state disk")
            disks.require_space(self._folder, 0)
            disks.make_state(state, spec.disk_gib)
        before = Kept(spec, identity, kept.image if kept else "")
        if replace or before.image != made.digest or not root.exists():
            tell.phase("copying the image")
            # Said before it is done: a copy that was interrupted is made again.
            write_atomic(self._folder / "node.json", msgspec.json.encode(Kept(spec, identity)))
            disks.require_space(self._folder, disks.allocated(made.root))
            for source, name in ((made.kernel, "vmlinuz"), (made.initrd, "initrd"), (made.root, "root.ext4")):
                disks.copy_sparse(source, self._folder / name)
                if name != "root.ext4":
                    # QEMU opens these two again by descriptor, as its own uid.
                    os.chmod(self._folder / name, 0o444)
        after = Kept(spec, identity, made.digest)
        write_atomic(self._folder / "node.json", msgspec.json.encode(after))
        return after

    def _execute(self, argv: list[str], groups: list[int]) -> ProcessIdentity:
        opened: list[int] = []
        sockets: list[socket.socket] = []
        ours, theirs = socket.socketpair()
        try:
            fds = {layout.CONSOLE_FD: theirs.fileno()}
            names = [(layout.QMP_FD, self.runtime / QMP_SOCKET)]
            names += [(layout.CHANNEL_FD + n, socket_path(self.runtime, n)) for n in range(CHANNELS)]
            for number, path in names:
                sockets.append(listen_unix(path))
                fds[number] = sockets[-1].fileno()
            files = [(layout.KERNEL_FD, "vmlinuz", os.O_RDONLY), (layout.INITRD_FD, "initrd", os.O_RDONLY)]
            files += [
                (layout.DRIVE_FD + machine.ROOT, "root.ext4", os.O_RDWR),
                (layout.DRIVE_FD + machine.STATE, "state.ext4", os.O_RDWR),
                (layout.DRIVE_FD + machine.SEED, "seed.tar", os.O_RDONLY),
            ]
            for number, name, flags in files:
                opened.append(os.open(self._folder / name, flags | os.O_CLOEXEC))
                fds[number] = opened[-1]
            vmm, _keeper = launch(
                Program(argv, fds, UID, UID, groups),
                runtime=self.runtime,
                console=ours,
                errors=self.runtime / "logs" / "vmm.log",
            )
        finally:
            for sock in (*sockets, ours, theirs):
                sock.close()
            for fd in opened:
                os.close(fd)
        return vmm

    def _await(self, tell: Tell) -> None:
        """Until systemd says that everything is up, which includes mvm. A node that fails is left for a look at it."""
        deadline = time.monotonic() + BOOT_S
        tell.phase("booting")
        while True:
            try:
                with self._session(deadline) as channel:
                    channel.hello(timeout=min(10.0, max(1.0, deadline - time.monotonic())))
                break
            except GuestError as error:
                if self._running() is None:
                    raise VmmError(
                        "the node ended while it was booting",
                        details=self._last_words(),
                        resolution=f"See {self.runtime / 'logs'}.",
                    ) from error
                if time.monotonic() > deadline:
                    raise GuestError(
                        f"the node did not come up in {BOOT_S:.0f} s",
                        details=self._last_words(),
                        resolution="Stop it and start it again: mvm stop; mvm start",
                    ) from error
        tell.phase("waiting for its services")
        left = max(10.0, deadline - time.monotonic())
        code, text = self._ask("systemctl", "is-system-running", "--wait", timeout=left)
        if code != 0:
            _, units = self._ask("systemctl", "--failed", "--no-legend", "--plain", timeout=_ASK_S)
            raise GuestError(
                f"the node is up, but {text.strip() or 'not well'}",
                details=units.strip() or self._last_words(),
                resolution="Look at it with: mvm shell -- journalctl -b -p warning",
            )
        running = self._running()
        if running is not None:
            self._save(msgspec.structs.replace(running, ready=True))

    # stop

    def stop(self, *, grace_s: float, discard: bool, tell: Tell) -> str:
        _require_root()
        if not self._folder.is_dir():
            return "absent"
        tell.phase("waiting for another command")
        with locked(self._folder / "lock", wait=_LOCK_S):
            how = self._stop(grace_s, tell)
            if discard:
                tell.phase("removing its disks")
                for entry in list(self._folder.iterdir()):
                    if entry.name != "lock":
                        remove_tree(entry)
        if discard:
            remove_tree(self._folder)
        return how

    def _stop(self, grace_s: float, tell: Tell) -> str:
        running = self._running()
        how = "stopped" if (self._folder / "node.json").exists() else "absent"
        if running is not None:
            how = "killed"
            if grace_s > 0:
                tell.phase("shutting down")
                if self._power_off() and self._ends(running, grace_s):
                    how = "shut-down"
            if how == "killed":
                tell.phase("ending its process")
                terminate(running.vmm, 0)
            await_end(self.runtime)
        end_leftovers(self.runtime)
        for name in [
            QMP_SOCKET,
            "process.json",
            *(socket_path(self.runtime, n).name for n in range(CHANNELS)),
        ]:
            (self.runtime / name).unlink(missing_ok=True)
        return how

    def _power_off(self) -> bool:
        """Ask systemd, which answers before it acts; whether it took the request."""
        try:
            return self._ask("systemctl", "poweroff", "--no-block", timeout=_ASK_S)[0] == 0
        except MvmError:
            return False

    def _ends(self, running: Running, within_s: float) -> bool:
        fd = open_pidfd(running.vmm)
        if fd is None:
            return True
        try:
            return wait_readable(fd, within_s)
        finally:
            os.close(fd)

    # look

    def status(self) -> NodeStatus:
        _require_root()
        kept = self._kept()
        if kept is None:
            return NodeStatus(self.name, "absent", folder=str(self._folder))
        running = self._running()
        disks_used = sum(disks.allocated(self._folder / name) for name in ("root.ext4", "state.ext4"))
        status = NodeStatus(
            driver=self.name, state="stopped", image=kept.image, vcpus=kept.spec.vcpus, mem_mib=kept.spec.mem_mib,
            disk_gib=kept.spec.disk_gib, disk_used_bytes=disks_used, folder=str(self._folder),
        )  # fmt: skip
        if running is None:
            return status
        return msgspec.structs.replace(
            status,
            state="running" if running.ready else "starting",
            accel=running.accel,
            accel_reason=running.accel_reason,
            uptime_s=max(0, (time.time_ns() - running.started_ns) // 1_000_000_000),
            pid=running.vmm.pid,
        )

    # use

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        tty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
    ) -> int:
        from mvm.hostd.guest_channel.terminal import pump

        with self.channel() as channel:
            status = pump(
                channel,
                argv,
                stdin,
                stdout,
                stderr,
                tty=tty,
                env=env,
                cwd=cwd or ("" if user else "/root"),
                user=user,
            )
            return status.shell_code

    @contextmanager
    def channel(self) -> Iterator[GuestChannel]:
        """A session channel to the running node. Conflict if it does not run."""
        _require_root()
        if self._running() is None:
            raise Conflict(
                "the node is not running",
                details=f"There is no process of {self._folder}.",
                resolution="Start it with: mvm start",
            )
        with self._session(time.monotonic() + _ASK_S) as channel:
            yield channel

    def power_loss(self) -> None:
        """End the node as a failing power supply would: its process, at once, whatever it is doing."""
        running = self._running()
        if running is not None:
            terminate(running.vmm, 0)
            await_end(self.runtime)

    @contextmanager
    def _session(self, deadline: float) -> Iterator[GuestChannel]:
        lease = acquire_session_port(self.runtime)
        with connect(lease.socket, lease=lease, deadline=deadline) as channel:
            yield channel

    def _ask(self, *argv: str, timeout: float) -> tuple[int, str]:
        out = bytearray()
        with self._session(time.monotonic() + timeout) as channel:
            status = channel.exec(argv, stdout=out.extend, stderr=out.extend, timeout=timeout)
        return status.shell_code, out.decode("utf-8", "replace")

    def _kept(self) -> Kept | None:
        return _load(self._folder / "node.json", Kept)

    def _running(self) -> Running | None:
        """What runs now: a record whose very process is alive."""
        found = _load(self.runtime / "process.json", Running)
        return found if found is not None and is_alive(found.vmm) else None

    def _save(self, running: Running) -> None:
        write_atomic(self.runtime / "process.json", msgspec.json.encode(running))

    def _last_words(self) -> str:
        """The end of the console and of QEMU's own messages."""
        parts = []
        for name in ("console.log", "vmm.log"):
            try:
                data = (self.runtime / "logs" / name).read_bytes()[-3000:]
            except OSError:
                continue
            lines = [
                "".join(c for c in line if c.isprintable())
                for line in data.decode("utf-8", "replace").split("\n")
            ]
            parts += [line for line in lines if line.strip()][-12:]
        return "\n".join(parts)


def wanted_spec(kept: NodeSpec | None, options: StartOptions, running: bool) -> NodeSpec:
    """What was asked for, over what the node is, over the defaults. Conflict where that cannot be had now."""
    base = kept or NodeSpec()
    spec = NodeSpec(
        vcpus=options.vcpus or base.vcpus,
        mem_mib=options.mem_mib or base.mem_mib,
        disk_gib=options.disk_gib or base.disk_gib,
    )
    if running and (spec != base or options.rebuild):
        raise Conflict(
            "the node is running",
            details=f"It has {base.vcpus} CPUs, {base.mem_mib} MiB of memory and a disk of {base.disk_gib} GiB.",
            resolution="Stop it first: mvm stop",
        )
    if kept is not None and spec.disk_gib != kept.disk_gib:
        raise Conflict(
            "the node has its state disk already",
            details=f"It was made with {kept.disk_gib} GiB.",
            resolution="Keep that size, or give up what is on it: mvm stop --discard",
        )
    return spec


def _load(path: Path, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(read_bounded(path, _FILE_MAX), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _require_root() -> None:
    if os.geteuid() != 0:
        raise MissingPrerequisite(
            "the development node needs root",
            details="Its image holds files of root, and QEMU is started as a user that owns nothing.",
            resolution="Run the command as root, for example with sudo.",
        )


def _require_memory(spec: NodeSpec) -> None:
    available = host.memory_available()
    if available < (spec.mem_mib << 20) + _SPARE_MEMORY:
        raise ResourceExhausted(
            "too little memory for the node",
            details=f"{available >> 20} MiB are available; the node has {spec.mem_mib} MiB and QEMU takes"
            f" {_SPARE_MEMORY >> 20} MiB more.",
            resolution="End something, or give it less: mvm start --memory 2048",
        )
