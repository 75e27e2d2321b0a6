"""What every driver must do, written once: `DriverContract` is inherited by a test class for each driver.

An `Origin` is one guest that was started cold and saved, once per module: its memory as a plain image and as a sealed
one, and its device state. Everything else starts from there, so few guests boot.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
from tests.support.world import World, open_files

from mvm.core.errors import VmmError
from mvm.core.ids import SnapshotId
from mvm.core.plan import InstancePlan
from mvm.hostd import keeper
from mvm.hostd.assembly import assemble, load_revision
from mvm.hostd.guest_channel import connect, lock_path, socket_path
from mvm.hostd.pager import open_memory, plain_memory
from mvm.hostd.recovery import read_exit
from mvm.hostd.resources import network
from mvm.hostd.sealing import SealedImage, SealWriter, SnapshotIdentity
from mvm.hostd.vmm.driver import GuestMemory, Machine, MemorySource, Vm
from mvm.linux.files import remove_tree
from mvm.linux.pidfd import is_alive
from mvm.linux.process import wait_readable

PAGE = 4096
IDENTITY = b"driver=contract\n"


class Probe(Protocol):
    """What a test can do in a guest of the driver at hand."""

    def begin(self, vm: Vm) -> None:
        """Start the worker that counts in memory."""
        ...

    def count(self, vm: Vm) -> int: ...
    def write(self, vm: Vm, text: str) -> None:
        """Put a text into guest memory."""
        ...


class Origin(NamedTuple):
    world: World
    plan: InstancePlan
    probe: Probe
    plain: Path
    sealed: Path
    sealed_identity: SnapshotIdentity
    digest: str
    state: bytes
    dirty_at_start: list[tuple[int, int]]
    counted: int


@contextmanager
def machine_of(world: World, plan: InstancePlan, *, cold: bool) -> Iterator[Machine]:
    world.paths(plan).make()
    wants, revision = world.driver.wants, load_revision(world.store, plan)
    with assemble(world.store, world.keys, plan, revision, cold=cold, wants=wants) as machine:
        yield machine


def answers(world: World, plan: InstancePlan, vm: Vm, timeout: float) -> None:
    """Wait until the guest's agent answers on the host's own port."""
    runtime, until = world.paths(plan).runtime, time.monotonic() + timeout
    while True:
        try:
            with connect(
                socket_path(runtime, 0), lock_path=lock_path(runtime, 0), deadline=time.monotonic() + 5
            ) as channel:
                channel.hello(timeout=2)
            return
        except Exception:
            assert vm.is_alive(), (world.paths(plan).console_log).read_text()[-2000:]
            assert time.monotonic() < until
            time.sleep(0.05)


def page(memory: MemorySource, number: int) -> bytes:
    buffer = bytearray(PAGE)
    memory.read_into(number * PAGE, memoryview(buffer))
    return bytes(buffer)


def whole(memory: MemorySource) -> bytes:
    buffer = bytearray(memory.size)
    memory.read_into(0, memoryview(buffer))
    return bytes(buffer)


def outside(runs: list[tuple[int, int]], pages: int) -> Iterator[tuple[int, int]]:
    """The gaps between `runs`."""
    at = 0
    for first, count in [*runs, (pages, 0)]:
        if first > at:
            yield at, first - at
        at = first + count


@contextmanager
def clean_runtime(world: World, plan: InstancePlan) -> Iterator[None]:
    """Whatever happens, nothing of this VM is left for the next test."""
    runtime = world.paths(plan).runtime
    try:
        yield
    finally:
        keeper.end_leftovers(runtime)
        for entry in os.listdir(runtime) if runtime.is_dir() else ():
            if entry not in ("logs", "metrics"):
                remove_tree(runtime / entry)
        network.remove_port(plan.network.tap)


def make_origin(world: World, plan: InstancePlan, probe: Probe, folder: Path, boot_s: float) -> Origin:
    plain, sealed = folder / "memory.plain", folder / ".new-sealed"
    identity = SnapshotIdentity(plan.instance, SnapshotId("0f" * 16), IDENTITY)
    with clean_runtime(world, plan), ExitStack() as opened:
        machine = opened.enter_context(machine_of(world, plan, cold=True))
        vm = world.driver.start(machine)
        opened.callback(vm.stop, 0)
        answers(world, plan, vm, boot_s)
        probe.begin(vm)
        vm.pause()
        state = bytes(vm.save_state())
        with vm.memory() as memory:
            dirty = list(memory.dirty_runs())
            plain.write_bytes(whole(memory))
            os.chown(plain, plan.uid, plan.gid)  # the VMM opens it for itself, through its descriptor
            key = opened.enter_context(world.keys.tenant_key(plan.instance.tenant))
            writer = opened.enter_context(SealWriter(sealed, identity, key.wrap))
            writer.write_pages(memory)
            writer.write_state(state)
            digest = writer.finish().manifest_sha256
        vm.resume()
        count_at = probe.count(vm)
        vm.stop(0)
    return Origin(world, plan, probe, plain, sealed, identity, digest, state, dirty, count_at)


class DriverContract:
    """Needs a module- or class-scoped fixture `origin`."""

    @pytest.fixture
    def restored(self, origin: Origin) -> Iterator[Callable[..., Vm]]:
        """A function that restores the origin; everything it started is ended, and that is checked."""
        with ExitStack() as opened:
            opened.enter_context(clean_runtime(origin.world, origin.plan))

            def restore(*, load: bool = True, sealed: bool = False) -> Vm:
                with ExitStack() as borrowed:
                    machine = borrowed.enter_context(machine_of(origin.world, origin.plan, cold=False))
                    memory = borrowed.enter_context(memory_of(origin, sealed=sealed))
                    vm = origin.world.driver.restore(machine, memory)
                    opened.callback(vm.stop, 0)
                    if load:
                        vm.load_state(origin.state)
                return vm

            yield restore
        assert origin.world.processes() == {}
        assert origin.world.mounts() == []
        assert origin.plan.network.tap not in origin.world.links()

    @pytest.mark.req("S5")
    def test_after_a_start_unnamed_pages_are_zero(self, origin: Origin) -> None:
        image = origin.plain.read_bytes()
        pages = len(image) // PAGE
        assert len(image) == origin.plan.mem_mib << 20
        named = sum(count for _, count in origin.dirty_at_start)
        assert 0 < named < pages
        for first, count in outside(origin.dirty_at_start, pages):
            assert not image[first * PAGE : (first + count) * PAGE].strip(b"\0")

    @pytest.mark.req("S2")
    def test_it_goes_on_where_it_left_off(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = restored()
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)
        first = origin.probe.count(vm)
        # It cannot have started anew: the count is that of the saved guest, or a little later.
        assert first > 0
        until = time.monotonic() + 30
        while origin.probe.count(vm) <= max(first, origin.counted):
            assert time.monotonic() < until, "the worker goes on"

    @pytest.mark.req("S2", "S5")
    def test_dirty_pages_after_a_restore_are_what_was_written(
        self, origin: Origin, restored: Callable[..., Vm]
    ) -> None:
        vm = restored()
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)
        marker = "written-after-" + os.urandom(8).hex()
        origin.probe.write(vm, marker)
        vm.pause()
        with vm.memory() as memory:
            runs = list(memory.dirty_runs())
            now = whole(memory)
        assert runs == sorted(runs)
        image = origin.plain.read_bytes()
        pages = len(image) // PAGE
        for first, count in outside(runs, pages):
            at, end = first * PAGE, (first + count) * PAGE
            assert now[at:end] == image[at:end], f"a page from {first} on changed and is not named"
        assert marker.encode() in now
        assert marker.encode() not in image
        assert sum(count for _, count in runs) < pages // 3

    @pytest.mark.req("S2")
    def test_one_image_serves_again_and_never_changes(
        self, origin: Origin, restored: Callable[..., Vm]
    ) -> None:
        before = hashlib.sha256(origin.plain.read_bytes()).digest()
        for _ in range(2):
            vm = restored()
            vm.resume()
            answers(origin.world, origin.plan, vm, 30)
            origin.probe.write(vm, "scribble" * 100)
            assert origin.probe.count(vm) > 0
            vm.stop(0)
        assert hashlib.sha256(origin.plain.read_bytes()).digest() == before

    @pytest.mark.req("S2", "S3")
    def test_sealed_memory_is_the_same_memory(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = restored(sealed=True)
        with vm.memory() as memory:
            runs = list(memory.dirty_runs())
            now = whole(memory)
        image = origin.plain.read_bytes()
        for first, count in outside(runs, len(image) // PAGE):
            at, end = first * PAGE, (first + count) * PAGE
            assert now[at:end] == image[at:end]
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)
        assert origin.probe.count(vm) > 0

    @pytest.mark.req("S1")
    def test_pause_and_resume_may_be_repeated(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = restored()
        for _ in range(2):
            vm.pause()
            vm.pause()
            vm.resume()
            vm.resume()
        answers(origin.world, origin.plan, vm, 30)

    @pytest.mark.req("S1")
    def test_a_saved_guest_can_go_on_and_be_saved_again(
        self, origin: Origin, restored: Callable[..., Vm]
    ) -> None:
        vm = restored()
        for _ in range(3):
            vm.resume()
            answers(origin.world, origin.plan, vm, 30)
            vm.pause()
            assert len(vm.save_state()) > 0
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)

    @pytest.mark.req("L7")
    @pytest.mark.parametrize("state", ["waiting", "paused", "running", "dead"])
    @pytest.mark.parametrize("grace_s", [0, 5])
    def test_stop_leaves_nothing_in_any_state(
        self, origin: Origin, restored: Callable[..., Vm], state: str, grace_s: float
    ) -> None:
        vm = restored(load=state != "waiting")
        if state == "running":
            vm.resume()
        elif state == "dead":
            os.kill(vm.identity.pid, signal.SIGKILL)
        vm.stop(grace_s)
        vm.stop(grace_s)
        assert not vm.is_alive()
        runtime = origin.world.paths(origin.plan).runtime
        assert keeper.anything_left(runtime) is None
        for entry in runtime.glob("*.sock"):
            with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match="refused"):
                probe.connect(f"/proc/self/fd/{os.open(runtime, os.O_PATH)}/{entry.name}")

    @pytest.mark.req("L7")
    @pytest.mark.parametrize("sealed", [True, False])
    def test_without_its_keeper_a_vmm_dies(
        self, origin: Origin, restored: Callable[..., Vm], sealed: bool
    ) -> None:
        vm = restored(sealed=sealed)
        vm.resume()
        runtime = origin.world.paths(origin.plan).runtime
        pid = keeper.anything_left(runtime)
        assert pid
        handle = os.pidfd_open(vm.identity.pid)
        os.kill(pid, signal.SIGKILL)
        assert wait_readable(handle, 10)
        os.close(handle)
        assert keeper.await_end(runtime)
        assert read_exit(runtime) is None, "nobody was there to write it"

    @pytest.mark.req("L7", "L3")
    def test_without_its_vmm_a_keeper_says_how_it_ended_and_goes(
        self, origin: Origin, restored: Callable[..., Vm]
    ) -> None:
        vm = restored()
        runtime = origin.world.paths(origin.plan).runtime
        os.kill(vm.identity.pid, signal.SIGKILL)
        assert keeper.await_end(runtime)
        assert read_exit(runtime) == signal.SIGKILL

    @pytest.mark.req("L3")
    def test_another_process_can_adopt_it(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = restored()
        vm.close()
        runtime = origin.world.paths(origin.plan).runtime
        child = os.fork()
        if child == 0:
            try:
                driver = origin.world.driver
                other = driver.adopt(vm.identity, "x", origin.plan.mem_mib, runtime)
                other.resume()
                answers(origin.world, origin.plan, other, 30)
                other.pause()
                with other.memory() as memory:
                    assert memory.size == origin.plan.mem_mib << 20
                    assert any(True for _ in memory.dirty_runs())
                other.close()
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert vm.is_alive()
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)

    @pytest.mark.req("L3")
    def test_a_dead_vmm_is_an_error_and_no_hang(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = restored()
        vm.pause()
        handle = os.pidfd_open(vm.identity.pid)
        os.kill(vm.identity.pid, signal.SIGKILL)
        assert wait_readable(handle, 10)
        os.close(handle)
        assert not vm.is_alive()

        def read_memory() -> None:
            with vm.memory() as memory:
                list(memory.dirty_runs())

        for call in (vm.pause, vm.resume, vm.save_state, lambda: vm.load_state(b"x"), read_memory):
            with pytest.raises(VmmError):
                call()
        with pytest.raises(VmmError):
            origin.world.driver.adopt(vm.identity, "x", 128, origin.world.paths(origin.plan).runtime)

    @pytest.mark.req("L3")
    def test_memory_of_a_vmm_that_dies_meanwhile(self, origin: Origin, restored: Callable[..., Vm]) -> None:
        vm = restored()
        vm.pause()
        with pytest.raises((VmmError, OSError)), vm.memory() as memory:
            handle = os.pidfd_open(vm.identity.pid)
            os.kill(vm.identity.pid, signal.SIGKILL)
            assert wait_readable(handle, 10)
            os.close(handle)
            whole(memory)

    @pytest.mark.req("S4")
    @pytest.mark.parametrize("how", ["empty", "noise", "cut", "header only"])
    def test_state_that_is_none_is_refused(
        self, origin: Origin, restored: Callable[..., Vm], how: str
    ) -> None:
        state = {
            "empty": b"",
            "noise": os.urandom(5000),
            "cut": origin.state[: len(origin.state) // 2],
            "header only": origin.state[:12],
        }[how]
        vm = restored(load=False)
        with pytest.raises(VmmError):
            vm.load_state(state)

    @pytest.mark.req("H4")
    def test_it_runs_as_the_instances_uid_and_can_gain_nothing(
        self, origin: Origin, restored: Callable[..., Vm]
    ) -> None:
        vm = restored()
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{vm.identity.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        uid = str(origin.plan.uid)
        assert status["Uid"].split() == [uid] * 4
        assert status["Gid"].split() == [uid] * 4
        assert status["Groups"].strip() == ""
        assert status["NoNewPrivs"] == "1"
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0

    @pytest.mark.req("H4", "K2")
    def test_its_uid_can_open_nothing_of_ours_by_name(
        self, origin: Origin, restored: Callable[..., Vm]
    ) -> None:
        vm = restored()
        root = origin.world.store.root
        files = [path for path in root.rglob("*") if path.is_file() or path.is_socket()]
        assert origin.world.paths(origin.plan).data_disk in files
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setresgid(*[origin.plan.gid] * 3)
            os.setresuid(*[origin.plan.uid] * 3)
            os._exit(sum(1 for path in files if os.access(path, os.R_OK) or os.access(path, os.W_OK)))
        assert os.waitpid(child, 0)[1] == 0
        # Nor is anything of ours in what the world can read of it.
        public = Path(f"/proc/{vm.identity.pid}/cmdline").read_bytes()
        public += Path(f"/proc/{vm.identity.pid}/environ").read_bytes()
        assert str(root).encode() not in public

    @pytest.mark.req("H4")
    def test_it_holds_no_descriptor_that_was_not_given(
        self, origin: Origin, restored: Callable[..., Vm]
    ) -> None:
        vm = restored(sealed=True)
        vm.resume()
        answers(origin.world, origin.plan, vm, 30)
        links = set(open_files(str(vm.identity.pid)))
        paths = origin.world.paths(origin.plan)
        ours = {link for link in links if link.startswith(str(origin.world.store.root))}
        assert ours <= {
            str(paths.runtime / keeper.ALIVE_FILE), str(paths.data_disk),
            *(str(origin.world.store.revisions_dir / origin.plan.revision / name) for name in ARTIFACT_NAMES),
        }  # fmt: skip
        assert "/dev/fuse" not in links, "the VMM cannot answer for its own memory"
        assert is_alive(vm.identity)


ARTIFACT_NAMES = ("rootfs.ext4",)


@contextmanager
def memory_of(origin: Origin, *, sealed: bool) -> Iterator[GuestMemory]:
    with ExitStack() as opened:
        if sealed:
            key = opened.enter_context(origin.world.keys.tenant_key(origin.plan.instance.tenant))
            image = opened.enter_context(
                SealedImage.open(origin.sealed, origin.sealed_identity, key.unwrap, origin.digest)
            )
            point = origin.world.paths(origin.plan).runtime / "memory"
            memory = open_memory(image, origin.plan.uid, origin.plan.gid, point)
        else:
            memory = plain_memory(origin.plain)
        opened.callback(memory.close)
        yield memory
