from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mvm.hostd.sealing.compaction import Usage, plan
from mvm.hostd.sealing.index import SEGMENTS_MAX
from mvm.hostd.sealing.layout import PAGES_PER_CHUNK, runs

sizes = st.integers(0, 1 << 30)


@given(st.lists(st.builds(Usage, sizes, sizes), max_size=SEGMENTS_MAX), sizes)
def test_after_compaction_both_rules_hold(old: list[Usage], new_live: int) -> None:
    victims = plan(old, new_live)
    kept = [usage for number, usage in enumerate(old) if number not in victims]
    live = new_live + sum(usage.live for usage in old)
    assert len(kept) + 1 <= SEGMENTS_MAX
    assert 2 * sum(usage.dead for usage in kept) <= live
    assert all(usage.live for usage in kept)


def test_nothing_is_moved_without_need() -> None:
    assert plan([Usage(100, 10), Usage(50, 20)], 5) == frozenset()
    assert plan([Usage(100, 10), Usage(0, 20)], 5) == {1}
    assert plan([Usage(100, 10), Usage(10, 90)], 5) == {1}


@given(st.integers(0, (1 << PAGES_PER_CHUNK) - 1))
def test_runs_are_the_set_bits(mask: int) -> None:
    rebuilt, end = 0, -1
    for first, count in runs(mask):
        assert first > end
        end = first + count
        rebuilt |= ((1 << count) - 1) << first
    assert rebuilt == mask
