"""A node without VMs, fresh for every test."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.standalone.fakes import FakeNode


@pytest.fixture
def fake(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path / "root")
