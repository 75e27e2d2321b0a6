"""JSON documents with one canonical form and one way in.

Out: keys sorted, UTF-8, no spaces, one newline at the end; equal values give equal bytes, so a digest of a
document is a digest of its value. In: bounded, strict (unknown fields, wrong types and values out of range
are refused), and any failure is `InvalidInput` naming the field. Nothing else escapes from `decode`,
whatever the bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec

from mvm.core.errors import InvalidInput
from mvm.core.ids import InstanceId, NodeId, PoolId, RevisionId, SnapshotId, TenantId

T = TypeVar("T")

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_SHOWN: Final = 300
_IDS: Final = (TenantId, PoolId, InstanceId, RevisionId, SnapshotId, NodeId)


def _enc_hook(value: Any) -> Any:
    # msgspec encodes exact str only; a checked id is its text.
    if isinstance(value, str) and not isinstance(value, Enum):
        return str.__str__(value)
    raise TypeError(f"no JSON form for {type(value).__name__}")


def _dec_hook(kind: type, value: Any) -> Any:
    if kind in _IDS:
        if type(value) is not str:
            raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
        try:
            return kind.parse(value)
        except InvalidInput as error:
            # ValueError is what msgspec turns into an error that knows the field's path.
            raise ValueError(f"{error.brief}. {error.details}") from error
    raise TypeError(f"no decoder for {kind.__name__}")


def encode(value: Any) -> bytes:
    """The canonical bytes of `value`, newline included. Raises InvalidInput for text that has no UTF-8 form."""
    return encode_line(value) + b"\n"


def encode_line(value: Any) -> bytes:
    """The canonical bytes without the newline, for digests and line formats."""
    try:
        return msgspec.json.encode(value, enc_hook=_enc_hook, order="sorted")
    except UnicodeEncodeError as error:
        # Python gives command line bytes that are not UTF-8 as lone surrogates.
        raise InvalidInput(
            "a text is not valid Unicode",
            details=f"{error.object[:80]!a}",
            resolution="Use a UTF-8 locale, and names in UTF-8.",
        ) from error


def decode(
    untrusted: bytes,
    kind: type[T],
    *,
    limit: int,
    what: str,
    resolution: str = "",
    allowed: Mapping[str, str] = _NOTHING,
) -> T:
    """Parse `untrusted` (at most `limit` bytes) as `kind`; `what` names the document in errors.

    `allowed`: what a field may hold, as a sentence, by the field's path without indices (`pools.count`).
    """
    if len(untrusted) > limit:
        raise InvalidInput(
            f"{what} is too large",
            details=f"It has {len(untrusted)} bytes; at most {limit} are read.",
            resolution=resolution or "Check that this is the right file.",
        )
    try:
        return msgspec.json.decode(untrusted, type=kind, dec_hook=_dec_hook, strict=True)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), what, allowed, resolution) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(
            f"{what} is not JSON",
            details="nested too deeply" if isinstance(error, RecursionError) else _shown(str(error)),
            resolution=resolution or "Check that the file is complete and was not edited by hand.",
        ) from error


def checked(value: T, *, what: str, allowed: Mapping[str, str] = _NOTHING) -> T:
    """Put a value built in this process through the same rules as one that was read.

    msgspec checks ranges only when it decodes, so constructors of documents end with this.
    """
    try:
        plain = msgspec.to_builtins(value, enc_hook=_enc_hook)
        return msgspec.convert(plain, type(value), dec_hook=_dec_hook, strict=True)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), what, allowed, "") from error


def _invalid(message: str, what: str, allowed: Mapping[str, str], resolution: str) -> InvalidInput:
    """From msgspec's "Expected `int` <= 32 - at `$.pools[0].vcpus`"."""
    reason, found, path = message.rpartition(" - at `$")
    if not found:
        reason, path = message, ""
    field = _shown(path.rstrip("`").lstrip("."))
    rule = allowed.get(re.sub(r"\[[^]]*\]", "", field), "")
    # A pattern is for programs; where the field has a sentence, that says it better.
    reason = "not of the form it must have" if rule and "matching regex" in reason else _shown(reason)
    return InvalidInput(
        f"{what} is not valid: {f'field `{field}`: ' if field else ''}{reason}",
        details=rule,
        resolution=resolution or f"Correct {f'`{field}`' if field else 'it'} and try again.",
    )


def _shown(text: str) -> str:
    """Printable and short: msgspec quotes keys and values of the document, which may be hostile."""
    safe = "".join(c if c.isprintable() else "?" for c in text[:_SHOWN])
    return safe + ("..." if len(text) > _SHOWN else "")
