"""A node with two tenants awake, for tests in the shoes of a VMM that its guest has taken over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.fake_world import FakeWorld, fake_world


@pytest.fixture(scope="module")
def two() -> Iterator[FakeWorld]:
    """`acme` and `rival` run, both woken, so their memory comes from pagers."""
    with fake_world() as world:
        for tenant in ("acme", "rival"):
            plan = world.plan(tenant)
            world.host().create_instance(plan)
            world.mark(plan, f"memory of {tenant} ")
            world.host().sleep_instance(plan.instance)
            world.host().wake_instance(plan)
        yield world
