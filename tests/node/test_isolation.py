"""Real packets between real guests, behind the installed daemon's rules.

    guests of `one` (two instances) and `two`  -  node: up0 192.0.2.2  -  in0 192.0.2.1: a namespace that stands for
    the internet, with a site and a name server

Forged packets are sent by `mvm net verify --active`, which has the guests send frames that it made and watches every
interface of the node meanwhile; what passes and what does not is also tried by programs in the guests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.node.conftest import Rig
from tests.node.guests import RUN_S, Guests

from mvm.hostd.install import units

pytestmark = [pytest.mark.node, pytest.mark.req("N2")]
NODE, PEER, SITE, RESOLVER = "192.0.2.2", "192.0.2.1", "203.0.113.7", "203.0.113.53"
PORT = 443

INTERNET = f"""
ip netns add internet
ip link add up0 type veth peer name in0 netns internet
ip address add {NODE}/24 dev up0
ip link set up0 up
ip -n internet address add {PEER}/24 dev in0
ip -n internet address add {SITE}/32 dev lo
ip -n internet address add {RESOLVER}/32 dev lo
ip -n internet link set lo up
ip -n internet link set in0 up
ip route add default via {PEER}
echo nameserver {RESOLVER} >/etc/resolv.conf
"""
# Tells each caller who it seems to be: what a guest looks like from outside.
SERVERS = f"""
import socket, threading
def names():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("{RESOLVER}", 53))
    while True:
        question, who = s.recvfrom(512); s.sendto(b"for " + who[0].encode(), who)
threading.Thread(target=names, daemon=True).start()
s = socket.create_server(("{SITE}", {PORT}))
while True:
    c, who = s.accept(); c.sendall(who[0].encode()); c.close()
"""
# In a guest: what becomes of a connection to each address. A refusal would mean that the other side was reached; that
# nobody says where an address of the guest's own network is (EHOSTUNREACH) means that not even ARP gets there.
CONNECT = """
import socket, sys, threading
def to(address):
    try: socket.create_connection((address, 7), 4); said = "connected"
    except TimeoutError: said = "silence"
    except OSError as error: said = "silence" if error.errno == 113 else str(error)
    print(address, said, flush=True)
threads = [threading.Thread(target=to, args=(a,)) for a in sys.argv[1:]]
[t.start() for t in threads]; [t.join() for t in threads]
"""
SITE_SAYS = f"import socket; s = socket.create_connection(('{SITE}', {PORT}), 20); print(s.recv(99).decode())"
NAME_SERVER_SAYS = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20)
s.sendto(b"?", (sys.argv[1], 53)); print(s.recv(99).decode())
"""


@pytest.fixture(scope="module")
def fleet(rig: Rig, guests: Guests) -> Iterator[dict[str, str]]:
    """instance -> address, of three running instances of two tenants."""
    rig.sh(INTERNET)
    rig.sh(
        'systemd-run --quiet --unit=internet --property=NetworkNamespacePath=/run/netns/internet python3 -c "$(cat)"',
        stdin=SERVERS.encode(),
    )
    try:
        for name in ("one", "two"):
            guests.create(name)
        rig.sh("mvm pool scale one default 2")
        for name in ("one", "two"):
            rig.sh(f"mvm tenant run {name}", timeout=2 * RUN_S)
        rows = [json.loads(line) for line in rig.sh("mvm instance list --output json").splitlines()]
        running = {str(row["instance"]): str(row["ip"]) for row in rows if row["state"] == "running"}
        assert sorted(running) == ["one/default-0", "one/default-1", "two/default-0"]
        yield running
    finally:
        rig.sh("for t in one two; do mvm tenant destroy $t --wipe-volumes --yes || true; done", timeout=RUN_S)
        rig.sh("systemctl stop internet; ip link del up0; ip netns del internet; rm /etc/resolv.conf")
    assert rig.sh("ls /sys/class/net").split() == ["lo"]
    assert rig.sh("nft list ruleset") == "", "with the last instance the rules go"


def python(rig: Rig, instance: str, program: str, *arguments: str) -> str:
    """Standard output of a program in a guest."""
    done = rig.mvm(
        "shell", "--", "mvm", "instance", "exec", instance, "--", "python3", "-c", program, *arguments
    )
    return done.stdout.decode().strip()


