from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core import limits
from mvm.core.errors import InvalidInput, NotFound
from mvm.core.ids import InstanceId, PoolId, TenantId
from mvm.core.spec import (
    EgressRule,
    PoolSpec,
    Quotas,
    TenantSpec,
    changed,
    decode_spec,
    encode_spec,
    new_tenant,
)

from . import strategies as some

ACME = new_tenant(TenantId("acme"), "nix/embedded")


def with_fields(**fields: Any) -> bytes:
    return json.dumps(json.loads(encode_spec(ACME)) | fields).encode()


@pytest.mark.req("L2")
@given(some.specs())
def test_a_spec_survives_its_bytes_and_the_bytes_are_canonical(spec: TenantSpec) -> None:
    data = encode_spec(spec)
    assert decode_spec(data) == spec
    assert encode_spec(decode_spec(data)) == data
    assert data.endswith(b"}\n")
    assert data.count(b"\n") == 1
    keys = list(json.loads(data))
    assert keys == sorted(keys)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_only_ever_invalid_input(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_spec(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(TenantSpec.__struct_fields__), json_values)
def test_any_json_in_any_field_is_a_valid_spec_or_invalid_input(field: str, value: Any) -> None:
    found = some.attempt(lambda: decode_spec(with_fields(**{field: value})))
    if isinstance(found, InvalidInput):
        assert found.resolution
        assert found.brief.isprintable()
    else:
        assert decode_spec(encode_spec(found)) == found


def test_depth_and_size_are_bounded() -> None:
    with pytest.raises(InvalidInput):
        decode_spec(b"[" * limits.SPEC_JSON_BYTES)
    with pytest.raises(InvalidInput, match="too large"):
        decode_spec(b" " * (limits.SPEC_JSON_BYTES + 1))


@pytest.mark.req("L1")
def test_without_pools_there_is_default_with_one_instance() -> None:
    assert ACME.instances() == (InstanceId.parse("acme/default-0"),)


@pytest.mark.req("L2")
def test_the_data_disk_is_two_gibibytes_unless_said_otherwise() -> None:
    assert ACME.data_disk_mib == 2048


@pytest.mark.req("L2")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"profile": "huge"}, "baseline, minimal, python"),
        ({"mem_mib": 127}, "128"),
        ({"mem_mib": True}, "mem_mib"),
        ({"vcpus": 33}, "1 to 32"),
        ({"vcpus": "1"}, "vcpus"),
        ({"data_disk_mib": 15}, "16"),
        ({"id": "Acme"}, "lower-case"),
        ({"flake_ref": "--impure"}, "hyphen"),
        ({"flake_ref": "a b"}, "spaces"),
        ({"flake_ref": "a\n"}, "spaces"),
        ({"colour": "red"}, "colour"),
        ({"schema": 2}, "schema"),
        ({"pools": []}, "pools"),
        ({"pools": [{"id": "a"}, {"id": "a"}]}, "same id"),
        ({"pools": [{"id": "a", "count": 200}, {"id": "b", "count": 54}]}, "253"),
        ({"pools": [{"id": "a", "count": -1}]}, "pools[0].count"),
        ({"ip": "10.240.1.1"}, "gateway"),
        ({"ip": "10.240.1.255"}, "broadcast"),
        ({"ip": "10.240.0.9"}, "host"),
        ({"ip": "192.0.2.1"}, "outside"),
        ({"mac": "01:00:00:00:00:01"}, "unicast"),
        ({"mac": "00:16:3e:00:00:01"}, "locally administered"),
        ({"mac": "02:00:00:00:00:AB"}, "upper-case"),
        ({"egress": [{"net": "10.0.0.1/8"}]}, "10.0.0.0/8"),
        ({"egress": [{"net": "10.0.0.0/8", "port": 53}]}, "protocol"),
        ({"egress": [{"net": "example.com/32"}]}, "egress"),
        ({"quotas": {"instances": 1}, "pools": [{"id": "a", "count": 2}]}, "quotas.instances"),
        ({"quotas": {"mem_mib": 128}}, "quotas.mem_mib"),
        ({"quotas": {"disk_mib": 100}}, "quotas.disk_mib"),
        ({"sleep": {"idle_s": 1}}, "sleep.idle_s"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_spec(with_fields(**fields))
    error = caught.value
    assert words in f"{error.brief} {error.details} {error.resolution}"
    assert error.resolution


def test_a_value_made_here_obeys_the_same_rules() -> None:
    with pytest.raises(InvalidInput, match="mem_mib"):
        new_tenant(TenantId("acme"), "x", mem_mib=1)
    with pytest.raises(InvalidInput, match=r"quotas\.vcpus"):
        changed(ACME, vcpus=4, quotas=Quotas(vcpus=2))
    with pytest.raises(TypeError):
        new_tenant(TenantId("acme"), "x", colour="red")


def test_a_hostile_document_does_not_reach_the_terminal_raw() -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_spec(b'{"\\u001b[2J' + b"x" * 5000 + b'": 1}')
    assert caught.value.brief.isprintable()
    assert len(caught.value.brief) < 500


def test_a_spec_copied_from_another_tenant_is_refused() -> None:
    assert decode_spec(encode_spec(ACME), of=ACME.id) == ACME
    with pytest.raises(InvalidInput, match="specification of acme, not of evil"):
        decode_spec(encode_spec(ACME), of=TenantId("evil"))


def test_an_unknown_pool_is_not_found() -> None:
    with pytest.raises(NotFound, match="no pool web"):
        ACME.pool(PoolId("web"))


def test_the_fixed_address_is_that_of_the_first_instance_of_the_first_pool() -> None:
    spec = changed(ACME, pools=(PoolSpec(id=PoolId("web"), count=2), PoolSpec(id=PoolId("job"))))
    assert [i.dir_name for i in spec.instances() if spec.holds_fixed_address(i)] == ["web-0"]


@given(some.egress_rules)
def test_an_egress_rule_survives_its_text(rule: EgressRule) -> None:
    assert EgressRule.parse(str(rule)) == rule


@given(st.text("0123456789./:tcpud", max_size=45))
def test_any_text_is_an_egress_rule_or_invalid_input(text: str) -> None:
    try:
        rule = EgressRule.parse(text)
    except InvalidInput:
        return
    assert EgressRule.parse(str(rule)) == rule
    assert changed(ACME, egress=(rule,)).egress == (rule,)
