"""Which state of the packet filter is live, in a few microseconds.

The kernel counts every committed change of a network namespace's nftables, whoever makes it, and numbers its
namespaces in a way that no two of one boot share a number. Boot, namespace and count together name one state: while
they stay, nobody has touched a rule. So a wake asks for them instead of reading or writing rules."""

from __future__ import annotations

import os
import socket
import struct

import msgspec

from mvm.core.errors import MissingPrerequisite
from mvm.linux import machine
from mvm.linux import netlink as nl

_NETLINK_NETFILTER = 12
_GETGEN, _NEWGEN = 10 << 8 | 16, 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES
_NFTA_GEN_ID = 1
_SO_NETNS_COOKIE = 71
_HEADER = struct.Struct("=IHHII")
_NFGEN = struct.Struct("=BBH")


class Generation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`namespace`: the kernel's cookie of the network namespace. `count`: of changes, 32 bits."""

    boot: str
    namespace: int
    count: int

    def is_next_after(self, earlier: Generation) -> bool:
        """Whether exactly one change lies between the two."""
        after = (earlier.count + 1) % (1 << 32) or 1  # the kernel leaves zero out
        return (self.boot, self.namespace, self.count) == (earlier.boot, earlier.namespace, after)


def live() -> Generation:
    """Of this thread's network namespace. MissingPrerequisite where the kernel has no nftables."""
    request = _HEADER.pack(_HEADER.size + _NFGEN.size, _GETGEN, nl.NLM_F_REQUEST, 1, 0) + _NFGEN.pack(0, 0, 0)
    try:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        ) as route:
            cookie = route.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
            route.bind((0, 0))
            route.send(request)
            count = _count(route.recv(1 << 16))
    except OSError as error:
        raise MissingPrerequisite(
            "the kernel's packet filter does not answer",
            details=str(error),
            resolution="Load the module (modprobe nf_tables) and run as root; Linux 5.14 or later is needed.",
        ) from error
    return Generation(machine.boot_id(), struct.unpack("=Q", cookie)[0], count)


def _count(answer: bytes) -> int:
    for kind, _, body in nl.messages(answer):
        if kind == _NEWGEN:
            return int.from_bytes(nl.attributes(body[_NFGEN.size :])[_NFTA_GEN_ID], "big")
        if kind == nl.NLMSG_ERROR:
            code = -struct.unpack_from("=i", body)[0]
            raise OSError(code, os.strerror(code))
    raise OSError(0, "no generation in the kernel's answer")
