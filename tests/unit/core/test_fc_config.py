from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import InvalidInput
from mvm.core.fc_config import FcPaths, overlay_fc_config
from mvm.core.ids import PoolId, RevisionId, TenantId
from mvm.core.plan import plan_instance
from mvm.core.spec import new_tenant

from . import strategies as some

PLAN = plan_instance(
    new_tenant(TenantId("acme"), "x", vcpus=2, mem_mib=512), PoolId("default"), 0, RevisionId("a" * 64), 1, 0
)
PATHS = FcPaths(
    kernel="/vmlinux",
    rootfs="/rootfs",
    data="/data",
    secrets="/secrets",
    vsock="/vsock",
    log="/log",
    metrics="/metrics",
    initrd="/initrd",
)
BASE: dict[str, Any] = {
    "boot-source": {"kernel_image_path": "/build/vmlinux", "initrd_path": "/build/i", "boot_args": "quiet"},
    "machine-config": {"vcpu_count": 1, "mem_size_mib": 128, "smt": True, "huge_pages": "None"},
    "drives": [
        {"drive_id": "data", "cache_type": "Unsafe", "socket": "/x", "rate_limiter": {"ops": {"size": 1}}}
    ],
    "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "mvm-t9s9", "mtu": 1400}],
    "balloon": {"amount_mib": 0, "deflate_on_oom": True},
    "logger": {"level": "Warning"},
}


@pytest.mark.req("B7")
def test_run_time_values_are_laid_over_the_base() -> None:
    before = copy.deepcopy(BASE)
    config = overlay_fc_config(BASE, PLAN, PATHS)
    assert before == BASE, "the base is shared by all instances of a revision"
    assert config == {
        "boot-source": {
            "kernel_image_path": "/vmlinux",
            "initrd_path": "/initrd",
            "boot_args": "quiet mvm.ip=10.240.1.2/24 mvm.gw=10.240.1.1 mvm.dns=10.240.1.1 "
            "mvm.host=acme-default-0",
        },
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 512, "smt": False, "huge_pages": "None"},
        "drives": [
            {"drive_id": "rootfs", "path_on_host": "/rootfs", "is_root_device": True, "is_read_only": True},
            {
                "drive_id": "data",
                "path_on_host": "/data",
                "is_root_device": False,
                "is_read_only": False,
                "cache_type": "Writeback",
                "io_engine": "Sync",
                "rate_limiter": {"ops": {"size": 1}},
            },
            {
                "drive_id": "secrets",
                "path_on_host": "/secrets",
                "is_root_device": False,
                "is_read_only": True,
            },
        ],
        "network-interfaces": [
            {"iface_id": "eth0", "guest_mac": PLAN.network.mac, "host_dev_name": "mvm-t1s0", "mtu": 1400}
        ],
        "vsock": {"guest_cid": 3, "uds_path": "/vsock"},
        "logger": {"level": "Warning", "log_path": "/log"},
        "metrics": {"metrics_path": "/metrics"},
        "balloon": {"amount_mib": 0, "deflate_on_oom": True},
    }


@pytest.mark.req("B7")
def test_the_base_needs_to_say_nothing() -> None:
    config = overlay_fc_config({}, PLAN, FcPaths("/k", "/r", "/d", "/s", "/v", "/l", "/m"))
    assert config["boot-source"] == {"kernel_image_path": "/k", "boot_args": PLAN.boot_args}
    assert [drive["drive_id"] for drive in config["drives"]] == ["rootfs", "data", "secrets"]


@pytest.mark.req("B7")
@given(st.dictionaries(st.text(min_size=1, max_size=10), st.integers() | st.lists(st.booleans())))
def test_keys_nobody_knows_are_kept(extra: dict[str, Any]) -> None:
    kept = {f"x-{key}": value for key, value in extra.items()}
    config = overlay_fc_config(BASE | kept, PLAN, PATHS)
    assert {key: config[key] for key in kept} == kept


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"drives": [{"drive_id": "passwd", "path_on_host": "/etc/shadow"}]}, "drives"),
        ({"drives": [{"drive_id": "data"}, {"drive_id": "data"}]}, "drives"),
        ({"drives": [{"path_on_host": "/x"}]}, "drives"),
        ({"drives": [1]}, "drives"),
        ({"drives": {}}, "drives"),
        ({"network-interfaces": [{"iface_id": "eth1", "host_dev_name": "mvm-t2s0"}]}, "network-interfaces"),
        ({"pmem": [{"id": "p", "path_on_host": "/etc/shadow"}]}, "pmem"),
        ({"serial": {"serial_out_path": "/etc/cron.d/x"}}, "serial"),
        ({"cpu-config": "/etc/shadow"}, "cpu-config"),
        ({"machine-config": {"gdb_socket_path": "/x"}}, "gdb_socket_path"),
        ({"machine-config": {"huge_pages": "2M"}}, "huge_pages"),
        ({"machine-config": []}, "machine-config"),
        ({"boot-source": {"boot_args": 1}}, "boot_args"),
    ],
)
def test_a_base_that_reaches_for_the_host_or_is_malformed_is_refused(
    change: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        overlay_fc_config(BASE | change, PLAN, PATHS)
    assert field in caught.value.brief


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["drive_id", "iface_id", "boot_args", "smt", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@pytest.mark.req("B7")
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "boot-source",
                "machine-config",
                "drives",
                "network-interfaces",
                "vsock",
                "logger",
                "metrics",
                "y",
            ]
        ),
        json_values,
    )
)
def test_any_base_gives_our_devices_or_invalid_input(base: dict[str, Any]) -> None:
    config = some.attempt(lambda: overlay_fc_config(base, PLAN, PATHS))
    if isinstance(config, InvalidInput):
        assert config.resolution
        return
    assert [drive["path_on_host"] for drive in config["drives"]] == ["/rootfs", "/data", "/secrets"]
    assert [nic["host_dev_name"] for nic in config["network-interfaces"]] == ["mvm-t1s0"]
    assert config["machine-config"]["smt"] is False


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000])
def test_a_path_no_kernel_accepts_is_refused(path: str) -> None:
    with pytest.raises(InvalidInput, match="kernel path"):
        overlay_fc_config({}, PLAN, FcPaths(path, "/r", "/d", "/s", "/v", "/l", "/m"))
