"""What nft lists after an apply is what was meant, whatever the policy; and one change is one generation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from tests.support.world import network_namespace
from tests.unit.core.test_firewall import POLICIES, guest

from mvm.core import firewall
from mvm.core.errors import CommandFailed
from mvm.core.firewall import HostNetwork, Policy
from mvm.core.spec import EgressRule
from mvm.hostd.resources import nft_generation, nftables
from mvm.linux import process

pytestmark = [pytest.mark.root, pytest.mark.req("N2", "N3")]

_EDGES = firewall.policy(
    [
        firewall.tenant_network(
            4095,
            [guest(4095, 252)],
            metadata=True,
            egress=[EgressRule.parse(text) for text in ("0.0.0.0/0", "0.0.0.0/0:1", "10.0.0.0/31:65535/udp")],
        )
    ],
    HostNetwork(("192.168.0.0/24", "192.168.1.0/24", "192.168.2.1/32"), ("eth0",), "192.0.2.53"),
)


@pytest.fixture(scope="module")
def namespace() -> Iterator[None]:
    with network_namespace():
        yield


@settings(
    max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(POLICIES)
@example(_EDGES)
def test_what_is_live_is_what_was_meant(namespace: None, policy: Policy) -> None:
    before = nft_generation.live()
    nftables.apply(policy)
    assert nft_generation.live().is_next_after(before)
    assert nftables.read() == nftables.ruleset(policy)


def test_others_tables_stay_and_their_changes_are_noticed(namespace: None) -> None:
    process.run(["nft", "add", "table", "inet", "somebody"], timeout=10)
    nftables.apply(_EDGES)
    seen = nft_generation.live()
    assert nft_generation.live() == seen
    process.run(["nft", "add", "chain", "inet", "somebody", "else"], timeout=10)
    assert nft_generation.live() != seen
    nftables.apply(Policy())
    assert b"somebody" in process.run(["nft", "list", "tables"], timeout=10).stdout
    assert nftables.read() == nftables.EMPTY


def test_a_refused_change_leaves_the_old_rules(namespace: None) -> None:
    nftables.apply(_EDGES)
    before = nft_generation.live()
    broken = firewall.policy(
        [firewall.TenantNetwork(1, (firewall.Guest("mvm-t1s0", "10.240.1.2", "nonsense"),))], HostNetwork()
    )
    with pytest.raises(CommandFailed):
        nftables.apply(broken)
    assert nftables.read() == nftables.ruleset(_EDGES)
    assert nft_generation.live() == before


def test_namespaces_are_told_apart(namespace: None) -> None:
    here = nft_generation.live()
    with network_namespace():
        there = nft_generation.live()
    assert (here.boot, here.namespace) != (there.boot, there.namespace)
