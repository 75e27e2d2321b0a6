"""Phases follow each other, and what they add up to is never more than the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.hostd.stopwatch import Stopwatch


@pytest.mark.req("S7")
@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=10))
def test_phases_are_told_and_kept_in_order(names: list[str]) -> None:
    told: list[str] = []
    watch = Stopwatch(told.append)
    for name in names:
        watch.phase(name)
    phases, total = watch.stop()
    assert told == names
    assert [phase.name for phase in phases] == names
    assert 0 <= sum(phase.ns for phase in phases) <= total


def test_stopping_again_adds_nothing() -> None:
    watch = Stopwatch(lambda name: None)
    watch.phase("only")
    first, _ = watch.stop()
    assert watch.stop()[0] == first
