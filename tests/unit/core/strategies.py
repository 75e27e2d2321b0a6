"""Values that are valid by construction, shared by the tests of the domain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import strategies as st

from mvm.core import limits
from mvm.core.errors import InvalidInput
from mvm.core.ids import InstanceId, NodeId, PoolId, RevisionId, SnapshotId, TenantId
from mvm.core.spec import EgressRule, PoolSpec, Profile, SeccompPolicy, SleepPolicy, TenantSpec, new_tenant

T = TypeVar("T")
HEX = "0123456789abcdef"


def attempt(parse: Callable[[], T]) -> T | InvalidInput:
    """What `parse` returns, or the one error it may raise; any other escapes and fails the test."""
    try:
        return parse()
    except InvalidInput as error:
        return error


def _names(limit: int) -> st.SearchStrategy[str]:
    return st.from_regex(r"[a-z][a-z0-9]{0,7}(-[a-z0-9]{1,5}){0,3}", fullmatch=True).filter(
        lambda text: len(text) <= limit
    )


tenants = _names(limits.TENANT_ID_MAX).map(TenantId)
pools = _names(limits.POOL_ID_MAX).map(PoolId)
ordinals = st.integers(0, limits.INSTANCES_PER_POOL - 1)
instances = st.builds(InstanceId, tenants, pools, ordinals)
revisions = st.text(HEX, min_size=64, max_size=64).map(RevisionId)
sha256s = st.text(HEX, min_size=64, max_size=64)
snapshots = st.text(HEX, min_size=32, max_size=32).map(SnapshotId)
nodes = st.text(HEX, min_size=32, max_size=32).map(NodeId)
indices = st.integers(1, limits.SUBNETS - 1)
slots = st.integers(0, limits.SLOTS_PER_TENANT - 1)
times = st.integers(0, limits.INT63_MAX)
egress_rules = st.builds(
    lambda octets, port, protocol: EgressRule.parse(
        ".".join(map(str, octets)) + (f":{port}/{protocol}" if port else "")
    ),
    st.lists(st.integers(0, 255), min_size=4, max_size=4),
    st.none() | st.integers(1, 65535),
    st.sampled_from(["tcp", "udp"]),
)
pool_specs = st.builds(
    PoolSpec,
    id=pools,
    count=st.integers(0, 10),
    vcpus=st.none() | st.integers(limits.VCPUS_MIN, limits.VCPUS_MAX),
    mem_mib=st.none() | st.integers(limits.SPEC_MEM_MIB_MIN, limits.MEM_MIB_MAX),
)
sleep_policies = st.builds(
    SleepPolicy,
    idle_s=st.none() | st.integers(limits.IDLE_S_MIN, limits.IDLE_S_MAX),
    min_running_s=st.integers(0, limits.MIN_RUNNING_S_MAX),
    pinned=st.booleans(),
)


@st.composite
def specs(draw: st.DrawFn) -> TenantSpec:
    return new_tenant(
        draw(tenants),
        draw(st.from_regex(r"[a-z./:?=#][a-z0-9./:?=#-]{0,40}", fullmatch=True)),
        profile=draw(st.sampled_from(Profile)),
        vcpus=draw(st.integers(limits.VCPUS_MIN, limits.VCPUS_MAX)),
        mem_mib=draw(st.integers(limits.SPEC_MEM_MIB_MIN, limits.MEM_MIB_MAX)),
        data_disk_mib=draw(st.integers(limits.DATA_DISK_MIB_MIN, limits.DATA_DISK_MIB_MAX)),
        seccomp=draw(st.sampled_from(SeccompPolicy)),
        metadata=draw(st.booleans()),
        egress=draw(st.none() | st.lists(egress_rules, max_size=4).map(tuple)),
        sleep=draw(sleep_policies),
        pools=draw(st.lists(pool_specs, min_size=1, max_size=4, unique_by=lambda pool: pool.id).map(tuple)),
    )
