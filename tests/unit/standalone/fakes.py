"""A host, a workshop and a node without VMs or builds: real records and documents, no effects.

`FakeHost` follows the life-cycle table, so what it refuses is what the real one refuses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvm.core import record as records
from mvm.core.audit import AuditEntry, Verified
from mvm.core.errors import NotFound
from mvm.core.ids import InstanceId, RevisionId, SnapshotId, TenantId
from mvm.core.lifecycle import Action, State, Step, plan_transition
from mvm.core.plan import InstancePlan, check_plan
from mvm.core.record import InstanceRecord, ProcessIdentity, VmmIdentity
from mvm.core.snapshot import ArtifactHash, Phase, SleepReceipt, SnapshotRef, WakeReceipt
from mvm.hostd.keys.development import DevelopmentKeyProvider
from mvm.hostd.resources import audit as audit_file
from mvm.hostd.store import Store
from mvm.linux.files import ensure_dir, remove_tree
from mvm.standalone.facade import Standalone
from mvm.standalone.ports import Built, LineSink, StepSink
from mvm.wire.executor import Progress, no_progress
from mvm.wire.guest_api import CopyReport, ExitStatus
from mvm.wire.hostd_api import Purpose

BOOT = "00000000-0000-4000-8000-000000000000"


class FakeChannel:
    """Remembers what it was asked. `status`: what every program ends with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.status = ExitStatus(0)

    def spawn(self, argv: Any, *, env: Mapping[str, str], cwd: str, user: str) -> int:
        self.calls.append(("spawn", tuple(argv), dict(env), cwd, user))
        return 77

    def copy_in(self, local: Path, remote: str, on_progress: Callable[[int], object]) -> CopyReport:
        self.calls.append(("copy_in", str(local), remote))
        on_progress(3 << 20)
        return CopyReport(1, 3 << 20, 0)

    def copy_out(self, remote: str, local: Path, on_progress: Callable[[int], object]) -> CopyReport:
        self.calls.append(("copy_out", remote, str(local)))
        return CopyReport(2, 10, 1)

    def refresh_secrets(self, files: Mapping[str, memoryview]) -> CopyReport:
        self.calls.append(("refresh", {name: bytes(view) for name, view in files.items()}))
        return CopyReport(len(files), 0, 0)


