"""One user's share, on a clock of the test's."""

from __future__ import annotations

import pytest

from mvm.hostd.fairness import Allowance

pytestmark = pytest.mark.req("H2")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_so_many_at_once_and_so_many_a_second() -> None:
    clock = Clock()
    some = Allowance(3, 2.0, clock)
    assert [some.take(7) for _ in range(5)] == [True, True, True, False, False]
    assert some.kept_back(7) == 2
    assert some.kept_back(7) == 0
    assert some.take(8)  # another user's is another's
    clock.now += 0.25
    assert not some.take(7)
    clock.now += 0.25
    assert [some.take(7), some.take(7)] == [True, False]
    clock.now += 1000
    assert [some.take(7) for _ in range(4)] == [True, True, True, False]


def test_root_is_not_counted() -> None:
    some = Allowance(1, 0.0, Clock())
    assert all(some.take(0) for _ in range(100))


def test_users_who_ask_no_more_are_forgotten() -> None:
    clock = Clock()
    some = Allowance(2, 1.0, clock)
    for uid in range(1, 5000):
        clock.now += 1
        assert some.take(uid)
    assert len(some._left) < 1100
