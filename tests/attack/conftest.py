"""Nodes to attack: two tenants awake, for one in the shoes of a taken-over VMM; and a running mvm-hostd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.fake_world import FakeWorld, fake_world
from tests.support.hostd_daemon import DaemonWorld, daemon_world


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


@pytest.fixture
def world() -> Iterator[DaemonWorld]:
    """The daemon is ready. Members of `games` may connect besides root."""
    with daemon_world('group = "games"\n') as made:
        made.daemon.start()
        yield made
