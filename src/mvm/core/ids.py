"""Identifiers: strings that have been checked.

Every type here is a `str` whose value is known to be well formed, because making one is checking one: there
is no other constructor. `X.parse(untrusted)` and `X(untrusted)` are the same and raise `InvalidInput` with
what is allowed and, where one can be guessed, a valid form.

    TenantId    acme             a-z 0-9 -, a letter first, no hyphen last or twice in a row, 32 characters
    PoolId      default          the same, 16 characters
    InstanceId  acme/default-0   <tenant>/<pool>-<ordinal>, ordinal without leading zeros
    RevisionId  64 hex digits    sha256 over what a build produced
    SnapshotId  32 hex digits
    NodeId      32 hex digits

`--` is not allowed inside a tenant or pool id so that `InstanceId.vm_name` (`acme--default-0`) names one
instance only: a single hyphen would make (`a-b`, `c`) and (`a`, `b-c`) the same jail."""

from __future__ import annotations

import re
from typing import Final, Self

from mvm.core import limits
from mvm.core.errors import InvalidInput

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_ORDINAL: Final = re.compile(r"0|[1-9][0-9]{0,3}")
_HEX: Final = re.compile(r"[0-9a-f]+")

DEFAULT_POOL: Final = "default"


def _shown(value: object) -> str:
    """The offending value, quoted and short: it may be hostile and it goes to a terminal."""
    text = ascii(value if isinstance(value, str) else str(type(value).__name__))
    return text if len(text) <= 60 else text[:56] + "...'"


def _suggest(untrusted: str, limit: int) -> str:
    """A valid name close to what was typed, or nothing."""
    guess = re.sub(r"[^a-z0-9]+", "-", untrusted[: 4 * limit].lower()).strip("-")
    guess = re.sub(r"^[0-9-]+", "", guess)[:limit].rstrip("-")
    return guess if _NAME.fullmatch(guess) else ""


def _checked_name(untrusted: object, what: str, limit: int, example: str) -> str:
    if isinstance(untrusted, str) and len(untrusted) <= limit and _NAME.fullmatch(untrusted):
        return str(untrusted)
    guess = _suggest(untrusted, limit) if isinstance(untrusted, str) else ""
    raise InvalidInput(
        f"{_shown(untrusted)} is not a {what} id",
        details=f"A {what} id has 1 to {limit} characters: lower-case letters, digits and single hyphens; it "
        "starts with a letter and does not end with a hyphen.",
        resolution=f"Did you mean {guess!r}?" if guess else f"Use, for example, {example!r}.",
    )


def _checked_hex(untrusted: object, what: str, digits: int, hint: str) -> str:
    if isinstance(untrusted, str) and len(untrusted) == digits and _HEX.fullmatch(untrusted):
        return str(untrusted)
    raise InvalidInput(
        f"{_shown(untrusted)} is not a {what} id",
        details=f"A {what} id is {digits} lower-case hexadecimal digits.",
        resolution=hint,
    )


def _refuse_instance(untrusted: object) -> None:
    """`acme/default-0` where a tenant is wanted is a common slip that has a better answer."""
    head, slash, _ = untrusted.partition("/") if isinstance(untrusted, str) else ("", "", "")
    if slash and len(head) <= limits.TENANT_ID_MAX and _NAME.fullmatch(head):
        raise InvalidInput(
            f"{_shown(untrusted)} names an instance, not a tenant",
            details="A tenant id holds no '/'.",
            resolution=f"Use {head!r} for the tenant, or the `mvm instance` commands for one instance.",
        )


class TenantId(str):
    """Names a tenant; unique in the fleet."""

    __slots__ = ()

    def __new__(cls, untrusted: str) -> Self:
        _refuse_instance(untrusted)
        return super().__new__(cls, _checked_name(untrusted, "tenant", limits.TENANT_ID_MAX, "acme"))

    @classmethod
    def parse(cls, untrusted: str) -> Self:
        return cls(untrusted)


class PoolId(str):
    """Names a pool inside its tenant."""

    __slots__ = ()

    def __new__(cls, untrusted: str) -> Self:
        return super().__new__(cls, _checked_name(untrusted, "pool", limits.POOL_ID_MAX, DEFAULT_POOL))

    @classmethod
    def parse(cls, untrusted: str) -> Self:
        return cls(untrusted)


