"""Per-tenant bridges and taps.

Rules. A bridge belongs to one tenant and holds the tenant's gateway address; its MAC is made from that
address, so guests that slept keep a valid neighbour entry. A tap that is given to its VMM as a descriptor
(`open_tap`) is NOT persistent: it exists exactly as long as some process holds it, so a dead VMM cannot leave
one behind and there is nothing to clean up. A VMM that opens its tap by name has it in a network namespace of
its own, and on the bridge a port of the tap's name (`private_tap`). Ports are isolated from each other before
they come up (instances of one tenant reach the gateway, not one another). IPv6 is off before a link comes up, so
not even a link-local address or a router solicitation is ever sent.

`render_*` and `parse_links` are pure. The functions that act change the network namespace of the calling
thread. They go through rtnetlink directly (docs/adr/0002); `inspect` reads back through `ip`, so what
checks is not what wrote.

Ordering, by the caller, under the tenant's lock: `ensure_bridge`, then `open_tap` or `open_private_tap`;
`remove_port` when no VMM is left; `remove_bridge_if_unused` at any time.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from typing import TYPE_CHECKING, NoReturn

import msgspec

from mvm.core.errors import Conflict, InvalidInput, MissingPrerequisite
from mvm.linux import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Iterable

_AF_BRIDGE = 7
_TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETOWNER = 0x400454CA, 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x2, 0x1000, 0x4000, 0x8000
_IFREQ = struct.Struct("16sH22x")
_OCTETS = frozenset(str(n) for n in range(256))
_LINK_NAME = re.compile(r"[a-z0-9-]{1,15}")
"""IFNAMSIZ is 16 with its closing zero. `all` and `default` would be sysctls of every link."""
_IP_TIMEOUT_S = 10.0


class BridgeSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tenant's bridge. `gateway`: dotted IPv4 of the bridge itself; `prefix`: bits of the subnet, 8 to
    30."""

    name: str
    gateway: str
    prefix: int

    @property
    def mac(self) -> str:
        return gateway_mac(self.gateway)


class ObservedLink(msgspec.Struct, frozen=True):
    """A link as the kernel reports it. `addresses`: `a.b.c.d/n` and IPv6 alike; `master`: "" if it is no
    port.

    `isolated`, `stp` and `forward_delay_s` are None where they do not apply.
    """

    name: str
    kind: str
    mac: str
    up: bool
    mtu: int
    master: str = ""
    isolated: bool | None = None
    stp: bool | None = None
    forward_delay_s: float | None = None
    addresses: tuple[str, ...] = ()


def packed_ipv4(address: str) -> bytes:
    """Four bytes. InvalidInput unless it is a plain dotted IPv4 address."""
    parts = address.split(".")
    # No leading zeros: some tools read them as octal.
    if len(parts) == 4 and all(part in _OCTETS for part in parts):
        return bytes(int(part) for part in parts)
    raise InvalidInput(f"{address!r} is not an IPv4 address", resolution="write it as 10.240.1.1")


def gateway_mac(gateway: str) -> str:
    """0a:6d and the address: locally administered, one-to-one with the gateway."""
    return ":".join(f"{octet:02x}" for octet in b"\x0a\x6d" + packed_ipv4(gateway))


def check_link_name(name: str) -> str:
    """InvalidInput unless the kernel and sysctl paths can take it: 1 to 15 of a-z 0-9 - ."""
    if _LINK_NAME.fullmatch(name) and name not in ("all", "default"):
        return name
    raise InvalidInput(f"{name!r} cannot name a link", details="1 to 15 of a-z, 0-9 and -")


def bridge_kind() -> bytes:
    """The attribute that makes a new link a bridge: one that passes frames on from the first, and sends none itself."""
    # Snooping off: with it the bridge itself joins a multicast group and says so to every guest.
    data = nl.nested(
        nl.IFLA_INFO_DATA,
        nl.u32(nl.IFLA_BR_STP_STATE, 0),
        nl.u32(nl.IFLA_BR_FORWARD_DELAY, 0),
        nl.u8(nl.IFLA_BR_MCAST_SNOOPING, 0),
    )
    return nl.nested(nl.IFLA_LINKINFO, nl.attribute(nl.IFLA_INFO_KIND, b"bridge"), data)


def render_bridge(spec: BridgeSpec) -> nl.Request:
    """The request that creates the bridge, down and without address."""
    body = nl.link(
        0,
        nl.text(nl.IFLA_IFNAME, check_link_name(spec.name)),
        nl.attribute(nl.IFLA_ADDRESS, bytes.fromhex(spec.mac.replace(":", ""))),
        bridge_kind(),
    )
    return nl.Request(nl.RTM_NEWLINK, nl.NLM_F_CREATE | nl.NLM_F_EXCL, body, f"create bridge {spec.name}")


