from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core import limits
from mvm.core.errors import InvalidInput, NotFound
from mvm.core.history import Adopted, History, Pin, adopt, decode_history, encode_history, pin, rollback
from mvm.core.ids import RevisionId, TenantId

EMPTY = History(tenant=TenantId("acme"))


def built(number: int) -> Adopted:
    return Adopted(RevisionId(f"{number:064x}"[::-1]), "nix/embedded", "1" * 64, number)


def after(*numbers: int) -> History:
    history = EMPTY
    for number in numbers:
        history = adopt(history, built(number))
    return history


@pytest.mark.req("B6")
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 3)), max_size=40))
def test_the_last_ones_stay_listed_once_each_and_one_is_current(moves: list[tuple[int, int]]) -> None:
    history = EMPTY
    for number, steps in moves:
        history = adopt(history, built(number))
        assert history.entries[-1] == history.current_entry() == built(number)
        if steps < len(history.entries):
            history = rollback(history, steps=steps)
            assert history.current_entry() == history.entries[-1 - steps]
        assert decode_history(encode_history(history)) == history
    ids = [entry.revision for entry in history.entries]
    assert len(set(ids)) == len(ids) <= limits.REVISIONS_LISTED


@pytest.mark.req("B6")
def test_the_oldest_go_once_there_are_too_many() -> None:
    count = limits.REVISIONS_LISTED + 5
    history = after(*range(count))
    assert history.entries == tuple(built(n) for n in range(5, count))
    assert decode_history(encode_history(history)) == history


@pytest.mark.req("B6")
def test_rolling_back_and_forward_again() -> None:
    history = rollback(after(1, 2, 3), steps=2)
    assert history.current_entry() == built(1)
    assert rollback(history, revision=built(3).revision).current_entry() == built(3)
    assert rollback(history, revision=built(2).revision[:3]).current_entry() == built(2)


@pytest.mark.req("B6")
def test_an_unclear_or_impossible_rollback_lists_what_there_is() -> None:
    history = after(1, 2, 3)
    for options in ({"steps": 3}, {"steps": 0}, {"steps": -1}, {"revision": "ff"}, {"revision": ""}):
        with pytest.raises(NotFound) as caught:
            rollback(history, **options)
        assert built(1).revision[:12] in caught.value.details
    with pytest.raises(NotFound, match="more than one"):
        rollback(after(1, 17), revision="1")
    with pytest.raises(InvalidInput):
        rollback(history)
    with pytest.raises(InvalidInput):
        rollback(history, steps=1, revision="1")
    with pytest.raises(NotFound, match="no revision"):
        rollback(EMPTY, steps=1)


@pytest.mark.req("B6")
def test_a_pin_is_kept_until_it_is_taken_away() -> None:
    wanted = Pin("github:acme/guest", "2" * 64)
    history = adopt(pin(after(1), wanted), built(2))
    assert decode_history(encode_history(history)).pinned == wanted
    assert pin(history, None).pinned is None


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_only_ever_invalid_input(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_history(data)


def test_a_history_that_contradicts_itself_is_refused() -> None:
    one = built(1)
    for bad in (
        History(tenant=EMPTY.tenant, entries=(one, one), current=one.revision),
        History(tenant=EMPTY.tenant, entries=(one,), current=built(2).revision),
        History(tenant=EMPTY.tenant, entries=(one,)),
        History(tenant=EMPTY.tenant, current=one.revision),
    ):
        with pytest.raises(InvalidInput):
            decode_history(encode_history(bad))
