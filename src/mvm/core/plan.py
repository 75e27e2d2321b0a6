"""`InstancePlan`: everything the executor needs to start one instance, and nothing it would have to decide.

A plan is frozen and self-contained: two numbers (subnet index, slot), the spec and the revision give it,
and the privileged side makes the same checks again with `check_plan` before it believes one that came over
a socket.

Boot arguments are an overlay on those of the revision's base configuration. They are logged by VMMs and
readable in the guest by everybody, so no secret is ever among them."""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.core import addressing, codec, limits
from mvm.core.errors import InvalidInput
from mvm.core.ids import InstanceId, PoolId, RevisionId
from mvm.core.record import NetworkIdentity, network_identity
from mvm.core.spec import DataDiskMib, EgressRule, Profile, SeccompPolicy, TenantSpec, Vcpus

SCHEMA: Final = 1

MemMib = Annotated[int, Meta(ge=limits.MEM_MIB_MIN, le=limits.MEM_MIB_MAX)]

# mvm's own arguments: what the guest agent reads and nothing else may set.
_OWN: Final = "mvm."
_ARGUMENT: Final = re.compile(r"[!-~]+")


class InstancePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    instance: InstanceId
    revision: RevisionId
    profile: Profile
    vcpus: Vcpus
    mem_mib: MemMib
    data_disk_mib: DataDiskMib
    seccomp: SeccompPolicy
    network: NetworkIdentity
    egress: Annotated[tuple[EgressRule, ...], Meta(max_length=limits.EGRESS_RULES)] | None
    boot_args: Annotated[str, Meta(max_length=limits.BOOT_ARGS_MAX, pattern=r"^[ -~]*\Z")]
    uid: Annotated[int, Meta(ge=addressing.UID_BASE, le=addressing.UID_BASE + limits.SUBNETS * 256)]
    gid: Annotated[int, Meta(ge=addressing.UID_BASE, le=addressing.UID_BASE + limits.SUBNETS * 256)]
    metadata: bool
    schema: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA

    def describe(self) -> str:
        """One line for a log or a dry run."""
        return (
            f"{self.instance}: {self.vcpus} vCPU, {self.mem_mib} MiB, data disk {self.data_disk_mib} MiB, "
            f"{self.network.ip} on {self.network.tap}, revision {self.revision[:12]}"
        )


def plan_instance(
    spec: TenantSpec, pool: PoolId, ordinal: int, revision: RevisionId, index: int, slot: int
) -> InstancePlan:
    """The plan for one instance of `spec` in subnet `index` at `slot`.

    The instance that holds the tenant's fixed address must have been given the slot of that address
    (`slot_for`). Raises NotFound for a pool the spec does not have, InvalidInput for anything else.
    """
    sizes = spec.pool(pool)
    instance = InstanceId(spec.id, pool, ordinal)
    if ordinal >= sizes.count:
        raise InvalidInput(
            f"{instance} is not asked for",
            details=f"Pool {pool} has {sizes.count} instances, numbered from 0.",
            resolution=f"Scale it first: mvm pool scale {spec.id} {pool} {ordinal + 1}",
        )
    fixed = spec.holds_fixed_address(instance)
    network = network_identity(instance, index, slot, mac=spec.mac if fixed else None)
    if fixed and spec.ip is not None and network.ip != spec.ip:
        raise InvalidInput(
            f"{instance} has the fixed address {spec.ip}, the plan gives it {network.ip}",
            details=f"Subnet {addressing.subnet(index)}, slot {slot}.",
            resolution="Allocate the slot that belongs to the fixed address.",
        )
    uid = addressing.instance_uid(index, slot)
    return check_plan(
        InstancePlan(
            instance=instance,
            revision=revision,
            profile=spec.profile,
            vcpus=sizes.vcpus or spec.vcpus,
            mem_mib=sizes.mem_mib or spec.mem_mib,
            data_disk_mib=sizes.data_disk_mib or spec.data_disk_mib,
            seccomp=spec.seccomp,
            network=network,
            egress=spec.egress,
            boot_args=boot_args(instance, network),
            uid=uid,
            gid=uid,
            metadata=spec.metadata,
        )
    )


