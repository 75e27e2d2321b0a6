"""What may pass between guests, the host and the world: the policy as a value, and the data its rules look up.

The rules themselves never change: `mvm.hostd.resources.nft_rules` holds them. Everything that depends on a tenant, an
instance or the host is an element of a set that the rules look up, and `elements` gives them all. What is in no set
does not pass, so a rule that nobody thought of cannot be missing.

    gateways        bridge . gateway               guests may speak to it
    guests          bridge . ip                    who may speak, seen from layer 3
    sources         tap . mac . ip                 who may speak, seen at the tap (ARP and IPv4 alike)
    metadata        bridge                         the metadata service may be asked
    resolvers, dns  bridge : address               where questions to the gateway's port 53 go
    open            bridge                         out to anywhere but `networks` and the fleet
    networks        network                        what the host itself is attached to
    allow_nets      bridge . network               the egress allow-list, by what a rule names
    allow_protocols bridge . network . protocol
    allow_ports     bridge . network . protocol . port
    uplinks         interface                      forwards only because of us, so only for our bridges

An instance is in the policy from the moment it has a record: waking it then changes no rule. Names and addresses are
those of `mvm.core.addressing`, so one number per tenant gives bridge, subnet and gateway."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.core import addressing, limits
from mvm.core.record import NetworkIdentity
from mvm.core.spec import EgressRule, Protocol

Element = tuple[str, ...]
"""One element of a set, field by field; of a map, with the value last."""

METADATA_ADDRESS: Final = "169.254.169.254"
METADATA_PORT: Final = 80
# Destinations that no guest reaches through the host, whatever its allow-list says: the fleet, "this network",
# loopback, link-local (other people's metadata services), multicast and reserved, broadcast.
NEVER: Final = ("0.0.0.0/8", addressing.NETWORK_TEXT, "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")

# Set -> the types of its fields, as nftables names them. Those that hold networks are interval sets.
SETS: Final[Mapping[str, Element]] = {
    "gateways": ("ifname", "ipv4_addr"),
    "guests": ("ifname", "ipv4_addr"),
    "metadata": ("ifname",),
    "dns": ("ifname", "ipv4_addr"),
    "open": ("ifname",),
    "networks": ("ipv4_addr",),
    "allow_nets": ("ifname", "ipv4_addr"),
    "allow_protocols": ("ifname", "ipv4_addr", "inet_proto"),
    "allow_ports": ("ifname", "ipv4_addr", "inet_proto", "inet_service"),
    "uplinks": ("ifname",),
    "sources": ("ifname", "ether_addr", "ipv4_addr"),
}
MAPS: Final[Mapping[str, tuple[str, str]]] = {"resolvers": ("ifname", "ipv4_addr")}
INTERVALS: Final = frozenset({"networks", "allow_nets", "allow_protocols", "allow_ports"})


class Guest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One instance as its port sees it."""

    tap: str
    ip: str
    mac: str


