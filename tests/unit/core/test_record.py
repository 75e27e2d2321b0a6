from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mvm.core.errors import Conflict, InvalidInput
from mvm.core.ids import InstanceId, SnapshotId
from mvm.core.lifecycle import TRANSITIONS, Action, Forbidden, NoOp, State, Step, after_failure, settle
from mvm.core.record import (
    InstanceRecord,
    ProcessIdentity,
    begin,
    commit,
    decode_record,
    encode_record,
    end,
    finish,
    network_identity,
    new_record,
    note,
    observe,
    pending_step,
)
from mvm.core.snapshot import Phase, SnapshotRef, WakeReceipt

from . import strategies as some

WEB = InstanceId.parse("acme/web-1")
NET = network_identity(WEB, 7, 3)
PROCESS = ProcessIdentity(pid=4711, start_ticks=99, boot_id="01234567-89ab-cdef-0123-456789abcdef")
SNAPSHOT = SnapshotRef(id=SnapshotId("1" * 32), manifest_sha256="a" * 64, created_ns=5, stored_bytes=10)
NEW = new_record(WEB, NET, now_ns=1)


def step(state: State, action: Action) -> Step:
    found = TRANSITIONS[(state, action)]
    assert isinstance(found, Step)
    return found


def running() -> InstanceRecord:
    started = note(begin(NEW, step(State.CREATED, Action.RUN), now_ns=2), process=PROCESS)
    return finish(commit(started), now_ns=3)


def sleeping() -> InstanceRecord:
    going = begin(running(), step(State.RUNNING, Action.SLEEP), now_ns=4, snapshot=SNAPSHOT.id)
    return finish(note(commit(going), snapshot=SNAPSHOT), now_ns=6)


@pytest.mark.req("H4")
def test_what_a_vmm_is_without_is_known_for_as_long_as_it_runs() -> None:
    bare = note(running(), unconfined=("without a jail: Operation not permitted",))
    assert decode_record(encode_record(bare)).unconfined == bare.unconfined
    going = begin(bare, step(State.RUNNING, Action.SLEEP), now_ns=4, snapshot=SNAPSHOT.id)
    asleep = finish(note(commit(going), snapshot=SNAPSHOT), now_ns=6)
    assert asleep.unconfined == ()


class AnyLife(RuleBasedStateMachine):
    """Any order of actions, successes, failures, crashes and losses, persisted after every change."""

    def __init__(self) -> None:
        super().__init__()
        self.record = NEW
        self.now = 1

    def _keep(self, record: InstanceRecord) -> None:
        assert record.generation > self.record.generation
        self.record = decode_record(encode_record(record))
        assert self.record == record
        self.now += 1

    def _facts(self, state: State) -> None:
        """What whoever carries out a step would have written down before ending in `state`."""
        if state is State.RUNNING and self.record.process is None:
            self._keep(note(self.record, process=PROCESS))
        if state is State.SLEEPING and self.record.snapshot is None:
            self._keep(note(self.record, snapshot=SNAPSHOT))

    @precondition(lambda self: self.record.pending is None)
    @rule(action=st.sampled_from([Action.RUN, Action.SLEEP, Action.WAKE, Action.STOP, Action.DESTROY]))
    def ask(self, action: Action) -> None:
        found = TRANSITIONS[(self.record.state, action)]
        if isinstance(found, Step):
            self._keep(begin(self.record, found, now_ns=self.now))
        else:
            assert isinstance(found, NoOp | Forbidden)

    @precondition(lambda self: self.record.pending is not None)
    @rule()
    def pass_commit_point(self) -> None:
        committed = commit(self.record)
        if committed != self.record:
            self._keep(committed)
        assert commit(self.record) == self.record

    @precondition(lambda self: self.record.pending is not None)
    @rule(alive=st.booleans(), how=st.sampled_from(["success", "failure", "crash"]))
    def conclude(self, alive: bool, how: str) -> None:
        going, pending = pending_step(self.record), self.record.pending
        assert pending is not None
        state = going.success
        if how == "failure":
            state = after_failure(going, committed=pending.committed, alive=alive)
        elif how == "crash":
            state = settle(going, committed=pending.committed, alive=alive)
        self._facts(state)
        self._keep(end(self.record, state, now_ns=self.now))
        assert self.record.state is state

    @precondition(lambda self: self.record.pending is None)
    @rule(action=st.sampled_from([Action.EXIT, Action.LOSE]))
    def vmm_is_gone(self, action: Action) -> None:
        seen = observe(self.record, action, now_ns=self.now, error="gone")
        if self.record.state is State.RUNNING:
            self._keep(seen)
            assert self.record.last_error == "gone"
        else:
            assert seen == self.record

    @invariant()
    def says_nothing_that_is_not_so(self) -> None:
        record = self.record
        if record.pending is None:
            assert (record.process is not None) == (record.state is State.RUNNING)
        if record.state is State.SLEEPING:
            assert record.snapshot is not None
        if record.state in (State.CREATED, State.STOPPED, State.DESTROYED):
            assert record.pending is not None or record.snapshot is None