def render_bridge_state(
    spec: BridgeSpec, found: nl.LinkInfo, addresses: Iterable[nl.AddressInfo]
) -> list[nl.Request]:
    """What brings an existing bridge to `spec`: nothing if it is there already."""
    wanted = nl.AddressInfo(found.ifindex, spec.prefix, packed_ipv4(spec.gateway))
    mine = [address for address in addresses if address.ifindex == found.ifindex]
    requests = [
        nl.Request(nl.RTM_DELADDR, 0, nl.address(*address), f"remove a stale address from {spec.name}")
        for address in mine
        if address != wanted
    ]
    mac = bytes.fromhex(spec.mac.replace(":", ""))
    if found.mac != mac:
        body = nl.link(found.ifindex, nl.attribute(nl.IFLA_ADDRESS, mac))
        requests.append(nl.Request(nl.RTM_SETLINK, 0, body, f"set the MAC of {spec.name}"))
    if wanted not in mine:
        what = f"give {spec.gateway}/{spec.prefix} to {spec.name}"
        flags = nl.NLM_F_CREATE | nl.NLM_F_REPLACE
        requests.append(nl.Request(nl.RTM_NEWADDR, flags, nl.address(*wanted), what))
    if not found.up:
        requests.append(
            nl.Request(nl.RTM_SETLINK, 0, nl.link(found.ifindex, up=True), f"bring {spec.name} up")
        )
    return requests


def render_port(tap: int, bridge: int, name: str) -> list[nl.Request]:
    """Attach, isolate, and only then bring up: at no moment does the port talk to its neighbours."""
    isolated = nl.nested(nl.IFLA_PROTINFO, nl.u8(nl.IFLA_BRPORT_ISOLATED, 1))
    return [
        nl.Request(nl.RTM_SETLINK, 0, nl.link(tap, nl.u32(nl.IFLA_MASTER, bridge)), f"attach {name}"),
        nl.Request(nl.RTM_SETLINK, 0, nl.link(tap, isolated, family=_AF_BRIDGE), f"isolate {name}"),
        nl.Request(nl.RTM_SETLINK, 0, nl.link(tap, up=True), f"bring {name} up"),
    ]


def ensure_bridge(spec: BridgeSpec) -> None:
    """Make the bridge be there as specified; again is harmless. Conflict if the name belongs to something
    else."""
    if not 8 <= spec.prefix <= 30:
        raise InvalidInput(f"a subnet of /{spec.prefix} has no room for guests", details="use /8 to /30")
    with nl.Netlink() as route:
        found = route.find_link(check_link_name(spec.name))
        if found is None:
            try:
                route.execute([render_bridge(spec)])
            except FileExistsError:
                pass  # made by somebody else in between; checked below
            except OSError as error:
                explain(error, f"create the bridge {spec.name}")
            found = route.find_link(spec.name)
        if found is None or found.kind != "bridge":
            kind = "gone again" if found is None else f"of type {found.kind or 'hardware'}"
            raise Conflict(
                f"the link {spec.name} is in the way",
                details=f"it is {kind}, not a bridge",
                resolution=f"remove it: ip link del {spec.name}",
            )
        disable_ipv6(spec.name)
        try:
            route.execute(render_bridge_state(spec, found, route.addresses()))
        except OSError as error:
            explain(error, f"set up the bridge {spec.name}")


def open_tap(name: str, owner_uid: int, bridge: str) -> int:
    """An owned descriptor of a new tap: port of `bridge`, isolated, up, with a virtio-net header, default
    MTU.

    The tap vanishes with the last descriptor. `owner_uid` is the only user that could attach to it by name.
    Conflict if a tap of that name exists, which means that a VMM still runs.
    """
    fd = open_tun()
    try:
        name_tap(fd, name, owner_uid)
        plug(name, bridge)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_tun() -> int:
    """An owned descriptor that a tap of this thread's namespace can be made with."""
    try:
        return os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise MissingPrerequisite(
            f"{_TUN} cannot be opened",
            details=str(error),
            resolution="run as root, and load the module: modprobe tun",
        ) from error


def name_tap(fd: int, name: str, owner_uid: int) -> None:
    """Make the tap of `open_tun`'s descriptor. Conflict if the name is taken."""
    import fcntl

    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(check_link_name(name).encode(), flags))
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EEXIST, errno.EINVAL):
            raise Conflict(
                f"the link {name} exists already",
                details="a tap lives as long as the process that holds it, so its VMM still runs",
                resolution=f"find the process: grep -l {name} /proc/*/fdinfo/*",
            ) from error
        explain(error, f"create the tap {name}")
    fcntl.ioctl(fd, _TUNSETOWNER, owner_uid)


def plug(name: str, bridge: str) -> None:
    """Make a new link, down, a port of `bridge` as ports have to be. Conflict if there is no such bridge."""
    disable_ipv6(name)
    with nl.Netlink() as route:
        master = route.find_link(bridge)
        port = route.find_link(name)
        if master is None or master.kind != "bridge" or port is None:
            raise Conflict(f"there is no bridge {bridge} to attach {name} to")
        try:
            route.execute(render_port(port.ifindex, master.ifindex, name))
        except OSError as error:
            explain(error, f"attach {name} to {bridge}")


