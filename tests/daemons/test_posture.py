"""`mvm posture` finds the daemon by its socket and reads what the kernel says of it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.support.hostd_daemon import DaemonWorld, daemon_world

from mvm.hostd import confine
from mvm.hostd.inspect.guarantees import SCENE_JUDGES
from mvm.hostd.inspect.scene import read_scene

pytestmark = pytest.mark.root
JUDGE = SCENE_JUDGES["bounded-capabilities"]


@pytest.mark.req("O6", "H3")
def test_a_confined_daemon_holds_what_is_documented(world: DaemonWorld) -> None:
    assert world.daemon.process is not None
    scene = read_scene(world.store, world.keys, world.daemon.socket)
    assert [daemon.pid for daemon in scene.daemons] == [world.daemon.process.pid]
    verdict = JUDGE(scene)
    assert verdict.held is True, verdict.seen
    assert verdict.count == 1


@pytest.fixture
def lesser() -> Iterator[DaemonWorld]:
    """A daemon with one capability less than documented: other than promised is not as promised."""
    wanted = [name for name in confine.CAPABILITIES if name != "KILL"]
    with daemon_world(capabilities=wanted) as made:
        made.daemon.start()
        yield made


@pytest.mark.req("O6", "H3")
def test_another_set_than_documented_is_named(lesser: DaemonWorld) -> None:
    verdict = JUDGE(read_scene(lesser.store, lesser.keys, lesser.daemon.socket))
    assert verdict.held is False
    assert "capabilities are" in verdict.seen


@pytest.mark.req("O6", "H3")
def test_without_a_daemon_nothing_is_bounded(world: DaemonWorld) -> None:
    assert JUDGE(read_scene(world.store, world.keys, None)).held is False
    nobody = world.daemon.socket.with_name("nobody.sock")
    assert not os.path.exists(nobody)
    assert JUDGE(read_scene(world.store, world.keys, nobody)).held is False
