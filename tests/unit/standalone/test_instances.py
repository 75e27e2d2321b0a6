"""Run, sleep, wake, stop and destroy, through the facade."""

from __future__ import annotations

import pytest
from tests.unit.standalone.fakes import FakeNode

from mvm.core.errors import Conflict, InvalidInput, NotFound, VmmError
from mvm.core.ids import InstanceId, PoolId, TenantId
from mvm.core.lifecycle import Action, State
from mvm.core.spec import new_tenant
from mvm.standalone.facade import Standalone

ACME = TenantId("acme")
FIRST = InstanceId("acme", "default", 0)
WEB = [InstanceId("acme", "web", n) for n in range(3)]


@pytest.fixture
def node(fake: FakeNode) -> Standalone:
    node = fake.open()
    node.create(new_tenant(ACME, "nix/embedded"))
    node.build(ACME)
    return node


@pytest.mark.req("L3", "L5")
def test_a_life(fake: FakeNode, node: Standalone) -> None:
    states = []
    for action in (Action.RUN, Action.SLEEP, Action.WAKE, Action.STOP):
        (outcome,) = node.act(ACME, action)
        assert outcome.changed
        states.append(outcome.record.state)
        (again,) = node.act(ACME, action)
        assert (again.changed, again.skipped) == (False, False)
        assert again.note.startswith("is ")
    assert states == [State.RUNNING, State.SLEEPING, State.RUNNING, State.STOPPED]
    # What changed nothing is not in the log.
    assert [a for a, _ in fake.entries("acme")] == [
        "tenant.create", "tenant.build", "instance.run", "instance.sleep", "instance.wake", "instance.stop",
    ]  # fmt: skip


@pytest.mark.req("L5")
@pytest.mark.parametrize(
    ("before", "action", "says", "advice"),
    [
        ([], Action.WAKE, "acme never slept", "mvm tenant run acme"),
        ([], Action.SLEEP, "acme was never started", "mvm tenant run acme"),
        ([Action.RUN, Action.STOP], Action.SLEEP, "acme is stopped", "mvm tenant run acme"),
        ([Action.RUN, Action.STOP], Action.WAKE, "acme is stopped", "mvm tenant run acme"),
        ([Action.RUN, Action.SLEEP], Action.RUN, "acme is sleeping", "mvm tenant wake acme"),
    ],
)
def test_what_is_not_possible_says_what_is(
    fake: FakeNode, node: Standalone, before: list[Action], action: Action, says: str, advice: str
) -> None:
    for step in before:
        node.act(ACME, step)
    state = fake.state("acme/default-0")
    with pytest.raises(Conflict) as refusal:
        node.act(ACME, action)
    assert says in refusal.value.brief
    assert advice in refusal.value.resolution
    assert fake.state("acme/default-0") is state
    assert fake.entries("acme")[-1] == (f"instance.{action}", "refused")


@pytest.mark.req("L5")
def test_running_before_building_is_refused_with_the_command(fake: FakeNode) -> None:
    node = fake.open()
    node.create(new_tenant(ACME, "nix/embedded"))
    with pytest.raises(NotFound) as refusal:
        node.act(ACME, Action.RUN)
    assert "mvm tenant build acme" in refusal.value.resolution


@pytest.mark.req("L1", "N1")
def test_instances_get_addresses_of_their_own_and_keep_them(fake: FakeNode, node: Standalone) -> None:
    node.create_pool(ACME, PoolId("web"), {"count": 2})
    ips = {i.record.id: i.record.network.ip for i in node.act(ACME, Action.RUN)}
    assert sorted(ips.values()) == ["10.240.1.2", "10.240.1.3", "10.240.1.4"]
    node.act(ACME, Action.STOP)
    assert {i.record.id: i.record.network.ip for i in node.act(ACME, Action.RUN)} == ips
    assert len({p.network.ip for p in fake.host.plans}) == 3


@pytest.mark.req("L1", "L5")
def test_a_tenants_verb_skips_what_cannot_follow(fake: FakeNode, node: Standalone) -> None:
    node.create_pool(ACME, PoolId("web"), {"count": 2})
    node.act(ACME, Action.RUN)
    node.act(FIRST, Action.SLEEP)
    node.act(WEB[0], Action.STOP)
    outcomes = {o.record.id: o for o in node.act(ACME, Action.RUN)}
    assert outcomes[FIRST].skipped
    assert "mvm instance wake acme/default-0" in outcomes[FIRST].note
    assert outcomes[WEB[0]].changed
    assert not outcomes[WEB[1]].changed
    assert not outcomes[WEB[1]].skipped


@pytest.mark.req("L5")
def test_a_verb_that_none_can_follow_is_refused(node: Standalone) -> None:
    node.create_pool(ACME, PoolId("web"), {"count": 1})
    with pytest.raises(Conflict, match="acme/default-0 never slept"):
        node.act(ACME, Action.WAKE)


