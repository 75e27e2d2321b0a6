"""A whole node for tests: a state root, a network namespace of its own, one or more tenants, and what must not be left.

Everything here is the real thing but the VMM, which the test chooses.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mvm.core import revision as revisions
from mvm.core.errors import MvmError
from mvm.core.ids import PoolId, RevisionId, TenantId
from mvm.core.plan import InstancePlan, plan_instance
from mvm.core.record import InstanceRecord
from mvm.core.spec import new_tenant
from mvm.hostd import keeper
from mvm.hostd.host import Host, no_fault
from mvm.hostd.keys.development import DevelopmentKeyProvider
from mvm.hostd.store import InstancePaths, Store
from mvm.hostd.vmm.driver import Driver
from mvm.linux.mount import parse_mountinfo

_CLONE_NEWNET = 0x40000000
FAKE_FILES = {
    revisions.KERNEL: b"a kernel",
    revisions.INITRD: b"an initrd",
    revisions.ROOTFS: b"a root file system".ljust(4096, b"\0"),
    revisions.FC_BASE: b'{"boot-source": {"boot_args": "console=ttyS0"}, "machine-config": {}}',
}


@contextmanager
def network_namespace() -> Iterator[None]:
    """This thread, and all it forks, in a fresh network namespace, which the kernel removes with its last user."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "no network namespace")
        try:
            yield
        finally:
            assert libc.setns(home, _CLONE_NEWNET) == 0
    finally:
        os.close(home)


def add_revision(store: Store, files: dict[str, bytes | Path], profile: str = "minimal") -> RevisionId:
    """A revision of these files, as a build would have left it. Paths are linked or copied."""
    names = {file: name for name, file in revisions.FILES.items()}
    sha256 = {}
    for file, content in files.items():
        raw = content.read_bytes() if isinstance(content, Path) else content
        sha256[names[file]] = hashlib.sha256(raw).hexdigest()
    revision = revisions.make_revision(
        flake_ref="nix/embedded", profile=profile, lock_hash="0" * 64, store_paths=(), sha256=sha256
    )
    folder = store.revisions_dir / revision.id
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        if isinstance(content, Path):
            os.symlink(content, folder / file)
        else:
            (folder / file).write_bytes(content)
    (folder / revisions.DOCUMENT).write_bytes(revisions.encode_revision(revision))
    return revision.id