def slot_for(spec: TenantSpec, instance: InstanceId, index: int, taken: frozenset[int]) -> int:
    """The slot a new instance gets: that of the fixed address if it is its, else the lowest free other one.

    `taken`: the slots of the tenant's other instances. Raises ResourceExhausted, and InvalidInput where the
    fixed address is outside the subnet or already in use."""
    if spec.ip is None:
        return addressing.free_slot(taken)
    reserved = addressing.check_fixed_ip(spec.ip, index)
    if not spec.holds_fixed_address(instance):
        return addressing.free_slot(taken, reserved=(reserved,))
    if reserved in taken:
        raise InvalidInput(
            f"the fixed address {spec.ip} is in use by another instance of {spec.id}",
            details=f"It belongs to {instance}.",
            resolution="Destroy that instance or choose another address.",
        )
    return reserved


def boot_args(instance: InstanceId, network: NetworkIdentity) -> str:
    """`mvm.ip=10.240.1.2/24 mvm.gw=10.240.1.1 mvm.dns=10.240.1.1 mvm.host=acme-default-0`"""
    return f"mvm.ip={network.cidr} mvm.gw={network.gateway} mvm.dns={network.gateway} mvm.host={instance.host_name}"


def merge_boot_args(base: str, overlay: str) -> str:
    """`base` without any `mvm.` argument of its own, then `overlay`.

    The overlay goes before a `--`, after which the kernel hands everything to init. Raises InvalidInput for
    characters other than printable ASCII, and for more than the kernel reads.
    """
    words = base.split()
    if any(not _ARGUMENT.fullmatch(word) for word in words):
        raise InvalidInput(
            "the base configuration's boot arguments hold characters that are not printable ASCII",
            details=f"{base[:200]!a}",
            resolution="Correct `boot_args` in the flake's base configuration and build again.",
        )
    cut = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:cut] if not word.startswith(_OWN)]
    merged = " ".join([*kept, *overlay.split(), *words[cut:]])
    if len(merged) >= limits.BOOT_ARGS_MAX:
        raise InvalidInput(
            "the boot arguments are too long",
            details=f"{len(merged)} characters; the kernel reads {limits.BOOT_ARGS_MAX - 1}.",
            resolution="Shorten `boot_args` in the flake's base configuration and build again.",
        )
    return merged


def check_plan(plan: InstancePlan) -> InstancePlan:
    """`plan`, if every derived value is the one that its instance, index and slot give. Raises InvalidInput.

    A plan from elsewhere cannot borrow another instance's uid, tap or address: those are computed, not
    believed."""
    plan = codec.checked(plan, what="the instance plan")
    net = plan.network
    uid = addressing.instance_uid(net.index, net.slot)
    wrong = [
        name
        for name, found, right in (
            ("network", net, network_identity(plan.instance, net.index, net.slot, mac=net.mac)),
            ("uid", plan.uid, uid),
            ("gid", plan.gid, uid),
            ("boot_args", plan.boot_args, boot_args(plan.instance, net)),
        )
        if found != right
    ]
    if wrong:
        raise InvalidInput(
            f"the instance plan is not valid: field `{wrong[0]}` is not what its instance, index and slot give",
            details=f"Instance {plan.instance}, subnet index {net.index}, slot {net.slot}; wrong: {', '.join(wrong)}.",
            resolution="Make the plan with plan_instance.",
        )
    return plan


def encode_plan(plan: InstancePlan) -> bytes:
    return codec.encode(plan)


def decode_plan(untrusted: bytes) -> InstancePlan:
    """Raises InvalidInput, and nothing else, whatever the bytes."""
    return check_plan(
        codec.decode(untrusted, InstancePlan, limit=limits.RECORD_JSON_BYTES, what="the instance plan")
    )
