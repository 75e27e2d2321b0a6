"""Real packets: frames that a guest sends, and where in this host they turn up.

The host builds every frame, with a token in it that occurs once, and has the guest send it as it is. One packet socket
hears all interfaces meanwhile. So the verdict does not depend on what a guest says it saw: a frame that was seen
coming out of its tap was sent, and then either it was seen somewhere else or it was not.

    forged   may be seen at its own tap only: it dies before the bridge
    barred   at its tap and its tenant's bridge, where routing begins, and nowhere else; no answer to it either, but
             this host's own word that it went nowhere: without a route it says so before its rules are asked
    echoed   an answer with the token goes back into its tap
    leaves   it goes out by an interface that is not mvm's

Bounded: SOURCES guests, TARGETS others for each, and a time limit for each guest."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from mvm.core.errors import MvmError
from mvm.hostd.net_verify.wanted import Expected, Instance
from mvm.hostd.resources.network import ObservedLink, gateway_mac, packed_ipv4
from mvm.linux.process import wait_readable

SOURCES: Final = 16
TARGETS: Final = 6
SEND_S: Final = 20.0
"""How long a guest may take to send its frames, the start of its program included."""
_SETTLE_S: Final = 0.5
OUTSIDE: Final = "198.51.100.1"
"""Kept for documentation (RFC 5737): nobody has it, so a packet to it bothers nobody."""
UNUSED_IN_FLEET: Final = "10.240.0.9"
"""In the part of the fleet's range that no tenant gets."""
_ARP, _IPV4, _IPV6 = 0x0806, 0x0800, 0x86DD
_BROADCAST: Final = b"\xff" * 6
_OUTGOING: Final = 4  # PACKET_OUTGOING
_ETH_P_ALL: Final = 3
_TOKEN_BYTES: Final = 12
_ICMP_ERRORS: Final = (b"\3", b"\4", b"\5", b"\x0b", b"\x0c")

SCRIPT: Final = (
    "import socket,sys\n"
    "s=socket.socket(socket.AF_PACKET,socket.SOCK_RAW)\n"
    "s.bind(('eth0',0))\n"
    "for line in sys.stdin:s.send(bytes.fromhex(line))\n"
)
"""What runs in the guest, with frames in hexadecimal on its standard input."""

Send = Callable[[Instance, list[bytes]], None]
"""Have this instance send these frames. MvmError if it cannot."""
FORGED, BARRED, ECHOED, LEAVES = "forged", "barred", "echoed", "leaves"


class Probe(NamedTuple):
    what: str
    expect: str
    frame: bytes
    token: bytes


class Sighting(NamedTuple):
    """`quoted`: in an ICMP error, which quotes the packet that it is about."""

    token: bytes
    interface: str
    outgoing: bool
    quoted: bool = False


class Result(NamedTuple):
    """`seen`: what happened, in words."""

    instance: str
    probe: str
    ok: bool
    must: str
    seen: str


def run(expected: Expected, links: Iterable[ObservedLink], send: Send, *, uplink: bool) -> list[Result]:
    """Every probe of the first SOURCES running instances. `uplink`: there is a default route."""
    running = [instance for instance in expected.instances if instance.has_tap]
    host = _host_address(links)
    results: list[Result] = []
    for instance in _spread(running)[:SOURCES]:
        probes = probes_of(expected, instance, running, host=host, uplink=uplink)
        results += _run_one(instance, probes, send)
    return results


