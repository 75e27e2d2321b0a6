"""What is undone, what is left alone: for any ledger and anything a host can show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core import addressing, ledger
from mvm.core.ids import InstanceId, TenantId
from mvm.core.ledger import Entry, Foreign, HostObject, Kind, Lacks, Ledger, Seen, Undo, reconcile
from mvm.core.lifecycle import TRANSITIONS, Action, State, Step
from mvm.core.record import (
    begin,
    commit,
    decode_record,
    encode_record,
    end,
    network_identity,
    new_record,
    note,
)

from .test_record import PROCESS

TENANTS = [TenantId(name) for name in ("acme", "beta", "a-b")]
INSTANCES = [InstanceId(t, pool, n) for t in TENANTS for pool in ("default", "web") for n in (0, 1)]


def held_by(instance: InstanceId) -> tuple[HostObject, ...]:
    index, slot = TENANTS.index(instance.tenant) + 1, INSTANCES.index(instance) % 4
    return ledger.entitled(
        instance, bridge=addressing.bridge_name(index), tap=addressing.tap_name(index, slot)
    )


EVERYTHING = sorted({o for i in INSTANCES for o in held_by(i)})
NAMES = st.one_of(
    st.sampled_from([(o.kind, o.name) for o in EVERYTHING]),
    st.sampled_from(
        [
            (Kind.BRIDGE, "mvm-b9"),
            (Kind.TAP, "mvm-t9s0"),
            (Kind.CGROUP, "stranger--default-0"),
            (Kind.CGROUP, "not ours"),
            (Kind.MAPPING, "mvm-swap"),
            (Kind.FILE, "tenants/acme/instances/default-0/.tmp-state.json-1"),
            (Kind.FILE, ".tmp-allocations.json-2"),
            (Kind.REMAINS, "tenants/beta/instances/web-1"),
            (Kind.MOUNT, "tenants/acme/instances/default-0/runtime/memory"),
            (Kind.RULES, "mvm"),
        ]
    ),
)


@st.composite
def anything(draw: st.DrawFn) -> Seen:
    kind, name = draw(NAMES)
    return Seen(
        kind,
        name,
        in_use=draw(st.booleans()),
        below_root=draw(st.sampled_from([None, True, False])),
        proper=draw(st.booleans()),
    )


@st.composite
def some_entries(draw: st.DrawFn) -> tuple[Entry, ...]:
    found = []
    for instance in draw(st.lists(st.sampled_from(INSTANCES), unique=True)):
        awake, pending = draw(st.booleans()), draw(st.booleans())
        found.append(Entry(instance, awake, pending, held_by(instance) if awake or pending else ()))
    return tuple(found)


SEEN, ENTRIES = anything(), some_entries()
LEDGERS = st.builds(
    Ledger,
    ENTRIES,
    st.frozensets(st.integers(1, 3)),
    st.frozensets(st.sampled_from(TENANTS)),
    st.frozensets(st.sampled_from(INSTANCES), max_size=1),
    st.frozensets(st.integers(1, 3), max_size=1),
)


def is_live(book: Ledger, seen: Seen) -> bool:
    return any(
        (o.kind, o.name) == (seen.kind, seen.name)
        or (o.kind is seen.kind is Kind.MOUNT and seen.name.startswith(o.name + "/"))
        for e in book.entries
        if e.awake or e.pending
        for o in e.holds
    )


@pytest.mark.req("L3", "L7")
@given(LEDGERS, st.lists(SEEN, unique_by=lambda s: (s.kind, s.name)))
def test_only_what_nobody_owns_is_undone(book: Ledger, seen: list[Seen]) -> None:
    actions = reconcile(book, seen)
    undone = [a for a in actions if isinstance(a, Undo)]
    by_name = {(s.kind, s.name): s for s in seen}
    assert len(undone) == len({(u.kind, u.name) for u in undone})
    for action in undone:
        s = by_name[action.kind, action.name]
        assert not is_live(book, s)
        instance = ledger.instance_of(s.kind, s.name)
        assert instance is None or instance not in book.unreadable
        if s.kind in (Kind.TAP, Kind.BRIDGE):
            assert s.proper
            assert not s.in_use
            index = ledger.link_index(s.name)
            assert index in book.indices
            assert index not in book.closed
        if s.kind is Kind.MAPPING:
            assert s.below_root
        if s.kind is Kind.CGROUP:
            assert instance is not None
            assert instance.tenant in book.tenants
            assert not s.in_use
    # Whatever is not live is undone or said, never passed over in silence.
    told = {(a.kind, a.name) for a in actions if not isinstance(a, Lacks)}
    pending = {e.instance for e in book.entries if e.pending}
    for s in seen:
        quiet = s.kind is Kind.RULES and bool(book.entries or book.unreadable)
        quiet = quiet or (s.kind is Kind.FILE and ledger.instance_of(s.kind, s.name) in pending)
        assert is_live(book, s) or quiet or (s.kind, s.name) in told


@given(LEDGERS, st.lists(SEEN, unique_by=lambda s: (s.kind, s.name)))
def test_what_was_undone_is_undone_for_good(book: Ledger, seen: list[Seen]) -> None:
    undone = {(a.kind, a.name) for a in reconcile(book, seen) if isinstance(a, Undo)}
    left = [s for s in seen if (s.kind, s.name) not in undone]
    assert not [a for a in reconcile(book, left) if isinstance(a, Undo)]


@given(LEDGERS)
def test_a_running_instance_that_lacks_something_is_named(book: Ledger) -> None:
    lacks = {(a.instance, a.kind) for a in reconcile(book, ()) if isinstance(a, Lacks)}
    awake = {e.instance for e in book.entries if e.awake and not e.pending}
    assert lacks == {(i, kind) for i in awake for kind in ledger.NEEDED}


@pytest.mark.req("L3")
@pytest.mark.parametrize("rule", [r for r in TRANSITIONS.values() if isinstance(r, Step)], ids=str)
def test_the_record_holds_from_the_intent_to_the_end(rule: Step) -> None:
    """Whatever makes host objects is preceded by a record that lists them, and no state without a VM lists any."""
    instance = INSTANCES[0]
    net = network_identity(instance, 1, 0)
    record = new_record(instance, net, now_ns=1)
    wanted = ledger.entitled(instance, bridge=net.bridge, tap=net.tap)
    if rule.source is State.RUNNING or rule.source is State.STOPPED or rule.source is State.FAILED:
        run = TRANSITIONS[State.CREATED, Action.RUN]
        assert isinstance(run, Step)
        record = note(begin(record, run, now_ns=2), process=PROCESS)
        assert record.holds == wanted
        record = end(commit(record), State.RUNNING, now_ns=3)
        assert decode_record(encode_record(record)).holds == wanted
    if rule.source is State.RUNNING:
        going = begin(record, rule, now_ns=4)
        assert going.holds == wanted
        if rule.success is not State.SLEEPING:
            assert end(going, rule.success, now_ns=5).holds == ()
    if rule.source is State.CREATED and rule.action is Action.RUN:
        assert end(begin(record, rule, now_ns=4), State.FAILED, now_ns=5).holds == ()


@pytest.mark.parametrize("instance", INSTANCES)
def test_names_tell_their_instance(instance: InstanceId) -> None:
    for o in held_by(instance):
        found = ledger.instance_of(o.kind, o.name)
        assert found == (None if o.kind in (Kind.TAP, Kind.BRIDGE) else instance)


@pytest.mark.parametrize(
    "name",
    ["mvm-b0", "mvm-b4096", "mvm-b01", "mvm-bx", "docker0", "mvm-t1s01", "mvm-b1\n", "xmvm-b1", "mvm-b"],
)
def test_other_names_have_no_subnet(name: str) -> None:
    assert ledger.link_index(name) is None


def test_foreign_things_are_said() -> None:
    book = Ledger(indices=frozenset({1}))
    seen = [
        Seen(Kind.BRIDGE, "mvm-b2"),
        Seen(Kind.BRIDGE, "mvm-b1", proper=False),
        Seen(Kind.TAP, "mvm-t1s0", in_use=True),
    ]
    assert {(a.name, type(a)) for a in reconcile(book, seen)} == {
        ("mvm-b2", Foreign),
        ("mvm-b1", Foreign),
        ("mvm-t1s0", Foreign),
    }
