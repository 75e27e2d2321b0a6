"""The ruleset: rendered from the policy, read back into the same form, applied in one transaction.

`Ruleset` is all that the two tables named `mvm` hold, in comparable form. `ruleset(policy)` says what it must be,
`render` makes the nft commands that replace whatever is there by it, and `parse` reads `nft -j list ruleset`:

    parse(live after render(r)) == r

The kernel takes the whole replacement or nothing, and packets see either the old rules or the new. Tables of other
names are never touched; a verdict `drop` of ours is final whatever they say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from mvm.core import firewall
from mvm.core.errors import InvalidInput, MissingPrerequisite
from mvm.core.firewall import Element, Policy
from mvm.hostd.resources.nft_rules import BRIDGE_SETS, CHAINS, FAMILIES, TABLE, Hook
from mvm.linux import process

_TIMEOUT_S = 30.0

Place = tuple[str, str]
"""Family and name of a chain or set."""


class ObservedChain(NamedTuple):
    """`hook`: type, hook, priority and policy of a base chain, "" for another. `rules`: canonical JSON, in order."""

    hook: str
    rules: tuple[str, ...]


class ObservedSet(NamedTuple):
    """`form`: its types and flags in canonical JSON."""

    form: str
    elements: frozenset[Element]


class Ruleset(NamedTuple):
    """`others`: objects in the tables that mvm never makes (counters, flow tables), canonical JSON."""

    tables: frozenset[str]
    chains: Mapping[Place, ObservedChain]
    sets: Mapping[Place, ObservedSet]
    others: tuple[str, ...] = ()


EMPTY = Ruleset(frozenset(), {}, {})


def ruleset(policy: Policy) -> Ruleset:
    """What must be live for `policy`: no table at all where there is no tenant."""
    if not policy.tenants:
        return EMPTY
    return parse(json.dumps({"nftables": _objects(policy)}).encode())


def render(policy: Policy) -> bytes:
    """Commands for `nft -j -f -`: remove both tables if they are there, and make them anew."""
    commands: list[dict[str, Any]] = []
    for family in FAMILIES:
        table = {"table": {"family": family, "name": TABLE}}
        # Deleting what is not there is an error, adding what is there is none.
        commands += [{"add": table}, {"delete": table}]
    if policy.tenants:
        commands += [{"add": item} for item in _objects(policy)]
    return json.dumps({"nftables": commands}).encode()


def parse(untrusted_json: bytes) -> Ruleset:
    """The tables named `mvm` in the answer of `nft -j list ruleset`. InvalidInput if it is not that."""
    try:
        return _parsed(json.loads(untrusted_json or b'{"nftables": []}')["nftables"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(
            "the list of packet filter rules cannot be read",
            details=f"{type(error).__name__}: {error}",
            resolution="Compare with: nft -j list ruleset",
        ) from error


def apply(policy: Policy) -> None:
    """Replace the live rules. Costs one start of nft; CommandFailed leaves the old ones."""
    process.run(["nft", "-j", "-f", "-"], stdin=render(policy), timeout=_TIMEOUT_S)


def read() -> Ruleset:
    """The live rules of this thread's network namespace."""
    return parse(process.run(["nft", "-j", "list", "ruleset"], timeout=_TIMEOUT_S).stdout)


def require() -> None:
    """MissingPrerequisite where nft is not installed."""
    import shutil

    if shutil.which("nft", path=process.PATH) is None:
        raise MissingPrerequisite(
            "this host has no nft",
            details="Without packet filter rules guests could reach the host and each other.",
            resolution="Install it: apt-get install nftables",
        )


def _objects(policy: Policy) -> Iterable[dict[str, Any]]:
    """Tables, sets, chains, rules: in the order in which they may refer to each other."""
    found = firewall.elements(policy)
    objects: list[dict[str, Any]] = [{"table": {"family": f, "name": TABLE}} for f in FAMILIES]
    for name, types in firewall.SETS.items():
        body = _set_body(name, types if len(types) > 1 else types[0])
        if name in firewall.INTERVALS:
            body["flags"] = ["interval"]
        if found[name]:
            body["elem"] = [_element(name, element) for element in sorted(found[name])]
        objects.append({"set": body})
    for name, (key, value) in firewall.MAPS.items():
        body = {**_set_body(name, key), "map": value}
        if found[name]:
            body["elem"] = [list(element) for element in sorted(found[name])]
        objects.append({"map": body})
    for chain in CHAINS:
        place = {"family": chain.family, "table": TABLE, "name": chain.name}
        objects.append({"chain": {**place, **_hook_body(chain.hook)}})
    for chain in CHAINS:
        where = {"family": chain.family, "table": TABLE, "chain": chain.name}
        objects += [{"rule": {**where, "expr": list(rule)}} for rule in chain.rules]
    return objects