@pytest.mark.req("L3")
def test_a_failure_is_not_skipped(fake: FakeNode, node: Standalone) -> None:
    node.create_pool(ACME, PoolId("web"), {"count": 1})
    fake.host.fail = VmmError("no such machine")
    with pytest.raises(VmmError):
        node.act(ACME, Action.RUN)
    assert fake.entries("acme")[-1] == ("instance.run", "failed")


@pytest.mark.req("B6", "S2")
def test_waking_uses_the_revision_it_slept_with(fake: FakeNode, node: Standalone) -> None:
    node.act(ACME, Action.RUN)
    slept_with = fake.store.load_record(FIRST).revision
    node.act(ACME, Action.SLEEP)
    node.pin(ACME, "github:owner/name")
    node.build(ACME)
    node.act(ACME, Action.WAKE)
    assert fake.host.plans[-1].revision == slept_with
    assert slept_with != fake.store.load_history(ACME).current
    (again,) = node.act(ACME, Action.RUN)
    assert "the current one is" in again.note


@pytest.mark.req("L5")
def test_an_instance_nobody_asked_for(node: Standalone) -> None:
    with pytest.raises(InvalidInput, match="not asked for"):
        node.act(InstanceId("acme", "default", 3), Action.RUN)
    with pytest.raises(NotFound, match="has no pool web"):
        node.act(WEB[0], Action.RUN)
    with pytest.raises(NotFound, match="there is no instance"):
        node.act(InstanceId("acme", "default", 3), Action.STOP)
    with pytest.raises(NotFound, match="there is no tenant"):
        node.act(TenantId("nobody"), Action.STOP)


@pytest.mark.req("L5", "L7")
def test_destroying_an_instance_twice(fake: FakeNode, node: Standalone) -> None:
    node.act(ACME, Action.RUN)
    assert node.destroy_instance(FIRST, wipe_volumes=False)
    assert fake.store.instance_paths(FIRST).data_disk.exists()
    assert not node.destroy_instance(FIRST, wipe_volumes=False)
    assert node.destroy_instance(FIRST, wipe_volumes=True)
    assert not fake.store.instance_paths(FIRST).base.exists()
    assert not node.destroy_instance(FIRST, wipe_volumes=True)
    with pytest.raises(NotFound, match="no pool defualt"):
        node.destroy_instance(InstanceId("acme", "defualt", 0), wipe_volumes=False)
    (outcome,) = node.act(ACME, Action.RUN)
    assert outcome.record.state is State.RUNNING


@pytest.mark.req("L5")
def test_a_tenant_without_instances(fake: FakeNode, node: Standalone) -> None:
    node.scale_pool(ACME, PoolId("default"), 0, wipe_volumes=False)
    with pytest.raises(Conflict) as refusal:
        node.act(ACME, Action.RUN)
    assert "mvm pool scale acme default 1" in refusal.value.resolution


@pytest.mark.req("L6")
def test_a_session_needs_a_running_guest(fake: FakeNode, node: Standalone) -> None:
    with pytest.raises(Conflict, match="not running"), node.session(FIRST, "exec", ("mvm",)):
        pass
    node.act(ACME, Action.RUN)
    with node.session(FIRST, "exec", ("mvm", "exec", "acme/default-0")) as channel:
        assert channel is fake.host.fake_channel  # type: ignore[comparison-overlap]
    node.act(ACME, Action.SLEEP)
    with pytest.raises(Conflict) as refusal, node.session(FIRST, "exec", ("mvm",)):
        pass
    assert "mvm tenant wake acme" in refusal.value.resolution
    assert fake.entries("acme")[-1] == ("instance.exec", "refused")
    node.create_pool(ACME, PoolId("web"), {"count": 1})
    with pytest.raises(Conflict) as refusal, node.session(FIRST, "exec", ("mvm",)):
        pass
    assert "mvm instance wake acme/default-0" in refusal.value.resolution


@pytest.mark.req("O2")
def test_the_log_names_addresses_revision_and_snapshot(fake: FakeNode, node: Standalone) -> None:
    import msgspec

    node.act(ACME, Action.RUN)
    node.act(ACME, Action.SLEEP)
    lines = (fake.store.tenant_dir(ACME) / "audit.log").read_bytes().splitlines()
    slept = msgspec.json.decode(lines[-1])
    record = fake.store.load_record(FIRST)
    assert record.snapshot is not None
    assert slept["snapshot_hash"] == record.snapshot.manifest_sha256
    assert (slept["ip"], slept["mac"]) == (record.network.ip, record.network.mac)
    assert slept["revision"] == record.revision
    assert slept["command"] == ["mvm", "test"]
