"""Guests under QEMU. The artifacts are built once; each module boots one guest and goes on from its snapshots."""

from __future__ import annotations

import pytest
from tests.support.qemu_world import build

from mvm.builder.model import Artifacts


@pytest.fixture(scope="session")
def artifacts() -> Artifacts:
    return build()