@pytest.mark.req("L3")
def test_no_life_leads_to_a_record_that_contradicts_itself() -> None:
    run_state_machine_as_test(AnyLife)


@pytest.mark.req("L3")
def test_an_interrupted_record_admits_nothing_before_it_is_recovered() -> None:
    going = begin(running(), step(State.RUNNING, Action.SLEEP), now_ns=4)
    with pytest.raises(Conflict, match="interrupted while quiescing"):
        begin(going, step(State.RUNNING, Action.STOP), now_ns=5)


def test_a_step_is_only_begun_where_it_starts_and_only_ends_where_it_can() -> None:
    with pytest.raises(Conflict, match="is created, not running"):
        begin(NEW, step(State.RUNNING, Action.SLEEP), now_ns=2)
    going = begin(running(), step(State.RUNNING, Action.SLEEP), now_ns=4)
    with pytest.raises(Conflict, match="cannot become destroyed"):
        end(going, State.DESTROYED, now_ns=5)
    with pytest.raises(Conflict, match="no step in progress"):
        finish(running(), now_ns=5)


def test_success_without_its_facts_is_refused() -> None:
    going = begin(running(), step(State.RUNNING, Action.SLEEP), now_ns=4)
    with pytest.raises(InvalidInput, match="snapshot"):
        finish(going, now_ns=5)
    with pytest.raises(InvalidInput, match="process"):
        finish(begin(NEW, step(State.CREATED, Action.RUN), now_ns=2), now_ns=3)


@pytest.mark.req("L3")
def test_a_stop_discards_the_snapshot_and_the_process() -> None:
    stopped = finish(begin(sleeping(), step(State.SLEEPING, Action.STOP), now_ns=8), now_ns=9)
    assert (stopped.snapshot, stopped.process, stopped.changed_ns) == (None, None, 9)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_only_ever_invalid_input(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_record(data)


@pytest.mark.parametrize(
    "change",
    [
        {"state": "sleeping"},
        {"state": "running"},
        {"state": "dreaming"},
        {"pending": {"action": "sleep", "intent": "quiescing", "started_ns": 1}},
        {"pending": {"action": "run", "intent": "waking", "started_ns": 1}},
        {"generation": -1},
        {"surprise": 1},
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    document = json.loads(encode_record(NEW)) | change
    with pytest.raises(InvalidInput):
        decode_record(json.dumps(document).encode())


def test_a_record_copied_from_another_instance_is_refused() -> None:
    assert decode_record(encode_record(NEW), of=WEB) == NEW
    with pytest.raises(InvalidInput, match="record of acme/web-1, not of acme/web-2"):
        decode_record(encode_record(NEW), of=InstanceId.parse("acme/web-2"))


@pytest.mark.req("N1")
@given(st.sampled_from(["bridge", "tap", "ip", "gateway", "slot", "index"]))
def test_a_record_cannot_claim_anothers_place(field: str) -> None:
    document = json.loads(encode_record(NEW))
    other = network_identity(WEB, 8, 4)
    document["network"][field] = getattr(other, field)
    with pytest.raises(InvalidInput, match="network"):
        decode_record(json.dumps(document).encode())


@given(some.instances, some.indices, some.slots)
def test_a_new_record_survives_its_bytes(instance: InstanceId, index: int, slot: int) -> None:
    record = new_record(instance, network_identity(instance, index, slot), now_ns=1)
    assert decode_record(encode_record(record)) == record


def test_a_receipt_is_kept_with_its_kind() -> None:
    receipt = WakeReceipt(instance=WEB, snapshot=SNAPSHOT.id, total_ns=10, phases=(Phase("load", 4),))
    kept = note(running(), receipt=receipt)
    assert decode_record(encode_record(kept)).last_receipt == receipt
