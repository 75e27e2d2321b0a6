"""What may be asked, by whom and for what: no socket, no process."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from mvm.core import addressing
from mvm.core import record as records
from mvm.core.errors import Conflict, MvmError, NotFound, Refused, ResourceExhausted
from mvm.core.history import Adopted, adopt
from mvm.core.ids import InstanceId, PoolId, RevisionId, TenantId
from mvm.core.lifecycle import State
from mvm.core.plan import InstancePlan, plan_instance
from mvm.core.record import ProcessIdentity
from mvm.core.snapshot import Fingerprint
from mvm.core.spec import new_tenant
from mvm.hostd import admission
from mvm.hostd.settings import HostLimits
from mvm.hostd.store import Store
from mvm.linux.sockets import PeerCredentials

REVISION = RevisionId("ab" * 32)
BOOT = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path)
    (made.revisions_dir / REVISION).mkdir(parents=True)
    made.tenants_dir.mkdir()
    return made


def plan(store: Store, name: str = "acme", slot: int = 0) -> InstancePlan:
    tenant = TenantId(name)
    spec = new_tenant(tenant, "nix/embedded", mem_mib=256)
    store.save_spec(spec)
    after, index = addressing.allocate(store.load_allocations(), tenant)
    with store.allocations() as (_, save):
        save(after)
    entry = Adopted(REVISION, "nix/embedded", "0" * 64, 1)
    store.save_history(adopt(store.load_history(tenant), entry))
    return plan_instance(spec, PoolId("default"), 0, REVISION, index, slot)


def running(store: Store, wanted: InstancePlan) -> None:
    record = records.new_record(wanted.instance, wanted.network, now_ns=time.time_ns())
    store.save_record(
        msgspec.structs.replace(
            record,
            state=State.RUNNING,
            process=ProcessIdentity(pid=4242, start_ticks=1, boot_id=BOOT),
            fingerprint=Fingerprint(
                vmm="fake",
                vmm_version="1",
                machine="fake",
                accel="none",
                cpu_model="none",
                vcpus=1,
                mem_mib=256,
            ),
        )
    )


@pytest.mark.req("H2")
def test_who_may_connect() -> None:
    admission.check_peer(PeerCredentials(1, 0, 0), (), None)
    admission.check_peer(PeerCredentials(1, 1000, 77), (), 77)
    admission.check_peer(PeerCredentials(1, 1000, 1000), (5, 77), 77)
    for uid, gid, groups, allowed in ((1000, 1000, (), 77), (1000, 0, (0,), None), (1000, 0, (0,), 77)):
        with pytest.raises(Refused):
            admission.check_peer(PeerCredentials(1, uid, gid), groups, allowed)


@pytest.mark.req("H2")
def test_a_plan_as_the_specification_gives_it(store: Store) -> None:
    admission.check_exists(store, plan(store))


@pytest.mark.req("H2")
@pytest.mark.parametrize(
    ("break_", "expected"),
    [
        (lambda s, p: (s.tenant_dir(p.instance.tenant) / "spec.json").unlink(), NotFound),
        (lambda s, p: s.allocations_file.unlink(), NotFound),
        (lambda s, p: (s.revisions_dir / REVISION).rmdir(), NotFound),
        (lambda s, p: (s.tenant_dir(p.instance.tenant) / "revisions.json").unlink(), Refused),
    ],
)
def test_what_must_be_there(store: Store, break_: object, expected: type[MvmError]) -> None:
    wanted = plan(store)
    break_(store, wanted)  # type: ignore[operator]
    with pytest.raises(expected):
        admission.check_exists(store, wanted)


@pytest.mark.req("H2", "N1")
def test_an_address_is_one_instances(store: Store) -> None:
    wanted = plan(store)
    other = InstanceId(wanted.instance.tenant, PoolId("other"), 0)
    network = records.network_identity(other, wanted.network.index, wanted.network.slot)
    store.save_record(records.new_record(other, network, now_ns=1))
    with pytest.raises(Conflict):
        admission.check_exists(store, wanted)


@pytest.mark.req("H2")
def test_limits_of_one_instance(store: Store) -> None:
    wanted = plan(store)
    admission.check_limits(wanted, HostLimits(mem_mib=256))
    for limits in (
        HostLimits(mem_mib=255),
        HostLimits(data_disk_mib=2047),
        HostLimits(vcpus=wanted.vcpus - 1 or 1),
    ):
        if limits.vcpus == 1 and wanted.vcpus == 1:
            continue
        with pytest.raises(Refused):
            admission.check_limits(wanted, limits)


@pytest.mark.req("H2")
def test_limits_of_the_node(store: Store) -> None:
    first, second, third = (plan(store, name) for name in ("acme", "beta", "gamma"))
    running(store, first)
    admission.check_capacity(store, second, HostLimits(running=2, running_mem_mib=512), [])
    # One that is starting counts, and one that runs already is not counted twice.
    admission.check_capacity(store, first, HostLimits(running=1, running_mem_mib=256), [first])
    for limits in (HostLimits(running=2), HostLimits(running_mem_mib=767)):
        with pytest.raises(ResourceExhausted):
            admission.check_capacity(store, third, limits, [second])
    admission.check_capacity(store, third, HostLimits(running=3, running_mem_mib=768), [second])


def test_what_is_in_the_way_is_not_an_instance(store: Store) -> None:
    running(store, plan(store))
    (store.tenants_dir / "Not A Tenant").mkdir()
    (store.tenants_dir / "file").touch()
    (store.tenants_dir / "lost" / "instances" / "x").mkdir(parents=True)
    assert [str(i) for i in admission.all_instances(store)] == ["acme/default-0"]
