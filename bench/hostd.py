"""What mvm-hostd costs: memory when idle and for each sleeping instance, round trips of a no-op and of an operation.

    python -m bench.hostd [--runs N] [--instances N] [--output json]

Starts the real daemon (as root, with a state root made for the purpose), first over an empty node, then over one with
many sleeping instances. Targets: at most 60 MiB idle, 2 ms a round trip (median, connection included), 1 KiB of the
daemon's memory for each sleeping instance. Exits 1 if one is missed. Memory is resident, as the kernel counts it; the
difference between two daemons varies by some pages, so many instances are needed for the last figure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvm.core import record as records
from mvm.core.ids import InstanceId, RevisionId, SnapshotId, TenantId
from mvm.core.lifecycle import State
from mvm.core.snapshot import SnapshotRef
from mvm.core.spec import encode_spec, new_tenant
from mvm.linux.stream import UnixStream
from mvm.wire.hostd_client import HostdClient

SOURCE = Path(__file__).resolve().parents[1] / "src"
IDLE_MIB, ROUND_TRIP_MS, PER_INSTANCE_KIB = 60.0, 2.0, 1.0


def add_sleeping(root: Path, count: int) -> None:
    """`count` instances that sleep, one to a tenant, as far as documents go."""
    now = time.time_ns()
    for n in range(count):
        tenant = TenantId(f"t{n:05d}")
        instance = InstanceId(tenant, "default", 0)
        home = root / "tenants" / tenant / "instances" / instance.dir_name
        home.mkdir(parents=True)
        (root / "tenants" / tenant / "spec.json").write_bytes(encode_spec(new_tenant(tenant, "nix/embedded")))
        record = records.InstanceRecord(
            id=instance,
            state=State.SLEEPING,
            network=records.network_identity(instance, n % 4000 + 1, 0),
            created_ns=now,
            changed_ns=now,
            revision=RevisionId("ab" * 32),
            snapshot=SnapshotRef(SnapshotId("cd" * 16), "ef" * 32, now, 1 << 20),
        )
        (home / "state.json").write_bytes(records.encode_record(record))


@contextmanager
def daemon(folder: Path) -> Iterator[tuple[HostdClient, int]]:
    """A ready daemon over `folder`/root: a client and its pid."""
    path, notices = folder / "run" / "hostd.sock", folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(notices))
        listener.settimeout(300)
        argv = [sys.executable, "-m", "mvm.hostd", "--root", str(folder / "root"), "--socket", str(path)]
        argv += ["--cache", str(folder / "cache"), "--settings", str(folder / "none")]
        env = {**os.environ, "PYTHONPATH": str(SOURCE), "NOTIFY_SOCKET": str(notices)}
        process = subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL, cwd="/")
        try:
            while b"READY=1" not in listener.recv(4096):
                pass
            yield HostdClient(lambda: UnixStream.dial(path)), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            notices.unlink()


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError(f"no VmRSS of {pid}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000, help="round trips (default 1000)")
    parser.add_argument("--instances", type=int, default=1000, help="sleeping instances (default 1000)")
    parser.add_argument("--output", choices=("human", "json"), default="human")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mvm-bench-") as name:
        folder = Path(name)
        with daemon(folder) as (client, pid):
            client.ping()
            idle = resident_kib(pid)
            trips = []
            for _ in range(options.runs):
                began = time.perf_counter()
                client.ping()
                trips.append((time.perf_counter() - began) * 1000)
        add_sleeping(folder / "root", options.instances)
        began = time.perf_counter()
        with daemon(folder) as (client, pid):
            recovered = time.perf_counter() - began
            client.ping()
            full = resident_kib(pid)
            someone = InstanceId.parse("t00000/default-0")
            operations = []
            for _ in range(max(1, options.runs // 10)):
                began = time.perf_counter()
                client.inspect_instance(someone)
                operations.append((time.perf_counter() - began) * 1000)
    trips.sort()
    figures = {
        "idle_mib": round(idle / 1024, 1),
        "round_trip_ms": round(statistics.median(trips), 3),
        "round_trip_p99_ms": round(trips[len(trips) * 99 // 100], 3),
        "operation_ms": round(statistics.median(operations), 2),
        "instances": options.instances,
        "per_instance_kib": round((full - idle) / options.instances, 2),
        "start_with_instances_s": round(recovered, 2),
    }
    met = (
        figures["idle_mib"] <= IDLE_MIB
        and figures["round_trip_ms"] <= ROUND_TRIP_MS
        and figures["per_instance_kib"] <= PER_INSTANCE_KIB
    )
    if options.output == "json":
        print(json.dumps({**figures, "met": met}))
    else:
        for figure, value in figures.items():
            print(f"{figure:24} {value}")
        print("targets met" if met else "targets MISSED")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
