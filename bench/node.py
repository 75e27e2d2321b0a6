"""A node of its own for measuring: temporary state root, own network namespace, one tenant for each guest size.

Lifetimes: `measuring_node` is a context manager; however it is left (an error, SIGINT, SIGTERM, SIGHUP), every VM is
ended and the root, the plain images and the network are gone. Guests are ended through `Host`, by recorded identity.
The network namespace is this process's: bridges and taps vanish with it and cannot meet those of a real node.

Revisions are built before the namespace is entered, because a build may fetch packages.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from bench import cost
from bench.target import Given, Target
from bench.worker import Worker

import mvm
from mvm.core.ids import PoolId, TenantId
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan, plan_instance
from mvm.core.record import InstanceRecord
from mvm.core.snapshot import Fingerprint, SleepReceipt, WakeReceipt
from mvm.core.spec import Profile, new_tenant
from mvm.hostd.assembly import assemble, has_secrets, load_revision
from mvm.hostd.guest_channel import distrust_ports
from mvm.hostd.host import Host, no_fault
from mvm.hostd.operations.context import ANSWER_S, Context
from mvm.hostd.operations.snapshots import open_latest
from mvm.hostd.pager import open_memory, plain_memory
from mvm.hostd.sealing import CHUNK, SealedImage
from mvm.hostd.stopwatch import Stopwatch
from mvm.hostd.store import InstancePaths, Store
from mvm.hostd.vmm.driver import GuestMemory, Vm
from mvm.linux.files import remove_tree
from mvm.linux.process import Completed, run
from mvm.standalone.compose import CACHE, FileAuditLog, key_provider
from mvm.standalone.facade import Standalone
from mvm.wire.executor import no_progress
from mvm.wire.guest_api import WakeReport
from mvm.wire.hostd_api import Purpose

FLAKE = "nix/embedded"
DATA_DISK_MIB = 64
WINDOW_S = 3.3
"""How long a guest must stay awake for its pager to have written the working set down (`mvm.hostd.pager.WINDOW_S`)."""
_CLONE_NEWNET = 0x40000000
_COMMAND_TIMEOUT_S = 300.0
Say = Callable[[str], None]
_QEMU = Target()


class Timed(NamedTuple):
    """Seconds of wall time and of CPU, and where they came from the receipt."""

    wall: float
    cpu: cost.Cpu
    record: InstanceRecord


class Step(NamedTuple):
    """One step of a restore: seconds of wall time, and of CPU in the three processes meanwhile."""

    name: str
    wall: float
    cpu: cost.Cpu


class Restored(NamedTuple):
    """One restore below the verbs. `core`: from opening the memory to the guest's answer; `wall`: with the assembly of
    disks, tap and configuration before it; `served`: from the same start as `wall` to the worker's answer. `cpu`,
    `faults`, `decrypted` (chunks): until the guest's answer, at `answered_at` (time.perf_counter).
    """

    wall: float
    core: float
    served: float
    cpu: cost.Cpu
    steps: tuple[Step, ...]
    report: WakeReport
    decrypted: int
    faults: cost.Faults
    began_at: float
    answered_at: float


class Opened(NamedTuple):
    """A snapshot's memory, on the way into a VMM. `load`: its device state, into a VMM that was started for it."""

    memory: GuestMemory
    authenticate: Callable[[], None]
    load: Callable[[Vm], None]


Way = Callable[["Guest", Context, Fingerprint, ExitStack], Opened]
"""How a snapshot becomes the memory of a VM."""


def plain(guest: Guest, context: Context, fingerprint: Fingerprint, opened: ExitStack) -> Opened:
    """From a file that was decrypted before."""
    return Opened(
        plain_memory(guest.plain_image), lambda: None, lambda vm: vm.load_state(guest.state_of_plain)
    )


def encrypted(guest: Guest, context: Context, fingerprint: Fingerprint, opened: ExitStack) -> Opened:
    """As shipped."""
    image = opened.enter_context(open_snapshot(context, fingerprint))
    state = image.state()
    memory = open_memory(image, guest.plan.uid, guest.plan.gid, context.paths.runtime / "memory")
    return Opened(memory, image.authenticate, lambda vm: vm.load_state(state))


def open_snapshot(context: Context, fingerprint: Fingerprint) -> SealedImage:
    ref = context.record.snapshot
    assert ref is not None
    return open_latest(context, ref, fingerprint)