def probes_of(
    expected: Expected, instance: Instance, running: Iterable[Instance], *, host: str | None, uplink: bool
) -> list[Probe]:
    net = instance.network
    mine, gateway = _mac(net.mac), _mac(gateway_mac(net.gateway))
    stranger = b"\x02\x6d\x76\x6d\x00\x01"
    other_ip = _another(net.ip, net.gateway)
    probes: list[Probe] = []

    def add(what: str, expect: str, build: Callable[[bytes], bytes]) -> None:
        token = os.urandom(_TOKEN_BYTES)
        probes.append(Probe(what, expect, build(token), token))

    def ping(
        target: str, *, source: str = net.ip, mac: bytes = mine, to: bytes = gateway
    ) -> Callable[[bytes], bytes]:
        return lambda token: _ethernet(to, mac, _IPV4, _ipv4(source, target, 1, _echo(token)))

    def claim(mac: bytes, ip: str) -> Callable[[bytes], bytes]:
        return lambda token: _ethernet(_BROADCAST, mine, _ARP, _arp(mac, ip, net.gateway) + token)

    add("ping its gateway", ECHOED, ping(net.gateway))
    add(f"send as the address {other_ip}", FORGED, ping(net.gateway, source=other_ip))
    add("send as the gateway's address", FORGED, ping(OUTSIDE, source=net.gateway))
    add("send with another MAC", FORGED, ping(net.gateway, mac=stranger))
    add("claim the gateway's address by ARP", FORGED, claim(mine, net.gateway))
    add("put another MAC into an ARP message", FORGED, claim(stranger, net.ip))
    add("send IPv6 (a router advertisement)", FORGED, lambda token: _router(mine, token))
    add(
        "play DHCP server",
        FORGED,
        lambda token: _ethernet(
            _BROADCAST, mine, _IPV4, _ipv4(net.ip, "255.255.255.255", 17, _udp(67, 68, token))
        ),
    )
    for other in _targets(instance, running):
        there = other.network
        add(f"ping {other.id} ({there.ip}) by the gateway", BARRED, ping(there.ip))
        add(f"ping {other.id} ({there.ip}) by its MAC", BARRED, ping(there.ip, to=_mac(there.mac)))
        if there.index != net.index:
            add(f"ping the gateway of {other.id.tenant}", BARRED, ping(there.gateway))
    if host is not None:
        add(f"ping this host's address {host}", BARRED, ping(host))
    add("ping another node's part of the fleet", BARRED, ping(UNUSED_IN_FLEET))
    add("ping 169.254.169.254", BARRED, ping("169.254.169.254"))
    tenant = expected.policy.tenant(net.index)
    if tenant is not None and tenant.egress is None:
        if uplink and not any(_inside(OUTSIDE, network) for network in expected.policy.host.networks):
            add(f"send to {OUTSIDE}, outside", LEAVES, ping(OUTSIDE))
    elif tenant is not None and not any(_inside(OUTSIDE, rule.net) for rule in tenant.egress or ()):
        add(f"send to {OUTSIDE}, which its allow-list does not have", BARRED, ping(OUTSIDE))
    return probes


def judge(instance: Instance, probe: Probe, sightings: Iterable[Sighting]) -> Result:
    """Pure. `sightings`: all there were; those of other tokens are left out here."""
    net = instance.network
    about = [s for s in sightings if s.token == probe.token]
    # What goes back to who sent it, quoted, went nowhere else: had it, it would have been seen there as itself.
    back = {(net.tap, True), (net.bridge, True)}
    seen = {(s.interface, s.outgoing) for s in about if not (s.quoted and (s.interface, s.outgoing) in back)}
    sent = (net.tap, False) in seen
    allowed = {(net.tap, False)}
    if probe.expect in (BARRED, ECHOED, LEAVES):
        allowed.add((net.bridge, False))
    elsewhere = sorted(f"{'out of' if outgoing else 'at'} {name}" for name, outgoing in seen - allowed)
    if not sent:
        return _result(instance, probe, False, "the frame was not seen at the tap")
    if probe.expect == ECHOED:
        ok = (net.tap, True) in seen
        return _result(instance, probe, ok, "answered" if ok else "no answer")
    if probe.expect == LEAVES:
        ok = any(outgoing and not name.startswith(("mvm-", "lo")) for name, outgoing in seen)
        return _result(instance, probe, ok, "left" if ok else "did not leave")
    return _result(instance, probe, not elsewhere, f"seen {', '.join(elsewhere)}" if elsewhere else "dropped")


def _result(instance: Instance, probe: Probe, ok: bool, seen: str) -> Result:
    must = "pass" if probe.expect in (ECHOED, LEAVES) else "be dropped"
    return Result(str(instance.id), probe.what, ok, must, seen)


