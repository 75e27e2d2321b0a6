"""The final Firecracker configuration: the revision's base configuration with run-time values laid over it.

    boot-source         base, with kernel_image_path ours and boot_args merged (initrd_path only if there is one)
    machine-config      base, with vcpu_count, mem_size_mib ours and smt false
    drives              ours: rootfs (root device, read-only), data (writable), secrets (read-only)
    network-interfaces  ours: eth0
    vsock, logger, metrics   ours, over the base's other keys
    anything else       the base's, untouched

**The base comes from a tenant's flake, so it may not name anything of the host.** Drives and interfaces
beside ours are refused, and of ours only the keys in `_KEPT` (rate limiters, mtu) are taken from the base;
top-level sections that hold host paths (`_REFUSED`) are refused, and so are huge pages, which no control
group's limit on memory counts and every tenant would take from the same pool. What stays free: CPU template,
balloon, entropy, MMDS, and whatever Firecracker ignores or refuses for itself (unknown at the top level,
unknown below it).

The data drive is `Writeback`, because the default `Unsafe` hides the guest's flushes and a power cut would
lose what the guest believes is on disk; and `Sync`, the engine that every host kernel supports.

Paths are as the VMM sees them: inside its jail if it has one.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from mvm.core import limits
from mvm.core.errors import InvalidInput
from mvm.core.plan import InstancePlan, merge_boot_args

# 0 to 2 are reserved by the vsock protocol; every instance has a socket of its own, so all can have one
# number.
GUEST_CID: Final = 3

_OBJECTS: Final = ("boot-source", "machine-config", "vsock", "logger", "metrics")
_LISTS: Final = {"drives": "drive_id", "network-interfaces": "iface_id"}
_OURS: Final = {"drives": ("rootfs", "data", "secrets"), "network-interfaces": ("eth0",)}
_KEPT: Final = {
    "drives": frozenset({"rate_limiter"}),
    "network-interfaces": frozenset({"rx_rate_limiter", "tx_rate_limiter", "mtu"}),
}
_REFUSED: Final = ("pmem", "serial", "cpu-config")


class FcPaths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Absolute paths, or relative to the VMM's working directory; as the VMM sees them."""

    kernel: str
    rootfs: str
    data: str
    secrets: str
    vsock: str
    log: str
    metrics: str
    initrd: str | None = None


def overlay_fc_config(base: dict[str, Any], plan: InstancePlan, paths: FcPaths) -> dict[str, Any]:
    """A new dict; `base` is not changed. Raises InvalidInput where `base` is not of the form described
    above."""
    _check_base(base)
    _check_paths(paths)
    config = {key: _copy(value) for key, value in base.items()}

    boot = config.setdefault("boot-source", {})
    given = boot.get("boot_args", "")
    if not isinstance(given, str):
        raise _bad_base("boot-source.boot_args", "it is not text")
    boot["kernel_image_path"] = paths.kernel
    boot["boot_args"] = merge_boot_args(given, plan.boot_args)
    # A base's initrd path is one of the machine it was built on.
    boot.pop("initrd_path", None)
    if paths.initrd is not None:
        boot["initrd_path"] = paths.initrd

    config.setdefault("machine-config", {}).update(
        {"vcpu_count": plan.vcpus, "mem_size_mib": plan.mem_mib, "smt": False}
    )
    _merge(config, "drives", _drives(paths))
    _merge(
        config,
        "network-interfaces",
        [{"iface_id": "eth0", "guest_mac": plan.network.mac, "host_dev_name": plan.network.tap}],
    )
    config.setdefault("vsock", {}).update({"guest_cid": GUEST_CID, "uds_path": paths.vsock})
    config.setdefault("logger", {}).update({"log_path": paths.log})
    config.setdefault("metrics", {}).update({"metrics_path": paths.metrics})
    return config


def _drives(paths: FcPaths) -> list[dict[str, Any]]:
    """In the order that makes them vda, vdb and vdc."""
    return [
        {"drive_id": "rootfs", "path_on_host": paths.rootfs, "is_root_device": True, "is_read_only": True},
        {
            "drive_id": "data",
            "path_on_host": paths.data,
            "is_root_device": False,
            "is_read_only": False,
            "cache_type": "Writeback",
            "io_engine": "Sync",
        },
        {"drive_id": "secrets", "path_on_host": paths.secrets, "is_root_device": False, "is_read_only": True},
    ]


def _merge(config: dict[str, Any], key: str, ours: list[dict[str, Any]]) -> None:
    """Ours, with what the base may say about each."""
    name = _LISTS[key]
    theirs = {entry[name]: entry for entry in config.get(key, [])}
    config[key] = [
        {**{k: v for k, v in theirs.get(entry[name], {}).items() if k in _KEPT[key]}, **entry}
        for entry in ours
    ]


def _check_base(base: dict[str, Any]) -> None:
    for key in _OBJECTS:
        if key in base and not isinstance(base[key], dict):
            raise _bad_base(key, "it is not an object")
    if "gdb_socket_path" in base.get("machine-config", {}):
        raise _bad_base("machine-config.gdb_socket_path", "it opens a debugger's socket on the host")
    if base.get("machine-config", {}).get("huge_pages", "None") != "None":
        raise _bad_base("machine-config.huge_pages", "such pages are outside the limit on a guest's memory")
    for key, name in _LISTS.items():
        entries = base.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _bad_base(key, "it is not a list of objects")
        ids = [entry.get(name) for entry in entries]
        if not all(isinstance(found, str) for found in ids) or len(set(ids)) != len(ids):
            raise _bad_base(key, f"every entry needs a `{name}` of its own")
        if not set(ids) <= set(_OURS[key]):
            raise _bad_base(key, f"only {', '.join(_OURS[key])} can be there")
    for key in _REFUSED:
        if key in base:
            raise _bad_base(key, "it names files of the host, which a guest's configuration may not")


def _check_paths(paths: FcPaths) -> None:
    for name in FcPaths.__struct_fields__:
        path = getattr(paths, name)
        if path is not None and (not 0 < len(path) < limits.PATH_MAX or "\0" in path):
            raise InvalidInput(
                f"the {name} path of the instance is not usable",
                details=f"{path[:80]!a}, {len(path)} characters.",
                resolution=f"Use a path of 1 to {limits.PATH_MAX - 1} characters.",
            )


def _bad_base(field: str, reason: str) -> InvalidInput:
    return InvalidInput(
        f"the base Firecracker configuration is not valid: field `{field}`: {reason}",
        resolution="Correct the `tenant-fc-base` output of the flake and build again.",
    )


def _copy(value: Any) -> Any:
    """A deep copy of a JSON value, so that the base, which is shared by a revision's instances, stays as it
    is."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value
