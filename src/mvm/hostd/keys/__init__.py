"""Per-tenant keys: the provider protocol, and the key that wraps all other keys of a tenant.

Rules. A tenant key encrypts keys and nothing else: every file, snapshot and secret has a random data key of
its own, stored wrapped. So a rotation rewraps some dozens of bytes per file, and destroying the wrapped key
destroys the file. Versions count from 1; new wraps use the newest, old ones are kept until `retire`, to
unwrap what they wrapped. A wrapped key says which version made it, and is bound to the tenant and to a
context chosen by its owner (what it is for, which instance, which file): a blob moved to another place does
not unwrap.

Key material is in SecretBytes only. Who asks for a TenantKey closes it (it is a context manager).

A wrapped key (docs/formats/wrapped-key.md), integers big-endian:

    offset  size  field
    0       4     magic "mvmW"
    4       1     format version, 1
    5       1     algorithm, 1 = AES-256-GCM
    6       2     n, bytes of the wrapped key (16 to 64)
    8       4     version of the tenant key
    12      12    nonce, random
    24      n     ciphertext
    24+n    16    tag

    AAD = "mvm/wrapped-key/1" 00 | bytes 0 to 11 | u16 len(tenant) | tenant | context
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mvm.core.errors import IntegrityError, NotFound
from mvm.linux.secret import SecretBytes

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from mvm.core.ids import TenantId

KEY_SIZE = 32
MIN_WRAPPED = 16
MAX_WRAPPED = 64
MAX_VERSION = 0xFFFFFFFF
_MAGIC = b"mvmW"
_FORMAT = 1
_AES_256_GCM = 1
_HEADER = struct.Struct(">4sBBHI")
_NONCE = 12
_TAG = 16
_DOMAIN = b"mvm/wrapped-key/1\0"
OVERHEAD = _HEADER.size + _NONCE + _TAG
"""Bytes by which a wrapped key is longer than the key."""


class TenantKey(Protocol):
    """One version of one tenant's key. The key itself may be elsewhere (a vault): only its use is promised."""

    @property
    def tenant(self) -> TenantId: ...
    @property
    def version(self) -> int: ...
    def wrap(self, key: SecretBytes, context: bytes) -> bytes:
        """A blob that only `unwrap` with the same tenant, version and context turns back into `key`."""
        ...

    def unwrap(self, blob: bytes, context: bytes) -> SecretBytes:
        """The key; the caller wipes it. IntegrityError if the blob is damaged or was made for anything
        else."""
        ...

    def close(self) -> None:
        """Forget the key. Leaving the context does the same."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class KeyProvider(Protocol):
    """Where tenant keys come from. `warning` is empty, or says what this provider does not protect against."""

    @property
    def name(self) -> str: ...
    @property
    def warning(self) -> str: ...
    def describe(self) -> str:
        """One or more lines for the operator, the warning included."""
        ...

    def create(self, tenant: TenantId) -> TenantKey:
        """The newest key of the tenant, made now if there is none."""
        ...

    def tenant_key(self, tenant: TenantId, version: int | None = None) -> TenantKey:
        """The given version, or the newest. NotFound if there is none."""
        ...

    def versions(self, tenant: TenantId) -> tuple[int, ...]:
        """The versions that exist, ascending; empty for a tenant without keys."""
        ...

    def rotate(self, tenant: TenantId) -> TenantKey:
        """A new version, from now on the newest. NotFound if the tenant has no key yet."""
        ...

    def retire(self, tenant: TenantId, before: int) -> None:
        """Destroy the versions below `before`, once everything has been rewrapped. The newest is never one
        of them."""
        ...

    def destroy(self, tenant: TenantId) -> None:
        """Destroy every version: all that was wrapped is lost for good. Absent is done."""
        ...


class WrappedHeader(NamedTuple):
    """What a wrapped key says about itself, unauthenticated until it is unwrapped. `size`: bytes of the
    key."""

    key_version: int
    size: int


def parse_header(blob: bytes) -> WrappedHeader:
    """Check the form of a wrapped key. IntegrityError for anything that is not one."""
    if len(blob) < OVERHEAD + MIN_WRAPPED:
        raise _bad("it is too short")
    magic, form, algorithm, size, version = _HEADER.unpack_from(blob)
    if magic != _MAGIC:
        raise _bad("it does not begin with its magic number")
    if form != _FORMAT or algorithm != _AES_256_GCM:
        raise _bad(f"format {form} with algorithm {algorithm} is not known here")
    if not MIN_WRAPPED <= size <= MAX_WRAPPED or len(blob) != OVERHEAD + size:
        raise _bad(f"its length {len(blob)} does not fit a key of {size} bytes")
    if version < 1:
        raise _bad("it names no key version")
    return WrappedHeader(version, size)


def _bad(details: str) -> IntegrityError:
    return IntegrityError(
        "a wrapped key is damaged or was made for something else",
        details=details,
        resolution="restore the file it belongs to from a backup; nothing was changed",
    )


class LocalTenantKey:
    """A tenant key whose bytes are here. Owns `secret` and wipes it on close."""

    __slots__ = ("_secret", "_tenant", "_version")

    def __init__(self, tenant: TenantId, version: int, secret: SecretBytes) -> None:
        if len(secret) != KEY_SIZE:
            raise ValueError(f"a tenant key has {KEY_SIZE} bytes")
        self._tenant = tenant
        self._version = version
        self._secret = secret

    @property
    def tenant(self) -> TenantId:
        return self._tenant

    @property
    def version(self) -> int:
        return self._version

    def wrap(self, key: SecretBytes, context: bytes) -> bytes:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if not MIN_WRAPPED <= len(key) <= MAX_WRAPPED:
            raise ValueError(f"keys of {MIN_WRAPPED} to {MAX_WRAPPED} bytes are wrapped, not {len(key)}")
        header = _HEADER.pack(_MAGIC, _FORMAT, _AES_256_GCM, len(key), self._version)
        nonce = os.urandom(_NONCE)
        sealed = AESGCM(self._secret.view()).encrypt(nonce, key.view(), self._associated(header, context))
        return header + nonce + sealed

    def unwrap(self, blob: bytes, context: bytes) -> SecretBytes:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        found = parse_header(blob)
        if found.key_version != self._version:
            raise _bad(f"it was wrapped by key version {found.key_version}, not {self._version}")
        nonce = blob[_HEADER.size : _HEADER.size + _NONCE]
        sealed = blob[_HEADER.size + _NONCE :]
        key = SecretBytes(found.size)
        try:
            # Straight into locked memory: `decrypt` would return an immutable copy that nobody can wipe.
            AESGCM(self._secret.view()).decrypt_into(
                nonce, sealed, self._associated(blob[: _HEADER.size], context), key.view()
            )
        except InvalidTag:
            key.wipe()
            raise _bad(f"it does not authenticate for tenant {self._tenant} and its place") from None
        except BaseException:
            key.wipe()
            raise
        return key

    def _associated(self, header: bytes, context: bytes) -> bytes:
        tenant = self._tenant.encode()
        return b"".join((_DOMAIN, header, struct.pack(">H", len(tenant)), tenant, context))

    def close(self) -> None:
        self._secret.wipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def unwrap(provider: KeyProvider, tenant: TenantId, blob: bytes, context: bytes) -> SecretBytes:
    """Unwrap with whichever version of the tenant's key made the blob.

    NotFound if the tenant has no key at all. A blob that names a version the tenant does not have is
    damaged, or outlived the version it needs: IntegrityError, as for any other blob that cannot be used.
    """
    version = parse_header(blob).key_version
    try:
        tenant_key = provider.tenant_key(tenant, version)
    except NotFound:
        if provider.versions(tenant):
            raise _bad(f"it names key version {version}, which tenant {tenant} does not have") from None
        raise
    with tenant_key:
        return tenant_key.unwrap(blob, context)


def rewrap(provider: KeyProvider, tenant: TenantId, blob: bytes, context: bytes) -> bytes:
    """The same key wrapped by the newest version; `blob` itself if it already is."""
    with provider.tenant_key(tenant) as newest:
        if parse_header(blob).key_version == newest.version:
            return blob
        with unwrap(provider, tenant, blob, context) as key:
            return newest.wrap(key, context)
