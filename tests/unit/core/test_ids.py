from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import InvalidInput
from mvm.core.ids import InstanceId, NodeId, PoolId, RevisionId, SnapshotId, TenantId

from . import strategies as some


@pytest.mark.req("L1")
@given(some.instances)
def test_an_instance_id_survives_its_text(instance: InstanceId) -> None:
    again = InstanceId.parse(str(instance))
    assert again == instance
    assert hash(again) == hash(instance)
    assert (again.tenant, again.pool, again.ordinal) == (instance.tenant, instance.pool, instance.ordinal)
    assert InstanceId.in_dir(instance.tenant, instance.dir_name) == instance
    assert copy.deepcopy(instance) == instance


@given(some.instances, some.instances)
def test_two_instances_never_share_a_jail_name(one: InstanceId, other: InstanceId) -> None:
    assert (one.vm_name == other.vm_name) == (one == other)
    assert len(one.vm_name) <= 64
    assert len(one.host_name) <= 63


def test_names_that_only_hyphens_tell_apart_stay_apart() -> None:
    assert InstanceId("a-b", "c", 0).vm_name != InstanceId("a", "b-c", 0).vm_name
    assert InstanceId("a", "p-1", 0).dir_name != InstanceId("a", "p", 1).dir_name


PARSERS: list[Callable[[str], str]] = [
    TenantId.parse,
    PoolId.parse,
    InstanceId.parse,
    RevisionId.parse,
    SnapshotId.parse,
    NodeId.parse,
]


@given(st.sampled_from(PARSERS), st.text(max_size=80))
def test_any_text_is_an_id_in_its_only_form_or_refused_with_a_way_out(
    parse: Callable[[str], str], text: str
) -> None:
    found = some.attempt(lambda: parse(text))
    if isinstance(found, InvalidInput):
        assert found.details
        assert found.resolution
        assert found.brief.isprintable()
    else:
        assert str(found) == text


@given(st.text(max_size=60))
def test_a_suggested_name_is_a_valid_one(text: str) -> None:
    for parse in PARSERS[:3]:
        found = some.attempt(lambda parse=parse: parse(text))  # type: ignore[misc]
        if isinstance(found, InvalidInput) and found.resolution.startswith("Did you mean"):
            parse(found.resolution.split("'")[1])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("Acme Corp", "'acme-corp'"),
        ("acme-", "'acme'"),
        ("9lives", "'lives'"),
        ("a--b", "'a-b'"),
        ("acme/default-0", "'acme'"),
        ("", "'acme'"),
        ("x" * 33, "'" + "x" * 32 + "'"),
        ("../etc", "'etc'"),
        ("acme\n", "'acme'"),
    ],
)
def test_a_bad_tenant_id_is_answered_with_a_good_one(text: str, hint: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        TenantId.parse(text)
    assert hint in caught.value.resolution


@pytest.mark.parametrize(
    "text", ["acme", "acme/default", "acme/default-00", "acme/default-253", "a/b-1/c-2", "/-0"]
)
def test_what_is_not_an_instance_id(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        InstanceId.parse(text)
    assert "/" in caught.value.resolution


def test_a_tenant_alone_suggests_its_default_instance() -> None:
    with pytest.raises(InvalidInput) as caught:
        InstanceId.parse("acme")
    assert "'acme/default-0'" in caught.value.resolution


def test_instances_sort_by_number() -> None:
    ids = [InstanceId("a", "p", n) for n in (10, 2, 1)]
    assert [i.ordinal for i in sorted(ids, key=lambda i: i.sort_key)] == [1, 2, 10]


@pytest.mark.parametrize("digits", ["0" * 31, "0" * 33, "A" * 32, "g" * 32, "0" * 32 + "\n"])
def test_node_and_snapshot_ids_are_32_lower_case_digits(digits: str) -> None:
    for kind in (NodeId, SnapshotId):
        with pytest.raises(InvalidInput):
            kind.parse(digits)
