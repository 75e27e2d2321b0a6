"""A running mvm-hostd with everything real but the VMM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.hostd_daemon import DaemonWorld, daemon_world


@pytest.fixture
def world() -> Iterator[DaemonWorld]:
    """The daemon is ready. Members of `games` may connect besides root."""
    with daemon_world('group = "games"\n') as made:
        made.daemon.start()
        yield made
