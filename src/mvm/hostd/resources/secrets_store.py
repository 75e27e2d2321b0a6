"""A tenant's secrets at rest: parsed from what the operator gives, kept encrypted in
`tenants/<tenant>/secrets.sealed`.

Every write draws a fresh data key, raises the version by one and replaces the file atomically. The data key
is wrapped by the tenant's key, so rotating that rewrites the header only. Values are in SecretBytes; what
the parsers of JSON and of files copy on the way in cannot be wiped and lives as long as Python keeps it.

    offset  size  field (integers big-endian)
    0       4     magic "mvmS"
    4       1     format version, 1
    5       3     zero
    8       8     version of the secrets, from 1
    16      2     W, bytes of the wrapped data key
    18      W     wrapped data key (docs/formats/wrapped-key.md), context "secrets"
    18+W    12    nonce, random
    30+W    ..    ciphertext, then 16 tag; AES-256-GCM, AAD = "mvm/secrets/1" 00 | bytes 0 to 15 | tenant

    plain text: u16 count, then per secret, by name: u8 length of the name, name, u32 length of the value,
    value

Somebody who can write the file can put an older one back: the version tells, to who remembers it.
"""

from __future__ import annotations

import os
import re
import struct
from typing import TYPE_CHECKING

from mvm.core import limits
from mvm.core.errors import IntegrityError, InvalidInput
from mvm.hostd import keys
from mvm.linux import files
from mvm.linux.secret import SecretBytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mvm.core.ids import TenantId

STORE_NAME = "secrets.sealed"
CONTEXT = b"secrets"
_MAGIC = b"mvmS"
_FORMAT = 1
_HEAD = struct.Struct(">4sB3xQ")
_WRAPPED_SIZE = struct.Struct(">H")
_NONCE = 12
_TAG = 16
_DOMAIN = b"mvm/secrets/1\0"
_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{limits.SECRET_NAME_MAX}}}")
_ENV_KEY = re.compile(r"(?:export\s+)?([A-Za-z0-9._-]+)\s*=\s*(.*)", re.DOTALL)
_MAX_SOURCE = 4 * limits.SECRETS_TOTAL_BYTES
_MAX_STORE = 2 * limits.SECRETS_TOTAL_BYTES


def check_name(untrusted: str) -> str:
    """The name of a secret, which becomes a file name in the guest. InvalidInput says what is allowed."""
    if _NAME.fullmatch(untrusted) and untrusted not in (".", ".."):
        return untrusted
    raise InvalidInput(
        f"{untrusted[:80]!a} cannot name a secret",
        details=f"1 to {limits.SECRET_NAME_MAX} of letters, digits, dot, underscore and hyphen",
    )


def check_bounds(sizes: Mapping[str, int]) -> None:
    """InvalidInput if there are too many secrets, or they are too large for the guest's disk."""
    if len(sizes) > limits.SECRET_FILES:
        raise InvalidInput(f"{len(sizes)} secrets are too many", details=f"at most {limits.SECRET_FILES}")
    for name, size in sizes.items():
        check_name(name)
        if size > limits.SECRET_FILE_BYTES:
            raise InvalidInput(
                f"the secret {name} is too large", details=f"{size} bytes; at most {limits.SECRET_FILE_BYTES}"
            )
    if sum(sizes.values()) > limits.SECRETS_TOTAL_BYTES:
        raise InvalidInput(
            "the secrets are too large together",
            details=f"{sum(sizes.values())} bytes; at most {limits.SECRETS_TOTAL_BYTES}",
        )


