"""A socket that systemd listens on is handed over, and is the one that the daemon serves: sd_listen_fds(3)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.hostd_daemon import DaemonWorld, daemon_world

from mvm.core.errors import Refused
from mvm.linux.stream import UnixStream
from mvm.wire.hostd_client import HostdClient

pytestmark = [pytest.mark.root, pytest.mark.req("H2", "H7")]


@pytest.fixture
def world() -> Iterator[DaemonWorld]:
    with daemon_world() as made:
        yield made


@pytest.fixture
def held(tmp_path: Path) -> Iterator[socket.socket]:
    """Bound and listening; nobody accepts yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "handed.sock"))
        sock.listen()
        yield sock


def test_it_serves_what_it_is_handed_and_makes_none(world: DaemonWorld, held: socket.socket) -> None:
    path = Path(held.getsockname())
    before = path.stat()
    waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    waiting.connect(str(path))  # before the daemon is there: it waits, as the first client of a service does
    world.daemon.launch([held])
    world.daemon.await_ready()
    assert world.daemon.process is not None
    answer = HostdClient(lambda: UnixStream.dial(path)).ping()
    assert answer.pid == world.daemon.process.pid
    waiting.settimeout(20)
    waiting.close()
    assert not world.daemon.socket.exists()
    after = path.stat()
    assert (after.st_ino, after.st_mode, after.st_uid, after.st_gid) == (
        before.st_ino, before.st_mode, before.st_uid, before.st_gid,
    )  # fmt: skip


def test_it_survives_the_daemon_and_serves_the_next(world: DaemonWorld, held: socket.socket) -> None:
    """Clients of a restart wait; they are not refused."""
    path = Path(held.getsockname())
    client = HostdClient(lambda: UnixStream.dial(path))
    world.daemon.launch([held])
    world.daemon.await_ready()
    first = client.ping().pid
    assert world.daemon.stop() == 0
    assert path.exists(), "whoever listens removes it, and that is not the daemon"
    world.daemon.launch([held])
    world.daemon.await_ready()
    assert client.ping().pid != first


def test_what_is_no_listening_socket_is_refused(
    world: DaemonWorld, tmp_path: Path, held: socket.socket
) -> None:
    one, other = socket.socketpair()
    with one, other:
        for handed in ([one], [held, one]):
            world.daemon.launch(handed)
            assert world.daemon.process is not None
            assert world.daemon.process.wait(60) == Refused.exit_code
            assert world.daemon.stop() == Refused.exit_code