def _set_body(name: str, types: Element | str) -> dict[str, Any]:
    family = "bridge" if name in BRIDGE_SETS else "inet"
    return {
        "family": family,
        "table": TABLE,
        "name": name,
        "type": types if isinstance(types, str) else list(types),
    }


def _hook_body(hook: Hook | None) -> dict[str, Any]:
    if hook is None:
        return {}
    return {"type": hook.type, "hook": hook.hook, "prio": hook.priority, "policy": "accept"}


def _element(name: str, element: Element) -> Any:
    fields = [_field(field) if name in firewall.INTERVALS else field for field in element]
    return {"concat": fields} if len(fields) > 1 else fields[0]


def _field(text: str) -> Any:
    address, slash, bits = text.partition("/")
    if slash:
        return {"prefix": {"addr": address, "len": int(bits)}}
    return int(text) if text.isdigit() else text


# Reading back.


def _parsed(items: list[dict[str, dict[str, Any]]]) -> Ruleset:
    tables: set[str] = set()
    hooks: dict[Place, str] = {}
    rules: dict[Place, list[str]] = {}
    sets: dict[Place, ObservedSet] = {}
    others: list[str] = []
    for item in items:
        ((kind, body),) = item.items()
        family = body.get("family", "")
        if kind == "metainfo" or body.get("name" if kind == "table" else "table") != TABLE:
            continue
        if family not in FAMILIES:
            others.append(_canonical(item))
        elif kind == "table":
            tables.add(family)
            if body.get("flags"):  # `dormant` switches all its chains off
                others.append(_canonical({"table": {"family": family, "flags": body["flags"]}}))
        elif kind == "chain":
            names = ("type", "hook", "prio", "policy", "dev")
            hooks[family, body["name"]] = " ".join(str(body[name]) for name in names if name in body)
        elif kind == "rule":
            rules.setdefault((family, body["chain"]), []).append(_canonical(_named(body["expr"])))
        elif kind in ("set", "map"):
            elements = body.get("elem", [])
            extra = {k: v for k, v in body.items() if k not in ("family", "name", "table", "handle", "elem")}
            plain = (_plain(element, in_map=kind == "map") for element in elements)
            sets[family, body["name"]] = ObservedSet(
                _canonical(extra), frozenset(_named_fields(element, body.get("type")) for element in plain)
            )
        else:
            others.append(_canonical({kind: {k: v for k, v in body.items() if k != "handle"}}))
    chains = {place: ObservedChain(hook, tuple(rules.get(place, ()))) for place, hook in hooks.items()}
    return Ruleset(frozenset(tables), chains, sets, tuple(others))


# nft says protocols by the names of /etc/protocols, which a plain Debian has only where `netbase` is installed.
_PROTOCOLS: Final = {"1": "icmp", "6": "tcp", "17": "udp"}
_L4: Final = {"meta": {"key": "l4proto"}}


def _named(expression: Any) -> Any:
    """A rule's statements with names for the protocols that it matches on by number."""
    if isinstance(expression, list):
        return [_named(part) for part in expression]
    if not isinstance(expression, dict):
        return expression
    match = expression.get("match")
    if not isinstance(match, dict) or match.get("left") != _L4:
        return expression
    right = match.get("right")
    if isinstance(right, dict) and isinstance(right.get("set"), list):
        right = {"set": [_PROTOCOLS.get(str(one), one) for one in right["set"]]}
    elif isinstance(right, int):
        right = _PROTOCOLS.get(str(right), right)
    return {"match": {**match, "right": right}}


def _named_fields(element: Element, kind: Any) -> Element:
    types = kind if isinstance(kind, list) else [kind]
    if "inet_proto" not in types or len(types) != len(element):
        return element
    return tuple(
        _PROTOCOLS.get(field, field) if name == "inet_proto" else field
        for field, name in zip(element, types, strict=True)
    )


def _plain(element: Any, *, in_map: bool) -> Element:
    if in_map and isinstance(element, list):
        key, value = element
        return (*_plain(key, in_map=False), _text(value))
    if isinstance(element, dict) and "concat" in element:
        return tuple(_text(field) for field in element["concat"])
    return (_text(element),)


def _text(field: Any) -> str:
    if isinstance(field, dict) and "prefix" in field:
        return f"{field['prefix']['addr']}/{field['prefix']['len']}"
    # Anything else (a range, an element with a time-out) is not of our making and differs by its spelling.
    return str(field) if isinstance(field, str | int) else _canonical(field)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
