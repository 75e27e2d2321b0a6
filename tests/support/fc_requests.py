"""One of every request the Firecracker driver can make, with every field it can have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mvm.core.fc_config import FcPaths, overlay_fc_config
from mvm.core.ids import PoolId, RevisionId, TenantId
from mvm.core.plan import plan_instance
from mvm.core.spec import new_tenant
from mvm.hostd.vmm.firecracker import requests as rq

BASE: dict[str, Any] = {
    "boot-source": {"boot_args": "console=ttyS0 reboot=k"},
    "machine-config": {"track_dirty_pages": False, "huge_pages": "None"},
    "drives": [{"drive_id": "data", "rate_limiter": {"bandwidth": {"size": 1, "refill_time": 1}}}],
    "network-interfaces": [{"iface_id": "eth0", "mtu": 1500}],
    "balloon": {
        "amount_mib": 0,
        "deflate_on_oom": True,
        "stats_polling_interval_s": 1,
        "free_page_reporting": True,
    },
    "entropy": {},
    "logger": {"level": "Info"},
    "mmds-config": {"version": "V2", "network_interfaces": ["eth0"]},
    "ours-alone": {"passed": "over"},
}
PATHS = FcPaths(
    kernel="/vmlinux", initrd="/initrd", rootfs="/rootfs", data="/data", secrets="/secrets",
    vsock="/run/vsock.sock", log="/run/log", metrics="/run/metrics",
)  # fmt: skip


def config(base: dict[str, Any] | None = None) -> dict[str, Any]:
    spec = new_tenant(TenantId("acme"), "nix/embedded")
    plan = plan_instance(spec, PoolId("default"), 0, RevisionId("ab" * 32), 1, 0)
    return overlay_fc_config(BASE if base is None else base, plan, PATHS)


def every() -> Iterator[rq.Call]:
    yield from rq.boot(config())
    yield from rq.boot(config({}))
    for state in ("Paused", "Resumed"):
        yield rq.SetState(state).call()
    yield rq.CreateSnapshot("/snapshot.new", "/", "Full").call()
    backend = rq.MemoryBackend("File", "/memory")
    yield rq.LoadSnapshot("/snapshot", backend).call()
    yield rq.LoadSnapshot(
        "/snapshot",
        backend,
        resume_vm=False,
        track_dirty_pages=False,
        clock_realtime=True,
        network_overrides=(rq.NetworkOverride("eth0", "mvm-t1s0"),),
        vsock_override=rq.VsockOverride("/run/vsock.sock"),
    ).call()
    yield rq.GET_INSTANCE
