from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core import limits
from mvm.core.audit import (
    GENESIS,
    AuditEntry,
    AuditLimits,
    Head,
    chain,
    head_of,
    parse_line,
    verify_lines,
)
from mvm.core.errors import IntegrityError, InvalidInput
from mvm.core.ids import InstanceId, NodeId, TenantId
from mvm.core.snapshot import ArtifactHash

from . import strategies as some

ACME = TenantId("acme")
NODE = NodeId("0" * 31 + "1")
ROOT = Path(__file__).resolve().parents[3]

entries = st.builds(
    AuditEntry,
    time_ns=some.times,
    tenant=st.just(ACME),
    action=st.sampled_from(["tenant.create", "instance.sleep", "instance.wake"]),
    outcome=st.sampled_from(["done", "failed", "refused", "recovered"]),
    node=st.just(NODE),
    host=st.text(max_size=20),
    command=st.lists(st.text(max_size=10), max_size=4).map(tuple),
    detail=st.text(max_size=30),
    snapshot_hash=st.none() | some.sha256s,
)
logs = st.lists(entries, min_size=2, max_size=6)


def write(items: list[AuditEntry]) -> tuple[list[bytes], Head]:
    lines, head = [], Head()
    for item in items:
        line, head = chain(head, item)
        lines.append(line)
    return lines, head


def entry(**fields: Any) -> AuditEntry:
    return AuditEntry(
        **{
            "time_ns": 1,
            "tenant": ACME,
            "action": "a",
            "outcome": "done",
            "node": NODE,
            "host": "h",
            **fields,
        }
    )


def refused(lines: list[bytes], **options: Any) -> IntegrityError:
    with pytest.raises(IntegrityError) as caught:
        verify_lines(lines, **options)
    assert caught.value.resolution
    return caught.value


@pytest.mark.req("O2")
@given(logs)
def test_what_was_chained_verifies_and_can_be_continued(items: list[AuditEntry]) -> None:
    lines, head = write(items)
    assert all(line.endswith(b"}\n") and line.count(b"\n") == 1 for line in lines)
    verified = verify_lines(lines, tenant=ACME, expected=head)
    assert verified.as_head() == head == head_of(lines[-1])
    more, _ = chain(head_of(lines[-1]), items[0])
    assert verify_lines([*lines, more], expected=head).count == len(items) + 1


@pytest.mark.req("O2")
@given(logs, st.data())
def test_any_edit_is_found_at_its_line(items: list[AuditEntry], data: st.DataObject) -> None:
    lines, _ = write(items)
    which = data.draw(st.integers(0, len(lines) - 1))
    line = bytearray(lines[which])
    where = data.draw(st.integers(0, len(line) - 1))
    line[where] ^= data.draw(st.integers(1, 255))
    lines[which] = bytes(line)
    assert f"line {which + 1}:" in refused(lines).brief


@pytest.mark.req("O2")
@given(logs, st.data())
def test_any_loss_is_found(items: list[AuditEntry], data: st.DataObject) -> None:
    lines, head = write(items)
    which = data.draw(st.integers(0, len(lines) - 1))
    del lines[which]
    assert f"line {which + 1}:" in refused(lines, expected=head).brief


@pytest.mark.req("O2")
@given(logs, st.data())
def test_any_reorder_or_repetition_is_found(items: list[AuditEntry], data: st.DataObject) -> None:
    lines, head = write(items)
    order = data.draw(st.permutations(range(len(lines))))
    if list(order) != sorted(order):
        refused([lines[n] for n in order], expected=head)
    twice = data.draw(st.integers(0, len(lines) - 1))
    assert f"line {twice + 2}:" in refused([*lines[: twice + 1], *lines[twice:]]).brief


@pytest.mark.req("O2")
@given(logs, st.data())
def test_a_cut_end_needs_a_head_and_is_found_with_it(items: list[AuditEntry], data: st.DataObject) -> None:
    lines, head = write(items)
    kept = data.draw(st.integers(0, len(lines) - 1))
    assert verify_lines(lines[:kept]).count == kept
    assert "cut off" in refused(lines[:kept], expected=head).brief


@pytest.mark.req("O2")
@given(logs, logs)
def test_a_rewritten_log_needs_a_head_and_is_found_with_it(
    items: list[AuditEntry], other: list[AuditEntry]
) -> None:
    _, head = write(items)
    forged, forged_head = write([*other, *items])
    verify_lines(forged)
    assert forged_head.count > head.count
    if head_of(forged[head.count - 1]) != head:
        assert "rewritten" in refused(forged, expected=head).brief


