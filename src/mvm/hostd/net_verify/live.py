"""What the kernel says, read by other means than it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mvm.hostd.net_verify.wanted import Expected
from mvm.hostd.resources import forwarding, network, nftables
from mvm.hostd.resources.network import ObservedLink
from mvm.hostd.resources.nftables import Ruleset


class Live(NamedTuple):
    """`settings`: interface -> `net.ipv4.conf.<interface>.*`, of our bridges and the uplinks. `ipv6`: interfaces of
    ours on which it is on."""

    links: Mapping[str, ObservedLink]
    rules: Ruleset
    settings: Mapping[str, Mapping[str, str]]
    ipv6: frozenset[str]


def read_live(expected: Expected) -> Live:
    links = network.inspect()
    ours = [name for name in links if name.startswith(("mvm-b", "mvm-t"))]
    settings: dict[str, dict[str, str]] = {}
    for name in (*(n for n in ours if n.startswith("mvm-b")), *expected.policy.host.uplinks):
        settings[name] = {
            key: value
            for key in forwarding.BRIDGE_SETTINGS
            if (value := forwarding.setting(name, key)) is not None
        }
    return Live(links, nftables.read(), settings, frozenset(name for name in ours if _ipv6(name)))


def _ipv6(name: str) -> bool:
    try:
        with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6") as setting:
            return setting.read().strip() != "1"
    except FileNotFoundError:
        return False
