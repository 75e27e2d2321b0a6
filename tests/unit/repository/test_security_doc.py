"""docs/security.md names guarantees and files that exist, and none that is not there without saying so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mvm.core.posture import GUARANTEES

DOCS = Path(__file__).resolve().parents[3] / "docs"
TEXT = (DOCS / "security.md").read_text(encoding="utf-8")
NAMED = {
    name
    for names in re.findall(r"\*posture:\*((?:\s*,?\s*`[a-z0-9-]+`)+)", TEXT)
    for name in re.findall(r"`([a-z0-9-]+)`", names)
}
ABSENT = {guarantee.id for guarantee in GUARANTEES if not guarantee.there}


@pytest.mark.req("O6")
def test_it_names_guarantees_that_exist() -> None:
    known = {guarantee.id for guarantee in GUARANTEES}
    assert sorted(NAMED - known) == []
    assert len(NAMED) > 20


@pytest.mark.req("O6")
def test_what_is_not_there_is_named_only_where_that_is_said() -> None:
    for paragraph in re.split(r"\n\s*\n", TEXT):
        for name in ABSENT:
            if f"`{name}`" in paragraph:
                assert re.search(r"not\s+there\s+yet", paragraph, re.IGNORECASE), name


@pytest.mark.req("O6")
def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (DOCS / target).exists(), target
