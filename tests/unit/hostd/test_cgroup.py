"""Limits as files and back, and which group a process says it is in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.hostd.resources.cgroup import OVERHEAD_MIB, Limits, limits, membership, parse, render

pytestmark = pytest.mark.req("H5")


@given(st.integers(1, 1 << 20), st.integers(1, 1024))
def test_what_was_written_is_read_back(mem_mib: int, vcpus: int) -> None:
    wanted = limits(mem_mib=mem_mib, vcpus=vcpus)
    assert parse(render(wanted)) == wanted
    assert wanted.memory_max == (mem_mib + OVERHEAD_MIB) << 20
    assert wanted.cpu_us == vcpus * 100_000
    assert wanted.pids_max > vcpus + 64, "QEMU has up to 64 workers"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("memory.max", "max"),
        ("cpu.max", "max 100000"),
        ("cpu.max", "1 2"),
        ("cpu.max", "x"),
        ("pids.max", "max"),
        ("memory.swap.max", "max"),
        ("memory.oom.group", "0"),
    ],
)
def test_anything_else_is_no_limit(name: str, content: str) -> None:
    with pytest.raises(ValueError):
        parse({**render(Limits(1 << 30, 100_000, 100)), name: content})


def test_a_kernel_without_swap_accounting() -> None:
    files = render(Limits(1 << 30, 100_000, 100))
    del files["memory.swap.max"]
    assert parse(files).memory_max == 1 << 30


def test_membership() -> None:
    assert membership("12:pids:/x\n0::/mvm.slice/mvm-instances/acme-default-0\n") == (
        "/mvm.slice/mvm-instances/acme-default-0"
    )
    assert membership("12:pids:/x\n") == ""
    assert membership("") == ""
