"""A tenant that is destroyed while one of its instances is first started ends with neither VM nor record, whatever the
moment: the two hold no lock in common that would order them."""

from __future__ import annotations

import pytest
from tests.support.fake_world import FakeWorld
from tests.unit.standalone.fakes import FakeWorkshop, FileLog

from mvm.core.errors import Conflict, NotFound
from mvm.core.ids import InstanceId, PoolId, TenantId
from mvm.core.plan import InstancePlan, plan_instance
from mvm.core.record import InstanceRecord, network_identity, new_record
from mvm.core.spec import TenantSpec
from mvm.hostd.host import Host
from mvm.hostd.store import Store
from mvm.standalone.facade import Standalone
from mvm.standalone.ports import Host as HostPort

pytestmark = [pytest.mark.root, pytest.mark.req("L3", "L5")]

ACME = TenantId("acme")


def node_of(world: FakeWorld, store: Store, host: HostPort) -> Standalone:
    return Standalone(
        store, world.keys, host=lambda: host, workshop=lambda: FakeWorkshop(store), audit=FileLog(store)
    )


class Meanwhile(Store):
    """Destroys the tenant at a moment of the start's: just before, or just after, it has written its first record."""

    def __init__(self, world: FakeWorld, when: str) -> None:
        super().__init__(world.store.root)
        self._world = world
        self._when = when

    def save_record(self, record: InstanceRecord) -> None:
        when, self._when = self._when, ""
        if when == "before":
            self._destroy()
        super().save_record(record)
        if when == "begun":
            self._world.store.mark_destroying(ACME)

    def _destroy(self) -> None:
        node_of(self._world, self._world.store, self._world.host()).destroy(ACME, wipe_volumes=True)


@pytest.mark.parametrize("when", ["before", "begun"])
def test_no_vm_is_left(world: FakeWorld, when: str) -> None:
    plan: InstancePlan = world.plan()
    host = Host(Meanwhile(world, when), world.keys, world.driver)
    with pytest.raises((NotFound, Conflict)):
        host.create_instance(plan)
    assert world.store.instances(ACME) == []
    assert not world.paths(plan).base.exists()
    world.assert_nothing_runs(plan)
    if when == "begun":
        # The destruction was interrupted: nothing can be started, and it can be finished.
        node = node_of(world, world.store, world.host())
        with pytest.raises(Conflict, match="being destroyed"):
            world.host().create_instance(plan)
        with pytest.raises(Conflict, match="being destroyed"):
            node.create(world.store.load_spec(ACME))
        node.destroy(ACME, wipe_volumes=True)
    with pytest.raises(NotFound):
        world.store.load_spec(ACME)
    assert not (world.store.tenant_dir(ACME) / "destroying").exists()


class Twin(Store):
    """Has another instance with the same slot recorded just before, or just after, the start's first record."""

    def __init__(self, world: FakeWorld, twin: InstanceRecord, *, first: bool) -> None:
        super().__init__(world.store.root)
        self._twin: InstanceRecord | None = twin
        self._first = first

    def save_record(self, record: InstanceRecord) -> None:
        twin, self._twin = self._twin, None
        if twin is not None and self._first:
            super().save_record(twin)
        super().save_record(record)
        if twin is not None and not self._first:
            super().save_record(twin)


@pytest.mark.parametrize("first", [True, False])
def test_no_two_instances_get_one_address(world: FakeWorld, first: bool) -> None:
    """Two first starts that were planned at the same moment: admission has seen neither's record."""
    plan = world.plan()
    other = InstanceId(ACME, PoolId("default"), 7)
    twin = new_record(other, network_identity(other, plan.network.index, plan.network.slot), now_ns=1)
    host = Host(Twin(world, twin, first=first), world.keys, world.driver)
    with pytest.raises(Conflict, match="cannot have the address"):
        host.create_instance(plan)
    assert world.store.instances(ACME) == [other]
    world.assert_nothing_runs(plan)


def test_created_again_after_it_was_interrupted_at_the_very_end(world: FakeWorld) -> None:
    plan: InstancePlan = world.plan()
    spec: TenantSpec = world.store.load_spec(ACME)
    node = node_of(world, world.store, world.host())
    node.destroy(ACME, wipe_volumes=True)
    world.store.mark_destroying(ACME)  # the specification is gone, its mark is not yet
    node.create(spec)
    assert world.store.instances(ACME) == [plan.instance]
    # A plan for the tenant's former life, made before: its subnet is nobody's now.
    world.store.instance_paths(plan.instance).state.unlink()
    revision, net = plan.revision, plan.network
    former = plan_instance(spec, plan.instance.pool, 0, revision, net.index + 7, net.slot)
    with pytest.raises(Conflict, match="created again"):
        world.host().create_instance(former)
    assert world.store.instances(ACME) == []
