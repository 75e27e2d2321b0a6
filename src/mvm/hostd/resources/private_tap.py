"""The network of a VMM that opens its tap by name: a network namespace of its own, and one way out of it.

    the host's namespace                          the VMM's
    tenant's bridge - <tap>, a veth  ===========  mvm-out - mvm-in, a bridge - <tap>, the tap itself

Rules. To the host a VMM of this kind looks like any other: the port of the tenant's bridge has the name that a tap has
there (`network.open_tap`), is isolated, has no IPv6 and comes up last, so rules, anti-spoofing and verification are the
same. Inside, the tap has that name as well, whatever host a sleeping guest wakes on, and is its owner's alone. The
inner bridge passes frames on and nothing more: it has no address, so the kernel answers nobody there; it speaks
neither spanning tree nor multicast; it learns no MACs, of which a guest could make up any number before the host's
rules see them.

Lifetime. The namespace is what its descriptor and the VMM hold, and nothing else: nobody gives it a name. With the last
of them the kernel removes all of it, the host's end included: in a moment of its own, some 50 ms later. Who needs the
name or the bridge at once removes the port (`network.remove_port`).

IPv6 is off inside by having no link make itself an address (IFLA_INET6_ADDR_GEN_MODE). The sysctls are reached by a
path, and where a daemon has parts of /proc/sys mounted, a path may lead to those of the host.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
import time
from typing import Final

from mvm.core.errors import Conflict
from mvm.hostd.resources import network
from mvm.linux import namespaces
from mvm.linux import netlink as nl

_TUNSETIFINDEX, _TUNSETPERSIST = 0x400454DA, 0x400454CB
_BRIDGE, _OUT, _TAP = 100, 101, 102
"""Interface indices, chosen by us: the namespace is new, and so one batch of requests can name what it makes."""
_GEN_MODE_NONE: Final = 1
_GONE_S: Final = 2.0


def open_private_tap(name: str, owner_uid: int, bridge: str) -> int:
    """An owned descriptor of a new network namespace with a tap `name` in it, whose frames come out of the port `name`
    of `bridge`. Only `owner_uid` can attach to it, by name.

    Everything ends with the descriptor and the last process inside. Conflict if a link of that name exists and stays.
    """
    network.check_link_name(name)
    _await_gone(name)
    made: list[int | BaseException] = []
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def build() -> None:
        try:
            made.append(_build(name, owner_uid, outside))
        except BaseException as error:
            made.append(error)

    try:
        # A namespace is a thread's: one that ends afterwards has no way back to find, and cannot take a wrong one.
        worker = threading.Thread(target=build, name="mvm-netns")
        worker.start()
        worker.join()
    finally:
        os.close(outside)
    (result,) = made
    if isinstance(result, BaseException):
        raise result
    try:
        network.plug(name, bridge)
    except BaseException:
        os.close(result)
        network.remove_port(name)
        raise
    return result


def _await_gone(name: str) -> None:
    """Give the port of a VMM that has just ended its time: the kernel takes namespaces down in its own good one."""
    deadline = time.monotonic() + _GONE_S
    with nl.Netlink() as route:
        while time.monotonic() < deadline:
            found = route.find_link(name)
            if found is None or found.kind != "veth":
                return
            time.sleep(0.005)


def render_inside(name: str, outside: int) -> list[nl.Request]:
    """What is asked of the new namespace, its tap being there. `outside`: a descriptor of the one with the bridge."""
    silent = nl.nested(
        nl.IFLA_AF_SPEC,
        nl.nested(socket.AF_INET6, nl.u8(nl.IFLA_INET6_ADDR_GEN_MODE, _GEN_MODE_NONE)),
    )
    # A kernel without IPv6 has nothing to turn off, and refuses to be asked.
    quiet = silent if os.path.isdir("/proc/sys/net/ipv6") else b""
    master = nl.u32(nl.IFLA_MASTER, _BRIDGE)
    learns_nothing = nl.nested(nl.IFLA_PROTINFO, nl.u8(nl.IFLA_BRPORT_LEARNING, 0))
    new = nl.NLM_F_CREATE | nl.NLM_F_EXCL
    bridge = nl.link(_BRIDGE, nl.text(nl.IFLA_IFNAME, "mvm-in"), network.bridge_kind())
    port = nl.link(0, nl.text(nl.IFLA_IFNAME, name), nl.u32(nl.IFLA_NET_NS_FD, outside))
    veth = nl.nested(
        nl.IFLA_LINKINFO,
        nl.attribute(nl.IFLA_INFO_KIND, b"veth"),
        nl.nested(nl.IFLA_INFO_DATA, nl.attribute(nl.VETH_INFO_PEER, port)),
    )
    out = nl.link(_OUT, nl.text(nl.IFLA_IFNAME, "mvm-out"), master, veth)
    return [
        nl.Request(nl.RTM_NEWLINK, new, bridge, f"create the bridge of {name}"),
        nl.Request(nl.RTM_NEWLINK, new, out, f"create the veth pair of {name}"),
        nl.Request(nl.RTM_SETLINK, 0, nl.link(_TAP, master), f"attach the tap {name}"),
        *(
            nl.Request(
                nl.RTM_SETLINK, 0, nl.link(index, learns_nothing, family=socket.AF_BRIDGE), f"set up {name}"
            )
            for index in (_OUT, _TAP)
        ),
        *(
            nl.Request(nl.RTM_SETLINK, 0, nl.link(index, quiet), f"turn IPv6 off for {name}")
            for index in (_BRIDGE, _OUT, _TAP)
            if quiet
        ),
        *(
            nl.Request(nl.RTM_SETLINK, 0, nl.link(index, up=True), f"bring up the way to {name}")
            for index in (_BRIDGE, _OUT, _TAP)
        ),
    ]


def _build(name: str, owner_uid: int, outside: int) -> int:
    """In a thread of its own, which is in the new namespace from here on."""
    try:
        namespaces.unshare(("net",))
    except OSError as error:
        network.explain(error, "make a network namespace")
    tap = network.open_tun()
    try:
        fcntl.ioctl(tap, _TUNSETIFINDEX, struct.pack("=I", _TAP))
        network.name_tap(tap, name, owner_uid)
        fcntl.ioctl(tap, _TUNSETPERSIST, 1)  # within the namespace, which is not
        with nl.Netlink() as route:
            try:
                route.execute(render_inside(name, outside))
            except OSError as error:
                if error.errno == errno.EEXIST:
                    raise Conflict(
                        f"the link {name} exists already",
                        details="it goes with its VMM, so that still runs, or has ended a moment ago",
                        resolution=f"look at it: ip -details link show {name}",
                    ) from error
                network.explain(error, f"create the veth pair of {name}", module="veth")
    finally:
        os.close(tap)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
