"""A node with the strict fake of Firecracker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.fake_firecracker import install
from tests.support.firecracker_world import FirecrackerWorld, firecracker_world


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    return install(tmp_path / "programs")


@pytest.fixture
def world(programs: Path) -> Iterator[FirecrackerWorld]:
    with firecracker_world(programs) as made:
        yield made
