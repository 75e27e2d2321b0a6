"""The rules, the same on every node and for every tenant; what they look up is in sets (`mvm.core.firewall`).

Two tables named `mvm`. `bridge` sees every frame at the tap it comes from: only ARP and IPv4, only with the MAC and
address of the instance behind that tap, never from one port to another. `inet` sees packets as the host's stack does:
to the host only what the gateway offers, through it only outwards, back only answers.

A guest's traffic is recognised by its interface's name alone (`mvm-b*`, `mvm-t*`), so an interface that is in no set
has no permission, rather than no rules. Outbound packets are judged one by one and not by connection: a policy that
becomes stricter holds for open connections too.

Written as `nft -j list ruleset` shows them, so that what is live can be compared with what is meant."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from mvm.core.addressing import NETWORK_TEXT
from mvm.core.firewall import METADATA_ADDRESS, METADATA_PORT, NEVER

TABLE: Final = "mvm"
FAMILIES: Final = ("inet", "bridge")
BRIDGE_SETS: Final = frozenset({"sources"})
"""The sets of the table `bridge`; all others are those of `inet`."""

Statement = dict[str, Any]
Rule = tuple[Statement, ...]


class Hook(NamedTuple):
    """Where a base chain is attached. `priority`: lower is earlier."""

    type: str
    hook: str
    priority: int


class Chain(NamedTuple):
    family: str
    name: str
    hook: Hook | None
    rules: tuple[Rule, ...]


def _meta(key: str) -> Statement:
    return {"meta": {"key": key}}


def _field(protocol: str, field: str) -> Statement:
    return {"payload": {"protocol": protocol, "field": field}}


def _match(left: Any, right: Any, op: str = "==") -> Statement:
    return {"match": {"op": op, "left": left, "right": right}}


def _concat(*parts: Statement) -> Statement:
    return {"concat": list(parts)}


def _prefix(network: str) -> Statement:
    address, _, bits = network.partition("/")
    return {"prefix": {"addr": address, "len": int(bits)}}


def _goto(chain: str) -> Statement:
    return {"goto": {"target": chain}}


_IN, _OUT = _meta("iifname"), _meta("oifname")
_SOURCE, _TARGET = _field("ip", "saddr"), _field("ip", "daddr")
_L4, _PORT = _meta("l4proto"), _field("th", "dport")
_ACCEPT: Final[Statement] = {"accept": None}
_DROP: Final[Statement] = {"drop": None}
_BRIDGES, _TAPS = "mvm-b*", "mvm-t*"

_NOT_IPV4 = _match(_meta("nfproto"), "ipv4", "!=")
_FORGED = _match(_concat(_IN, _SOURCE), "@guests", "!=")
_KNOWN = _match({"ct": {"key": "state"}}, ["established", "related"], "in")
_INVALID = _match({"ct": {"key": "state"}}, "invalid", "in")
_DNS = (_match(_L4, {"set": ["tcp", "udp"]}), _match(_PORT, 53))
_METADATA = _match(_field("tcp", "dport"), METADATA_PORT)

_INET: Final = (
    Chain(
        "inet",
        "prerouting",
        Hook("nat", "prerouting", -100),
        (
            (
                _match(_concat(_IN, _TARGET), "@gateways"),
                *_DNS,
                {"dnat": {"family": "ip", "addr": {"map": {"key": _IN, "data": "@resolvers"}}}},
            ),
            (
                _match(_IN, "@metadata"),
                _match(_TARGET, METADATA_ADDRESS),
                _METADATA,
                {"redirect": None},  # to the address of the interface it came in by: the gateway
            ),
        ),
    ),
    Chain("inet", "input", Hook("filter", "input", 0), ((_match(_IN, _BRIDGES), _goto("to_host")),)),
    Chain(
        "inet",
        "to_host",
        None,
        (
            (_NOT_IPV4, _DROP),
            (_FORGED, _DROP),
            (_KNOWN, _ACCEPT),  # answers: the host may open connections to guests
            (_INVALID, _DROP),
            ({"jump": {"target": "to_resolver"}},),
            (_match(_concat(_IN, _TARGET), "@gateways", "!="), _DROP),
            (_match(_field("icmp", "type"), "echo-request"), _ACCEPT),
            (_match(_IN, "@metadata"), _METADATA, _ACCEPT),
            (_DROP,),
        ),
    ),
    Chain(
        "inet",
        "to_resolver",
        None,
        (
            # Only what was sent to the gateway: the resolver itself may be in a network that is closed.
            (
                _match({"ct": {"key": "status"}}, "dnat", "in"),
                _match(_concat(_IN, _TARGET), "@dns"),
                *_DNS,
                _ACCEPT,
            ),
        ),
    ),
    Chain(
        "inet",
        "forward",
        Hook("filter", "forward", 0),
        (
            (_match(_IN, _BRIDGES), _goto("from_guest")),
            (_match(_OUT, _BRIDGES), _goto("to_guest")),
            (_match(_IN, "@uplinks"), _DROP),
        ),
    ),
    Chain(
        "inet",
        "from_guest",
        None,
        (
            (_NOT_IPV4, _DROP),
            (_match(_OUT, _BRIDGES), _DROP),
            (_FORGED, _DROP),
            (_INVALID, _DROP),  # it would leave untranslated
            (_match(_TARGET, {"set": [_prefix(network) for network in NEVER]}), _DROP),
            ({"jump": {"target": "to_resolver"}},),
            (_match(_IN, "@open"), _match(_TARGET, "@networks", "!="), _ACCEPT),
            (_match(_concat(_IN, _TARGET), "@allow_nets"), _ACCEPT),
            (_match(_concat(_IN, _TARGET, _L4), "@allow_protocols"), _ACCEPT),
            (_match(_concat(_IN, _TARGET, _L4, _PORT), "@allow_ports"), _ACCEPT),
            (_DROP,),
        ),
    ),
    Chain("inet", "to_guest", None, ((_NOT_IPV4, _DROP), (_KNOWN, _ACCEPT), (_DROP,))),
    Chain(
        "inet",
        "output",
        Hook("filter", "output", 0),
        ((_match(_OUT, _BRIDGES), _NOT_IPV4, _DROP),),
    ),
    Chain(
        "inet",
        "postrouting",
        Hook("nat", "postrouting", 100),
        ((_match(_SOURCE, _prefix(NETWORK_TEXT)), _match(_OUT, _BRIDGES, "!="), {"masquerade": None}),),
    ),
)

_ETHER_SOURCE = _field("ether", "saddr")

_BRIDGE: Final = (
    Chain(
        "bridge",
        "prerouting",
        Hook("filter", "prerouting", -300),
        ((_match(_IN, _TAPS), _goto("from_tap")),),
    ),
    Chain(
        "bridge",
        "from_tap",
        None,
        (
            (
                # The frame's sender and the one the ARP message names are two fields, and both can lie.
                _match(_field("arp", "htype"), 1),
                _match(_field("arp", "ptype"), "ip"),
                _match(_field("arp", "operation"), {"set": ["request", "reply"]}),
                _match(_concat(_IN, _ETHER_SOURCE, _field("arp", "saddr ip")), "@sources"),
                _match(_concat(_IN, _field("arp", "saddr ether"), _field("arp", "saddr ip")), "@sources"),
                _ACCEPT,
            ),
            (_match(_concat(_IN, _ETHER_SOURCE, _SOURCE), "@sources"), _goto("ipv4")),
            (_DROP,),  # IPv6 and with it router advertisements, VLAN tags, everything else
        ),
    ),
    Chain(
        "bridge",
        "ipv4",
        None,
        (
            (_match(_field("udp", "sport"), 67), _DROP),
            (_match(_field("udp", "dport"), {"set": [67, 68]}), _DROP),
            (_ACCEPT,),
        ),
    ),
    Chain(
        "bridge",
        "forward",
        Hook("filter", "forward", -200),
        ((_match(_IN, _TAPS), _DROP), (_match(_OUT, _TAPS), _DROP)),
    ),
    Chain(
        "bridge",
        "output",
        Hook("filter", "output", -200),
        ((_match(_OUT, _TAPS), _match(_field("ether", "type"), {"set": ["ip", "arp"]}, "!="), _DROP),),
    ),
)

CHAINS: Final = (*_INET, *_BRIDGE)
