"""mvm-hostd as a process, with the fake VMM's driver, and a node for it to serve.

Run as a program it *is* the daemon: `python -m tests.support.hostd_daemon ROOT SOCKET SETTINGS [-- CAPABILITY...]`;
with $MVM_TEST_FIRECRACKER, a directory with firecracker and jailer (or the fake's), its driver is that of Firecracker.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.fake_driver import FakeDriver
from tests.support.fake_firecracker import elf_kernel
from tests.support.fake_world import MEM_MIB, FakeWorld
from tests.support.firecracker_world import PlainDiskDriver
from tests.support.world import FAKE_FILES, network_namespace

from mvm.core import addressing
from mvm.core import revision as revisions
from mvm.core.history import Adopted, adopt
from mvm.core.ids import PoolId, TenantId
from mvm.core.plan import InstancePlan, plan_instance
from mvm.core.spec import new_tenant
from mvm.hostd import confine
from mvm.hostd.__main__ import serve
from mvm.linux.stream import UnixStream
from mvm.wire.hostd_client import HostdClient

ROOT = Path(__file__).resolve().parents[2]
READY_S = 60.0
_FIRECRACKER = "MVM_TEST_FIRECRACKER"


# As systemd does: descriptors from 3 on, and the variables name the process that is to have them.
_HAND_OVER = """
import os, sys
count = int(sys.argv[1])
given = [int(number) for number in sys.argv[2:2 + count]]
high = [os.dup2(fd, 100 + n) for n, fd in enumerate(given)]
for n, fd in enumerate(high):
    os.dup2(fd, 3 + n)
os.closerange(3 + count, 200)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count))
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""


class Daemon:
    """A running daemon. `log` is its standard error, one JSON object a line."""

    def __init__(
        self,
        folder: Path,
        root: Path,
        capabilities: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.socket = folder / "run" / "hostd.sock"
        self.settings = folder / "hostd.toml"
        self.log = folder / "hostd.log"
        self._root = root
        self._notice = folder / "notify.sock"
        self._capabilities = capabilities
        self._environment = dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Daemon:
        """Returns when it says READY, as systemd would be told."""
        self.launch()
        self.await_ready()
        return self

    def launch(self, handed: Sequence[socket.socket] = ()) -> None:
        """`handed`: sockets it gets as systemd hands them over."""
        self._notice.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._listener.bind(str(self._notice))
        argv = [sys.executable, "-m", "tests.support.hostd_daemon"]
        argv += [str(self._root), str(self.socket), str(self.settings)]
        if self._capabilities is not None:
            argv += ["--", *self._capabilities]
        fds = [sock.fileno() for sock in handed]
        if fds:
            argv = [sys.executable, "-c", _HAND_OVER, str(len(fds)), *map(str, fds), *argv]
        env = {
            **os.environ,
            **self._environment,
            "NOTIFY_SOCKET": str(self._notice),
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds
            )

    def await_ready(self) -> None:
        assert self.process is not None
        self._listener.settimeout(0.1)
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            try:
                if b"READY=1" in self._listener.recv(4096):
                    self._listener.close()
                    return
            except TimeoutError:
                if self.process.poll() is not None:
                    break
        raise AssertionError(f"hostd is not ready\n{self.log.read_text()[-3000:]}")

    def client(self) -> HostdClient:
        return HostdClient(lambda: UnixStream.dial(self.socket))

    def raw(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.socket))
        sock.settimeout(20)
        return sock

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if event is None or line["event"] == event]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self._listener.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


class DaemonWorld(FakeWorld):
    """A node whose documents are complete, as the daemon's admission wants them."""

    daemon: Daemon

    def plan(
        self, tenant: str = "acme", *, mem_mib: int | None = None, data_disk_mib: int = 16
    ) -> InstancePlan:
        name = TenantId(tenant)
        spec = new_tenant(
            name,
            "nix/embedded",
            mem_mib=mem_mib or self.mem_mib,
            profile="minimal",
            data_disk_mib=data_disk_mib,
        )
        with self.store.allocations() as (now, save):
            after, index = addressing.allocate(now, name)
            save(after)
        self.store.save_spec(spec)
        self.keys.create(name).close()
        entry = Adopted(self.revision, "nix/embedded", "0" * 64, time.time_ns())
        self.store.save_history(adopt(self.store.load_history(name), entry))
        return plan_instance(spec, PoolId("default"), 0, self.revision, index, 0)

    @property
    def client(self) -> HostdClient:
        return self.daemon.client()


@contextmanager
def daemon_world(settings: str = "", capabilities: Sequence[str] | None = None) -> Iterator[DaemonWorld]:
    """A node in a network namespace of its own, with its daemon. Everything is ended at the end."""
    with tempfile.TemporaryDirectory(prefix="mvm-test-") as folder, network_namespace():
        world = DaemonWorld(Path(folder) / "root", FakeDriver(), mem_mib=MEM_MIB)
        world.daemon = Daemon(Path(folder), world.store.root, capabilities)
        world.daemon.settings.write_text(settings)
        try:
            yield world
        finally:
            try:
                if world.daemon.process is not None:
                    world.daemon.stop()
            finally:
                world.destroy_all()


def firecracker_driver(root: Path, programs: Path) -> PlainDiskDriver:
    """Of a daemon and of the test beside it."""
    driver = PlainDiskDriver(root.parent / "cache", programs)
    driver.disks = root.parent / "disks"
    driver.disks.mkdir(exist_ok=True)
    return driver


@contextmanager
def firecracker_daemon(programs: Path) -> Iterator[DaemonWorld]:
    """As `daemon_world`, started, its VMM being Firecracker."""
    files: dict[str, bytes | Path] = {**FAKE_FILES, revisions.KERNEL: elf_kernel()}
    keep = confine.wanted_by(["firecracker"])
    with tempfile.TemporaryDirectory(prefix="mvm-test-") as folder, network_namespace():
        root = Path(folder) / "root"
        driver: Any = firecracker_driver(root, programs)
        world = DaemonWorld(root, driver, files, mem_mib=MEM_MIB)
        world.daemon = Daemon(Path(folder), root, keep, {_FIRECRACKER: str(programs)})
        world.daemon.settings.write_text("")
        try:
            yield world
        finally:
            try:
                if world.daemon.process is not None:
                    world.daemon.stop()
            finally:
                world.destroy_all()


def main(argv: Sequence[str]) -> int:
    root, path, settings, *rest = argv
    keep = rest[1:] if rest[:1] == ["--"] else list(confine.CAPABILITIES)
    programs = os.environ.get(_FIRECRACKER)
    driver = firecracker_driver(Path(root), Path(programs)) if programs else FakeDriver()
    return serve(Path(root), Path(path), Path(settings), driver, keep=keep)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
