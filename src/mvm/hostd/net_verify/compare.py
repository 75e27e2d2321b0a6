"""Differences between what must be there and what is, in words. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mvm.core.firewall import Element
from mvm.core.lifecycle import Action, command_for
from mvm.hostd.net_verify.live import Live
from mvm.hostd.net_verify.wanted import Expected, Instance
from mvm.hostd.resources import forwarding, network, nftables
from mvm.hostd.resources.nftables import Ruleset

_OURS = ("mvm-b", "mvm-t")


class Difference(NamedTuple):
    """`where`: link, set, chain or setting. `what`: one sentence. `fix`: what to do about it."""

    where: str
    what: str
    fix: str


_REAPPLY = "Start or wake any instance: that puts all rules there again (mvm tenant run, mvm tenant wake)."


def compare(expected: Expected, live: Live) -> list[Difference]:
    """In the order documents, links, settings, rules. Empty if all is as it must be."""
    return [
        *_documents(expected),
        *_links(expected, live),
        *_settings(expected, live),
        *_rules(expected, live.rules),
    ]


def _documents(expected: Expected) -> Iterator[Difference]:
    for name in expected.unreadable:
        yield Difference(
            name,
            "its specification or record cannot be read, so it has no permission on the network",
            f"Restore its file, or destroy it; see: mvm instance show {name}",
        )


def _links(expected: Expected, live: Live) -> Iterator[Difference]:
    taps = {i.network.tap: i for i in expected.instances if i.has_tap}
    changing = {i.network.tap for i in expected.instances if not i.settled}
    bridges = {i.network.bridge: i for i in taps.values()}
    may_be = {i.network.bridge for i in expected.instances if not i.settled}
    for name, instance in sorted(bridges.items()):
        yield from _bridge(name, instance, expected, live)
    for name, instance in sorted(taps.items()):
        yield from _tap(name, instance, live)
    for name in sorted(live.links):
        if name.startswith(_OURS) and name not in {*taps, *bridges, *changing, *may_be}:
            whose = expected.who(name) if name.startswith("mvm-b") else expected.with_tap(name)
            yield Difference(
                name,
                f"the link is there, but no running instance has it ({whose})",
                f"Remove it: ip link delete {name}",
            )
    for name in sorted(live.ipv6):
        yield Difference(name, "IPv6 is on", f"Turn it off: sysctl net.ipv6.conf.{name}.disable_ipv6=1")


def _bridge(name: str, instance: Instance, expected: Expected, live: Live) -> Iterator[Difference]:
    net, found = instance.network, live.links.get(name)
    again = f"Restart the tenant's instances: {_restart(instance)}"
    if found is None:
        yield Difference(name, f"the bridge of {instance.id.tenant} is missing", again)
        return
    if found.kind != "bridge":
        yield Difference(
            name,
            f"it is not a bridge but {found.kind or 'hardware'}",
            f"Remove it, then: {_restart(instance)}",
        )
        return
    wanted = f"{net.gateway}/{net.prefix}"
    if wanted not in found.addresses:
        yield Difference(
            name, f"the gateway address {wanted} is missing", f"ip address add {wanted} dev {name}"
        )
    for address in found.addresses:
        if address != wanted:
            yield Difference(
                name,
                f"it has the address {address}, which is not the tenant's gateway",
                f"ip address delete {address} dev {name}",
            )
    if not found.up:
        yield Difference(name, "it is down", f"ip link set {name} up")
    mac = network.gateway_mac(net.gateway)
    if found.mac != mac:
        yield Difference(
            name,
            f"its MAC is {found.mac}, sleeping guests know it as {mac}",
            f"ip link set {name} address {mac}",
        )
    if found.stp:
        yield Difference(
            name,
            "it speaks the spanning tree protocol to guests",
            f"ip link set {name} type bridge stp_state 0",
        )
    for port in sorted(live.links.values(), key=lambda link: link.name):
        ours = {i.network.tap for i in expected.instances if i.network.bridge == name}
        if port.master == name and port.name not in ours:
            yield Difference(
                port.name,
                f"it is a port of {name}, the bridge of {instance.id.tenant}, and no instance's tap",
                f"ip link set {port.name} nomaster",
            )


def _tap(name: str, instance: Instance, live: Live) -> Iterator[Difference]:
    net, found = instance.network, live.links.get(name)
    if found is None:
        yield Difference(
            name, f"the tap of {instance.id} is missing, and its guest has no network", _restart(instance)
        )
        return
    if found.kind != instance.port:
        yield Difference(name, _another_kind(instance, found.kind), _restart(instance))
        return
    if found.master != net.bridge:
        what = f"it is a port of {found.master}" if found.master else "it is no port of any bridge"
        yield Difference(name, f"{what}, not of {net.bridge}", f"ip link set {name} master {net.bridge}")
    if found.isolated is not True:
        yield Difference(
            name,
            f"its port is not isolated from the other instances of {instance.id.tenant}",
            f"bridge link set dev {name} isolated on",
        )
    if not found.up:
        yield Difference(name, "it is down", f"ip link set {name} up")
    for address in found.addresses:
        yield Difference(
            name, f"the host has the address {address} on it", f"ip address delete {address} dev {name}"
        )


def _another_kind(instance: Instance, kind: str) -> str:
    if instance.port == "tun":
        return f"it is not a tap but {kind or 'hardware'}"
    what = "a tap of the host's own namespace" if kind == "tun" else kind or "hardware"
    return f"it is not the way into a namespace of the VMM's own (veth) but {what}"


def _restart(instance: Instance) -> str:
    return f"{command_for(Action.STOP, instance.id)} && {command_for(Action.RUN, instance.id)}"


def _settings(expected: Expected, live: Live) -> Iterator[Difference]:
    bridges = {i.network.bridge for i in expected.instances if i.has_tap}
    wanted = dict.fromkeys(bridges, forwarding.BRIDGE_SETTINGS)
    if expected.policy.tenants:
        wanted.update({name: {"forwarding": "1"} for name in expected.policy.host.uplinks})
    for name, settings in sorted(wanted.items()):
        seen = live.settings.get(name)
        for key, value in settings.items():
            if seen is not None and seen.get(key) != value:
                where = f"net.ipv4.conf.{name}.{key}"
                yield Difference(
                    where, f"it is {seen.get(key, 'missing')}, not {value}", f"sysctl {where}={value}"
                )


# Rules.


def _rules(expected: Expected, live: Ruleset) -> Iterator[Difference]:
    wanted = nftables.ruleset(expected.policy)
    for family in sorted(wanted.tables - live.tables):
        yield Difference(f"table {family} mvm", "it is missing, and with it every rule in it", _REAPPLY)
    for family in sorted(live.tables - wanted.tables):
        yield Difference(
            f"table {family} mvm",
            "it is there, but this node has no instance",
            f"nft delete table {family} mvm",
        )
    both = wanted.tables & live.tables
    for place in sorted({*wanted.chains, *live.chains}):
        if place[0] in both:
            yield from _chain(place, wanted, live)
    for place in sorted({*wanted.sets, *live.sets}):
        if place[0] in both:
            yield from _set(place, wanted, live, expected)
    if both:
        for other in live.others:
            yield Difference("table mvm", f"it holds something mvm never makes: {_short(other)}", _REAPPLY)


def _chain(place: tuple[str, str], wanted: Ruleset, live: Ruleset) -> Iterator[Difference]:
    where = f"chain {place[0]} mvm {place[1]}"
    want, have = wanted.chains.get(place), live.chains.get(place)
    if want is None:
        yield Difference(where, "mvm makes no such chain", _REAPPLY)
        return
    if have is None:
        yield Difference(where, "it is missing, with all its rules", _REAPPLY)
        return
    if want.hook != have.hook:
        yield Difference(where, f"it is attached as `{have.hook}`, not `{want.hook}`", _REAPPLY)
    lacking = _without(want.rules, have.rules)
    surplus = _without(have.rules, want.rules)
    for rule in lacking:
        yield Difference(where, f"a rule is missing: {readable(rule)}", _REAPPLY)
    for rule in surplus:
        yield Difference(where, f"a rule is there that mvm did not make: {readable(rule)}", _REAPPLY)
    if not lacking and not surplus and want.rules != have.rules:
        yield Difference(where, "its rules are in another order", _REAPPLY)


def _without(these: Iterable[str], those: Iterable[str]) -> list[str]:
    """What of `these` is not among `those`, counting repetitions."""
    rest, found = list(those), []
    for rule in these:
        if rule in rest:
            rest.remove(rule)
        else:
            found.append(rule)
    return found


def _set(place: tuple[str, str], wanted: Ruleset, live: Ruleset, expected: Expected) -> Iterator[Difference]:
    family, name = place
    where = f"set {family} mvm {name}"
    want, have = wanted.sets.get(place), live.sets.get(place)
    if want is None:
        yield Difference(where, "mvm makes no such set", _REAPPLY)
        return
    if have is None:
        yield Difference(where, "it is missing", _REAPPLY)
        return
    if want.form != have.form:
        yield Difference(where, f"it is of the form {have.form}, not {want.form}", _REAPPLY)
    for element in sorted(want.elements - have.elements):
        yield Difference(where, f"lacks {' . '.join(element)}: {_meaning(name, element, expected)}", _REAPPLY)
    for element in sorted(have.elements - want.elements):
        yield Difference(
            where,
            f"holds {' . '.join(element)}, which it must not: {_meaning(name, element, expected)}",
            _REAPPLY,
        )


def _meaning(name: str, element: Element, expected: Expected) -> str:
    """What an element of a set lets through."""
    first = element[0]
    tenant = expected.who(first)
    meanings = {
        "gateways": f"{tenant} may speak to the gateway {element[-1]}",
        "guests": f"{element[-1]} may send, by the bridge of {tenant}",
        "sources": f"{expected.with_tap(first)} may send as {' and '.join(element[1:])}",
        "metadata": f"{tenant} may ask the metadata service",
        "open": f"{tenant} may reach anything outside",
        "dns": f"{tenant} may ask the name server {element[-1]}",
        "resolvers": f"questions of {tenant} for names go to {element[-1]}",
        "networks": "a network of this host, closed to guests",
        "uplinks": "forwards to guests only",
    }
    return meanings.get(name, f"{tenant} may reach {' '.join(element[1:])}")


def readable(rule: str) -> str:
    """A rule's canonical JSON in roughly the words nft uses, short enough for one line."""
    try:
        return _short(" ".join(_words(part) for part in json.loads(rule)))
    except (ValueError, TypeError, KeyError):
        return _short(rule)


def _words(part: object) -> str:
    if isinstance(part, list):
        return "{ " + ", ".join(_words(item) for item in part) + " }"
    if not isinstance(part, dict):
        return str(part)
    ((key, body),) = part.items()
    if key == "match":
        op = "" if body["op"] in ("==", "in") else f"{body['op']} "
        return f"{_words(body['left'])} {op}{_words(body['right'])}"
    if key == "payload" and "field" in body:
        return f"{body['protocol']} {body['field']}"
    if key in ("meta", "ct"):
        return str(body["key"]) if key == "meta" else f"ct {body['key']}"
    if key == "concat":
        return " . ".join(_words(item) for item in body)
    if key == "set":
        return _words(body)
    if key == "prefix":
        return f"{body['addr']}/{body['len']}"
    if key in ("jump", "goto"):
        return f"{key} {body['target']}"
    return key if body is None else f"{key} {json.dumps(body)}"


def _short(text: str) -> str:
    safe = "".join(c if c.isprintable() else "?" for c in text[:300])
    return safe + ("..." if len(text) > 300 else "")
