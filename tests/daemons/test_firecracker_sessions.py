"""Sessions with a guest of Firecracker through mvm-hostd: the socket that it passes on leads to the guest."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.fake_firecracker import install
from tests.support.hostd_daemon import DaemonWorld, firecracker_daemon

from mvm.core.errors import GuestError
from mvm.standalone import remote
from mvm.standalone.remote import SocketHost
from mvm.wire.hostd_api import Purpose

pytestmark = pytest.mark.root


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DaemonWorld]:
    with firecracker_daemon(install(tmp_path / "programs")) as made:
        made.daemon.start()
        yield made


@pytest.mark.req("H2", "L1")
def test_a_session_reaches_the_guest_also_after_a_wake(world: DaemonWorld) -> None:
    plan = world.plan()
    world.client.create_instance(plan)
    host = SocketHost(world.daemon.socket)
    for _ in range(2):
        with host.channel(plan.instance, Purpose.EXEC) as channel:
            assert channel.status().uptime_ms > 0
        assert (world.paths(plan).runtime / "guest-1.lock").read_bytes() == b"clean\n"
        world.client.sleep_instance(plan.instance)
        world.client.wake_instance(plan)


@pytest.mark.req("H2", "L3")
def test_a_guest_that_does_not_take_it_is_an_error_in_time(
    world: DaemonWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = world.plan()
    world.client.create_instance(plan)
    identity = world.record(plan).process
    assert identity is not None
    os.kill(identity.pid, signal.SIGSTOP)
    monkeypatch.setattr(remote, "ANSWER_TIMEOUT", 0.2)
    before = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(GuestError, match="cannot be reached"),
        SocketHost(world.daemon.socket).channel(plan.instance, Purpose.EXEC),
    ):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
    os.kill(identity.pid, signal.SIGCONT)
    assert world.client.ping().channels == 0
