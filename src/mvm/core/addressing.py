"""Addresses, device names and user ids: all computed from two small numbers, so that they can be checked
anywhere.

    subnet index   1..4095, one per tenant, from `Allocations`; never given out twice
    slot           0..252, one per instance inside its tenant; given back when the instance is destroyed

    10.240.0.0/12 + index * 256    the tenant's /24; .1 gateway, .2 + slot the instance, .255 broadcast
    mvm-b<index>                   bridge       (Linux interface names have at most 15 characters)
    mvm-t<index>s<slot>            tap
    UID_BASE + index * 256 + slot  uid and gid of the instance's VMM

Index 0 is the host's and belongs to no tenant. A MAC is a hash of the instance id with the locally
administered bit set and the multicast bit clear, so it survives restarts, restores and moves between nodes.

Everything here is pure. `Allocations` is a value: allocating returns a new one, which the caller persists
before it uses what was allocated."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.core import codec, limits
from mvm.core.errors import Conflict, InvalidInput, NotFound, ResourceExhausted
from mvm.core.ids import InstanceId, TenantId

NETWORK: Final = (10 << 24) | (240 << 16)
NETWORK_TEXT: Final = "10.240.0.0/12"
PREFIX: Final = 24

# Above the ranges systemd and useradd hand out, below 2**31 (some tools still read uids as signed).
UID_BASE: Final = 1_900_000_000

_OCTET: Final = r"(?:0|[1-9][0-9]?|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_IPV4: Final = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")
_MAC: Final = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")

SubnetIndex = Annotated[int, Meta(ge=1, le=limits.SUBNETS - 1)]
Slot = Annotated[int, Meta(ge=0, le=limits.SLOTS_PER_TENANT - 1)]


def parse_ipv4(untrusted: str) -> int:
    """Dotted decimal without leading zeros, as a number. Raises InvalidInput."""
    if len(untrusted) > 15 or not _IPV4.fullmatch(untrusted):
        raise InvalidInput(
            f"{untrusted[:40]!a} is not an IPv4 address",
            details="Four numbers from 0 to 255 with dots between them, without leading zeros.",
            resolution="Use, for example, 10.240.1.2.",
        )
    a, b, c, d = (int(part) for part in untrusted.split("."))
    return a << 24 | b << 16 | c << 8 | d


def format_ipv4(address: int) -> str:
    return ".".join(str(address >> shift & 0xFF) for shift in (24, 16, 8, 0))


def parse_mac(untrusted: str) -> str:
    """A unicast, locally administered MAC in its one canonical form (lower case, colons). Raises
    InvalidInput."""
    text = untrusted.lower() if len(untrusted) == 17 else untrusted
    if not _MAC.fullmatch(text):
        raise InvalidInput(
            f"{untrusted[:40]!a} is not a MAC address",
            details="Six pairs of hexadecimal digits with colons between them.",
            resolution="Use, for example, 02:00:00:00:00:01, or leave the MAC out to have one derived.",
        )
    first = int(text[:2], 16)
    if first & 0x01 or not first & 0x02:
        raise InvalidInput(
            f"{text} is not a unicast, locally administered MAC address",
            details="The second digit of such an address is 2, 6, a or e.",
            resolution=f"Use, for example, {first & 0xFC | 0x02:02x}{text[2:]}.",
        )
    return text


def _check_index(index: int) -> None:
    if not 1 <= index < limits.SUBNETS:
        raise InvalidInput(
            f"{index} is not a subnet index",
            details=f"Indices run from 1 to {limits.SUBNETS - 1}.",
            resolution="Use an index that was allocated.",
        )


def _check_slot(slot: int) -> None:
    if not 0 <= slot < limits.SLOTS_PER_TENANT:
        raise InvalidInput(
            f"{slot} is not an instance slot",
            details=f"Slots run from 0 to {limits.SLOTS_PER_TENANT - 1}.",
            resolution="Use a slot that was allocated.",
        )


def _network(index: int) -> int:
    _check_index(index)
    return NETWORK + index * 256


def subnet(index: int) -> str:
    """`10.240.1.0/24`"""
    return f"{format_ipv4(_network(index))}/{PREFIX}"


def gateway(index: int) -> str:
    """`10.240.1.1`: the bridge's address, the guests' default route."""
    return format_ipv4(_network(index) + 1)


def broadcast(index: int) -> str:
    return format_ipv4(_network(index) + 255)


def instance_ip(index: int, slot: int) -> str:
    """`10.240.1.2` for slot 0."""
    _check_slot(slot)
    return format_ipv4(_network(index) + 2 + slot)


def bridge_name(index: int) -> str:
    _check_index(index)
    return f"mvm-b{index}"


def tap_name(index: int, slot: int) -> str:
    _check_index(index)
    _check_slot(slot)
    return f"mvm-t{index}s{slot}"


def instance_uid(index: int, slot: int) -> int:
    """The uid, and gid, that only this instance's VMM runs as."""
    _check_index(index)
    _check_slot(slot)
    return UID_BASE + index * 256 + slot


def instance_mac(instance: InstanceId) -> str:
    """`x2/x6/xa/xe:...`: 46 bits of sha256 over the instance id."""
    digest = bytearray(hashlib.sha256(b"mvm mac\0" + instance.encode()).digest()[:6])
    digest[0] = digest[0] & 0xFC | 0x02
    return ":".join(f"{byte:02x}" for byte in digest)


