"""A whole node in memory, for crashes by the thousand: hostd's own code over a disk and a kernel of the tests'.

Real: the store, records, ledger, operations, recovery, sealing, keys, network policy. Stood in for: what starts
programs or asks the kernel (`_patched`). hostd is a child of this process for every operation; it is killed before its
n-th effect, an effect being a system call that changes the disk or the kernel, a write being cut in half, or a named
step of an operation. Nothing of the child's runs after that: no `finally`, no handler, as after SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.campaign.disk import Disk
from tests.campaign.kernel import PAGE, Kernel
from tests.support.world import World

from mvm.core import ledger
from mvm.core.errors import GuestError, VmmError
from mvm.core.ledger import Kind, Seen
from mvm.core.record import ProcessIdentity
from mvm.core.snapshot import ArtifactHash, Fingerprint
from mvm.hostd import ledger as node_ledger
from mvm.hostd.host import Host
from mvm.hostd.sealing import CHUNK
from mvm.hostd.vmm.driver import Capabilities, GuestMemory, Machine, Wants
from mvm.wire.guest_api import WakeReport

KILLED, FAILED = 137, 3
_MARKED = 1000
"""The page of guest memory that holds what the guest knows."""
_EFFECTS = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "ftruncate")


class Tripwire:
    """Counts effects, and ends the process before the one that was asked for."""

    def __init__(self, at: int | None) -> None:
        self.count = 0
        self._at = at

    def __call__(self, step: str = "") -> None:
        self.count += 1
        if self.count == self._at:
            os._exit(KILLED)

    def write(self, fd: int, data: Any) -> int:
        self.count += 1
        if self.count == self._at:
            with contextlib.suppress(OSError):
                _write(fd, memoryview(data)[: len(data) // 2])
            os._exit(KILLED)
        return _write(fd, data)


_write = os.write


class SimulatedMemory:
    """Guest memory with one page in it."""

    def __init__(self, size: int, page: bytes) -> None:
        self.size = size
        self._page = page

    def dirty_runs(self) -> Iterator[tuple[int, int]]:
        yield _MARKED, 1

    def present_pages(self) -> bytearray:
        present = bytearray(self.size // PAGE)
        present[_MARKED] = 1
        return present

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), PAGE):
            here = self._page if (offset + at) // PAGE == _MARKED else bytes(PAGE)
            buffer[at : at + PAGE] = here[: len(buffer) - at]


class SimulatedVm:
    def __init__(self, kernel: Kernel, identity: ProcessIdentity, runtime: Path, size: int) -> None:
        self.identity = identity
        self._kernel = kernel
        self._runtime = runtime
        self._size = size

    def is_alive(self) -> bool:
        return self._kernel.alive(self.identity)

    def _there(self) -> dict[str, Any]:
        found = self._kernel.vm(self._runtime)
        if found is None or not self.is_alive():
            raise VmmError("the simulated VMM is gone")
        return found

    def pause(self) -> None:
        self._there()
        self._kernel.set_status(self._runtime, "paused")

    def resume(self) -> None:
        if self._there()["status"] == "waiting":
            raise VmmError("no device state was loaded")
        if self._there()["status"] != "running":
            self._kernel.set_status(self._runtime, "running")

    def save_state(self) -> bytearray:
        assert self._there()["status"] == "paused"
        return bytearray(b"device state")

    def load_state(self, state: bytes) -> None:
        assert self._there()["status"] == "waiting"
        assert bytes(state) == b"device state"
        self._kernel.set_status(self._runtime, "paused")

    @contextmanager
    def memory(self) -> Iterator[SimulatedMemory]:
        page = json.dumps(self._there()["memory"]).encode().ljust(PAGE, b" ")
        yield SimulatedMemory(self._size, page)

    def stop(self, grace_s: float) -> None:
        self._kernel.end_vm(self.identity)

    def close(self) -> None:
        """It holds nothing."""


class SimulatedDriver:
    name = "simulated"
    wants = Wants()

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def version(self) -> str:
        return "1"

    def capabilities(self, kernel: Path, initrd: Path) -> Capabilities:
        return Capabilities(incremental=True, accel="none", accel_reason="simulated")

    def fingerprint(self, machine: Machine) -> Fingerprint:
        artifacts = tuple(ArtifactHash(name, sha256) for name, sha256 in machine.artifact_hashes)
        return Fingerprint(
            vmm=self.name, vmm_version="1", machine="none", accel="none", cpu_model="none", vcpus=machine.vcpus,
            mem_mib=machine.mem_mib, artifacts=artifacts,
        )  # fmt: skip

    def start(self, machine: Machine) -> SimulatedVm:
        vm = self._launch(machine, None)
        vm.resume()
        return vm

    def restore(self, machine: Machine, memory: GuestMemory) -> SimulatedVm:
        return self._launch(machine, json.loads(os.pread(memory.fd, PAGE, 0)))

    def adopt(self, identity: ProcessIdentity, machine_name: str, mem_mib: int, runtime: Path) -> SimulatedVm:
        vm = SimulatedVm(self._kernel, identity, runtime, mem_mib << 20)
        if not vm.is_alive():
            raise VmmError(f"the VMM of {machine_name} is gone")
        return vm

    def _launch(self, machine: Machine, memory: dict[str, Any] | None) -> SimulatedVm:
        assert machine.nic is not None
        assert machine.nic.fd is not None
        tap = os.pread(machine.nic.fd, 64, 0).decode()
        for name in ("alive", "monitor.sock", "mvm.0.sock"):
            (machine.runtime / name).touch()
        disk = next(drive.path for drive in machine.drives if drive.id == "data")
        identity = self._kernel.start_vm(machine.runtime, tap, disk, memory)
        return SimulatedVm(self._kernel, identity, machine.runtime, machine.mem_bytes)


class SimulatedChannel:
    def __init__(self, node: Node, runtime: Path) -> None:
        self._node = node
        self._vm = node.kernel.vm(runtime)
        if self._vm is None or self._vm["status"] != "running":
            raise GuestError("the simulated guest does not answer")

    def __enter__(self) -> SimulatedChannel:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to close."""

    def hello(self, *, timeout: float) -> None:
        """It answered."""

    def prepare_sleep(self, *, timeout: float) -> None:
        assert self._vm is not None
        fd = os.open(self._vm["disk"], os.O_RDWR)
        os.fsync(fd)
        os.close(fd)

    def after_wake(self, *, remount_secrets: bool, timeout: float) -> WakeReport:
        return WakeReport("none", True, 0, 0, 0)


