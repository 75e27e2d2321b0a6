"""A node with tenants and an internet around it, in two network namespaces of the test's own.

The guests are real taps, on the node or in namespaces of their own, whose other end is held here, so a test sends any
frame it likes, and sees every frame that a guest would get. The internet is a namespace behind the node's uplink, with
a packet socket that hears what arrives.

    guests (tap descriptors) - bridges - node: up0 192.0.2.2/24 - in0 192.0.2.1/24: internet, addresses on lo
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec
from tests.support import frames
from tests.support.world import network_namespace

from mvm.core import addressing, firewall
from mvm.core.firewall import Guest, HostNetwork, Policy
from mvm.core.spec import EgressRule
from mvm.hostd.resources import forwarding, network, nftables, private_tap
from mvm.linux import process

_CLONE_NEWNET = 0x40000000
RESOLVER = "203.0.113.53"
SITE, OTHER_SITE = "203.0.113.7", "198.51.100.7"
ELSEWHERE_IN_THE_FLEET = "10.250.3.4"
NEIGHBOUR_OF_THE_HOST = "192.0.2.1"
CLOUD_METADATA = "169.254.169.254"
HOST = "192.0.2.2"
_QUIET_S = 0.25
"""How long silence is waited for. What passes has arrived long before: everything here is one machine's memory."""


def ip(*arguments: str) -> None:
    process.run(["ip", *arguments], timeout=10)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """This thread in the namespace behind the descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert libc.setns(namespace, _CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert libc.setns(home, _CLONE_NEWNET) == 0
    finally:
        os.close(home)


def take_tap(namespace: int | None, name: str) -> int:
    """Open a tap by its name, as Firecracker does, in the namespace behind the descriptor (None: in this thread's)."""
    fd = -1
    try:
        with contextlib.nullcontext() if namespace is None else inside(namespace):
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x2 | 0x1000 | 0x4000))
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    return fd


class Port:
    """One guest's end of its tap. `namespace`: the one its tap is in, if it has one of its own; else -1."""

    def __init__(self, index: int, slot: int, fd: int) -> None:
        self.index, self.fd, self.namespace = index, fd, -1
        self.tap = addressing.tap_name(index, slot)
        self.ip = addressing.instance_ip(index, slot)
        self.mac = f"02:00:00:00:{index:02x}:{slot:02x}"
        self.gateway = addressing.gateway(index)
        self.gateway_mac = network.gateway_mac(self.gateway)
        self._identifier = 0

    @property
    def guest(self) -> Guest:
        return Guest(self.tap, self.ip, self.mac)

    def send(self, frame: bytes) -> None:
        os.write(self.fd, bytes(10) + frame)

    def received(self, wait: float = _QUIET_S) -> list[bytes]:
        """Frames until it is silent."""
        found = []
        while process.wait_readable(self.fd, wait):
            found.append(os.read(self.fd, 4096)[10:])
            wait = 0.05
        return found

    def send_ip(
        self,
        target: str,
        protocol: int,
        payload: bytes,
        *,
        source: str | None = None,
        mac: str | None = None,
        to: str | None = None,
    ) -> None:
        packet = frames.ipv4(source or self.ip, target, protocol, payload)
        self.send(frames.ethernet(mac or self.mac, to or self.gateway_mac, frames.IPV4, packet))

    def greet(self) -> bool:
        """Ask for the gateway's MAC; also makes the host know this guest's."""
        self.send(frames.ethernet(self.mac, frames.BROADCAST, frames.ARP, self._question()))
        return any(frames.kind(frame) == frames.ARP for frame in self._answers(frames.ARP))

    def pings(self, target: str) -> bool:
        self._identifier += 1
        self.send_ip(target, frames.ICMP, frames.echo(self._identifier))
        wanted = frames.ipv4(target, self.ip, frames.ICMP, frames.echo(self._identifier, reply=True))[20:]
        return any(wanted[4:] in frame for frame in self._answers(frames.IPV4))

    def reaches_tcp(self, target: str, port: int) -> bool:
        """Whether anything answers, be it a refusal."""
        self._identifier += 1
        source_port = 20000 + self._identifier
        self.send_ip(target, frames.TCP, frames.tcp(self.ip, target, source_port, port))
        return any(
            frames.protocol(frame) == frames.TCP and frames.addresses(frame) == (target, self.ip)
            for frame in self._answers(frames.IPV4)
        )

    def reaches_udp(self, target: str, port: int) -> bool:
        """Whether the other side says that nobody listens there, or answers."""
        self._identifier += 1
        self.send_ip(target, frames.UDP, frames.udp(30000 + self._identifier, port))
        return any(
            frames.protocol(frame) in (frames.ICMP, frames.UDP) and frames.addresses(frame)[0] == target
            for frame in self._answers(frames.IPV4)
        )

    def _question(self) -> bytes:
        return frames.arp(1, self.mac, self.ip, self.gateway)

    def _answers(self, kind: int) -> list[bytes]:
        found: list[bytes] = []
        for frame in self.received():
            if (
                frames.kind(frame) == frames.ARP
                and frame[20:22] == b"\0\1"
                and frame[38:42] == frames.ip(self.ip)
            ):
                # The host asks for our MAC before it answers anything else.
                reply = frames.arp(2, self.mac, self.ip, self.gateway)
                self.send(frames.ethernet(self.mac, self.gateway_mac, frames.ARP, reply))
                found += self.received()
            found.append(frame)
        return [frame for frame in found if frames.kind(frame) == kind]


