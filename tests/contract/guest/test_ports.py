"""Ports that keep no boundaries, with the real agent: clients that die anywhere, and who may use a port."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvm.core.errors import Busy, GuestError
from mvm.hostd.guest_channel import (
    ExitStatus,
    acquire_session_port,
    distrust_ports,
    lock_path,
    take_port,
)
from mvm.wire import framing, guest_api

Eventually = Callable[[Callable[[], bool]], None]


@pytest.mark.req("L6")
def test_clients_follow_each_other_on_one_stream(agent: Any) -> None:
    for turn in range(4):
        with agent.port() as channel:
            assert channel.exec(["sh", "-c", f"exit {turn}"], stdin=bytes(300_000)) == ExitStatus(turn)
        assert agent.lock.read_bytes() == b"clean\n"


@pytest.mark.req("L6")
@pytest.mark.parametrize("seed", range(12))
def test_a_client_that_dies_anywhere_is_followed_by_one_that_works(agent: Any, seed: int) -> None:
    rng = random.Random(seed)
    body = guest_api.exec_body(
        ["cat"], env={}, cwd="", user="", tty=None, detach=False, stdin=True, window=1 << 18
    )
    stream = (
        framing.greeting(b"dead" * 4, resync=rng.random() < 0.5)
        + framing.encode(framing.EXEC, 1, body)
        + framing.encode(framing.DATA, 1, b"\0" + bytes(rng.randrange(60000)))
        + framing.encode(framing.DATA, 1, b"\0" + rng.randbytes(60000))
    )
    agent.port_end.sendall(stream[: rng.randrange(len(stream))])
    with agent.port() as channel:  # no lock file yet: not known to be clean
        assert channel.exec(["sh", "-c", "exit 5"]) == ExitStatus(5)
        assert channel.status().sessions == 0
    assert agent.lock.read_bytes() == b"clean\n"


@pytest.mark.req("L6")
def test_the_programs_of_a_dead_client_are_ended(agent: Any, tmp_path: Path, eventually: Eventually) -> None:
    pids = bytearray()
    channel = agent.port()
    script = "trap '' HUP; echo $$; while :; do sleep 0.1; done"
    channel.start_exec(["sh", "-c", script], stdin=b"", stdout=pids.extend)
    while not pids.endswith(b"\n"):
        channel._turn(None, None)
    channel.close()  # with a request open: as good as dying
    assert agent.lock.read_bytes() != b"clean\n"
    with agent.port() as channel:
        assert channel.status().sessions == 0
    # It ignores SIGHUP, so SIGKILL follows.
    eventually(lambda: not Path(f"/proc/{int(pids)}").exists())


@pytest.mark.req("L6")
def test_a_client_on_a_socket_that_disappears_takes_its_programs_along(
    agent: Any, eventually: Eventually
) -> None:
    channel = agent.channel()
    operation = channel.start_exec(["sleep", "1000"])
    while not operation.answered:
        channel._turn(None, None)
    channel.close()
    eventually(lambda: not Path(f"/proc/{operation.pid}").exists())


@pytest.mark.req("L6")
def test_malformed_bytes_cost_only_their_own_connection(agent: Any) -> None:
    with agent.channel() as good:
        bad = agent.channel()
        bad.hello()
        bad._sock.sendall(b"\xff" * 100)
        with pytest.raises(GuestError):
            bad.status()
        bad.close()
        assert good.exec(["true"]) == ExitStatus(0)
    agent.port_end.sendall(b"\xff" * 1000)
    with agent.port() as channel:
        assert channel.exec(["true"]) == ExitStatus(0)


@pytest.mark.req("L6")
def test_session_ports_are_taken_once_and_clean_ones_first(tmp_path: Path) -> None:
    take_port(lock_path(tmp_path, 2)).release(clean=True)
    first = acquire_session_port(tmp_path)
    assert (first.port, first.was_clean) == (2, True)
    rest = [acquire_session_port(tmp_path) for _ in range(6)]
    assert sorted(lease.port or 0 for lease in rest) == [1, 3, 4, 5, 6, 7]
    with pytest.raises(Busy, match="all session channels"):
        acquire_session_port(tmp_path)
    with pytest.raises(Busy) as caught:
        take_port(lock_path(tmp_path, 2))
    assert str(os.getpid()) in caught.value.details
    first.release(clean=True)
    distrust_ports(tmp_path)
    again = acquire_session_port(tmp_path)
    assert (again.port, again.was_clean) == (2, False)
    for lease in [again, *rest]:
        lease.release(clean=False)