class Guest:
    """One tenant with one instance of `size` MiB. `plain_image`, `state_of_plain`: see `make_plain`."""

    def __init__(self, node: Node, size: int) -> None:
        self.size = size
        self.tenant = TenantId(f"bench{size}")
        self._node = node
        self.worker = Worker("")
        self.plan = self._create()
        self._pristine = node.scratch / f"data-{size}.img"
        self.plain_image = node.scratch / f"memory-{size}.plain"
        self._plain_of = ""
        self.state_of_plain = b""

    def _create(self) -> InstancePlan:
        node = self._node.facade
        spec = new_tenant(
            self.tenant, FLAKE, profile=Profile.MINIMAL, mem_mib=self.size, data_disk_mib=DATA_DISK_MIB
        )
        node.create(spec)
        revision = node.build(self.tenant).built.revision
        index = node.store.load_allocations().index_of(self.tenant)
        pool = PoolId("default")
        record = node.store.load_record(spec.instances()[0])
        return plan_instance(spec, pool, 0, revision, index, record.network.slot)

    @property
    def paths(self) -> InstancePaths:
        return self._node.facade.store.instance_paths(self.plan.instance)

    # The verbs, in this process.

    def boot(self) -> Timed:
        before, began = time.process_time(), time.perf_counter()
        record = self._node.host.create_instance(self.plan)
        return self._timed(began, before, record)

    def start_worker(self) -> None:
        with self._node.host.channel(self.plan.instance, Purpose.EXEC) as channel:
            channel.spawn(Worker.argv())
        self.worker = Worker(self.plan.network.ip)
        self.worker.wait()

    def wake(self) -> Timed:
        before, began = time.process_time(), time.perf_counter()
        record = self._node.host.wake_instance(self.plan)
        return self._timed(began, before, record)

    def sleep(self) -> Timed:
        """The VMM's share of the CPU time is read at the rename, the last moment at which it lives."""
        running = self.record()
        assert running.process is not None
        pid = running.process.pid
        before, seen = cost.of_vm(pid), cost.Cpu(0, 0, 0)

        def at(step: str) -> None:
            nonlocal seen
            if step == "renamed":
                seen = cost.of_vm(pid)

        began = time.perf_counter()
        record = self._node.host_with(at).sleep_instance(self.plan.instance)
        wall = time.perf_counter() - began
        spent = seen.since(before)
        return Timed(wall, cost.Cpu(time.process_time() - before.command, spent.keeper, spent.vmm), record)

    def stop(self) -> None:
        self._node.host.stop_instance(self.plan.instance)

    def record(self) -> InstanceRecord:
        return self._node.facade.store.load_record(self.plan.instance)

    def _timed(self, began: float, before: float, record: InstanceRecord) -> Timed:
        wall = time.perf_counter() - began
        assert record.process is not None
        now = cost.of_vm(record.process.pid)
        return Timed(wall, cost.Cpu(now.command - before, now.keeper, now.vmm), record)

    def put_to_sleep(self) -> None:
        """Asleep for the second time: one life to learn the working set in, and the sleep that writes it down."""
        self.boot()
        self.start_worker()
        self.sleep()
        self.wake()
        self.worker.ask("touch")
        time.sleep(WINDOW_S)
        self.sleep()

    # The verbs, as commands.

    def command(self, verb: str) -> Timed:
        """`mvm tenant VERB` from process start to its end."""
        before, began = cost.of_children(), time.perf_counter()
        self._node.mvm("tenant", verb, self.tenant)
        wall = time.perf_counter() - began
        used, record = cost.of_children() - before, self.record()
        if record.process is None or record.state is not State.RUNNING:
            return Timed(wall, cost.Cpu(used, 0, 0), record)
        now = cost.of_vm(record.process.pid, used)
        return Timed(wall, now, record)

    # Below the verbs: the same image by the same VMM, with and without encryption.

    def make_plain(self) -> None:
        """The snapshot it sleeps in as a plain sparse file on tmpfs, and a copy of its disk; both only once a sleep."""
        record = self.record()
        assert record.snapshot is not None
        if self._plain_of == record.snapshot.id:
            return
        with open_latest(self._context(), record.snapshot) as image:
            write_plain(image, self.plain_image)
            self.state_of_plain = image.state()
        os.chown(self.plain_image, self.plan.uid, self.plan.gid)
        _copy(self.paths.data_disk, self._pristine)
        self._plain_of = record.snapshot.id

    def restore(self, way: Way) -> Restored:
        """Restore without taking the instance out of its sleep; the VM is ended and the disk put back afterwards.

        The steps are those of `mvm.hostd.operations.wake`, without its records on disk.
        """
        self.make_plain()
        try:
            return self._restore(way)
        finally:
            context = self._context()
            context.end_vm(0)
            context.release()
            context.release_network()
            _copy(self._pristine, self.paths.data_disk)

    def _restore(self, way: Way) -> Restored:
        node, context = self._node, self._context()
        steps: list[Step] = []
        pid = 0
        before = spent = cost.Cpu(time.process_time(), 0, 0)
        began = last = time.perf_counter()

        def step(name: str) -> None:
            nonlocal last, spent
            now, used = time.perf_counter(), cost.of_vm(pid)
            steps.append(Step(name, now - last, used.since(spent)))
            last, spent = now, used

        with ExitStack() as opened:
            revision = load_revision(node.facade.store, self.plan)
            machine = opened.enter_context(
                assemble(
                    node.facade.store, node.keys, self.plan, revision, cold=False, wants=node.driver.wants
                )
            )
            fingerprint = node.driver.fingerprint(machine)
            distrust_ports(context.paths.runtime, range(1, 8))
            step("assemble")
            core = time.perf_counter()
            memory, authenticate, load = way(self, context, fingerprint, opened)
            step("open memory")
            try:
                vm = node.driver.restore(machine, memory)
            finally:
                memory.close()
            opened.callback(vm.close)
            pid = vm.identity.pid
            step("start VMM")
            authenticate()
            step("verify")
            load(vm)
            step("load devices")
            vm.resume()
            step("resume")
            with context.channel() as channel:
                wanted = has_secrets(node.facade.store, self.plan)
                report = channel.after_wake(remount_secrets=wanted, timeout=ANSWER_S)
                answered = time.perf_counter()
                step("guest answers")
                cpu = spent.since(before)
                decrypted, faults = memory.decrypted(), cost.faults(pid)
            self.worker.ask("touch", restored=True)
            served = time.perf_counter()
            step("worker answers")
            vm.stop(0)
            return Restored(
                answered - began, answered - core, served - began, cpu, tuple(steps), report, decrypted, faults,
                began, answered,
            )  # fmt: skip

    def _context(self) -> Context:
        node = self._node
        return Context(
            node.facade.store, node.keys, node.driver, self.record(), Stopwatch(no_progress), no_fault
        )


