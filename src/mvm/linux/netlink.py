"""rtnetlink(7), as much of it as links need: build requests, send a batch, read the answers.

Why by hand: see docs/adr/0002. The whole protocol used here is a 16-byte header and type-length-value
attributes, and a batch of requests is one system call of well under a millisecond, where starting `ip` or
importing a netlink library costs several to a hundred times as much on the path that wakes a guest.

Integers are host byte order. Building and parsing are pure; only `Netlink` talks to the kernel, in the
network namespace of the thread that opened it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

# <linux/netlink.h>, <linux/rtnetlink.h>, <linux/if_link.h>, <linux/if_addr.h>, <linux/veth.h>
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MASTER, IFLA_PROTINFO, IFLA_LINKINFO = 1, 3, 10, 12, 18
IFLA_AF_SPEC, IFLA_NET_NS_FD = 26, 28
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
VETH_INFO_PEER = 1
IFLA_INET6_ADDR_GEN_MODE = 8
IFLA_BR_FORWARD_DELAY, IFLA_BR_STP_STATE, IFLA_BR_MCAST_SNOOPING = 1, 5, 23
IFLA_BRPORT_LEARNING, IFLA_BRPORT_ISOLATED = 8, 33
IFLA_CARRIER = 33
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFF_UP = 0x1
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
_BUFFER = 1 << 16


class Request(NamedTuple):
    """One message: `kind` is RTM_*, `flags` NLM_F_* beside REQUEST and ACK, `what` names it in an error."""

    kind: int
    flags: int
    body: bytes
    what: str


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    size = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(size, kind) + payload + bytes(-size % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=B", value))


def link(index: int = 0, *attributes: bytes, up: bool = False, family: int = 0) -> bytes:
    """The body of a link request: interface `index` (0: by name or new); `up` sets IFF_UP, else flags stay."""
    return _IFINFO.pack(family, 0, index, IFF_UP * up, IFF_UP * up) + b"".join(attributes)


def address(index: int, prefix: int, local: bytes) -> bytes:
    """The body of an IPv4 address request: `local` is four bytes."""
    head = _IFADDR.pack(socket.AF_INET, prefix, 0, 0, index)
    return head + attribute(IFA_LOCAL, local) + attribute(IFA_ADDRESS, local)


def attributes(data: bytes) -> dict[int, bytes]:
    """Type -> payload. ValueError if a length points outside."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if size < _ATTRIBUTE.size or at + size > len(data):
            raise ValueError("an attribute's length points outside its message")
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + size]
        at += size + (-size % 4)
    return found


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, sequence number, body) of each message in a datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        if size < _HEADER.size or at + size > len(data):
            raise ValueError("a message's length points outside its datagram")
        yield kind, sequence, data[at + _HEADER.size : at + size]
        at += size + (-size % 4)


class LinkInfo(NamedTuple):
    """`master`: ifindex of the bridge it is a port of, or 0. `kind`: as in `ip link add type`, "" for
    hardware. `carrier`: of a tap, that some process has it open."""

    ifindex: int
    name: str
    kind: str
    master: int
    up: bool
    mac: bytes
    carrier: bool = False


class AddressInfo(NamedTuple):
    ifindex: int
    prefix: int
    local: bytes


def parse_link(body: bytes) -> LinkInfo:
    _, _, index, flags, _ = _IFINFO.unpack_from(body)
    found = attributes(body[_IFINFO.size :])
    info = attributes(found.get(IFLA_LINKINFO, b""))
    return LinkInfo(
        ifindex=index,
        name=found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "replace"),
        kind=info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode("utf-8", "replace"),
        master=int.from_bytes(found.get(IFLA_MASTER, b""), sys.byteorder),
        up=bool(flags & IFF_UP),
        mac=found.get(IFLA_ADDRESS, b""),
        carrier=found.get(IFLA_CARRIER, b"\0")[:1] != b"\0",
    )


def parse_address(body: bytes) -> AddressInfo:
    _, prefix, _, _, index = _IFADDR.unpack_from(body)
    found = attributes(body[_IFADDR.size :])
    return AddressInfo(index, prefix, found.get(IFA_LOCAL, found.get(IFA_ADDRESS, b"")))


class Netlink:
    """A route socket. The kernel's refusals are OSErrors that name the request."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.bind((0, 0))
        self._sequence = 0

    def execute(self, requests: Iterable[Request]) -> None:
        """Send all in one go; the kernel takes them in order. Raises the first refusal, after all were
        answered."""
        waiting: dict[int, Request] = {}
        batch = bytearray()
        for request in requests:
            self._sequence += 1
            waiting[self._sequence] = request
            flags = NLM_F_REQUEST | NLM_F_ACK | request.flags
            size = _HEADER.size + len(request.body)
            batch += (
                _HEADER.pack(size, request.kind, flags, self._sequence, 0) + request.body + bytes(-size % 4)
            )
        if not batch:
            return
        self._socket.send(batch)
        first: OSError | None = None
        while waiting:
            for kind, sequence, body in messages(self._socket.recv(_BUFFER)):
                if kind != NLMSG_ERROR or sequence not in waiting:
                    continue
                request = waiting.pop(sequence)
                (code,) = _ERROR.unpack_from(body)
                if code and first is None:
                    first = OSError(-code, f"{os.strerror(-code)} ({request.what})")
        if first is not None:
            raise first

    def find_link(self, name: str) -> LinkInfo | None:
        """The link of that name, or None."""
        self._sequence += 1
        body = link(0, text(IFLA_IFNAME, name))
        self._socket.send(
            _HEADER.pack(_HEADER.size + len(body), RTM_GETLINK, NLM_F_REQUEST, self._sequence, 0) + body
        )
        while True:
            for kind, sequence, answer in messages(self._socket.recv(_BUFFER)):
                if sequence != self._sequence:
                    continue
                if kind == RTM_NEWLINK:
                    return parse_link(answer)
                if kind == NLMSG_ERROR:
                    (code,) = _ERROR.unpack_from(answer)
                    if -code == errno.ENODEV:
                        return None
                    raise OSError(-code, f"{os.strerror(-code)} (look up {name})")

    def links(self) -> list[LinkInfo]:
        return [parse_link(body) for body in self._dump(RTM_GETLINK, RTM_NEWLINK, link())]

    def addresses(self) -> list[AddressInfo]:
        """Every IPv4 address of the namespace."""
        request = _IFADDR.pack(socket.AF_INET, 0, 0, 0, 0)
        return [parse_address(body) for body in self._dump(RTM_GETADDR, RTM_NEWADDR, request)]

    def _dump(self, ask: int, want: int, body: bytes) -> Iterator[bytes]:
        self._sequence += 1
        flags = NLM_F_REQUEST | NLM_F_DUMP
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), ask, flags, self._sequence, 0) + body)
        while True:
            for kind, sequence, answer in messages(self._socket.recv(_BUFFER)):
                if sequence != self._sequence:
                    continue
                if kind == want:
                    yield answer
                elif kind == NLMSG_DONE:
                    return
                elif kind == NLMSG_ERROR:
                    (code,) = _ERROR.unpack_from(answer)
                    raise OSError(-code, os.strerror(-code))

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
