"""`Host` with everything real but the VMM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.fake_world import FakeWorld, fake_world


@pytest.fixture
def world() -> Iterator[FakeWorld]:
    with fake_world() as made:
        yield made