class World:
    """A state root with tenants. `plan()` makes the tenant `acme` with one instance where no other is named."""

    def __init__(
        self, root: Path, driver: Driver, files: dict[str, bytes | Path] | None = None, mem_mib: int = 128
    ) -> None:
        self.store = Store(root)
        self.store.open()
        self.driver = driver
        self.keys = DevelopmentKeyProvider(root)
        self.mem_mib = mem_mib
        self.revision = add_revision(self.store, files if files is not None else {**FAKE_FILES})
        self._indices: dict[str, int] = {}

    def plan(
        self, tenant: str = "acme", *, mem_mib: int | None = None, data_disk_mib: int = 16
    ) -> InstancePlan:
        name = TenantId(tenant)
        spec = new_tenant(
            name,
            "nix/embedded",
            mem_mib=mem_mib or self.mem_mib,
            profile="minimal",
            data_disk_mib=data_disk_mib,
        )
        self.store.save_spec(spec)
        self.keys.create(name).close()
        index = self._indices.setdefault(tenant, len(self._indices) + 1)
        return plan_instance(spec, PoolId("default"), 0, self.revision, index, 0)

    def host(
        self,
        *,
        fault: Callable[[str], None] = no_fault,
        driver: Driver | None = None,
        lock_wait_s: float = 20.0,
    ) -> Host:
        return Host(self.store, self.keys, driver or self.driver, fault=fault, lock_wait_s=lock_wait_s)

    def paths(self, plan: InstancePlan) -> InstancePaths:
        return self.store.instance_paths(plan.instance)

    def record(self, plan: InstancePlan) -> InstanceRecord:
        """What is written, without recovering anything."""
        return self.store.load_record(plan.instance)

    def killed_at(self, step: str, act: Callable[[Host], object]) -> bool:
        """Run `act` in a child that gets SIGKILL at `step`. False if it never came to that step."""
        return self._child(lambda: act(self.host(fault=lambda name: _die() if name == step else None)), None)

    def killed_after(self, seconds: float, act: Callable[[Host], object]) -> bool:
        """Run `act` in a child that gets SIGKILL after `seconds`. False if it was done by then."""
        return self._child(lambda: act(self.host()), seconds)

    @staticmethod
    def _child(act: Callable[[], object], seconds: float | None) -> bool:
        pid = os.fork()
        if pid == 0:
            try:
                act()
            except BaseException:
                os._exit(1)
            os._exit(0)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return True
        assert os.WEXITSTATUS(status) == 0, "the operation failed in the child"
        return False

    def destroy_all(self) -> None:
        for tenant in self.store.tenants():
            for instance in self.store.instances(tenant):
                try:
                    self.host().destroy_instance(instance, wipe_volumes=True)
                except MvmError:
                    continue  # a test broke it on purpose; what matters is that nothing goes on running
        self.destroy_all_processes()

    def destroy_all_processes(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    # What is there.

    def processes(self) -> dict[int, str]:
        """Other processes that have a file below the root open: pid -> command name."""
        prefix, found = str(self.store.root) + "/", {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            with contextlib.suppress(OSError):  # it has ended
                if any(link.startswith(prefix) for link in open_files(entry)):
                    found[int(entry)] = Path(f"/proc/{entry}/comm").read_text().strip()
        return found

    def mounts(self) -> list[str]:
        prefix = str(self.store.root) + "/"
        return [
            p for p, _ in parse_mountinfo(Path("/proc/self/mountinfo").read_text()) if p.startswith(prefix)
        ]

    @staticmethod
    def links() -> set[str]:
        """Bridges and taps of this network namespace."""
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
        return {line.partition(":")[0].strip() for line in lines} - {"lo", "sit0", "tunl0", "ip6tnl0"}

    def files(self, plan: InstancePlan) -> set[str]:
        """Names below the instance's directory, with what varies from run to run left out."""
        base = self.paths(plan).base
        found = {str(path.relative_to(base)) for path in base.rglob("*") if not path.is_dir()}
        varying = ("runtime/logs/", "runtime/metrics/", "snapshots/latest/")
        return {name for name in found if not name.startswith(varying)}

    def assert_nothing_runs(self, plan: InstancePlan, *, sleeping: bool = False) -> None:
        """No process, mount, link, socket, lock of a VM, or half of anything."""
        running = self.processes()
        assert "mvm-keeper" not in running.values(), running
        assert keeper.anything_left(self.paths(plan).runtime) is None, "a VMM or a keeper holds its lock"
        until = time.monotonic() + 10
        while running and time.monotonic() < until:
            # A program that a killed command had started ends by itself, on a file that has no name any more. (Until it
            # is executed it has the interpreter's name.) A VMM or a keeper would not.
            time.sleep(0.01)
            running = self.processes()
        assert running == {}, running
        assert self.mounts() == []
        assert self.links() == set()
        kept = {"lock", "state.json", "runtime/fc.final.json", "volumes/data.img", "volumes/data.key"}
        assert self.files(plan) - kept == set(), self.files(plan) - kept
        snapshots = self.paths(plan).snapshots
        names = sorted(os.listdir(snapshots)) if snapshots.is_dir() else []
        assert names == (["latest"] if sleeping else [])
        if sleeping:
            inside = {name.partition("-")[0] for name in os.listdir(snapshots / "latest")}
            assert inside <= {"manifest", "key", "state", "segment", "working"}, inside

    def assert_runs(self, plan: InstancePlan) -> None:
        """One VMM, one keeper, one bridge with one tap, and nothing half done."""
        running = self.processes()
        assert len(running) == 2, running
        assert sorted(name == "mvm-keeper" for name in running.values()) == [False, True]
        assert self.mounts() == []
        assert self.links() == {plan.network.bridge, plan.network.tap}
        base = self.paths(plan).base
        assert not [p for p in base.rglob("*") if p.name.startswith((".tmp-", ".new-", ".old-"))]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def read_state(paths: InstancePaths) -> dict[str, object]:
    value: dict[str, object] = json.loads(paths.state.read_bytes())
    return value


def open_files(pid: str) -> Iterator[str]:
    """What a process has open; a descriptor that it closes meanwhile is passed over, not the process."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(f"/proc/{pid}/fd/{fd}")
