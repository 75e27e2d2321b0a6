"""What a tenant asks for: `spec.json`, one document per tenant.

A `TenantSpec` holds at least one pool. Created without pools it has `default` with one instance, so that
somebody with one VM never meets the word. A pool may override the size of its instances; everything else is
the tenant's.

A spec is made by `new_tenant(...)` or read by `decode_spec(...)`; both apply every rule below and raise
`InvalidInput` naming the field. Encoding is canonical (see `mvm.core.codec`).

Rules that span fields: pool ids are unique; the instances of all pools fit one subnet; the fixed address
and MAC, if any, are those of instance 0 of the first pool; quotas, where set, are not below what the pools
ask for."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Final, Self

import msgspec
from msgspec import Meta

from mvm.core import addressing, codec, limits
from mvm.core.errors import InvalidInput, NotFound
from mvm.core.ids import DEFAULT_POOL, InstanceId, PoolId, TenantId

SCHEMA: Final = 1


class Profile(StrEnum):
    BASELINE = "baseline"
    MINIMAL = "minimal"
    PYTHON = "python"


class SeccompPolicy(StrEnum):
    BASELINE = "baseline"
    STRICT = "strict"


class Protocol(StrEnum):
    ANY = "any"
    TCP = "tcp"
    UDP = "udp"


Vcpus = Annotated[int, Meta(ge=limits.VCPUS_MIN, le=limits.VCPUS_MAX)]
SpecMemMib = Annotated[int, Meta(ge=limits.SPEC_MEM_MIB_MIN, le=limits.MEM_MIB_MAX)]
DataDiskMib = Annotated[int, Meta(ge=limits.DATA_DISK_MIB_MIN, le=limits.DATA_DISK_MIB_MAX)]

# No white space and no control characters (the reference is shown and logged), and nothing a program could
# take for an option.
FlakeRef = Annotated[str, Meta(min_length=1, max_length=limits.FLAKE_REF_MAX, pattern=r"^[!-,.-~][!-~]*\Z")]


class EgressRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Traffic to `net` is let out. `net`: `203.0.113.0/24`; `port` only with tcp or udp, None for every
    port."""

    net: str
    protocol: Protocol = Protocol.ANY
    port: Annotated[int, Meta(ge=1, le=65535)] | None = None

    @classmethod
    def parse(cls, untrusted: str) -> Self:
        """`203.0.113.0/24`, `203.0.113.7`, `203.0.113.7:443`, `203.0.113.7:53/udp`,
        `203.0.113.0/24:443/tcp`."""
        match = _EGRESS.fullmatch(untrusted) if len(untrusted) <= 40 else None
        if match is None:
            raise _bad_egress(untrusted)
        net, prefix, port, protocol = match.groups()
        rule = cls(
            net=_checked_net(f"{net}/{prefix or 32}"),
            protocol=Protocol(protocol or ("tcp" if port else "any")),
            port=int(port) if port else None,
        )
        if rule.port is not None and not 1 <= rule.port <= 65535:
            raise _bad_egress(untrusted)
        return rule

    def __str__(self) -> str:
        port = f":{self.port}" if self.port is not None else ""
        return self.net + port + (f"/{self.protocol}" if port else "")


_EGRESS: Final = re.compile(r"([0-9.]{7,15})(?:/([0-9]{1,2}))?(?::([0-9]{1,5})(?:/(tcp|udp))?)?")


def _bad_egress(shown: str) -> InvalidInput:
    return InvalidInput(
        f"{shown[:40]!a} is not an egress rule",
        details="An egress rule is an IPv4 network, with a port and protocol if it is for one service; "
        "names are not accepted, because what a name means is decided by somebody else.",
        resolution="Use, for example, 203.0.113.0/24, 203.0.113.7:443 or 203.0.113.7:53/udp.",
    )


def _checked_net(untrusted: str) -> str:
    address, slash, prefix = untrusted.partition("/")
    if not slash or not re.fullmatch(r"0|[1-9][0-9]?", prefix) or int(prefix) > 32:
        raise _bad_egress(untrusted)
    try:
        number, host_bits = addressing.parse_ipv4(address), 32 - int(prefix)
    except InvalidInput as error:
        raise _bad_egress(untrusted) from error
    base = number >> host_bits << host_bits
    if base != number:
        raise InvalidInput(
            f"{untrusted} has bits set beyond its prefix",
            details="A network's address is its first one.",
            resolution=f"Use {addressing.format_ipv4(base)}/{prefix}.",
        )
    return untrusted


