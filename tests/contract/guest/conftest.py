"""The real agent, started as a guest's init starts it, on a transport a test can reach."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mvm.guest
from mvm.hostd.guest_channel import GuestChannel, PortLease, connect, take_port

AGENT = Path(mvm.guest.__file__).parent / "__main__.py"


class Agent:
    """A running agent without disks, devices or power. `path`: its Unix socket, boundaries kept like vsock's.

    `port()`: a fresh channel over the one stream that never ends, like a virtio-serial port.
    """

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "agent.sock"
        self.lock = tmp_path / "guest-3.lock"
        self.port_end, theirs = socket.socketpair()
        log = (tmp_path / "agent.log").open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(AGENT), "--no-devices", "--no-disks", "--simulate"),
                *("--listen-unix", str(self.path), "--port-fd", str(theirs.fileno())),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
        log.close()
        theirs.close()
        until = time.monotonic() + 20
        while not self._listens():
            assert self.process.poll() is None, (tmp_path / "agent.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.01)

    def _listens(self) -> bool:
        """The path appears with bind, a moment before listen."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.path)) == 0

    def channel(self) -> GuestChannel:
        return connect(self.path, deadline=time.monotonic() + 10)

    def port(self) -> GuestChannel:
        lease: PortLease = take_port(self.lock)
        return GuestChannel(self.port_end.dup(), lease)

    def resident_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.port_end.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path)
    try:
        yield agent
    finally:
        agent.stop()


@pytest.fixture
def channel(agent: Agent) -> Iterator[GuestChannel]:
    with agent.channel() as channel:
        yield channel


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait for something another process does; fails after 20 s."""

    def wait(condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < until, "did not happen"
            time.sleep(0.01)

    return wait