class Lab:
    def __init__(self, internet: int, ear: socket.socket, stack: ExitStack, *, private: bool) -> None:
        self.internet, self._ear, self._stack, self.private = internet, ear, stack, private
        self.policy = Policy()
        self.ports: dict[str, Port] = {}
        self._open: set[int] = set()

    def own(self, fd: int) -> None:
        """Close it at the end, unless it was disowned."""
        self._open.add(fd)
        self._stack.callback(self._close, fd)

    def _close(self, fd: int) -> None:
        if fd in self._open:
            os.close(fd)

    def disown(self, fd: int) -> int:
        self._open.remove(fd)
        return fd

    def tenant(
        self,
        index: int,
        guests: int = 1,
        *,
        egress: Iterable[EgressRule] | None = None,
        metadata: bool = False,
        resolver: str | None = RESOLVER,
    ) -> list[Port]:
        """Bridge, ports and rules of a tenant, in the order in which `mvm` makes them."""
        bridge = addressing.bridge_name(index)
        network.ensure_bridge(network.BridgeSpec(bridge, addressing.gateway(index), addressing.PREFIX))
        forwarding.prepare_bridge(bridge)
        places = [Port(index, slot, -1) for slot in range(guests)]
        mine = firewall.tenant_network(index, [p.guest for p in places], metadata=metadata, egress=egress)
        host: HostNetwork = msgspec.structs.replace(forwarding.host_network(), resolver=resolver)
        others = [tenant for tenant in self.policy.tenants if tenant.index != index]
        self.policy = firewall.policy([*others, mine], host)
        nftables.apply(self.policy)
        forwarding.open_uplinks(self.policy.host.uplinks)
        for place in places:
            if self.private:
                place.namespace = private_tap.open_private_tap(place.tap, 0, bridge)
                self.own(place.namespace)
                place.fd = take_tap(place.namespace, place.tap)
            else:
                place.fd = network.open_tap(place.tap, 0, bridge)
            self.own(place.fd)
            self.ports[place.tap] = place
            # The kernel takes up to a second to let a bridge speak that has just got its first port.
            assert any(place.greet() for _ in range(12)), "the gateway answers to an honest guest"
        return places

    def heard(self) -> list[bytes]:
        """Every frame that reached the internet since the last call, ARP left out."""
        found, wait = [], _QUIET_S
        while process.wait_readable(self._ear.fileno(), wait):
            found.append(self._ear.recv(4096))
            wait = 0.05
        return [frame for frame in found if frames.kind(frame) != frames.ARP and frame[6:12] != _PEER]


_PEER = frames.mac("02:ee:00:00:00:01")


@contextmanager
def network_lab(*, private: bool = False) -> Iterator[Lab]:
    """`private`: every guest's tap in a namespace of its own, opened by name."""
    with ExitStack() as stack, network_namespace():
        node = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, node)
        with network_namespace():
            internet = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, internet)
            ip("link", "add", "in0", "address", "02:ee:00:00:00:01", "type", "veth", "peer", "name", "up0")
            network.disable_ipv6("in0")
            ip("link", "set", "up0", "netns", f"/proc/{os.getpid()}/fd/{node}")
            for address in (SITE, OTHER_SITE, RESOLVER, ELSEWHERE_IN_THE_FLEET, CLOUD_METADATA):
                ip("address", "add", f"{address}/32", "dev", "lo")
            ip("address", "add", f"{NEIGHBOUR_OF_THE_HOST}/24", "dev", "in0")
            for link in ("lo", "in0"):
                ip("link", "set", link, "up")
            ear = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
            stack.enter_context(ear)
            ear.bind(("in0", 0))
        with inside(node):
            ip("link", "set", "lo", "up")
            network.disable_ipv6("up0")
            ip("address", "add", f"{HOST}/24", "dev", "up0")
            ip("link", "set", "up0", "up")
            ip("route", "add", "default", "via", NEIGHBOUR_OF_THE_HOST)
            _await_carrier("up0")
            # Everything the packets need is loaded, and none of it was sent by a guest.
            yield Lab(internet, ear, stack, private=private)


def _await_carrier(link: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if b"LOWER_UP" in process.run(["ip", "link", "show", link], timeout=10).stdout:
            return
        time.sleep(0.01)
