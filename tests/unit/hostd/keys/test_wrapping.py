"""A wrapped key unwraps in its own place and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import IntegrityError
from mvm.core.ids import TenantId
from mvm.hostd import keys
from mvm.linux.secret import SecretBytes

ACME = TenantId("acme")
MATERIAL = bytes(range(32))


def tenant_key(tenant: TenantId = ACME, version: int = 1, material: bytes = MATERIAL) -> keys.LocalTenantKey:
    return keys.LocalTenantKey(tenant, version, SecretBytes.copy_of(material))


@pytest.mark.req("K2", "S4")
@given(
    key=st.binary(min_size=16, max_size=64),
    context=st.binary(max_size=100),
    version=st.integers(1, 2**32 - 1),
)
def test_round_trip(key: bytes, context: bytes, version: int) -> None:
    wrapper = tenant_key(version=version)
    blob = wrapper.wrap(SecretBytes.copy_of(key), context)
    assert len(blob) == len(key) + keys.OVERHEAD
    assert keys.parse_header(blob) == (version, len(key))
    with wrapper.unwrap(blob, context) as found:
        assert found.view() == key
    assert key not in blob


@pytest.mark.req("K2", "S4")
@given(st.data())
def test_any_change_is_refused(data: st.DataObject) -> None:
    wrapper = tenant_key()
    blob = bytearray(wrapper.wrap(SecretBytes.copy_of(MATERIAL), b"context"))
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        wrapper.unwrap(bytes(blob), b"context")


@pytest.mark.req("K2")
@given(st.binary(max_size=120))
def test_anything_else_is_an_integrity_error(blob: bytes) -> None:
    with pytest.raises(IntegrityError):
        tenant_key().unwrap(blob, b"")


@pytest.mark.req("K2")
@pytest.mark.parametrize("cut", [0, 1, 12, 40, 71])
def test_truncation_and_extension(cut: int) -> None:
    wrapper = tenant_key()
    blob = wrapper.wrap(SecretBytes.copy_of(MATERIAL), b"")
    for wrong in (blob[:cut], blob + b"\0"):
        with pytest.raises(IntegrityError):
            wrapper.unwrap(wrong, b"")


@pytest.mark.req("S4", "K2")
def test_bound_to_tenant_version_context_and_key() -> None:
    blob = tenant_key().wrap(SecretBytes.copy_of(MATERIAL), b"here")
    for other, context in (
        (tenant_key(TenantId("other")), b"here"),
        (tenant_key(version=2), b"here"),
        (tenant_key(material=bytes(32)), b"here"),
        (tenant_key(), b"there"),
        (tenant_key(), b""),
    ):
        with pytest.raises(IntegrityError):
            other.unwrap(blob, context)


@pytest.mark.req("S4")
@given(st.text("ab", min_size=1, max_size=5), st.text("ab", min_size=1, max_size=5), st.binary(max_size=5))
def test_tenant_and_context_cannot_be_shifted(one: str, two: str, context: bytes) -> None:
    blob = tenant_key(TenantId(one)).wrap(SecretBytes.copy_of(MATERIAL), context)
    shifted = (one.encode() + context).removeprefix(two.encode())
    if one == two:
        return
    with pytest.raises(IntegrityError):
        tenant_key(TenantId(two)).unwrap(blob, shifted)


@pytest.mark.req("K2")
def test_a_closed_key_is_wiped() -> None:
    with tenant_key() as wrapper:
        pass
    with pytest.raises(ValueError):
        wrapper.wrap(SecretBytes.copy_of(MATERIAL), b"")


@pytest.mark.parametrize("size", [0, 15, 65])
def test_only_keys_are_wrapped(size: int) -> None:
    with pytest.raises(ValueError):
        tenant_key().wrap(SecretBytes(size), b"")
