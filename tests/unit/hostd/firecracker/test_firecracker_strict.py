"""What is taken from a release's list of system calls, and what is no such list."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import InvalidInput, MissingPrerequisite
from mvm.hostd.vmm.firecracker.strict import THREADS, UNUSED, Rule, derive
from mvm.hostd.vmm.firecracker.version import Version

NEW = Version(1, 16, 1)


def eq(index: int, value: int) -> dict[str, Any]:
    return {"index": index, "type": "dword", "op": "eq", "val": value}


def unused(thread: str) -> list[Any]:
    """Every rule of the table that is of this thread, as a release writes them."""
    rules = [rule for rule in UNUSED if rule.thread == thread]
    masked = {**eq(2, 0), "op": {"masked_eq": 4}}
    return [
        {
            "syscall": rule.syscall,
            "args": [] if rule.argument < 0 else [eq(rule.argument, rule.value), masked],
        }
        for rule in rules
    ]


def policy(rules: dict[str, list[Any]]) -> bytes:
    """With these rules, after those of the table."""
    return json.dumps(
        {
            thread: {
                "default_action": "trap",
                "filter_action": "allow",
                "filter": [*unused(thread), *rules.get(thread, [])],
            }
            for thread in THREADS
        }
    ).encode()


def kept(rules: dict[str, list[Any]]) -> dict[str, list[Any]]:
    found = json.loads(derive(policy(rules), NEW))
    assert set(found) == set(THREADS)
    assert all(part["default_action"] == "trap" for part in found.values())
    return {thread: part["filter"] for thread, part in found.items()}


@pytest.mark.req("H6")
def test_every_rule_of_the_table_goes_and_nothing_beside_it() -> None:
    stays = [
        {"syscall": "read", "comment": "of every thread"},
        {"syscall": "mmap", "args": [eq(3, 50)]},
        {"syscall": "ioctl", "args": [eq(1, 0xAE80)]},
        {"syscall": "fcntl", "args": [eq(1, 2), eq(2, 1)]},
    ]
    assert kept(dict.fromkeys(THREADS, stays)) == dict.fromkeys(THREADS, stays)


@pytest.mark.req("H6")
def test_a_rule_goes_from_its_own_thread_only() -> None:
    rule = {"syscall": "recvmsg"}
    found = kept({thread: [rule] for thread in THREADS})
    assert Rule("vmm", "recvmsg") in UNUSED
    assert (found["vmm"], found["api"]) == ([], [rule])


@pytest.mark.req("H6")
@pytest.mark.parametrize("missing", sorted(UNUSED))
def test_a_list_without_a_rule_of_the_table_is_another_list(missing: Rule) -> None:
    """One value that changed would leave that rule in a filter that is called strict."""
    parts = json.loads(policy({}))
    rules = parts[missing.thread]["filter"]
    rules.remove(unused(missing.thread)[[r for r in UNUSED if r.thread == missing.thread].index(missing)])
    with pytest.raises(InvalidInput, match="list of system calls"):
        derive(json.dumps(parts).encode(), NEW)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.sampled_from(["eq", "mmap", "ioctl", "msync"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["syscall", "args", "index", "op", "val", "x"]), inner, max_size=5)
    ),
    max_leaves=12,
)


@pytest.mark.req("H6")
@given(st.dictionaries(st.sampled_from(THREADS), st.lists(_VALUES, max_size=6)))
def test_nothing_is_ever_added(rules: dict[str, list[Any]]) -> None:
    try:
        found = kept(rules)
    except InvalidInput:
        return
    for thread in THREADS:
        left = iter(rules.get(thread, []))
        assert all(any(rule == given for given in left) for rule in found[thread]), "in order, and unchanged"


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"vmm": 1, "api": 1, "vcpu": 1}', policy({}) + b" " * (1 << 20),
        policy({}).replace(b"trap", b"log"), policy({}).replace(b'"allow"', b'"trap"'),
        policy({"vmm": [{}]}), policy({"vmm": [{"syscall": 3}]}),
        policy({"vmm": [{"syscall": "mmap", "args": 3}]}), policy({"vmm": [{"syscall": "mmap", "args": [3]}]}),
    ],
)  # fmt: skip
def test_what_is_no_list_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidInput, match="list of system calls"):
        derive(text, NEW)


@pytest.mark.parametrize("version", [Version(1, 15, 1), Version(1, 17, 0), Version(2, 16, 0)])
def test_no_filter_is_made_for_a_version_whose_list_nobody_read(version: Version) -> None:
    with pytest.raises(MissingPrerequisite, match=str(version).replace(".", r"\.")):
        derive(policy({}), version)