class TenantNetwork(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tenant on this node. `egress`: None is anywhere outside the fleet and the host's own networks, () nowhere;
    normalised, as `tenant_network` makes it."""

    index: addressing.SubnetIndex
    guests: Annotated[tuple[Guest, ...], Meta(max_length=limits.INSTANCES_PER_TENANT)] = ()
    metadata: bool = False
    egress: Annotated[tuple[EgressRule, ...], Meta(max_length=limits.EGRESS_RULES)] | None = None

    @property
    def bridge(self) -> str:
        return addressing.bridge_name(self.index)

    @property
    def gateway(self) -> str:
        return addressing.gateway(self.index)


class HostNetwork(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The host as far as the policy depends on it.

    `networks`: what is attached to it, not to be reached by tenants without an allow-list. `uplinks`: interfaces that
    lead out and forward for nobody else. `resolver`: IPv4 address of the name server that guests' questions go to.
    """

    networks: tuple[str, ...] = ()
    uplinks: tuple[str, ...] = ()
    resolver: str | None = None


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything on one node, in canonical order; made by `policy`."""

    tenants: tuple[TenantNetwork, ...] = ()
    host: HostNetwork = HostNetwork()

    def tenant(self, index: int) -> TenantNetwork | None:
        return next((tenant for tenant in self.tenants if tenant.index == index), None)


def guest_of(network: NetworkIdentity) -> Guest:
    return Guest(tap=network.tap, ip=network.ip, mac=network.mac)


def tenant_network(
    index: int, guests: Iterable[Guest], *, metadata: bool, egress: Iterable[EgressRule] | None
) -> TenantNetwork:
    """With guests in the order of their addresses, and `egress` normalised."""
    return TenantNetwork(
        index=index,
        guests=tuple(sorted(set(guests), key=lambda guest: (addressing.parse_ipv4(guest.ip), guest.mac))),
        metadata=metadata,
        egress=None if egress is None else normalised_egress(egress),
    )


def policy(tenants: Iterable[TenantNetwork], host: HostNetwork) -> Policy:
    """In canonical order, so that equal policies are equal values."""
    networks = outermost(host.networks)
    uplinks = tuple(sorted(set(host.uplinks)))
    return Policy(
        tenants=tuple(sorted(tenants, key=lambda tenant: tenant.index)),
        host=HostNetwork(networks=networks, uplinks=uplinks, resolver=host.resolver),
    )


def with_guest(
    now: Policy, network: NetworkIdentity, *, metadata: bool, egress: tuple[EgressRule, ...] | None
) -> Policy:
    """`now` in which this instance is a guest, and its tenant has these settings. `now` itself if that is so already.

    Whoever had its tap or its address before loses them."""
    there, guest = now.tenant(network.index), guest_of(network)
    others = () if there is None else there.guests
    kept = [other for other in others if other.tap != guest.tap and other.ip != guest.ip]
    mine = tenant_network(network.index, [*kept, guest], metadata=metadata, egress=egress)
    if mine == there:
        return now
    return policy([*(tenant for tenant in now.tenants if tenant is not there), mine], now.host)


def outermost(networks: Iterable[str]) -> tuple[str, ...]:
    """`networks` without those that lie inside another, in order of address. An interval set takes no overlaps."""
    found: list[tuple[int, int]] = []
    for base, bits in sorted({_parsed(network) for network in networks}):
        if not found or base >> (32 - found[-1][1]) != found[-1][0] >> (32 - found[-1][1]):
            found.append((base, bits))
    return tuple(f"{addressing.format_ipv4(base)}/{bits}" for base, bits in found)


def normalised_egress(rules: Iterable[EgressRule]) -> tuple[EgressRule, ...]:
    """In order, each network once for each protocol and port: the outermost."""
    by_service: dict[tuple[Protocol, int | None], list[str]] = {}
    for rule in rules:
        by_service.setdefault((rule.protocol, rule.port), []).append(rule.net)
    return tuple(
        EgressRule(net=net, protocol=protocol, port=port)
        for (protocol, port), nets in sorted(
            by_service.items(), key=lambda item: (item[0][0], item[0][1] or 0)
        )
        for net in outermost(nets)
    )


def elements(policy: Policy) -> dict[str, frozenset[Element]]:
    """Set or map -> what it holds. Every name of SETS and MAPS is there. A /32 is written as its address."""
    found: dict[str, set[Element]] = {name: set() for name in (*SETS, *MAPS)}
    host = policy.host
    found["networks"] = {(_shortest(network),) for network in host.networks}
    found["uplinks"] = {(name,) for name in host.uplinks}
    for tenant in policy.tenants:
        bridge = tenant.bridge
        found["gateways"].add((bridge, tenant.gateway))
        for guest in tenant.guests:
            found["guests"].add((bridge, guest.ip))
            found["sources"].add((guest.tap, guest.mac, guest.ip))
        if tenant.metadata:
            found["metadata"].add((bridge,))
        if tenant.egress is None:
            found["open"].add((bridge,))
        for rule in tenant.egress or ():
            name, element = _allowed(bridge, rule)
            found[name].add(element)
        # A name server would carry messages for a tenant that may reach nobody.
        if host.resolver is not None and tenant.egress != ():
            found["dns"].add((bridge, host.resolver))
            found["resolvers"].add((bridge, host.resolver))
    return {name: frozenset(members) for name, members in found.items()}


def _allowed(bridge: str, rule: EgressRule) -> tuple[str, Element]:
    net = _shortest(rule.net)
    if rule.protocol is Protocol.ANY:
        return "allow_nets", (bridge, net)
    if rule.port is None:
        return "allow_protocols", (bridge, net, rule.protocol.value)
    return "allow_ports", (bridge, net, rule.protocol.value, str(rule.port))


def _parsed(network: str) -> tuple[int, int]:
    address, _, bits = network.partition("/")
    return addressing.parse_ipv4(address), int(bits)


def _shortest(network: str) -> str:
    return network.removesuffix("/32")
