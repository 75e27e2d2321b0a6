"""What the benchmark concludes from its samples."""

from __future__ import annotations

import math
import os
import time

from bench import cost
from bench.figures import Samples, aligned, ratio, table, verdicts_table
from hypothesis import given
from hypothesis import strategies as st

positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9)


def samples(**series: list[float]) -> Samples:
    made = Samples()
    for name, values in series.items():
        for value in values:
            made.add(name, 256, value)
    return made


def test_a_ratio_is_of_medians_and_its_spread_of_pairs() -> None:
    found = ratio(samples(a=[2, 3, 100], b=[1, 2, 4]), "a / b", ("a", 256), ("b", 256), 1.6)
    assert found is not None
    assert found.value == 1.5
    assert found.spread == (1.5, 25)
    assert found.word() == "held"


def test_a_bound_from_below_is_held_from_above() -> None:
    measured = samples(boot=[10], wake=[2])
    found = ratio(measured, "x", ("boot", 256), ("wake", 256), 10, at_most=False)
    assert found is not None
    assert not found.held
    assert "missed" in verdicts_table([found])
    assert "at least 10 x" in verdicts_table([found])
    found = ratio(measured, "x", ("boot", 256), ("wake", 256), 5, at_most=False)
    assert found is not None
    assert found.held


def test_what_was_not_measured_has_no_ratio_and_no_row() -> None:
    measured = samples(a=[1.0])
    assert ratio(measured, "x", ("a", 256), ("b", 256), 1) is None
    assert ratio(measured, "x", ("b", 256), ("a", 256), 1) is None
    drawn = table(measured, [("a", "first", str), ("b", "second", str)], [256, 512])
    assert drawn.splitlines()[1].split() == ["first", "1.0", "(1.0", "to", "1.0)", "-"]
    assert "second" not in drawn


def test_a_divisor_of_zero_has_no_ratio() -> None:
    assert ratio(samples(a=[1], b=[0]), "x", ("a", 256), ("b", 256), 1) is None


@given(positive, positive)
def test_the_verdict_follows_from_the_value(over: list[float], under: list[float]) -> None:
    found = ratio(samples(a=over, b=under), "x", ("a", 256), ("b", 256), 1.1)
    assert found is not None
    assert math.isfinite(found.value)
    assert found.held == (found.value <= 1.1)
    assert found.spread[0] <= found.spread[1]


@given(positive)
def test_a_summary_lies_within_its_samples(values: list[float]) -> None:
    found = samples(a=values).summary("a", 256)
    assert found is not None
    assert found.low == min(values)
    assert found.high == max(values)
    assert found.low <= found.median <= found.high


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([["a", "bbb", "c"], ["aaaa", "b", ""]]) == "a     bbb  c\naaaa  b"


def test_the_cpu_clock_of_a_process_is_the_one_it_reads_itself() -> None:
    before = time.process_time()
    seen = cost.process_seconds(os.getpid())
    assert before <= seen <= time.process_time()


def test_a_process_that_is_gone_costs_nothing() -> None:
    beyond_pid_max = 1 << 22
    assert cost.process_seconds(beyond_pid_max) == 0.0
    assert cost.parent_of(beyond_pid_max + 1) == 0
    assert cost.faults(0) == cost.Faults(0, 0)
    assert cost.parent_of(os.getpid()) == os.getppid()