class FakeHost:
    """`fail`: raised by the next verb, after `before` was called."""

    def __init__(self, store: Store, clock: Callable[[], int]) -> None:
        self.unconfined: tuple[str, ...] = ()
        self.store = store
        self.clock = clock
        self.calls: list[str] = []
        self.fail: BaseException | None = None
        self.fake_channel = FakeChannel()
        self.plans: list[InstancePlan] = []

    def create_instance(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        self.plans.append(check_plan(plan))
        progress("boot")
        return self._step(plan.instance, Action.RUN, plan)

    def sleep_instance(self, instance: InstanceId, progress: Progress = no_progress) -> InstanceRecord:
        progress("seal memory")
        return self._step(instance, Action.SLEEP)

    def wake_instance(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        self.plans.append(check_plan(plan))
        progress("restore")
        return self._step(plan.instance, Action.WAKE)

    def stop_instance(self, instance: InstanceId, progress: Progress = no_progress) -> InstanceRecord:
        return self._step(instance, Action.STOP)

    def destroy_instance(
        self, instance: InstanceId, *, wipe_volumes: bool, progress: Progress = no_progress
    ) -> None:
        self._called("destroy", instance)
        paths = self.store.instance_paths(instance)
        if not paths.state.exists():
            return
        if wipe_volumes or not paths.data_disk.exists():
            remove_tree(paths.base)
        else:
            paths.state.unlink()

    def inspect_instance(self, instance: InstanceId) -> InstanceRecord:
        return self.store.load_record(instance)

    @contextmanager
    def channel(self, instance: InstanceId, purpose: Purpose, program: str = "") -> Iterator[Any]:
        self._called("channel", instance)
        yield self.fake_channel

    def _called(self, verb: str, instance: InstanceId) -> None:
        self.calls.append(f"{verb} {instance}")
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error

    def _step(self, instance: InstanceId, action: Action, plan: InstancePlan | None = None) -> InstanceRecord:
        self._called(action.value, instance)
        record = self.store.load_record(instance)
        rule = plan_transition(record.state, action, instance)
        if not isinstance(rule, Step):
            return record
        record = records.begin(record, rule, now_ns=self.clock())
        if action is Action.RUN and plan is not None:
            self._disk(instance)
            record = records.note(record, revision=plan.revision, vmm=VmmIdentity("fake", "1"))
        if action in (Action.RUN, Action.WAKE):
            record = records.note(record, process=ProcessIdentity(4242, 1, BOOT), unconfined=self.unconfined)
        snapshot = SnapshotId("ab" * 16)
        if action is Action.SLEEP:
            receipt = SleepReceipt(
                instance, snapshot, 5_000_000, 1000, 4000, None, (Phase("seal", 4_000_000),)
            )
            record = records.note(
                record, snapshot=SnapshotRef(snapshot, "cd" * 32, self.clock(), 1000), receipt=receipt
            )
        if action is Action.WAKE:
            record = records.note(
                record, receipt=WakeReceipt(instance, snapshot, 412_000_000, (Phase("restore", 300_000_000),))
            )
        record = records.finish(record, now_ns=self.clock())
        self.store.save_record(record)
        return record

    def _disk(self, instance: InstanceId) -> None:
        paths = self.store.instance_paths(instance)
        paths.make()
        paths.data_disk.touch()

    def lose(self, instance: InstanceId) -> None:
        """Its VMM dies, and that was noticed."""
        record = self.store.load_record(instance)
        self.store.save_record(records.observe(record, Action.LOSE, now_ns=self.clock(), error="killed"))


class FakeWorkshop:
    """Builds in no time; the revision is a hash of what was asked for. `fail`: raised by the next build."""

    notice = ""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.built: list[tuple[str, str, str | None]] = []
        self.fail: BaseException | None = None

    def resolve(self, flake_ref: str, cwd: Path) -> str:
        return str(cwd / flake_ref) if flake_ref.startswith("./") else flake_ref

    def build(
        self, flake_ref: str, profile: str, lock_sha256: str | None, *, on_line: LineSink, on_step: StepSink
    ) -> Built:
        on_step("building kernel", 0.5)
        on_line("cc vmlinux.c")
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        self.built.append((flake_ref, profile, lock_sha256))
        digest = hashlib.sha256(f"{flake_ref} {profile}".encode()).hexdigest()
        ensure_dir(self.store.revisions_dir / digest)
        return Built(
            RevisionId(digest), flake_ref, "ab" * 32, ("/nix/store/x",), (ArtifactHash("kernel", "ef" * 32),)
        )

    def collect(self, keep: Collection[RevisionId]) -> list[RevisionId]:
        gone = [RevisionId(p.name) for p in self.store.revisions_dir.iterdir() if p.name not in keep]
        for revision in gone:
            remove_tree(self.store.revisions_dir / revision)
        return gone


class FileLog:
    """The real audit log, below `store`."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def append(self, entry: AuditEntry) -> None:
        audit_file.append(self.store.tenant_dir(entry.tenant) / audit_file.LOG_NAME, entry)

    def verify(self, tenant: TenantId) -> Verified:
        return audit_file.verify(self.store.tenant_dir(tenant) / audit_file.LOG_NAME, tenant)


class FakeNode:
    """A facade over `root`, with its fakes at hand."""

    def __init__(self, root: Path) -> None:
        self.now = 1_700_000_000_000_000_000
        self.store = Store(root)
        for folder in (root, self.store.tenants_dir, self.store.revisions_dir, self.store.keys_dir):
            ensure_dir(folder)
        self.host = FakeHost(self.store, self.clock)
        self.workshop = FakeWorkshop(self.store)
        self.keys = DevelopmentKeyProvider(root)

    def clock(self) -> int:
        self.now += 1_000_000
        return self.now

    def open(self, command: tuple[str, ...] = ("mvm", "test")) -> Standalone:
        return Standalone(
            self.store,
            self.keys,
            host=lambda: self.host,
            workshop=lambda: self.workshop,
            audit=FileLog(self.store),
            command=command,
            clock=self.clock,
        )

    def entries(self, tenant: str) -> list[tuple[str, str]]:
        """(action, outcome) of every audit entry."""
        import msgspec

        path = self.store.tenant_dir(TenantId(tenant)) / audit_file.LOG_NAME
        lines = path.read_bytes().splitlines() if path.exists() else []
        found = [msgspec.json.decode(line) for line in lines]
        return [(entry["action"], entry["outcome"]) for entry in found]

    def state(self, instance: str) -> State | None:
        try:
            return self.store.load_record(InstanceId.parse(instance)).state
        except NotFound:
            return None