def parse_json(untrusted: bytes) -> dict[str, SecretBytes]:
    """A JSON object of strings. Errors never quote a value."""
    import msgspec

    try:
        plain = msgspec.json.decode(untrusted, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidInput(
            "the secrets are not a JSON object whose values are strings",
            resolution='write them as {"NAME": "value", ...}',
        ) from None
    return _taken({name: value.encode() for name, value in plain.items()})


def parse_env(untrusted: bytes) -> dict[str, SecretBytes]:
    """NAME=value lines. Blank lines and lines that begin with # are skipped, `export` and one pair of
    quotes around the
    value are taken off; nothing is expanded. A name given twice is InvalidInput. Errors quote line numbers
    only."""
    try:
        text = untrusted.decode()
    except UnicodeDecodeError:
        raise InvalidInput("the secrets file is not UTF-8") from None
    plain: dict[str, bytes] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _ENV_KEY.fullmatch(line)
        if match is None:
            raise InvalidInput(f"line {number} of the secrets is not NAME=value")
        name, value = match[1], match[2]
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if name in plain:
            raise InvalidInput(f"line {number} of the secrets gives {name[:80]!a} a second time")
        plain[name] = value.encode()
    return _taken(plain)


def read_source(path: Path) -> dict[str, SecretBytes]:
    """Secrets from a directory (one file each, the name is the file's; hidden files and subdirectories are
    refused), a JSON
    file, or a file of NAME=value lines. FileNotFoundError passes through."""
    if path.is_dir():
        names = sorted(os.listdir(path))
        if len(names) > limits.SECRET_FILES:
            raise InvalidInput(f"{len(names)} secrets are too many", details=f"at most {limits.SECRET_FILES}")
        for name in names:
            if name.startswith("."):
                raise InvalidInput(f"{name!a} is a hidden file", resolution=f"remove it from {path}")
        read = {check_name(n): files.read_bounded(path / n, limits.SECRET_FILE_BYTES) for n in names}
        return _taken(read)
    data = files.read_bounded(path, _MAX_SOURCE)
    return parse_json(data) if data.lstrip()[:1] == b"{" else parse_env(data)


def _taken(plain: dict[str, bytes]) -> dict[str, SecretBytes]:
    check_bounds({name: len(value) for name, value in plain.items()})
    return {name: SecretBytes.copy_of(value) for name, value in plain.items()}


def save(path: Path, provider: keys.KeyProvider, tenant: TenantId, secrets: Mapping[str, SecretBytes]) -> int:
    """Replace the tenant's secrets; returns their new version. The caller holds the tenant's lock."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    check_bounds({name: len(value) for name, value in secrets.items()})
    number = version(path) + 1
    head = _HEAD.pack(_MAGIC, _FORMAT, number)
    with SecretBytes.from_random(keys.KEY_SIZE) as data_key, _packed(secrets) as plain:
        with provider.tenant_key(tenant) as tenant_key:
            wrapped = tenant_key.wrap(data_key, CONTEXT)
        nonce = os.urandom(_NONCE)
        sealed = AESGCM(data_key.view()).encrypt(nonce, plain.view(), _associated(head, tenant))
    files.write_atomic(path, head + _WRAPPED_SIZE.pack(len(wrapped)) + wrapped + nonce + sealed, 0o600)
    return number


def load(path: Path, provider: keys.KeyProvider, tenant: TenantId) -> dict[str, SecretBytes]:
    """The tenant's secrets by name, none if there never were any. The caller wipes them. IntegrityError if
    the file is
    damaged or another tenant's."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    data = _read(path)
    if data is None:
        return {}
    head, wrapped, body = _parse(data)
    with keys.unwrap(provider, tenant, wrapped, CONTEXT) as data_key:
        with SecretBytes(len(body) - _NONCE - _TAG) as plain:
            try:
                AESGCM(data_key.view()).decrypt_into(
                    body[:_NONCE], body[_NONCE:], _associated(head, tenant), plain.view()
                )
            except InvalidTag:
                raise _bad(f"they do not authenticate for tenant {tenant}") from None
            return _unpacked(plain)


def version(path: Path) -> int:
    """The version of the secrets in the file, as it says; 0 without a file. Unauthenticated: `load` is what
    checks.
    """
    data = _read(path)
    if data is None:
        return 0
    number: int = _HEAD.unpack(_parse(data)[0])[2]
    return number


def rewrap(path: Path, provider: keys.KeyProvider, tenant: TenantId) -> bool:
    """Wrap the data key by the tenant's newest key; False if there is nothing to do."""
    data = _read(path)
    if data is None:
        return False
    head, wrapped, body = _parse(data)
    new = keys.rewrap(provider, tenant, wrapped, CONTEXT)
    if new == wrapped:
        return False
    files.write_atomic(path, head + _WRAPPED_SIZE.pack(len(new)) + new + body, 0o600)
    return True


def wipe_all(secrets: Mapping[str, SecretBytes]) -> None:
    for value in secrets.values():
        value.wipe()


def _read(path: Path) -> bytes | None:
    try:
        return files.read_bounded(path, _MAX_STORE)
    except FileNotFoundError:
        return None
    except InvalidInput as error:
        raise _bad(error.brief) from error


def _parse(data: bytes) -> tuple[bytes, bytes, bytes]:
    """(head, wrapped key, nonce with ciphertext and tag)."""
    start = _HEAD.size + _WRAPPED_SIZE.size
    if len(data) < start:
        raise _bad("the file is cut off")
    magic, form, number = _HEAD.unpack_from(data)
    if magic != _MAGIC or form != _FORMAT or data[5:8] != b"\0\0\0" or number < 1:
        raise _bad("the file does not begin as sealed secrets of a format known here")
    (size,) = _WRAPPED_SIZE.unpack_from(data, _HEAD.size)
    wrapped, body = data[start : start + size], data[start + size :]
    if len(body) < _NONCE + _TAG:
        raise _bad("the file is cut off")
    return data[: _HEAD.size], wrapped, body


def _associated(head: bytes, tenant: TenantId) -> bytes:
    return _DOMAIN + head + tenant.encode()


def _packed(secrets: Mapping[str, SecretBytes]) -> SecretBytes:
    size = 2 + sum(5 + len(name) + len(value) for name, value in secrets.items())
    plain = SecretBytes(size)
    out = plain.view()
    struct.pack_into(">H", out, 0, len(secrets))
    at = 2
    for name, value in sorted(secrets.items()):
        struct.pack_into(f">B{len(name)}sI", out, at, len(name), name.encode(), len(value))
        at += 5 + len(name)
        out[at : at + len(value)] = value.view()
        at += len(value)
    return plain


def _unpacked(plain: SecretBytes) -> dict[str, SecretBytes]:
    """The reverse of `_packed`. Its input is authentic, so a fault here is a writer's bug; it is refused
    all the same.
    """
    view = plain.view()
    found: dict[str, SecretBytes] = {}
    try:
        (count,) = struct.unpack_from(">H", view)
        at = 2
        for _ in range(count):
            length = view[at]
            name = check_name(bytes(view[at + 1 : at + 1 + length]).decode())
            (size,) = struct.unpack_from(">I", view, at + 1 + length)
            at += 5 + length
            if at + size > len(view) or name in found:
                raise IndexError
            found[name] = SecretBytes.copy_of(view[at : at + size])
            at += size
        if at != len(view):
            raise IndexError
    except (struct.error, IndexError, UnicodeDecodeError, InvalidInput):
        wipe_all(found)
        raise _bad("their content is not in order") from None
    return found


def _bad(details: str) -> IntegrityError:
    return IntegrityError(
        "the tenant's sealed secrets are damaged or another tenant's",
        details=details,
        resolution="give the secrets again: mvm tenant secrets set TENANT --from-file FILE",
    )