class InstanceId(str):
    """`acme/default-0`: the `ordinal`-th instance of a pool. Immutable; compares and hashes as its text."""

    __slots__ = ("_ordinal", "_pool", "_tenant")
    _tenant: TenantId
    _pool: PoolId
    _ordinal: int

    def __new__(cls, tenant: str, pool: str, ordinal: int) -> Self:
        tenant_id, pool_id = TenantId(tenant), PoolId(pool)
        if type(ordinal) is not int or not 0 <= ordinal < limits.INSTANCES_PER_POOL:
            raise InvalidInput(
                f"{ordinal!r} is not an instance number",
                details=f"The instances of a pool are numbered 0 to {limits.INSTANCES_PER_POOL - 1}.",
                resolution=f"Use, for example, '{tenant_id}/{pool_id}-0'.",
            )
        self = super().__new__(cls, f"{tenant_id}/{pool_id}-{ordinal}")
        self._tenant, self._pool, self._ordinal = tenant_id, pool_id, ordinal
        return self

    @classmethod
    def parse(cls, untrusted: str) -> Self:
        parts = _instance_parts(untrusted)
        if parts is not None:
            return cls(*parts)
        raise InvalidInput(
            f"{_shown(untrusted)} is not an instance id",
            details="An instance id is <tenant>/<pool>-<number>, the number without leading zeros.",
            resolution=f"Did you mean {_suggest_instance(untrusted)!r}?",
        )

    @classmethod
    def in_dir(cls, tenant: TenantId, untrusted_dir_name: str) -> Self:
        """The instance whose directory under `tenants/<tenant>/instances/` has this name."""
        return cls.parse(f"{tenant}/{untrusted_dir_name}")

    def __getnewargs__(self) -> tuple[str, str, int]:  # type: ignore[override]
        # copy and pickle would otherwise call __new__ with the text alone.
        return (self._tenant, self._pool, self._ordinal)

    @property
    def tenant(self) -> TenantId:
        return self._tenant

    @property
    def pool(self) -> PoolId:
        return self._pool

    @property
    def ordinal(self) -> int:
        return self._ordinal

    @property
    def dir_name(self) -> str:
        """`default-0`: unique inside the tenant."""
        return f"{self._pool}-{self._ordinal}"

    @property
    def vm_name(self) -> str:
        """`acme--default-0`: unique on the node, letters, digits and hyphens, at most 64 (jail and VMM
        id)."""
        return f"{self._tenant}--{self.dir_name}"

    @property
    def host_name(self) -> str:
        """`acme-default-0`: what the guest calls itself. For people; not unique."""
        return f"{self._tenant}-{self.dir_name}"

    @property
    def sort_key(self) -> tuple[str, str, int]:
        """Orders `default-2` before `default-10`."""
        return (str(self._tenant), str(self._pool), self._ordinal)


def _instance_parts(untrusted: object) -> tuple[str, str, int] | None:
    if not isinstance(untrusted, str) or len(untrusted) > limits.TENANT_ID_MAX + limits.POOL_ID_MAX + 6:
        return None
    tenant, slash, rest = untrusted.partition("/")
    pool, hyphen, ordinal = rest.rpartition("-")
    if not (slash and tenant and hyphen and pool) or "/" in rest or not _ORDINAL.fullmatch(ordinal):
        return None
    return tenant, pool, int(ordinal)


def _suggest_instance(untrusted: object) -> str:
    if not isinstance(untrusted, str):
        return f"acme/{DEFAULT_POOL}-0"
    tenant, _, rest = untrusted.partition("/")
    pool, hyphen, ordinal = rest.rpartition("-")
    number = int(ordinal) if hyphen and re.fullmatch(r"[0-9]{1,6}", ordinal) else 0
    named = _suggest(pool if hyphen and ordinal.isascii() and ordinal.isdigit() else rest, limits.POOL_ID_MAX)
    return (
        f"{_suggest(tenant, limits.TENANT_ID_MAX) or 'acme'}/{named or DEFAULT_POOL}"
        f"-{number if number < limits.INSTANCES_PER_POOL else 0}"
    )


class RevisionId(str):
    """sha256 over what a build produced; the same input gives the same id."""

    __slots__ = ()

    def __new__(cls, untrusted: str) -> Self:
        hint = "List the revisions of a tenant with: mvm tenant show <tenant>"
        return super().__new__(cls, _checked_hex(untrusted, "revision", limits.SHA256_HEX, hint))

    @classmethod
    def parse(cls, untrusted: str) -> Self:
        return cls(untrusted)


class SnapshotId(str):
    """Names one snapshot of one instance; random, chosen by whoever makes the snapshot."""

    __slots__ = ()

    def __new__(cls, untrusted: str) -> Self:
        hint = "Show an instance's snapshot with: mvm instance show <tenant>/<pool>-<number>"
        return super().__new__(cls, _checked_hex(untrusted, "snapshot", limits.SNAPSHOT_ID_HEX, hint))

    @classmethod
    def parse(cls, untrusted: str) -> Self:
        return cls(untrusted)


class NodeId(str):
    """Names a node; random, made once."""

    __slots__ = ()

    def __new__(cls, untrusted: str) -> Self:
        hint = "Show this node's id with: mvm node info"
        return super().__new__(cls, _checked_hex(untrusted, "node", limits.NODE_ID_HEX, hint))

    @classmethod
    def parse(cls, untrusted: str) -> Self:
        return cls(untrusted)
