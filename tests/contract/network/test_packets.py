"""The policy against real packets: what a guest may do passes, and every lie and every way around is dropped."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from tests.support import frames
from tests.support.network_lab import (
    CLOUD_METADATA,
    ELSEWHERE_IN_THE_FLEET,
    HOST,
    NEIGHBOUR_OF_THE_HOST,
    OTHER_SITE,
    SITE,
    Lab,
    Port,
    inside,
    ip,
    network_lab,
)

from mvm.core import firewall
from mvm.core.firewall import Policy
from mvm.core.spec import EgressRule
from mvm.hostd.resources import forwarding, network, nftables
from mvm.linux import process

pytestmark = [pytest.mark.root, pytest.mark.req("N2")]


@pytest.fixture(params=["tap", "private tap"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with network_lab(private=request.param == "private tap") as found:
        yield found


def _rules(*texts: str) -> list[EgressRule]:
    return [EgressRule.parse(text) for text in texts]


def test_the_gateway_answers_pings_and_offers_nothing_else(lab: Lab) -> None:
    (guest,) = lab.tenant(1)
    assert guest.pings(guest.gateway)
    for port in (22, 80, 111, 8080):
        assert not guest.reaches_tcp(guest.gateway, port)
        assert not guest.reaches_udp(guest.gateway, port)


def test_no_other_address_of_the_host_is_reached(lab: Lab) -> None:
    (guest,) = lab.tenant(1)
    (_, *_) = lab.tenant(2)
    for address in (HOST, "10.240.2.1", "127.0.0.1"):
        assert not guest.pings(address), address
        assert not guest.reaches_tcp(address, 22), address


def test_a_question_for_a_name_goes_to_the_resolver_and_comes_back_from_the_gateway(lab: Lab) -> None:
    (guest,) = lab.tenant(1)
    assert guest.reaches_udp(guest.gateway, 53)
    assert guest.reaches_tcp(guest.gateway, 53)
    assert {frames.addresses(frame) for frame in lab.heard()} == {(HOST, "203.0.113.53")}


def test_no_resolver_no_names(lab: Lab) -> None:
    (guest,) = lab.tenant(1, resolver=None)
    assert not guest.reaches_udp(guest.gateway, 53)
    assert lab.heard() == []


def test_out_to_anywhere_translated(lab: Lab) -> None:
    (guest,) = lab.tenant(1)
    assert guest.pings(SITE)
    assert guest.reaches_tcp(OTHER_SITE, 443)
    assert guest.reaches_udp(OTHER_SITE, 4433)
    assert {frames.addresses(frame)[0] for frame in lab.heard()} == {HOST}, (
        "no guest's address leaves the node"
    )


def test_never_to_the_fleet_the_hosts_network_or_somebody_elses_metadata(lab: Lab) -> None:
    (guest,) = lab.tenant(1)
    for address in (
        ELSEWHERE_IN_THE_FLEET,
        NEIGHBOUR_OF_THE_HOST,
        CLOUD_METADATA,
        "224.0.0.251",
        "255.255.255.255",
    ):
        assert not guest.pings(address), address
        assert not guest.reaches_tcp(address, 80), address
        assert not guest.reaches_udp(address, 80), address
    assert lab.heard() == []


def test_the_allow_list_and_nothing_else(lab: Lab) -> None:
    allowed = _rules("203.0.113.0/24:443", "203.0.113.7:443", "198.51.100.7:53/udp")
    (guest,) = lab.tenant(1, egress=allowed)
    assert guest.reaches_tcp(SITE, 443)
    assert guest.reaches_udp(OTHER_SITE, 53)
    assert not guest.reaches_tcp(SITE, 80)
    assert not guest.reaches_udp(SITE, 443)
    assert not guest.reaches_tcp(OTHER_SITE, 53)
    assert not guest.pings(SITE)


@pytest.mark.parametrize("rule", ["0.0.0.0/0", "10.240.0.0/12"])
def test_no_allow_list_opens_the_fleet(lab: Lab, rule: str) -> None:
    (guest,) = lab.tenant(1, egress=_rules(rule))
    (other,) = lab.tenant(2, egress=_rules(rule))
    assert not guest.pings(ELSEWHERE_IN_THE_FLEET)
    assert not guest.pings(other.ip)
    assert not guest.pings(CLOUD_METADATA)
    assert guest.pings(SITE) is (rule == "0.0.0.0/0")


def test_an_allow_list_may_name_the_hosts_own_network_but_never_the_host(lab: Lab) -> None:
    (guest,) = lab.tenant(1, egress=_rules("192.0.2.0/24"))
    assert guest.pings(NEIGHBOUR_OF_THE_HOST)
    assert not guest.pings(HOST)


def test_an_empty_allow_list_is_silence(lab: Lab) -> None:
    (guest,) = lab.tenant(1, egress=())
    assert not guest.pings(SITE)
    assert not guest.reaches_udp(guest.gateway, 53), "a name server would carry messages"
    assert guest.pings(guest.gateway)
    assert lab.heard() == []


def test_a_stricter_policy_holds_for_open_connections(lab: Lab) -> None:
    (guest,) = lab.tenant(1)
    segment = frames.tcp(guest.ip, SITE, 40000, 443)
    guest.send_ip(SITE, frames.TCP, segment)
    assert [f for f in guest.received() if frames.protocol(f) == frames.TCP]
    lab.heard()
    stricter = with_egress(lab, 1, _rules("198.51.100.0/24"))
    nftables.apply(stricter)
    guest.send_ip(SITE, frames.TCP, segment)
    assert guest.received() == []
    assert lab.heard() == []


def with_egress(lab: Lab, index: int, egress: list[EgressRule]) -> Policy:
    there = lab.policy.tenant(index)
    assert there is not None
    changed = firewall.tenant_network(index, there.guests, metadata=there.metadata, egress=egress)
    others = [tenant for tenant in lab.policy.tenants if tenant.index != index]
    return firewall.policy([*others, changed], lab.policy.host)


@pytest.mark.req("N1")
def test_tenants_do_not_reach_each_other(lab: Lab) -> None:
    (one,), (two,) = lab.tenant(1), lab.tenant(2)
    for left, right in ((one, two), (two, one)):
        assert not left.pings(right.ip)
        assert not left.reaches_tcp(right.ip, 80)
        # Straight to the other's gateway, as if it were a neighbour.
        left.send_ip(right.ip, frames.ICMP, frames.echo(9), to=right.gateway_mac)
        left.send_ip(right.ip, frames.ICMP, frames.echo(9), to=right.mac)
        assert right.received() == []


@pytest.mark.parametrize("isolated", [True, False])
def test_instances_do_not_reach_each_other_by_either_layer(lab: Lab, isolated: bool) -> None:
    one, two = lab.tenant(1, 2)
    if not isolated:  # the rules alone must do
        for port in (one, two):
            process.run(["bridge", "link", "set", "dev", port.tap, "isolated", "off"], timeout=10)
    assert not one.pings(two.ip)
    one.send_ip(two.ip, frames.ICMP, frames.echo(9), to=two.mac)
    one.send_ip("10.240.1.255", frames.UDP, frames.udp(1000, 2000), to=frames.BROADCAST)
    question = frames.arp(1, one.mac, one.ip, two.ip)
    one.send(frames.ethernet(one.mac, frames.BROADCAST, frames.ARP, question))
    assert two.received() == []


def test_ports_that_are_isolated_do_without_rules(lab: Lab) -> None:
    one, two = lab.tenant(1, 2)
    process.run(["nft", "delete", "table", "bridge", "mvm"], timeout=10)
    one.send_ip(two.ip, frames.ICMP, frames.echo(9), to=two.mac)
    assert two.received() == []


def _forgeries(guest: Port, other: Port) -> dict[str, bytes]:
    def packet(source: str, mac: str, kind: int = frames.IPV4, vlan: int | None = None) -> bytes:
        payload = frames.ipv4(source, SITE, frames.ICMP, frames.echo(77))
        return frames.ethernet(mac, guest.gateway_mac, kind, payload, vlan=vlan)

    def claim(operation: int, frame_mac: str, arp_mac: str, arp_ip: str) -> bytes:
        body = frames.arp(operation, arp_mac, arp_ip, guest.gateway)
        return frames.ethernet(frame_mac, frames.BROADCAST, frames.ARP, body)

    return {
        "another instance's address": packet(other.ip, guest.mac),
        "another instance's MAC": packet(guest.ip, other.mac),
        "another instance altogether": packet(other.ip, other.mac),
        "another tenant's address": packet("10.240.2.2", guest.mac),
        "the gateway's address": packet(guest.gateway, guest.mac),
        "the gateway's MAC": packet(guest.ip, guest.gateway_mac),
        "an address from outside": packet(OTHER_SITE, guest.mac),
        "no address": packet("0.0.0.0", guest.mac),
        "a VLAN tag": packet(guest.ip, guest.mac, vlan=5),
        "a priority tag, which the kernel takes off, around a lie": packet(other.ip, guest.mac, vlan=0),
        "IPv4 said to be IPv6": packet(guest.ip, guest.mac, kind=frames.IPV6),
        "IPv4 said to be something else": packet(guest.ip, guest.mac, kind=0x88B5),
        "ARP for another's address": claim(2, guest.mac, guest.mac, other.ip),
        "ARP for the gateway's address": claim(2, guest.mac, guest.mac, guest.gateway),
        "ARP with another's MAC inside": claim(1, guest.mac, other.mac, guest.ip),
        "ARP from another's MAC": claim(1, other.mac, guest.mac, guest.ip),
        "ARP in another's name": claim(1, other.mac, other.mac, other.ip),
        "a reverse ARP": claim(3, guest.mac, guest.mac, guest.ip),
    }


def test_every_forgery_is_dropped_at_the_tap(lab: Lab) -> None:
    guest, other = lab.tenant(1, 2)
    lab.tenant(2)
    assert guest.pings(SITE), "honestly it works"
    lab.heard()
    for name, frame in _forgeries(guest, other).items():
        guest.send(frame)
        assert guest.received(0.1) == [], name
        assert other.received(0.05) == [], name
    assert lab.heard() == []
    known = process.run(["ip", "-json", "neighbour", "show", "dev", "mvm-b1"], timeout=10).stdout.decode()
    assert guest.mac in known
    assert f'"{other.ip}","lladdr":"{guest.mac}"' not in known.replace(" ", "")


def test_nobody_plays_dhcp_server_or_router(lab: Lab) -> None:
    guest, other = lab.tenant(1, 2)
    for port in (67, 68):
        guest.send_ip("255.255.255.255", frames.UDP, frames.udp(67, port), to=frames.BROADCAST)
        guest.send_ip(guest.gateway, frames.UDP, frames.udp(68, port))
    # A router advertisement to all nodes: ICMPv6 type 134, from a link-local address.
    advertisement = bytes.fromhex("6000000000083aff") + bytes.fromhex("fe80" + "00" * 13 + "01")
    advertisement += bytes.fromhex("ff02" + "00" * 13 + "01") + bytes.fromhex("8600000040000708")
    guest.send(frames.ethernet(guest.mac, "33:33:00:00:00:01", frames.IPV6, advertisement))
    assert guest.received() == []
    assert other.received() == []


def test_ipv6_is_closed_even_if_somebody_turns_it_on(lab: Lab) -> None:
    (guest,) = lab.tenant(1)
    if not os.path.isdir("/proc/sys/net/ipv6"):
        pytest.skip("this kernel has no IPv6")
    for name in ("mvm-b1", "up0"):
        with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as setting:
            setting.write("0")
    ip("address", "add", "fd00:1::1/64", "dev", "mvm-b1", "nodad")
    ip("neighbour", "add", "fd00:1::2", "lladdr", guest.mac, "dev", "mvm-b1")
    guest.received()
    source, target = (bytes.fromhex("fd000001" + "00" * 11 + last) for last in ("02", "01"))
    body = bytes.fromhex("8000000000010001") + b"mvm1"
    pseudo = source + target + len(body).to_bytes(4, "big") + bytes([0, 0, 0, 58])
    body = body[:2] + frames.checksum(pseudo + body).to_bytes(2, "big") + body[4:]
    packet = (
        bytes.fromhex("60000000") + len(body).to_bytes(2, "big") + bytes([58, 64]) + source + target + body
    )
    frame = frames.ethernet(guest.mac, guest.gateway_mac, frames.IPV6, packet)
    guest.send(frame)
    assert [f for f in guest.received() if frames.kind(f) == frames.IPV6] == []
    # The frame is sound: without the rules the host answers it.
    for family in ("bridge", "inet"):
        process.run(["nft", "delete", "table", family, "mvm"], timeout=10)
    guest.send(frame)
    assert [f for f in guest.received() if frames.kind(f) == frames.IPV6]


def test_the_host_may_call_a_guest_and_gets_its_answer(lab: Lab) -> None:
    (guest,) = lab.tenant(1, egress=())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
        caller.settimeout(5)
        caller.connect((guest.ip, 7))
        caller.send(b"hello")
        (question,) = [f for f in guest.received() if frames.kind(f) == frames.IPV4]
        source_port = int.from_bytes(question[34:36], "big")
        guest.send_ip(guest.gateway, frames.UDP, frames.udp(7, source_port, b"and to you"))
        assert caller.recv(100) == b"and to you"
        # An answer nobody asked for is none.
        guest.send_ip(guest.gateway, frames.UDP, frames.udp(8, source_port, b"unasked"))
        assert not process.wait_readable(caller.fileno(), 0.2)


def test_nobody_outside_calls_a_guest_through_the_host(lab: Lab) -> None:
    (guest,) = lab.tenant(1)
    with inside(lab.internet):
        ip("route", "add", "10.240.1.0/24", "via", HOST)
        _call(guest.ip)
    assert [f for f in guest.received() if frames.kind(f) == frames.IPV4] == []


def test_the_uplink_forwards_to_bridges_only(lab: Lab) -> None:
    """Its forwarding is on because of us; a neighbour must not be able to use this host as a router."""
    lab.tenant(1)
    assert forwarding.setting("all", "forwarding") == "0"
    assert forwarding.setting("up0", "forwarding") == "1"
    ip("link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
    for link in ("lan0", "lan1"):
        network.disable_ipv6(link)
    ip("link", "set", "lan1", "up")
    ip("address", "add", "198.18.0.1/24", "dev", "lan0")
    ip("link", "set", "lan0", "up")
    ip("neighbour", "add", "198.18.0.9", "lladdr", "02:00:00:00:00:99", "dev", "lan0")
    before = _sent("lan0")
    with inside(lab.internet):
        ip("route", "add", "198.18.0.0/24", "via", HOST)
        _call("198.18.0.9")
    lab.heard()
    assert _sent("lan0") == before
    # Without the rule it would pass.
    process.run(["nft", "delete", "table", "inet", "mvm"], timeout=10)
    with inside(lab.internet):
        _call("198.18.0.9")
    lab.heard()
    assert _sent("lan0") == before + 1


def _call(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
        caller.sendto(b"hello", (address, 7))


def _sent(link: str) -> int:
    with open("/proc/thread-self/net/dev") as table:
        row = next(line for line in table if line.strip().startswith(f"{link}:"))
    return int(row.partition(":")[2].split()[9])


def test_the_metadata_service_is_the_gateways_and_only_where_enabled(lab: Lab) -> None:
    (with_it,), (without,) = lab.tenant(1, metadata=True), lab.tenant(2)
    assert with_it.reaches_tcp(with_it.gateway, 80)
    assert with_it.reaches_tcp(CLOUD_METADATA, 80), "redirected to the gateway, which answers in its name"
    assert not with_it.reaches_tcp(CLOUD_METADATA, 81)
    assert not without.reaches_tcp(without.gateway, 80)
    assert not without.reaches_tcp(CLOUD_METADATA, 80)
    assert not without.reaches_tcp(with_it.gateway, 80)
    assert lab.heard() == []


def test_an_interface_in_no_set_may_do_nothing(lab: Lab) -> None:
    """What a crash or a mistake could leave: a bridge and a port of ours that no rule knows."""
    guest, forgotten = lab.tenant(1, 2)
    mine = firewall.tenant_network(1, [guest.guest], metadata=False, egress=None)
    nftables.apply(firewall.policy([mine], lab.policy.host))
    assert guest.pings(SITE)
    assert not forgotten.pings(SITE)
    assert not forgotten.pings(forgotten.gateway)
    assert not forgotten.greet()