def _run_one(instance: Instance, probes: list[Probe], send: Send) -> list[Result]:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        try:
            # Twice: the first packets to an address may be lost while its MAC is asked for.
            for _ in range(2):
                send(instance, [probe.frame for probe in probes])
        except MvmError as error:
            problem = f"{error.brief}. {error.details}".strip()[:200]
            return [_result(instance, probe, False, f"not sent: {problem}") for probe in probes]
        sightings = _listen(ear, {probe.token for probe in probes})
    return [judge(instance, probe, sightings) for probe in probes]


def _listen(ear: socket.socket, tokens: set[bytes]) -> list[Sighting]:
    found: list[Sighting] = []
    deadline, quiet = time.monotonic() + 5.0, _SETTLE_S
    while time.monotonic() < deadline and wait_readable(ear.fileno(), quiet):
        frame, where = ear.recvfrom(2048)
        found += [
            Sighting(token, where[0], where[2] == _OUTGOING, is_icmp_error(frame))
            for token in tokens
            if token in frame
        ]
    return found


def is_icmp_error(frame: bytes) -> bool:
    """Whether an Ethernet frame carries one of ICMP's errors (RFC 792), which quote what they are about."""
    if len(frame) < 34 or int.from_bytes(frame[12:14], "big") != _IPV4 or frame[23] != 1:
        return False
    at = 14 + 4 * (frame[14] & 0x0F)
    return frame[at : at + 1] in _ICMP_ERRORS


def _spread(running: list[Instance]) -> list[Instance]:
    """The first of every tenant, then the second of every tenant, and so on."""
    seen: dict[int, int] = {}
    ranked = []
    for instance in running:
        rank = seen.get(instance.network.index, 0)
        seen[instance.network.index] = rank + 1
        ranked.append((rank, instance.network.index, instance))
    return [instance for _, _, instance in sorted(ranked, key=lambda item: item[:2])]


def _targets(instance: Instance, running: Iterable[Instance]) -> list[Instance]:
    """Some of its own tenant and some of others."""
    others = [other for other in running if other.id != instance.id]
    mine = [other for other in others if other.network.index == instance.network.index]
    return [*mine[: TARGETS // 2], *_spread([o for o in others if o not in mine])][:TARGETS]


def _host_address(links: Iterable[ObservedLink]) -> str | None:
    for link in links:
        if link.name != "lo" and not link.name.startswith("mvm-"):
            for address in link.addresses:
                if ":" not in address:
                    return address.partition("/")[0]
    return None


def _another(ip: str, gateway: str) -> str:
    stem = ip.rpartition(".")[0]
    return next(f"{stem}.{last}" for last in (254, 253) if f"{stem}.{last}" not in (ip, gateway))


def _inside(ip: str, network: str) -> bool:
    base, _, bits = network.partition("/")
    shift = 32 - int(bits)
    return (
        int.from_bytes(packed_ipv4(ip), "big") >> shift == int.from_bytes(packed_ipv4(base), "big") >> shift
    )


# Frames.


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _ethernet(target: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    return (target + source + kind.to_bytes(2, "big") + payload).ljust(60, b"\0")


def _ipv4(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0)
    head += packed_ipv4(source) + packed_ipv4(target)
    return head[:10] + _checksum(head) + head[12:] + payload


def _echo(token: bytes) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, int.from_bytes(token[:2], "big"), 1) + token
    return body[:2] + _checksum(body) + body[4:]


def _udp(source: int, target: int, data: bytes) -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(data), 0) + data


def _arp(sender_mac: bytes, sender_ip: str, target_ip: str) -> bytes:
    head = struct.pack("!HHBBH", 1, _IPV4, 6, 4, 2)
    return head + sender_mac + packed_ipv4(sender_ip) + bytes(6) + packed_ipv4(target_ip)


def _router(source: bytes, token: bytes) -> bytes:
    """An ICMPv6 router advertisement to all nodes, as far as a filter looks at it."""
    body = bytes([134, 0, 0, 0, 64, 0, 7, 8]) + bytes(8) + token
    head = bytes([0x60, 0, 0, 0]) + len(body).to_bytes(2, "big") + bytes([58, 255])
    head += bytes.fromhex("fe80" + "00" * 13 + "6d") + bytes.fromhex("ff02" + "00" * 13 + "01")
    return _ethernet(bytes.fromhex("333300000001"), source, _IPV6, head + body)


def _checksum(data: bytes) -> bytes:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2, "big")