class Quotas(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Upper bounds on sums over a tenant's instances; None is no bound of the tenant's own."""

    vcpus: Annotated[int, Meta(ge=1, le=limits.QUOTA_VCPUS_MAX)] | None = None
    mem_mib: Annotated[int, Meta(ge=1, le=limits.QUOTA_MEM_MIB_MAX)] | None = None
    disk_mib: Annotated[int, Meta(ge=1, le=limits.QUOTA_DISK_MIB_MAX)] | None = None
    instances: Annotated[int, Meta(ge=1, le=limits.INSTANCES_PER_TENANT)] | None = None
    running: Annotated[int, Meta(ge=1, le=limits.INSTANCES_PER_TENANT)] | None = None


class SleepPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`idle_s`: sleep after this long without activity, None never by itself; `min_running_s`: not before
    this long after a start or wake; `pinned`: never by policy, whatever the rest says."""

    idle_s: Annotated[int, Meta(ge=limits.IDLE_S_MIN, le=limits.IDLE_S_MAX)] | None = None
    min_running_s: Annotated[int, Meta(ge=0, le=limits.MIN_RUNNING_S_MAX)] = 60
    pinned: bool = False


class PoolSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`count` instances, numbered from 0. None in an override means the tenant's value."""

    id: PoolId
    count: Annotated[int, Meta(ge=0, le=limits.INSTANCES_PER_POOL)] = 1
    vcpus: Vcpus | None = None
    mem_mib: SpecMemMib | None = None
    data_disk_mib: DataDiskMib | None = None


DEFAULT_POOLS: Final = (PoolSpec(id=PoolId(DEFAULT_POOL)),)


class TenantSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: TenantId
    flake_ref: FlakeRef
    profile: Profile = Profile.BASELINE
    vcpus: Vcpus = 1
    mem_mib: SpecMemMib = 256
    data_disk_mib: DataDiskMib = limits.DATA_DISK_MIB_DEFAULT
    seccomp: SeccompPolicy = SeccompPolicy.BASELINE
    metadata: bool = False
    # None: anywhere outside the fleet's own range. (): nowhere.
    egress: Annotated[tuple[EgressRule, ...], Meta(max_length=limits.EGRESS_RULES)] | None = None
    ip: str | None = None
    mac: str | None = None
    quotas: Quotas = Quotas()
    sleep: SleepPolicy = SleepPolicy()
    pools: Annotated[tuple[PoolSpec, ...], Meta(min_length=1, max_length=limits.POOLS_PER_TENANT)] = (
        DEFAULT_POOLS
    )
    schema: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA

    def pool(self, pool: PoolId) -> PoolSpec:
        """Raises NotFound."""
        for candidate in self.pools:
            if candidate.id == pool:
                return candidate
        raise NotFound(
            f"{self.id} has no pool {pool}",
            details=f"Its pools: {', '.join(p.id for p in self.pools)}.",
            resolution=f"Create it with: mvm pool create {self.id} {pool}",
        )

    def instances(self) -> tuple[InstanceId, ...]:
        """Every instance the pools ask for, in order."""
        return tuple(InstanceId(self.id, pool.id, n) for pool in self.pools for n in range(pool.count))

    def holds_fixed_address(self, instance: InstanceId) -> bool:
        """Whether `ip` and `mac`, if set, are this instance's."""
        return instance.pool == self.pools[0].id and instance.ordinal == 0


_WHAT: Final = "the tenant's specification"

# What msgspec's message does not say: the whole of what a field may be.
_ALLOWED: Final[dict[str, str]] = {
    "profile": f"`profile` is one of {', '.join(Profile)}.",
    "seccomp": f"`seccomp` is one of {', '.join(SeccompPolicy)}.",
    "vcpus": f"`vcpus` is {limits.VCPUS_MIN} to {limits.VCPUS_MAX}.",
    "mem_mib": f"`mem_mib` is {limits.SPEC_MEM_MIB_MIN} to {limits.MEM_MIB_MAX} MiB; less does not boot.",
    "data_disk_mib": f"`data_disk_mib` is {limits.DATA_DISK_MIB_MIN} to {limits.DATA_DISK_MIB_MAX} MiB.",
    "flake_ref": f"`flake_ref` has 1 to {limits.FLAKE_REF_MAX} printable ASCII characters, no spaces, "
    "no hyphen first: a directory or a Nix flake reference such as github:owner/name.",
    "pools.count": f"A pool has 0 to {limits.INSTANCES_PER_POOL} instances.",
    "sleep.idle_s": f"`idle_s` is {limits.IDLE_S_MIN} to {limits.IDLE_S_MAX} seconds, or null for never.",
}


_ALLOWED.update({f"pools.{name}": _ALLOWED[name] for name in ("vcpus", "mem_mib", "data_disk_mib")})


def new_tenant(tenant: TenantId, flake_ref: str, **fields: Any) -> TenantSpec:
    """A checked spec from keyword values of `TenantSpec`; unknown names are a TypeError. Raises
    InvalidInput."""
    return validated(TenantSpec(id=tenant, flake_ref=flake_ref, **fields))


def changed(spec: TenantSpec, **fields: Any) -> TenantSpec:
    """A checked copy with other values. Raises InvalidInput."""
    return validated(msgspec.structs.replace(spec, **fields))


def validated(spec: TenantSpec) -> TenantSpec:
    """`spec` after every rule of this module. Raises InvalidInput."""
    return _cross_checked(codec.checked(spec, what=_WHAT, allowed=_ALLOWED))


def encode_spec(spec: TenantSpec) -> bytes:
    return codec.encode(spec)


def decode_spec(untrusted: bytes, *, of: TenantId | None = None) -> TenantSpec:
    """Raises InvalidInput, and nothing else, whatever the bytes.

    `of`: whose spec this must be, from the place it was read from; a file copied from elsewhere is refused.
    """
    spec = codec.decode(untrusted, TenantSpec, limit=limits.SPEC_JSON_BYTES, what=_WHAT, allowed=_ALLOWED)
    if of is not None and spec.id != of:
        raise _invalid(
            "id", f"it is the specification of {spec.id}, not of {of}", "Restore the file from a backup."
        )
    return _cross_checked(spec)


def _cross_checked(spec: TenantSpec) -> TenantSpec:
    names = [pool.id for pool in spec.pools]
    if len(set(names)) != len(names):
        raise _invalid("pools", "two pools have the same id", "Give every pool its own id.")
    total = sum(pool.count for pool in spec.pools)
    if total > limits.INSTANCES_PER_TENANT:
        raise _invalid(
            "pools",
            f"{total} instances are asked for, a tenant's subnet holds {limits.INSTANCES_PER_TENANT}",
            "Scale the pools down, or use a second tenant.",
        )
    if spec.ip is not None:
        addressing.locate(spec.ip)
    if spec.mac is not None and addressing.parse_mac(spec.mac) != spec.mac:
        raise _invalid("mac", "it has upper-case letters", f"Use {spec.mac.lower()}.")
    for rule in spec.egress or ():
        _checked_net(rule.net)
        if rule.port is not None and rule.protocol is Protocol.ANY:
            raise _invalid("egress", "a port needs a protocol", "Add tcp or udp to the rule.")
    _check_quotas(spec, total)
    return spec


def _check_quotas(spec: TenantSpec, total: int) -> None:
    sums = {
        "instances": total,
        "disk_mib": sum(pool.count * (pool.data_disk_mib or spec.data_disk_mib) for pool in spec.pools),
    }
    for name, asked in sums.items():
        bound = getattr(spec.quotas, name)
        if bound is not None and asked > bound:
            raise _invalid(
                f"quotas.{name}",
                f"the pools ask for {asked}, the quota is {bound}",
                "Raise the quota or scale the pools down.",
            )
    for name in ("vcpus", "mem_mib"):
        bound = getattr(spec.quotas, name)
        largest = max((getattr(pool, name) or getattr(spec, name) for pool in spec.pools), default=0)
        if bound is not None and largest > bound:
            raise _invalid(
                f"quotas.{name}",
                f"one instance has {largest}, the quota for all of them is {bound}",
                "Raise the quota or make the instances smaller.",
            )


def _invalid(field: str, reason: str, resolution: str) -> InvalidInput:
    return InvalidInput(f"{_WHAT} is not valid: field `{field}`: {reason}", resolution=resolution)