def remove_port(name: str) -> None:
    """Remove what a VMM that has ended left of its port, if it is there: the kernel removes a namespace later than its
    last process, and earlier versions of mvm made taps that stay.

    Conflict if it is a tap that somebody has open, or nothing of ours. The caller knows that no VMM is left.
    """
    with nl.Netlink() as route:
        found = route.find_link(check_link_name(name))
        if found is None:
            return
        if found.kind != "veth" and (found.kind != "tun" or found.carrier):
            raise Conflict(
                f"the port {name} cannot be removed",
                details="a process has it open"
                if found.kind == "tun"
                else f"it is of type {found.kind or 'hardware'}",
                resolution=f"find the process: grep -l {name} /proc/*/fdinfo/*",
            )
        try:
            route.execute([nl.Request(nl.RTM_DELLINK, 0, nl.link(found.ifindex), f"remove port {name}")])
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise


def remove_bridge_if_unused(name: str) -> bool:
    """Remove the bridge unless it has ports; True if it is gone. The tenant's lock keeps new ports away
    meanwhile."""
    with nl.Netlink() as route:
        found = route.find_link(check_link_name(name))
        if found is None:
            return True
        if found.kind != "bridge":
            kind = found.kind or "hardware"
            raise Conflict(f"the link {name} is not a bridge", details=f"it is of type {kind}")
        if any(link.master == found.ifindex for link in route.links()):
            return False
        route.execute([nl.Request(nl.RTM_DELLINK, 0, nl.link(found.ifindex), f"remove bridge {name}")])
        return True


def disable_ipv6(name: str) -> None:
    """Turn IPv6 off on a link; nothing to do in a kernel without it. The sysctl is of the thread's own
    namespace."""
    try:
        fd = os.open(
            f"/proc/sys/net/ipv6/conf/{check_link_name(name)}/disable_ipv6", os.O_WRONLY | os.O_CLOEXEC
        )
    except FileNotFoundError:
        if os.path.isdir("/proc/sys/net/ipv6/conf/all"):
            raise
        return
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)


def parse_links(untrusted_json: bytes) -> dict[str, ObservedLink]:
    """Name -> link from `ip -json -details address show`. InvalidInput if it is not that."""
    try:
        rows = msgspec.json.decode(untrusted_json or b"[]", type=list[_Row])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("the list of links cannot be read", details=str(error)) from error
    return {row.ifname: _observed(row) for row in rows if row.ifname}


def inspect() -> dict[str, ObservedLink]:
    """Every link of this thread's namespace, by `ip`. Not for the wake path: it starts a program."""
    from mvm.linux import process

    argv = ["ip", "-json", "-details", "address", "show"]
    return parse_links(process.run(argv, timeout=_IP_TIMEOUT_S).stdout)


class _PortData(msgspec.Struct, frozen=True):
    isolated: bool | None = None


class _BridgeData(msgspec.Struct, frozen=True):
    stp_state: int | None = None
    forward_delay: int | None = None  # hundredths of a second


class _LinkInfo(msgspec.Struct, frozen=True):
    info_kind: str = ""
    info_slave_kind: str = ""
    info_data: dict[str, object] = {}
    info_slave_data: dict[str, object] = {}


class _Address(msgspec.Struct, frozen=True):
    local: str = ""
    prefixlen: int = 0


class _Row(msgspec.Struct, frozen=True):
    ifname: str = ""
    flags: list[str] = []
    mtu: int = 0
    master: str = ""
    address: str = ""
    linkinfo: _LinkInfo = _LinkInfo()
    addr_info: list[_Address] = []


def _observed(row: _Row) -> ObservedLink:
    info = row.linkinfo
    # The data of other kinds of link has other shapes, so only that of bridges is looked at.
    bridge, port = _BridgeData(), _PortData()
    try:
        if info.info_kind == "bridge":
            bridge = msgspec.convert(info.info_data, _BridgeData)
        if info.info_slave_kind == "bridge":
            port = msgspec.convert(info.info_slave_data, _PortData)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"the link {row.ifname} cannot be read", details=str(error)) from error
    return ObservedLink(
        name=row.ifname,
        kind=info.info_kind,
        mac=row.address,
        up="UP" in row.flags,
        mtu=row.mtu,
        master=row.master,
        isolated=port.isolated,
        stp=None if bridge.stp_state is None else bridge.stp_state != 0,
        forward_delay_s=None if bridge.forward_delay is None else bridge.forward_delay / 100,
        addresses=tuple(f"{address.local}/{address.prefixlen}" for address in row.addr_info),
    )


def explain(error: OSError, doing: str, *, module: str = "bridge") -> NoReturn:
    """Re-raise a refusal for lack of privilege or support as what the operator can act on."""
    if error.errno in (errno.EPERM, errno.EACCES):
        raise MissingPrerequisite(
            f"not allowed to {doing}", details=str(error), resolution="run as root (CAP_NET_ADMIN)"
        ) from error
    if error.errno == errno.EOPNOTSUPP:
        raise MissingPrerequisite(
            f"the kernel cannot {doing}", details=str(error), resolution=f"load the module: modprobe {module}"
        ) from error
    raise error
