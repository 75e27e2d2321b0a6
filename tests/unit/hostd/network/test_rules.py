"""Rendering and reading rules, routes and resolvers, without a kernel."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.core.test_firewall import POLICIES

from mvm.core import firewall
from mvm.core.errors import InvalidInput
from mvm.core.firewall import Policy
from mvm.hostd.resources import forwarding, nftables
from mvm.hostd.resources.nft_generation import Generation
from mvm.hostd.resources.nft_rules import CHAINS

pytestmark = pytest.mark.req("N2", "N3")

ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
mvm-b1\t0001F00A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
wg0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0
eth0\t000064C6\t010200C0\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0
down0\t000010AC\t00000000\t0000\t0\t0\t0\t0000FFFF\t0\t0\t0
"""


def shown(policy: Policy) -> bytes:
    """What nft would list after `render`, as far as the form is known: the objects added, with handles."""
    items = [c["add"] for c in json.loads(nftables.render(policy))["nftables"] if "add" in c][2:]
    for number, item in enumerate(items):
        next(iter(item.values()))["handle"] = number
    return json.dumps({"nftables": [{"metainfo": {"version": "1.0.6"}}, *items]}).encode()


@given(POLICIES)
def test_protocols_may_be_told_by_number(policy: Policy) -> None:
    """As nft does where there is no /etc/protocols."""
    text = shown(policy).decode()
    names = {"icmp": 1, "tcp": 6, "udp": 17}
    items = json.loads(text)
    for item in items["nftables"]:
        (body,) = item.values()
        for part in body.get("expr", ()):
            match = part.get("match", {})
            if match.get("left") == {"meta": {"key": "l4proto"}}:
                match["right"] = {"set": [names[name] for name in match["right"]["set"]]}
        if "inet_proto" in body.get("type", ()):
            at = body["type"].index("inet_proto")
            for element in body.get("elem", ()):
                element["concat"][at] = names.get(element["concat"][at], element["concat"][at])
    assert nftables.parse(json.dumps(items).encode()) == nftables.parse(text.encode())


@given(POLICIES)
def test_what_was_rendered_is_read_back_as_the_same(policy: Policy) -> None:
    if policy.tenants:
        assert nftables.parse(shown(policy)) == nftables.ruleset(policy)
        sets = {name: found.elements for (_, name), found in nftables.ruleset(policy).sets.items()}
        assert sets == firewall.elements(policy)


def test_no_tenant_no_table() -> None:
    commands = json.loads(nftables.render(Policy()))["nftables"]
    assert [next(iter(command)) for command in commands] == ["add", "delete", "add", "delete"]
    assert nftables.ruleset(Policy()) == nftables.EMPTY


def test_tables_of_others_are_not_looked_at() -> None:
    foreign = {"nftables": [
        {"table": {"family": "inet", "name": "filter", "handle": 1}},
        {"chain": {"family": "inet", "table": "filter", "name": "input", "handle": 1}},
        {"set": {"family": "ip", "table": "nat", "name": "open", "type": "ifname", "handle": 2}},
    ]}  # fmt: skip
    assert nftables.parse(json.dumps(foreign).encode()) == nftables.EMPTY


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(
    inner) | st.dictionaries(st.sampled_from(["nftables", "table", "set", "chain", "rule", "elem", "name"]), inner)
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_whatever_is_read_it_is_rules_or_invalid_input(data: bytes) -> None:
    try:
        nftables.parse(data)
    except InvalidInput:
        pass


def test_a_dormant_table_is_seen() -> None:
    table = {"table": {"family": "inet", "name": "mvm", "flags": ["dormant"]}}
    assert nftables.parse(json.dumps({"nftables": [table]}).encode()).others


def test_every_chain_that_is_jumped_to_exists_and_every_base_chain_accepts_others() -> None:
    names = {(chain.family, chain.name) for chain in CHAINS}
    for chain in CHAINS:
        for rule in chain.rules:
            for part in rule:
                for verb in ("goto", "jump"):
                    if verb in part:
                        assert (chain.family, part[verb]["target"]) in names
        if chain.hook is None and chain.name != "to_resolver":
            assert "drop" in chain.rules[-1][-1] or chain.name == "ipv4", chain.name


def test_routes_give_attached_networks_and_uplinks() -> None:
    assert forwarding.parse_routes(ROUTES) == (("10.0.0.0/8", "192.0.2.0/24"), ("eth0",))
    with pytest.raises(InvalidInput):
        forwarding.parse_routes("Iface\neth0 zz\n")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nameserver 127.0.0.53\nnameserver 192.0.2.53\n", "192.0.2.53"),
        ("# nameserver 192.0.2.1\nnameserver ::1\nnameserver 0.0.0.0", None),
        ("nameserver", None),
        ("search example.org\nnameserver 9.9.9.9 # comment", "9.9.9.9"),
    ],
)
def test_the_resolver_is_one_that_is_not_the_host(text: str, found: str | None) -> None:
    assert forwarding.parse_resolver(text) == found


def test_one_change_later() -> None:
    now = Generation("b", 7, 41)
    assert Generation("b", 7, 42).is_next_after(now)
    assert Generation("b", 7, 1).is_next_after(Generation("b", 7, 2**32 - 1))
    for other in (Generation("b", 7, 43), Generation("b", 8, 42), Generation("c", 7, 42), now):
        assert not other.is_next_after(now)