def locate(ip: str) -> tuple[int, int]:
    """(subnet index, slot) of an instance address. Raises InvalidInput for any address that cannot be one."""
    offset = parse_ipv4(ip) - NETWORK
    index, host = divmod(offset, 256)
    why = ""
    if not 0 <= offset < limits.SUBNETS * 256:
        why = f"It is outside {NETWORK_TEXT}."
    elif index == 0:
        why = "The first /24 of the range is the host's."
    elif host == 0:
        why = "It is the address of the network itself."
    elif host == 1:
        why = "It is the gateway's address."
    elif host == 255:
        why = "It is the broadcast address."
    if why:
        raise InvalidInput(
            f"{ip} cannot be an instance's address",
            details=why,
            resolution=f"Use an address ending in .2 to .254 inside {NETWORK_TEXT}, or leave it out.",
        )
    return index, host - 2


def check_fixed_ip(ip: str, index: int) -> int:
    """The slot of a fixed address in the tenant's subnet. Raises InvalidInput if it is not there."""
    found, slot = locate(ip)
    if found != index:
        raise InvalidInput(
            f"{ip} is not in the tenant's subnet {subnet(index)}",
            details="A fixed address decides the subnet only when the tenant is created.",
            resolution=f"Use an address from {instance_ip(index, 0)} to "
            f"{instance_ip(index, limits.SLOTS_PER_TENANT - 1)}.",
        )
    return slot


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: TenantId
    index: SubnetIndex


class Allocations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which tenant has which subnet. An index, once given out, is in `leases` or in `retired` for ever.

    `next_index`: no index at or above it was given out, except those that a fixed address asked for.
    """

    next_index: Annotated[int, Meta(ge=1, le=limits.SUBNETS)] = 1
    leases: Annotated[tuple[Lease, ...], Meta(max_length=limits.TENANTS)] = ()
    retired: Annotated[tuple[SubnetIndex, ...], Meta(max_length=limits.TENANTS)] = ()
    schema: Annotated[int, Meta(ge=1, le=1)] = 1

    def index_of(self, tenant: TenantId) -> int:
        """Raises NotFound."""
        for lease in self.leases:
            if lease.tenant == tenant:
                return lease.index
        raise NotFound(
            f"{tenant} has no subnet",
            details=f"{len(self.leases)} tenants have one.",
            resolution="List tenants with: mvm tenant list",
        )


def allocate(now: Allocations, tenant: TenantId, *, fixed_ip: str | None = None) -> tuple[Allocations, int]:
    """(new value, subnet index) for `tenant`; the one it has if it has one.

    With `fixed_ip` the index is the one that holds that address. Raises Conflict if that is somebody else's
    or was used before, or if the tenant already has another; ResourceExhausted when every index was given
    out once."""
    mine = next((lease.index for lease in now.leases if lease.tenant == tenant), None)
    if mine is not None:
        if fixed_ip is not None:
            check_fixed_ip(fixed_ip, mine)
        return now, mine
    used = {lease.index: str(lease.tenant) for lease in now.leases}
    used.update(dict.fromkeys(now.retired, "a tenant that was destroyed"))
    if fixed_ip is not None:
        index, _ = locate(fixed_ip)
        if index in used:
            raise Conflict(
                f"{fixed_ip} is in {subnet(index)}, which belongs to {used[index]}",
                details="A subnet is one tenant's for ever; it is given to no other, even after a destroy.",
                resolution="Choose an address in an unused subnet, or leave the address out.",
            )
        next_index = now.next_index
    else:
        index = next((n for n in range(now.next_index, limits.SUBNETS) if n not in used), 0)
        if not index:
            raise ResourceExhausted(
                "every subnet was given out",
                details=f"{NETWORK_TEXT} has {limits.TENANTS} subnets; {len(now.leases)} are in use and "
                f"{len(now.retired)} belonged to tenants that were destroyed.",
                resolution="Place the tenant in another fleet.",
            )
        next_index = index + 1
    leases = tuple(sorted((*now.leases, Lease(tenant, index)), key=lambda lease: lease.index))
    return msgspec.structs.replace(now, next_index=next_index, leases=leases), index


def release(now: Allocations, tenant: TenantId) -> Allocations:
    """Retire the tenant's index. Releasing what is not held changes nothing."""
    gone = tuple(lease.index for lease in now.leases if lease.tenant == tenant)
    if not gone:
        return now
    return msgspec.structs.replace(
        now,
        leases=tuple(lease for lease in now.leases if lease.tenant != tenant),
        retired=tuple(sorted((*now.retired, *gone))),
    )


def encode_allocations(value: Allocations) -> bytes:
    return codec.encode(value)


def decode_allocations(untrusted: bytes) -> Allocations:
    """Raises InvalidInput, also where two tenants hold one index or one tenant two."""
    value = codec.decode(
        untrusted, Allocations, limit=limits.ALLOCATIONS_JSON_BYTES, what="the address allocation file"
    )
    indices = [lease.index for lease in value.leases] + list(value.retired)
    tenants = {lease.tenant for lease in value.leases}
    if len(set(indices)) != len(indices) or len(tenants) != len(value.leases):
        raise InvalidInput(
            "the address allocation file contradicts itself",
            details="A subnet index or a tenant is listed twice.",
            resolution="Restore the file from a backup; do not edit it by hand.",
        )
    return value


def free_slot(taken: Collection[int], *, reserved: Collection[int] = ()) -> int:
    """The lowest slot in neither set. `reserved`: the slot of the tenant's fixed address. Raises
    ResourceExhausted."""
    for slot in range(limits.SLOTS_PER_TENANT):
        if slot not in taken and slot not in reserved:
            return slot
    raise ResourceExhausted(
        "the tenant's subnet is full",
        details=f"A tenant has addresses for {limits.SLOTS_PER_TENANT} instances.",
        resolution="Destroy an instance, or scale a pool down: mvm pool scale",
    )