def verify(rig: Rig, *options: str, code: int = 0) -> list[dict[str, Any]]:
    done = rig.mvm(
        "shell", "--", "mvm", "net", "verify", *options, "--output", "json", code=code, timeout=RUN_S
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.req("N3", "N1")
def test_every_forged_packet_dies_and_every_right_one_passes(rig: Rig, fleet: dict[str, str]) -> None:
    found = verify(rig, "--active")
    assert [line for line in found if line["kind"] == "difference"] == []
    probes = {(p["instance"], p["probe"]): p for p in found if p["kind"] == "probe"}
    assert [p for p in probes.values() if not p["ok"]] == []
    for source in fleet:
        mine = {what: p["seen"] for (instance, what), p in probes.items() if instance == source}
        for target, address in fleet.items():
            if target != source:
                assert mine[f"ping {target} ({address}) by the gateway"] == "dropped"
                assert mine[f"ping {target} ({address}) by its MAC"] == "dropped"
        assert mine["send with another MAC"] == "dropped"
        assert mine["send as the gateway's address"] == "dropped"
        assert [seen for what, seen in mine.items() if what.startswith("send as the address")] == ["dropped"]
        assert mine["send IPv6 (a router advertisement)"] == "dropped"
        assert mine["play DHCP server"] == "dropped"
        assert mine["ping its gateway"] == "answered"
        assert [seen for what, seen in mine.items() if what.endswith("outside")] == ["left"]


def test_no_instance_connects_to_another(rig: Rig, fleet: dict[str, str]) -> None:
    """Nobody listens, so an open way would be told by a refusal. Gateways of others and the node are no way either."""
    for source, address in fleet.items():
        others = sorted({*fleet.values(), NODE} - {address})
        said = dict(line.split(" ", 1) for line in python(rig, source, CONNECT, *others).splitlines())
        assert said == dict.fromkeys(others, "silence"), source


def test_out_it_goes_as_the_node(rig: Rig, fleet: dict[str, str]) -> None:
    for source in fleet:
        assert python(rig, source, SITE_SAYS) == NODE, "translated"


def test_names_are_asked_at_the_gateway_and_answered_by_the_nodes_resolver(
    rig: Rig, fleet: dict[str, str]
) -> None:
    for source, address in fleet.items():
        gateway = address.rpartition(".")[0] + ".1"
        assert python(rig, source, NAME_SERVER_SAYS, gateway) == f"for {NODE}"


def test_no_ipv6_between_node_and_guests(rig: Rig, fleet: dict[str, str]) -> None:
    ours = [name for name in rig.sh("ls /sys/class/net").split() if name.startswith("mvm-")]
    assert len(ours) == 2 + len(fleet), "a bridge for each tenant, a tap for each instance"
    for name in ours:
        assert (
            rig.sh(f"cat /proc/sys/net/ipv6/conf/{name}/disable_ipv6; ip -6 address show dev {name}") == "1\n"
        )


def rules(rig: Rig) -> list[tuple[str, str, str, int]]:
    """(family, table, chain, handle) of every rule of mvm's."""
    listed = json.loads(rig.sh("nft --json --handle list ruleset"))["nftables"]
    found = [entry["rule"] for entry in listed if "rule" in entry]
    return [(r["family"], r["table"], r["chain"], r["handle"]) for r in found]


@pytest.mark.req("N3")
def test_a_rule_that_is_gone_is_named_and_comes_back(rig: Rig, fleet: dict[str, str]) -> None:
    there = rules(rig)
    bridge = [rule for rule in there if rule[0] == "bridge"]
    family, table, chain, handle = bridge[len(bridge) // 2]
    rig.sh(f"nft delete rule {family} {table} {chain} handle {handle}")
    found = verify(rig, code=13)
    (difference,) = [line for line in found if line["kind"] == "difference"]
    assert chain in difference["where"]
    assert difference["fix"]
    # The daemon puts the whole ruleset there again when it starts.
    rig.sh(f"systemctl restart {units.SERVICE}")
    verify(rig)
    assert len(rules(rig)) == len(there)


@pytest.mark.req("N3")
def test_a_port_that_is_open_to_its_neighbours_is_named(rig: Rig, fleet: dict[str, str]) -> None:
    tap = next(n for n in rig.sh("ls /sys/class/net").split() if n.startswith("mvm-t"))
    rig.sh(f"echo 0 >/sys/class/net/{tap}/brport/isolated")
    try:
        found = verify(rig, code=13)
        assert [tap in d["where"] or tap in d["what"] for d in found if d["kind"] == "difference"] == [True]
    finally:
        rig.sh(f"echo 1 >/sys/class/net/{tap}/brport/isolated")
    verify(rig)


@pytest.mark.req("N2", "S2")
def test_a_woken_instance_is_behind_the_same_rules(rig: Rig, fleet: dict[str, str]) -> None:
    rig.sh("mvm instance sleep one/default-1; mvm instance wake one/default-1", timeout=RUN_S)
    others = sorted(set(fleet.values()) - {fleet["one/default-1"]})
    said = dict(line.split(" ", 1) for line in python(rig, "one/default-1", CONNECT, *others).splitlines())
    assert said == dict.fromkeys(others, "silence")
    assert python(rig, "one/default-1", SITE_SAYS) == NODE
    verify(rig)
