"""The policy as a value: canonical, complete, and never wider than what a tenant asked for."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core import addressing, firewall
from mvm.core.firewall import Guest, HostNetwork, Policy
from mvm.core.ids import InstanceId, PoolId, TenantId
from mvm.core.record import network_identity
from mvm.core.spec import EgressRule, Protocol

pytestmark = pytest.mark.req("N2")

NETWORKS = st.builds(
    lambda number, bits: str(ipaddress.IPv4Network((number >> (32 - bits) << (32 - bits), bits))),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)
SERVICES = st.one_of(
    st.just((Protocol.ANY, None)),
    st.tuples(
        st.sampled_from([Protocol.TCP, Protocol.UDP]),
        st.one_of(st.none(), st.sampled_from([53, 443]), st.integers(1, 65535)),
    ),
)
RULES = st.builds(lambda net, service: EgressRule(net, *service), NETWORKS, SERVICES)


def guest(index: int, slot: int) -> Guest:
    instance = InstanceId(TenantId(f"t{index}"), PoolId("default"), slot)
    return firewall.guest_of(network_identity(instance, index, slot))


TENANTS = st.builds(
    lambda index, slots, metadata, egress: firewall.tenant_network(
        index, [guest(index, slot) for slot in slots], metadata=metadata, egress=egress
    ),
    st.integers(1, 4095),
    st.sets(st.integers(0, 252), max_size=4),
    st.booleans(),
    st.one_of(st.none(), st.lists(RULES, max_size=5)),
)
POLICIES = st.builds(
    lambda tenants, networks, uplinks, resolver: firewall.policy(
        tenants, HostNetwork(tuple(networks), tuple(uplinks), resolver)
    ),
    st.lists(TENANTS, max_size=3, unique_by=lambda tenant: tenant.index),
    st.lists(NETWORKS, max_size=4),
    st.lists(st.sampled_from(["eth0", "eth1", "wlan0"]), max_size=2),
    st.one_of(st.none(), st.just("192.0.2.53")),
)


@given(st.lists(NETWORKS, max_size=12))
def test_outermost_covers_the_same_addresses_without_overlap(networks: list[str]) -> None:
    found = [ipaddress.ip_network(network) for network in firewall.outermost(networks)]
    assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[i + 1 :])
    given_networks = [ipaddress.ip_network(network) for network in networks]
    assert set(found) <= set(given_networks)
    assert all(any(n.subnet_of(f) for f in found) for n in given_networks)  # type: ignore[arg-type]


@given(st.lists(RULES, max_size=12), st.integers(0, 2**32 - 1), SERVICES)
def test_normalising_an_allow_list_allows_the_same(
    rules: list[EgressRule], target: int, service: tuple[Protocol, int | None]
) -> None:
    def allows(those: tuple[EgressRule, ...], address: ipaddress.IPv4Address) -> bool:
        return any(
            (rule.protocol, rule.port) == service and address in ipaddress.ip_network(rule.net)
            for rule in those
        )

    normal = firewall.normalised_egress(rules)
    assert firewall.normalised_egress(normal) == normal
    addresses = [ipaddress.IPv4Address(target)]
    addresses += [ipaddress.ip_network(rule.net)[0] for rule in rules]  # type: ignore[misc]
    for address in addresses:
        assert allows(tuple(rules), address) == allows(normal, address)


@given(POLICIES, st.randoms())
def test_equal_policies_are_equal_whatever_the_order(policy: Policy, rng: object) -> None:
    shuffled = list(policy.tenants)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert firewall.policy(shuffled, policy.host) == policy


@given(POLICIES)
def test_every_permission_belongs_to_a_tenant_of_the_policy(policy: Policy) -> None:
    found = firewall.elements(policy)
    bridges = {tenant.bridge for tenant in policy.tenants}
    for name, members in found.items():
        if name not in ("networks", "uplinks", "sources"):
            assert {element[0] for element in members} <= bridges, name
    assert found["sources"] == {(g.tap, g.mac, g.ip) for t in policy.tenants for g in t.guests}
    assert found["gateways"] == {(t.bridge, t.gateway) for t in policy.tenants}
    for tenant in policy.tenants:
        listed = {name for name in found if any(element[0] == tenant.bridge for element in found[name])}
        ways_out = listed & {"open", "allow_nets", "allow_protocols", "allow_ports"}
        assert ("open" in ways_out) is (tenant.egress is None)
        if tenant.egress == ():
            assert not ways_out
            assert not listed & {"dns", "resolvers"}, "nowhere means nowhere"
        assert ("metadata" in listed) is tenant.metadata


def test_a_guest_that_is_there_changes_nothing() -> None:
    net = network_identity(InstanceId(TenantId("acme"), PoolId("default"), 0), 1, 0)
    one = firewall.with_guest(Policy(), net, metadata=False, egress=None)
    assert firewall.with_guest(one, net, metadata=False, egress=None) is one
    assert firewall.with_guest(one, net, metadata=True, egress=None) != one
    assert firewall.with_guest(one, net, metadata=False, egress=()) != one


def test_who_had_the_tap_before_loses_it() -> None:
    before = network_identity(InstanceId(TenantId("acme"), PoolId("default"), 0), 1, 0)
    after = network_identity(InstanceId(TenantId("acme"), PoolId("web"), 3), 1, 0)
    policy = firewall.with_guest(Policy(), before, metadata=False, egress=None)
    policy = firewall.with_guest(policy, after, metadata=False, egress=None)
    (tenant,) = policy.tenants
    assert tenant.guests == (firewall.guest_of(after),)


def test_the_fleet_is_never_let_out_to() -> None:
    assert addressing.NETWORK_TEXT in firewall.NEVER
    assert any(
        ipaddress.ip_address(firewall.METADATA_ADDRESS) in ipaddress.ip_network(net) for net in firewall.NEVER
    )
