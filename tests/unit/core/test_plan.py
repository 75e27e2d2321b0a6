from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core import addressing, limits
from mvm.core.errors import InvalidInput, NotFound, ResourceExhausted
from mvm.core.ids import InstanceId, PoolId, RevisionId, TenantId
from mvm.core.plan import (
    boot_args,
    check_plan,
    decode_plan,
    encode_plan,
    merge_boot_args,
    plan_instance,
    slot_for,
)
from mvm.core.record import network_identity
from mvm.core.spec import PoolSpec, TenantSpec, changed, new_tenant

from . import strategies as some

ACME = new_tenant(TenantId("acme"), "nix/embedded")
DEFAULT = PoolId("default")
REVISION = RevisionId("a" * 64)


@pytest.mark.req("L1")
@given(some.specs(), some.revisions, some.indices, some.slots)
def test_a_plan_follows_its_spec_and_survives_its_bytes(
    spec: TenantSpec, revision: RevisionId, index: int, slot: int
) -> None:
    for instance in spec.instances()[:3]:
        pool = spec.pool(instance.pool)
        plan = plan_instance(spec, instance.pool, instance.ordinal, revision, index, slot)
        assert decode_plan(encode_plan(plan)) == plan
        assert (plan.instance, plan.revision) == (instance, revision)
        assert plan.vcpus == (pool.vcpus or spec.vcpus)
        assert plan.mem_mib == (pool.mem_mib or spec.mem_mib)
        assert plan.uid == plan.gid == addressing.instance_uid(index, slot)
        assert plan.describe().isprintable()


@pytest.mark.req("N1")
def test_the_boot_arguments_are_those_the_guest_reads() -> None:
    instance = InstanceId.parse("acme/default-0")
    assert boot_args(instance, network_identity(instance, 1, 0)) == (
        "mvm.ip=10.240.1.2/24 mvm.gw=10.240.1.1 mvm.dns=10.240.1.1 mvm.host=acme-default-0"
    )


@pytest.mark.req("H2")
@pytest.mark.parametrize("field", ["uid", "gid", "boot_args", "network", "instance"])
def test_a_plan_cannot_borrow_what_is_anothers(field: str) -> None:
    mine = plan_instance(ACME, DEFAULT, 0, REVISION, 1, 0)
    spec = new_tenant(TenantId("evil"), "x")
    other = plan_instance(spec, DEFAULT, 0, REVISION, 2, 1)
    forged = msgspec.structs.replace(other, **{field: getattr(mine, field)})
    with pytest.raises(InvalidInput):
        check_plan(forged)
    with pytest.raises(InvalidInput):
        decode_plan(encode_plan(forged))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_only_ever_invalid_input(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_plan(data)


def test_a_plan_out_of_bounds_is_refused() -> None:
    plan = plan_instance(ACME, DEFAULT, 0, REVISION, 1, 0)
    with pytest.raises(InvalidInput, match="vcpus"):
        check_plan(msgspec.structs.replace(plan, vcpus=limits.VCPUS_MAX + 1))


def test_an_instance_that_nobody_asked_for() -> None:
    with pytest.raises(InvalidInput) as caught:
        plan_instance(ACME, DEFAULT, 1, REVISION, 1, 0)
    assert caught.value.resolution == "Scale it first: mvm pool scale acme default 2"
    with pytest.raises(NotFound):
        plan_instance(ACME, PoolId("web"), 0, REVISION, 1, 0)


@pytest.mark.req("L2", "N1")
def test_a_fixed_address_is_given_to_the_first_instance_and_to_no_other() -> None:
    spec = changed(ACME, ip="10.240.5.2", mac="02:00:00:00:00:07", pools=(PoolSpec(id=DEFAULT, count=2),))
    first, second = spec.instances()
    assert slot_for(spec, second, 5, frozenset()) == 1
    slot = slot_for(spec, first, 5, frozenset({1}))
    plan = plan_instance(spec, DEFAULT, 0, REVISION, 5, slot)
    assert (plan.network.ip, plan.network.mac) == ("10.240.5.2", "02:00:00:00:00:07")
    assert plan_instance(spec, DEFAULT, 1, REVISION, 5, 1).network.mac != plan.network.mac
    with pytest.raises(InvalidInput, match="fixed address"):
        plan_instance(spec, DEFAULT, 0, REVISION, 5, 1)
    with pytest.raises(InvalidInput, match="in use"):
        slot_for(spec, first, 5, frozenset({0}))
    with pytest.raises(InvalidInput, match="subnet"):
        slot_for(spec, first, 6, frozenset())
    with pytest.raises(ResourceExhausted):
        slot_for(spec, second, 5, frozenset(range(1, limits.SLOTS_PER_TENANT)))


@pytest.mark.req("B7")
@pytest.mark.parametrize(
    ("base", "merged"),
    [
        ("", "mvm.ip=1"),
        ("console=ttyS0  reboot=k", "console=ttyS0 reboot=k mvm.ip=1"),
        ("quiet mvm.ip=9 mvm.evil=1", "quiet mvm.ip=1"),
        ("quiet -- single mvm.ip=9", "quiet mvm.ip=1 -- single mvm.ip=9"),
    ],
)
def test_boot_arguments_are_laid_over_the_base(base: str, merged: str) -> None:
    assert merge_boot_args(base, "mvm.ip=1") == merged


@pytest.mark.parametrize("base", ["x" * limits.BOOT_ARGS_MAX, "caf\u00e9", "a\0b"])
def test_boot_arguments_the_kernel_would_not_read_are_refused(base: str) -> None:
    with pytest.raises(InvalidInput, match="boot arguments"):
        merge_boot_args(base, "mvm.ip=1")


def test_a_plan_holds_only_its_declared_fields() -> None:
    document = json.loads(encode_plan(plan_instance(ACME, DEFAULT, 0, REVISION, 1, 0)))
    with pytest.raises(InvalidInput, match="extra"):
        decode_plan(json.dumps(document | {"extra": 1}).encode())
