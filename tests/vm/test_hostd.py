"""A guest's life through the confined daemon, with QEMU: what the fake VMM cannot show of capabilities and filter."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.qemu_world import CACHE, ROOT, qemu_world

from mvm.builder.model import Artifacts
from mvm.core import addressing
from mvm.core.history import Adopted, adopt
from mvm.core.lifecycle import State
from mvm.hostd import confine
from mvm.linux import capabilities
from mvm.linux.stream import UnixStream
from mvm.standalone.remote import SocketHost
from mvm.wire.hostd_api import Purpose
from mvm.wire.hostd_client import HostdClient

pytestmark = [pytest.mark.root, pytest.mark.vm]


@pytest.mark.req("H2", "H3", "L6", "S1", "S2")
def test_a_life_through_the_daemon(artifacts: Artifacts, tmp_path: Path) -> None:
    with qemu_world(artifacts) as world:
        plan = world.plan(data_disk_mib=32)
        tenant = plan.instance.tenant
        with world.store.allocations() as (now, save):
            after, index = addressing.allocate(now, tenant)
            save(after)
        assert index == plan.network.index
        entry = Adopted(world.revision, "nix/embedded", "0" * 64, time.time_ns())
        world.store.save_history(adopt(world.store.load_history(tenant), entry))
        path, notices, log = tmp_path / "run" / "hostd.sock", tmp_path / "notify", tmp_path / "log"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, log.open("wb") as errors:
            listener.bind(str(notices))
            listener.settimeout(60)
            argv = [sys.executable, "-m", "mvm.hostd", "--root", str(world.store.root), "--socket", str(path)]
            argv += ["--cache", str(CACHE), "--settings", str(tmp_path / "none")]
            env = {**os.environ, "NOTIFY_SOCKET": str(notices), "PYTHONPATH": str(ROOT / "src")}
            daemon = subprocess.Popen(argv, env=env, cwd="/", stdin=subprocess.DEVNULL, stderr=errors)
            try:
                while b"READY=1" not in listener.recv(4096):
                    pass
                host, client = SocketHost(path), HostdClient(lambda: UnixStream.dial(path))
                record = client.create_instance(plan)
                assert record.process is not None
                vmm = capabilities.status(record.process.pid)
                assert vmm.effective == vmm.permitted == frozenset()
                assert vmm.bounding == frozenset(confine.CAPABILITIES)
                assert vmm.no_new_privs
                assert vmm.seccomp == 2
                world.start_worker(plan, "through-the-daemon")
                before = world.count(plan, "through-the-daemon")
                assert client.sleep_instance(plan.instance).state is State.SLEEPING
                assert client.wake_instance(plan).state is State.RUNNING
                assert world.count(plan, "through-the-daemon") >= before
                out = bytearray()
                with host.channel(plan.instance, Purpose.EXEC) as channel:
                    assert channel.exec(["cat", "/proc/sys/kernel/hostname"], stdout=out.extend).code == 0
                assert bytes(out).strip() == plan.instance.host_name.encode()
                # The VM is nobody's child: it survives the daemon.
                daemon.send_signal(signal.SIGTERM)
                assert daemon.wait(30) == 0
                assert world.count(plan, "through-the-daemon") >= before
            finally:
                if daemon.poll() is None:
                    daemon.kill()
                    daemon.wait()
        assert b'"defect"' not in log.read_bytes()
