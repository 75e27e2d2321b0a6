from __future__ import annotations

import ast
from pathlib import Path

import pytest

from requirements_doc import documents, ids_in, proofs

ROOT = Path(__file__).resolve().parents[3]


def test_generated_documents_are_up_to_date() -> None:
    stale = [
        name
        for name, text in documents(ROOT).items()
        if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != text
    ]
    assert not stale, f"{', '.join(stale)}: out of date, run scripts/gen-docs"


def test_finds_marks_wherever_pytest_does(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        """
import pytest
pytestmark = [pytest.mark.root, pytest.mark.req("A1")]

@pytest.mark.req("B1", "B2")
def test_one(): ...

@pytest.mark.req("C1")
class TestGroup:
    pytestmark = pytest.mark.req("C2")
    def test_two(self): ...
    def helper(self): ...

@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.req("D1")), 2])
def test_three(x): ...
"""
    )
    one, two, three = (f"tests/test_x.py::{n}" for n in ("test_one", "TestGroup::test_two", "test_three"))
    assert proofs(tmp_path) == {
        "A1": [one, two, three],
        "B1": [one],
        "B2": [one],
        "C1": [two],
        "C2": [two],
        "D1": [three],
    }


def test_refuses_ids_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="string literals"):
        list(ids_in(ast.parse("pytest.mark.req(*IDS)")))
