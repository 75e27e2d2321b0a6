"""The list of guarantees, and the rules that turn findings into a mode."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.posture import GUARANTEES, Finding, Guarantee, Mode, Status, Verdict, assess, find, render_page

DOCS = Path(__file__).resolve().parents[3] / "docs"
VERDICTS = st.builds(
    Verdict, held=st.sampled_from([True, False, None]), count=st.integers(0, 3), seen=st.text(max_size=9)
)


@pytest.mark.req("O6")
def test_the_page_is_up_to_date() -> None:
    text = (DOCS / "posture.md").read_text(encoding="utf-8")
    assert text == render_page(), "python -m mvm.cli.posture > docs/posture.md"


@pytest.mark.req("O6")
def test_every_guarantee_says_what_it_is() -> None:
    known = tomllib.loads((DOCS / "requirements.toml").read_text(encoding="utf-8"))["requirements"].keys()
    assert len({g.id for g in GUARANTEES}) == len(GUARANTEES)
    for guarantee in GUARANTEES:
        assert guarantee.statement.endswith("."), guarantee.id
        assert guarantee.check.endswith("."), guarantee.id
        assert guarantee.requires
        assert set(guarantee.requires) <= known, guarantee.id
        assert guarantee.mode is not Mode.DEVELOPMENT, "development mode promises nothing"


def made(mode: Mode, status: Status, name: str = "x") -> Finding:
    return Finding(msgspec.structs.replace(GUARANTEES[0], id=name, mode=mode), status, "")


@pytest.mark.req("O6")
@pytest.mark.parametrize(
    ("baseline", "hardened", "mode", "missing"),
    [
        (Status.HELD, Status.HELD, Mode.HARDENED, ()),
        (Status.NOTHING, Status.HELD, Mode.HARDENED, ()),
        (Status.HELD, Status.NOT_HELD, Mode.BASELINE, ("h",)),
        (Status.HELD, Status.UNKNOWN, Mode.BASELINE, ("h",)),
        (Status.HELD, Status.NOT_THERE, Mode.BASELINE, ("h",)),
        (Status.NOT_HELD, Status.HELD, Mode.DEVELOPMENT, ("b",)),
        (Status.UNKNOWN, Status.HELD, Mode.DEVELOPMENT, ("b",)),
        (Status.NOT_THERE, Status.NOT_HELD, Mode.DEVELOPMENT, ("b",)),
    ],
)
def test_the_mode_that_is_reached(
    baseline: Status, hardened: Status, mode: Mode, missing: tuple[str, ...]
) -> None:
    reached = assess([made(Mode.BASELINE, baseline, "b"), made(Mode.HARDENED, hardened, "h")])
    assert (reached.mode, reached.missing) == (mode, missing)
    assert ("b" in reached.unseen) == (baseline is Status.NOTHING)


@pytest.mark.req("O6")
@given(VERDICTS)
def test_what_is_not_there_is_never_held(verdict: Verdict) -> None:
    absent = msgspec.structs.replace(GUARANTEES[0], there=False)
    assert find(absent, verdict).status is Status.NOT_THERE


@pytest.mark.req("O6")
@given(VERDICTS)
def test_held_means_that_something_was_looked_at_and_found_good(verdict: Verdict) -> None:
    present = msgspec.structs.replace(GUARANTEES[0], there=True)
    status = find(present, verdict).status
    assert (status is Status.HELD) == (verdict.held is True and verdict.count > 0)
    assert (status is Status.UNKNOWN) == (verdict.held is None)


@pytest.mark.req("O6")
@given(st.lists(st.tuples(st.sampled_from(GUARANTEES), VERDICTS)))
def test_no_mode_is_reached_past_one_that_is_missing(found: list[tuple[Guarantee, Verdict]]) -> None:
    findings = [find(guarantee, verdict) for guarantee, verdict in found]
    reached = assess(findings)
    order = list(Mode)
    fine = (Status.HELD, Status.NOTHING)
    for finding in findings:
        if order.index(finding.guarantee.mode) <= order.index(reached.mode):
            assert finding.status in fine
    assert bool(reached.missing) == (reached.mode is not Mode.HARDENED)