class Node(World):
    """A simulated node below `folder`, which must be on tmpfs."""

    def __init__(self, folder: Path) -> None:
        self.kernel = Kernel(folder / "kernel.json")
        super().__init__(folder / "root", SimulatedDriver(self.kernel), mem_mib=128)
        self.disk = Disk(folder / "root", folder / "shadow")
        self.disk.sync()
        self._folder = folder
        self.effects: dict[str, int] = {}

    # A life of hostd.

    def hostd(self, act: Callable[[Node, Host], object], kill_at: int | None, what: str) -> bool:
        """Run `act` as hostd would, killed before effect `kill_at`; whether it was. AssertionError if it failed."""
        told = self._folder / "told"
        told.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            gc.disable()  # it would write to every page that is shared with the parent
            code = FAILED
            try:
                wire = Tripwire(kill_at)
                with self._patched(wire):
                    act(self, self.host(fault=wire))
                told.write_text(str(wire.count))
                code = 0
            except BaseException:
                told.write_text(traceback.format_exc())
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        self.kernel.hostd_died()
        code = os.waitstatus_to_exitcode(status)
        if code == KILLED:
            return True
        if code != 0:
            raise AssertionError(f"{what} failed (exit {code}):\n{told.read_text() if told.exists() else ''}")
        self.effects[what] = max(self.effects.get(what, 0), int(told.read_text()))
        return False

    def lose_power(self, rng: random.Random) -> None:
        self.kernel.lose_power()
        self.disk.lose_power(rng)

    # What is there, by the kernel and not by hostd.

    def objects(self) -> set[tuple[str, str]]:
        """Everything of mvm's on this host that is not a file."""
        state = self.kernel.state()
        found = {("vm", os.path.relpath(name, self.store.root)) for name in state["vms"]}
        found |= {(link["kind"], name) for name, link in state["links"].items()}
        return found | {("mount", name) for name in state["mounts"]}

    @contextmanager
    def _patched(self, wire: Tripwire) -> Iterator[None]:
        kernel = self.kernel
        kernel.trip = wire
        with ExitStack() as stack:

            def put(name: str, value: Any) -> None:
                stack.enter_context(mock.patch(f"mvm.hostd.{name}", value))

            for name in _EFFECTS:
                stack.enter_context(mock.patch.object(os, name, _tripped(wire, getattr(os, name))))
            stack.enter_context(mock.patch.object(os, "write", wire.write))
            stack.enter_context(mock.patch.object(os, "fsync", _tripped(wire, self.disk.fsync)))
            put("sealing.directory._exchange", _tripped(wire, _exchange))
            put("operations.context.connect", lambda path, **_: SimulatedChannel(self, path.parent))
            put("operations.context.keeper", self._keeper())
            put("operations.context.pidfd", self._pidfd())
            put("operations.stop.pidfd", self._pidfd())
            put("recovery.pidfd", self._pidfd())
            put("recovery.keeper", self._keeper())
            put("ledger.keeper", self._keeper())
            for module in ("operations.context", "ledger"):
                put(f"{module}.mounts_below", self._mounts_below)
                put(f"{module}.detach", self._detach)
            put("operations.context.network.remove_bridge_if_unused", self._remove_bridge)
            put("assembly.network.ensure_bridge", self._ensure_bridge)
            put("assembly.network.open_tap", self._open_tap)
            put("assembly.memory_available", lambda: 1 << 40)
            put("assembly.secrets_disk.build", lambda secrets: os.memfd_create("secrets"))
            put("assembly.volume._make", self._make_disk)
            put(
                "assembly.volume.dm_crypt",
                SimpleNamespace(unavailable=lambda: "simulated", close=lambda *_: False),
            )
            put("operations.wake.open_memory", self._open_memory)
            put("operations.wake.distrust_ports", lambda *_: None)
            for module in ("operations.start", "operations.wake"):
                put(f"{module}.require_memory", lambda plan: None)
            put("net_policy.nftables", SimpleNamespace(require=lambda: None, apply=self._apply_rules))
            put("net_policy.nft_generation.live", self._generation)
            put("net_policy.forwarding", self._forwarding())
            put("ledger.OBSERVERS", {**node_ledger.OBSERVERS, "links": self._links, **_NOTHING})
            put("ledger._remove_bridge", None)
            undo = {Kind.TAP: self._delete_link, Kind.BRIDGE: self._delete_link}
            put("ledger.UNDO", {**node_ledger.UNDO, **undo})
            yield

    def _keeper(self) -> SimpleNamespace:
        def left(runtime: Path) -> int | None:
            found = self.kernel.vm(runtime)
            return None if found is None else int(found["pid"]) + 1

        return SimpleNamespace(
            anything_left=left,
            await_end=lambda runtime, **_: True,
            end_leftovers=lambda runtime, **_: (
                left(runtime) is not None and self.kernel.end_vm(None, runtime)
            ),
            EXIT_FILE="vmm.exit",
        )

    def _pidfd(self) -> SimpleNamespace:
        def terminate(identity: ProcessIdentity, grace_s: float) -> str:
            return "killed" if self.kernel.alive(identity) and self.kernel.end_vm(identity) else "gone"

        return SimpleNamespace(
            is_alive=self.kernel.alive, terminate=terminate, open_pidfd=lambda identity: None
        )

    def _mounts_below(self, folder: Path) -> list[str]:
        return [m for m in self.kernel.state()["mounts"] if m == str(folder) or m.startswith(f"{folder}/")]

    def _detach(self, point: str | Path) -> bool:
        with self.kernel.change() as state:
            state["mounts"].remove(str(point))
        return True

    def _ensure_bridge(self, spec: Any) -> None:
        if spec.name not in self.kernel.state()["links"]:
            with self.kernel.change() as state:
                state["links"][spec.name] = {"kind": "bridge"}

    def _open_tap(self, name: str, uid: int, bridge: str) -> int:
        with self.kernel.change() as state:
            assert name not in state["links"], f"the link {name} exists already"
            assert bridge in state["links"]
            state["links"][name] = {"kind": "tun", "master": bridge}
        fd = os.memfd_create("tap")
        os.pwrite(fd, name.encode(), 0)
        return fd

    def _remove_bridge(self, name: str) -> bool:
        links = self.kernel.state()["links"]
        if name not in links:
            return True
        if any(link.get("master") == name for link in links.values()):
            return False
        with self.kernel.change() as state:
            del state["links"][name]
        return True

    def _delete_link(self, store: object, name: str) -> None:
        with self.kernel.change() as state:
            state["links"].pop(name, None)

    def _links(self, store: object) -> Iterator[Seen]:
        links = self.kernel.state()["links"]
        ports = {link.get("master") for link in links.values()}
        for name in links:
            if ledger.is_tap_name(name):
                yield Seen(Kind.TAP, name, in_use=True)
            else:
                yield Seen(Kind.BRIDGE, name, in_use=name in ports)

    def _make_disk(self, image: Path, size: int, *_: Any) -> None:
        from mvm.hostd.resources.volume import PAYLOAD_OFFSET

        fd = os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(fd, PAYLOAD_OFFSET + size)
            os.write(fd, b"LUKS\xba\xbe\0\x01")
            os.fsync(fd)
        finally:
            os.close(fd)

    def _open_memory(self, image: Any, uid: int, gid: int, mountpoint: Path) -> GuestMemory:
        """Mounted, and taken out of the tree at once, as by the pager."""
        mountpoint.touch()
        with self.kernel.change() as state:
            state["mounts"].append(str(mountpoint))
        number, at = divmod(_MARKED * PAGE, CHUNK)
        page = bytes(image.read_chunk(number))[at : at + PAGE]
        fd = os.memfd_create("memory")
        os.pwrite(fd, page, 0)
        self._detach(mountpoint)
        os.unlink(mountpoint)
        return GuestMemory(fd, (), None, lambda: os.close(fd), lambda: 0, lambda *_: None)

    def _apply_rules(self, policy: Any) -> None:
        with self.kernel.change() as state:
            state["rules"] = [guest.tap for tenant in policy.tenants for guest in tenant.guests]
            state["generation"] += 1

    def _generation(self) -> Any:
        from mvm.hostd.resources.nft_generation import Generation

        state = self.kernel.state()
        return Generation(state["boot"], 1, state["generation"])

    @staticmethod
    def _forwarding() -> SimpleNamespace:
        from mvm.core.firewall import HostNetwork

        def nothing(*_: Any) -> None:
            return None

        return SimpleNamespace(
            prepare_bridge=nothing, close_uplinks=nothing, open_uplinks=nothing, host_network=HostNetwork
        )


def _none(store: object) -> Iterator[Seen]:
    return iter(())


_NOTHING = {"mappings": _none, "cgroups": _none}


def _tripped(wire: Tripwire, call: Callable[..., Any]) -> Callable[..., Any]:
    def tripped(*arguments: Any, **options: Any) -> Any:
        wire()
        return call(*arguments, **options)

    return tripped


def _exchange(new: Path, latest: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(new), -100, os.fsencode(latest), ctypes.c_uint(2)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextmanager
def simulated_node() -> Iterator[Node]:
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="mvm-campaign-", dir=where))
    try:
        yield Node(folder)
    finally:
        shutil.rmtree(folder)
