"""What the kernel prints and sends, parsed."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.record import ProcessIdentity
from mvm.linux import machine, netlink, pidfd, process


@given(name=st.text(max_size=20).map(lambda s: s.replace("\n", "")), ticks=st.integers(0, 2**63 - 1))
def test_stat_survives_any_command_name(name: str, ticks: int) -> None:
    line = f"77 ({name}) S " + " ".join(["1"] * 18) + f" {ticks} 4 5"
    assert pidfd.parse_stat(line) == ("S", ticks)


@given(st.text(max_size=60))
def test_stat_of_anything_else_is_a_value_error(text: str) -> None:
    try:
        pidfd.parse_stat(text)
    except ValueError:
        pass


def test_a_reused_pid_is_not_the_same_process() -> None:
    mine = pidfd.identify(os.getpid())
    assert mine is not None
    assert pidfd.is_alive(mine)
    assert not pidfd.is_alive(ProcessIdentity(mine.pid, mine.start_ticks + 1, mine.boot_id))
    assert not pidfd.is_alive(ProcessIdentity(mine.pid, mine.start_ticks, "another boot"))
    assert pidfd.open_pidfd(ProcessIdentity(mine.pid, mine.start_ticks + 1, mine.boot_id)) is None
    assert pidfd.terminate(ProcessIdentity(mine.pid, 0, mine.boot_id), 0) == "gone"
    assert not pidfd.is_alive(ProcessIdentity(0, 0, mine.boot_id))


_CPU = "processor\t: {n}\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n"
_CPU += "stepping\t: 1\nflags\t\t: fpu sse avx2\n\n"


def test_cpuinfo() -> None:
    found = machine.parse_cpuinfo(_CPU.format(n=0) + _CPU.format(n=1))
    assert found == machine.CpuModel("AuthenticAMD", "AMD EPYC", 26, 2, 1, ("avx2", "fpu", "sse"), 2)


@given(st.text(max_size=200))
def test_machine_parsers_take_anything(text: str) -> None:
    machine.parse_cpuinfo(text)
    machine.parse_meminfo(text)
    machine.parse_cgroup_mounts(text)


def test_meminfo_is_bytes() -> None:
    assert machine.parse_meminfo("MemTotal:  2 kB\nHugePages_Total:  3\nnonsense\n") == {
        "MemTotal": 2048,
        "HugePages_Total": 3,
    }


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ("30 1 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw", ("v2", "/sys/fs/cgroup")),
        ("1 1 0:1 / /a rw - cgroup c rw\n2 1 0:2 / /u rw - cgroup2 c rw", ("hybrid", "/u")),
        ("1 1 0:1 / /a rw - cgroup c rw", ("v1", "")),
        ("", ("none", "")),
    ],
)
def test_cgroup_version(mounts: str, expected: tuple[str, str]) -> None:
    assert machine.parse_cgroup_mounts(mounts) == expected


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=40), max_size=6))
def test_attributes_come_back(wanted: dict[int, bytes]) -> None:
    data = b"".join(netlink.attribute(kind, payload) for kind, payload in wanted.items())
    assert netlink.attributes(data) == wanted
    assert len(data) % 4 == 0


@given(st.binary(max_size=200))
def test_netlink_parsers_raise_value_errors_only(data: bytes) -> None:
    for parse in (netlink.attributes, lambda d: list(netlink.messages(d))):
        try:
            parse(data)
        except ValueError:
            pass


@given(st.lists(st.binary(max_size=30), max_size=8), st.binary(max_size=200))
def test_lines_are_cut_the_same_however_they_arrive(parts: list[bytes], rest: bytes) -> None:
    whole: list[str] = []
    pieces: list[str] = []
    at_once, bit_by_bit = process._Lines(whole.append), process._Lines(pieces.append)
    at_once.feed(b"".join(parts) + rest)
    at_once.end()
    for part in [*parts, rest]:
        bit_by_bit.feed(part)
    bit_by_bit.end()
    assert whole == pieces


def test_a_line_without_end_is_cut() -> None:
    seen: list[str] = []
    lines = process._Lines(seen.append)
    for _ in range(5):
        lines.feed(b"x" * process.MAX_LINE)
    assert seen
    assert max(map(len, seen)) <= 2 * process.MAX_LINE


def test_the_command_can_be_pasted() -> None:
    assert process.command_line(["echo", "a b", "$x"]) == "echo 'a b' '$x'"