@pytest.mark.req("O2")
def test_a_line_of_another_sound_log_in_the_same_place_is_found() -> None:
    lines, _ = write([entry(), entry(), entry()])
    others, _ = write([entry(detail="another past"), entry(), entry()])
    assert "line 2: it does not follow" in refused([lines[0], *others[1:]]).brief


@pytest.mark.req("O2")
def test_a_well_linked_line_with_the_wrong_number_is_found() -> None:
    line, _ = chain(Head(5, GENESIS), entry())
    assert "line 1: entry 1 is missing" in refused([line]).brief


@pytest.mark.req("O2")
def test_the_same_meaning_in_other_bytes_is_an_edit() -> None:
    (line,), _ = write([entry()])
    spaced = json.dumps(json.loads(line)).encode() + b"\n"
    assert json.loads(spaced) == json.loads(line)
    assert "canonical" in refused([spaced]).brief
    assert "canonical" in refused([line.replace(b'{"action"', b'{"seq":7,"action"')]).brief


@pytest.mark.req("O2")
def test_an_interrupted_append_is_named_as_such() -> None:
    lines, _ = write([entry(), entry()])
    assert "line 2: it has no end" in refused([lines[0], lines[1][:-1]]).brief
    assert "line 2: it has no end" in refused([lines[0], lines[1][:20]]).brief


@pytest.mark.req("O2")
def test_an_entry_of_another_tenant_is_foreign() -> None:
    lines, _ = write([entry(), entry(tenant=TenantId("evil"))])
    verify_lines(lines)
    assert "line 2: it is an entry of tenant evil" in refused(lines, tenant=ACME).brief


def test_an_empty_log() -> None:
    assert verify_lines([]).as_head() == Head() == Head(0, GENESIS)
    assert "line 1" in refused([], expected=Head(1, "a" * 64)).brief
    refused([], expected=Head(0, "a" * 64))


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=3))
def test_arbitrary_lines_are_only_ever_integrity_errors(lines: list[bytes]) -> None:
    refused(lines)
    with pytest.raises((InvalidInput, IntegrityError)):
        parse_line(lines[0])


@pytest.mark.req("O2")
def test_every_field_of_the_requirement_is_kept_and_covered_by_the_hash() -> None:
    full = entry(
        command=("mvm", "tenant", "run", "acme"),
        instance=InstanceId("acme", "default", 0),
        flake_ref="nix/embedded",
        lock_hash="1" * 64,
        store_paths=("/nix/store/a",),
        artifacts=(ArtifactHash("kernel", "2" * 64),),
        snapshot_hash="3" * 64,
        final_config_hash="4" * 64,
        ip="10.240.1.2",
        mac="02:00:00:00:00:01",
        limits=AuditLimits(vcpus=1, mem_mib=256, data_disk_mib=2048),
    )
    (line,), head = write([full])
    sealed = parse_line(line)
    for name in AuditEntry.__struct_fields__:
        assert getattr(sealed, name) == getattr(full, name)
    document = json.loads(line)
    for name in set(document) - {"hash"}:
        rest = json.loads(line)
        del rest[name]
        bare = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        refused([bare])
    assert head.hash == document["hash"]


def test_an_entry_out_of_bounds_is_refused_before_it_is_written() -> None:
    for bad in ({"action": "Two words"}, {"time_ns": -1}, {"lock_hash": "x"}, {"host": "x" * 257}):
        with pytest.raises(InvalidInput):
            chain(Head(), entry(**bad))
    with pytest.raises(InvalidInput, match="Unicode"):
        chain(Head(), entry(command=("\udcff",)))
    with pytest.raises(InvalidInput, match="too large"):
        chain(Head(), entry(command=("x" * limits.MESSAGE_MAX,) * limits.AUDIT_ARGUMENTS))


@pytest.mark.req("O2")
def test_the_documented_example_can_be_checked_by_the_documented_rule() -> None:
    page = (ROOT / "docs" / "formats" / "audit.md").read_text(encoding="utf-8")
    line, head = page.rsplit("```\n", 2)[1].splitlines()
    document = json.loads(line)
    seal = document.pop("hash")
    body = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    assert seal == head == hashlib.sha256(b"mvm audit 1\x00" + body).hexdigest()
    assert verify_lines([line.encode() + b"\n"]).head == head
