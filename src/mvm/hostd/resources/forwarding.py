"""What the kernel is told, and asked, about routing between guests and the world.

Forwarding is never switched on for the whole host. A bridge forwards because it is ours. Answers come back through the
interface of the default route, which therefore must forward too: where the host is no router already
(`net.ipv4.ip_forward`), those interfaces are switched on alone and are `uplinks` of the policy, whose rules let them
forward to our bridges only. The rules come first, the switch after them.

The parsers are pure; the rest acts on the network namespace of the calling thread."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from mvm.core.addressing import format_ipv4, parse_ipv4
from mvm.core.errors import InvalidInput, MissingPrerequisite, ResourceExhausted
from mvm.core.firewall import HostNetwork

BRIDGE_SETTINGS: Final = {
    "forwarding": "1",
    # Strict: a packet's source must be routed back the way it came.
    "rp_filter": "1",
    # Addresses of the host's other interfaces are not answered for.
    "arp_ignore": "1",
    "accept_redirects": "0",
    "send_redirects": "0",
    "accept_source_route": "0",
    "proxy_arp": "0",
    "route_localnet": "0",
}
"""`net.ipv4.conf.<bridge>.*` of every bridge of ours."""
_OURS: Final = ("mvm-b", "mvm-t")
_ROUTES: Final = "/proc/thread-self/net/route"
_SETTINGS: Final = "/proc/sys/net/ipv4/conf"
# The first with a name server that is not on the loopback interface. systemd-resolved's own list of upstreams comes
# first: it writes itself into the other file.
_RESOLVERS: Final = ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf")
_FILE_MAX: Final = 8 << 20
_RTF_UP, _RTF_GATEWAY, _RTF_REJECT = 0x1, 0x2, 0x200


def host_network() -> HostNetwork:
    """The host as the policy needs to know it. Costs three small reads."""
    networks, uplinks = parse_routes(_read(_ROUTES))
    if setting("all", "forwarding") == "1":
        uplinks = ()  # a router already; what else it forwards is not ours to restrict
    return HostNetwork(networks=networks, uplinks=uplinks, resolver=_resolver())


def has_default_route() -> bool:
    return bool(parse_routes(_read(_ROUTES))[1])


def parse_routes(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(networks attached to the host, interfaces of default routes) from `/proc/net/route`. InvalidInput."""
    networks: set[str] = set()
    uplinks: set[str] = set()
    try:
        for line in text.splitlines()[1:]:
            name, target, _, flag_text, _, _, _, mask_text = line.split()[:8]
            flags, mask = int(flag_text, 16), socket.ntohl(int(mask_text, 16))
            if name.startswith(_OURS) or not flags & _RTF_UP or flags & _RTF_REJECT:
                continue
            if mask == 0:
                uplinks.add(name)
            elif not flags & _RTF_GATEWAY:
                networks.add(f"{format_ipv4(socket.ntohl(int(target, 16)))}/{mask.bit_count()}")
    except (ValueError, struct.error, OverflowError) as error:
        raise InvalidInput(
            "the kernel's routes cannot be read", details=str(error), resolution="See: cat /proc/net/route"
        ) from error
    return tuple(sorted(networks)), tuple(sorted(uplinks))


def parse_resolver(text: str) -> str | None:
    """The first IPv4 name server of a resolv.conf(5) that is reachable from elsewhere than the host itself."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                address = parse_ipv4(words[1])
            except InvalidInput:
                continue
            if address >> 24 not in (0, 127):
                return words[1]
    return None


def prepare_bridge(bridge: str) -> None:
    """Have the bridge forward, and believe nobody."""
    for name, value in BRIDGE_SETTINGS.items():
        _set(bridge, name, value)


def open_uplinks(names: Iterable[str]) -> None:
    """Have these interfaces forward. Only after the rules that restrict them are live."""
    for name in names:
        _set(name, "forwarding", "1")


def close_uplinks(names: Iterable[str]) -> None:
    """Undo `open_uplinks`, unless the host has become a router since. Before their rules go."""
    if setting("all", "forwarding") == "1":
        return
    for name in names:
        if setting(name, "forwarding") is not None:
            _set(name, "forwarding", "0")


def setting(interface: str, name: str) -> str | None:
    """`net.ipv4.conf.<interface>.<name>`; None without such an interface."""
    try:
        return Path(_SETTINGS, interface, name).read_text().strip()
    except FileNotFoundError:
        return None


def _set(interface: str, name: str, value: str) -> None:
    if setting(interface, name) == value:
        return
    path = Path(_SETTINGS, interface, name)
    try:
        path.write_text(value)
    except FileNotFoundError:
        return  # the interface went away
    except OSError as error:
        raise MissingPrerequisite(
            f"{path} cannot be set", details=str(error), resolution="Run as root, with /proc/sys writable."
        ) from error


def _resolver() -> str | None:
    for path in _RESOLVERS:
        try:
            found = parse_resolver(_read(path))
        except (FileNotFoundError, UnicodeDecodeError):
            continue
        if found is not None:
            return found
    return None


def _read(path: str) -> str:
    # Files of /proc have no size, so the bound is on what was read.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        data = file.read(_FILE_MAX + 1)
    if len(data) > _FILE_MAX:
        raise ResourceExhausted(f"{path} has more than {_FILE_MAX >> 20} MiB")
    return data.decode()