class Node:
    """The node of one run. `scratch`: a directory on tmpfs, for plain images."""

    def __init__(self, root: Path, scratch: Path, target: Target) -> None:
        self.root = root
        self.scratch = scratch
        self.target = target
        self.keys = key_provider(root)
        self.facade = self._facade()
        self.driver = target.driver(CACHE)
        self.host = Host(self.facade.store, self.keys, self.driver)
        self.guests: list[Guest] = []

    def _facade(self) -> Standalone:
        folder = self.target.revision
        if folder is None:
            return Standalone.open(self.root)
        store = Store(self.root)
        store.open()
        return Standalone(
            store,
            self.keys,
            host=lambda: self.host,
            workshop=lambda: Given(self.root, folder),
            audit=FileAuditLog(store),
        )

    def host_with(self, fault: Callable[[str], None]) -> Host:
        return Host(self.facade.store, self.keys, self.driver, fault=fault)

    def mvm(self, *arguments: str) -> Completed:
        """Run the command line on this node's root, as a user would start it."""
        installed = Path(sys.executable).with_name("mvm")
        env = {"MVM_ROOT": str(self.root), **self.target.environment()}
        argv = [str(installed)]
        if not installed.exists():
            argv = [sys.executable, "-m", "mvm.cli"]
            env["PYTHONPATH"] = str(Path(mvm.__file__).parents[1])
        return run([*argv, *arguments], timeout=_COMMAND_TIMEOUT_S, env=env)

    def destroy(self) -> None:
        """End every VM and remove all they have. The first error is raised after all were tried."""
        failure: Exception | None = None
        for guest in self.guests:
            try:
                self.host.destroy_instance(guest.plan.instance, wipe_volumes=True)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure


@contextmanager
def measuring_node(sizes: tuple[int, ...], say: Say, target: Target = _QEMU) -> Iterator[Node]:
    """A node with one built, never started guest for each of `sizes` (MiB). Needs root and one thread."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    root = Path(tempfile.mkdtemp(prefix="mvm-bench-", dir="/var/tmp"))
    scratch = Path(tempfile.mkdtemp(prefix="mvm-bench-", dir="/dev/shm"))
    node: Node | None = None
    try:
        node = Node(root, scratch, target)
        for size in sizes:
            say(f"preparing the {size} MiB guest")
            node.guests.append(Guest(node, size))
        enter_network_namespace()
        yield node
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):  # its terminal may be gone
            say("cleaning up")
        remove_tree(scratch)
        if node is not None:
            node.destroy()  # where it fails, the root stays: without it nobody could end what is left
        remove_tree(root)


def enter_network_namespace() -> None:
    """Give this process and all it starts from now on a network of their own. OSError without CAP_SYS_ADMIN."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"no network namespace: {os.strerror(error)}")


def write_plain(image: SealedImage, path: Path) -> None:
    """All of `image`, decrypted, as a sparse file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, image.size)
        for chunk in range(image.chunk_count):
            if not image.is_zero(chunk):
                os.pwrite(fd, image.read_chunk(chunk), chunk * CHUNK)
    finally:
        os.close(fd)


def sleep_receipt(timed: Timed) -> SleepReceipt:
    receipt = timed.record.last_receipt
    assert isinstance(receipt, SleepReceipt)
    return receipt


def wake_receipt(timed: Timed) -> WakeReceipt:
    receipt = timed.record.last_receipt
    assert isinstance(receipt, WakeReceipt)
    return receipt


def _copy(source: Path, target: Path) -> None:
    run(["cp", "--sparse=always", "--preserve=mode,ownership", str(source), str(target)], timeout=60)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
