"""What a request's body may look like, derived by hand from Firecracker's documented API.

Stricter than the program in three places, on purpose: the sub-objects in which it would pass over an unknown field
(token bucket, network override, vsock override, metrics) have none here, an object may not be written as a list, and
`is_read_only` of a drive has to be said.
"""

from __future__ import annotations

import json

from . import versions
from .versions import ALWAYS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .versions import Since, Version

    Kind = str | tuple[str, Any]

REQUIRED, DEFAULT, OPTION = "required", "may be left out", "may be left out or null"


class Malformed(Exception):
    """Not JSON, or not of the form that the schema wants."""


class Field:
    def __init__(self, kind: Kind, need: str = OPTION, since: Since = ALWAYS) -> None:
        self.kind, self.need, self.since = kind, need, since


_INTEGERS = {"u8": 1 << 8, "u16": 1 << 16, "u32": 1 << 32, "u64": 1 << 64, "usize": 1 << 64}
_BITS = ("list", ("object", "modifier"))
LEVELS = ("off", "trace", "debug", "info", "warn", "warning", "error")

SCHEMAS: dict[str, dict[str, Field]] = {
    "action": {"action_type": Field(("enum", ("FlushMetrics", "InstanceStart", "SendCtrlAltDel")), REQUIRED)},
    "balloon": {
        "amount_mib": Field("u32", REQUIRED),
        "deflate_on_oom": Field("bool", REQUIRED),
        "stats_polling_interval_s": Field("u16", DEFAULT),
        "free_page_hinting": Field("bool", DEFAULT, versions.HINTING),
        "free_page_reporting": Field("bool", DEFAULT, versions.HINTING),
    },
    "balloon update": {"amount_mib": Field("u32", REQUIRED)},
    "balloon statistics update": {"stats_polling_interval_s": Field("u16", REQUIRED)},
    "hinting start": {"acknowledge_on_stop": Field("bool", DEFAULT)},
    "boot source": {
        "kernel_image_path": Field("str", REQUIRED),
        "initrd_path": Field("str"),
        "boot_args": Field("str"),
    },
    "bucket": {
        "size": Field("u64", REQUIRED),
        "one_time_burst": Field("u64"),
        "refill_time": Field("u64", REQUIRED),
    },
    "cpu config": {
        "kvm_capabilities": Field(("list", "str"), DEFAULT),
        "cpuid_modifiers": Field(("list", ("object", "cpuid leaf")), DEFAULT),
        "msr_modifiers": Field(_BITS, DEFAULT),
    },
    "cpuid leaf": {
        "leaf": Field("str", REQUIRED),
        "subleaf": Field("str", REQUIRED),
        "flags": Field("u32", REQUIRED),
        "modifiers": Field(("list", ("object", "cpuid register")), REQUIRED),
    },
    "cpuid register": {
        "register": Field(("enum", ("eax", "ebx", "ecx", "edx")), REQUIRED),
        "bitmap": Field("str", REQUIRED),
    },
    "modifier": {"addr": Field("str", REQUIRED), "bitmap": Field("str", REQUIRED)},
    "drive": {
        "drive_id": Field("str", REQUIRED),
        "partuuid": Field("str"),
        "is_root_device": Field("bool", REQUIRED),
        "cache_type": Field(("enum", ("Unsafe", "Writeback")), DEFAULT),
        "is_read_only": Field("bool"),
        "path_on_host": Field("str"),
        "rate_limiter": Field(("object", "limiter")),
        "io_engine": Field(("enum", ("Sync", "Async"))),
        "socket": Field("str"),
    },
    "drive update": {
        "drive_id": Field("str", REQUIRED),
        "path_on_host": Field("str"),
        "rate_limiter": Field(("object", "limiter")),
    },
    "entropy": {"rate_limiter": Field(("object", "limiter"))},
    "limiter": {"bandwidth": Field(("object", "bucket")), "ops": Field(("object", "bucket"))},
    "logger": {
        "log_path": Field("str"),
        "level": Field("level"),
        "show_level": Field("bool"),
        "show_log_origin": Field("bool"),
        "module": Field("str"),
    },
    "machine": {
        "vcpu_count": Field("u8", REQUIRED),
        "mem_size_mib": Field("usize", REQUIRED),
        "smt": Field("bool", DEFAULT),
        "cpu_template": Field(("enum", ("C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"))),
        "track_dirty_pages": Field("bool", DEFAULT),
        "huge_pages": Field(("enum", ("None", "2M")), DEFAULT),
    },
    "memory hotplug": {
        "total_size_mib": Field("usize", REQUIRED),
        "block_size_mib": Field("usize", DEFAULT),
        "slot_size_mib": Field("usize", DEFAULT),
    },
    "memory hotplug update": {"requested_size_mib": Field("usize", REQUIRED)},
    "memory backend": {
        "backend_type": Field(("enum", ("File", "Uffd")), REQUIRED),
        "backend_path": Field("str", REQUIRED),
    },
    "metrics": {"metrics_path": Field("str", REQUIRED)},
    "mmds config": {
        "version": Field(("enum", ("V1", "V2")), DEFAULT),
        "network_interfaces": Field(("list", "str"), REQUIRED),
        "ipv4_address": Field("ipv4"),
        "imds_compat": Field("bool", DEFAULT, versions.IMDS_COMPAT),
    },
    "net": {
        "iface_id": Field("str", REQUIRED),
        "host_dev_name": Field("str", REQUIRED),
        "guest_mac": Field("mac"),
        "mtu": Field("u16", OPTION, versions.MTU),
        "rx_rate_limiter": Field(("object", "limiter")),
        "tx_rate_limiter": Field(("object", "limiter")),
    },
    "net update": {
        "iface_id": Field("str", REQUIRED),
        "rx_rate_limiter": Field(("object", "limiter")),
        "tx_rate_limiter": Field(("object", "limiter")),
    },
    "network override": {"iface_id": Field("str", REQUIRED), "host_dev_name": Field("str", REQUIRED)},
    "pmem": {
        "id": Field("str", REQUIRED),
        "path_on_host": Field("str", REQUIRED),
        "root_device": Field("bool", DEFAULT),
        "read_only": Field("bool", DEFAULT),
        "rate_limiter": Field(("object", "limiter"), OPTION, versions.PMEM_LIMIT),
    },
    "pmem update": {"id": Field("str", REQUIRED), "rate_limiter": Field(("object", "limiter"))},
    "serial": {
        "serial_out_path": Field("str"),
        "rate_limiter": Field(("object", "bucket"), OPTION, versions.SERIAL_LIMIT),
    },
    "snapshot create": {
        "snapshot_type": Field(("enum", ("Diff", "Full")), DEFAULT),
        "snapshot_path": Field("str", REQUIRED),
        "mem_file_path": Field("str", REQUIRED),
    },
    "snapshot load": {
        "snapshot_path": Field("str", REQUIRED),
        "mem_file_path": Field("str"),
        "mem_backend": Field(("object", "memory backend")),
        "enable_diff_snapshots": Field("bool", DEFAULT),
        "track_dirty_pages": Field("bool", DEFAULT, versions.TRACK_DIRTY_AT_LOAD),
        "resume_vm": Field("bool", DEFAULT),
        "network_overrides": Field(
            ("list", ("object", "network override")), DEFAULT, versions.NETWORK_OVERRIDES
        ),
        "vsock_override": Field(("object", "vsock override"), OPTION, versions.VSOCK_OVERRIDE),
        "clock_realtime": Field("bool", DEFAULT, versions.CLOCK_REALTIME),
    },
    "vm": {"state": Field(("enum", ("Paused", "Resumed")), REQUIRED)},
    "vsock": {
        "vsock_id": Field("str"),
        "guest_cid": Field("u32", REQUIRED),
        "uds_path": Field("str", REQUIRED),
    },
    "vsock override": {"uds_path": Field("str", REQUIRED)},
}
# PATCH takes the same fields, none of which it needs.
SCHEMAS["machine update"] = {name: Field(field.kind) for name, field in SCHEMAS["machine"].items()}

CONFIG_FILE: dict[str, tuple[Kind, bool]] = {
    "balloon": (("object", "balloon"), False),
    "drives": (("list", ("object", "drive")), True),
    "boot-source": (("object", "boot source"), True),
    "cpu-config": ("cpu config or path", False),
    "logger": (("object", "logger"), False),
    "machine-config": (("object", "machine"), False),
    "metrics": (("object", "metrics"), False),
    "mmds-config": (("object", "mmds config"), False),
    "network-interfaces": (("list", ("object", "net")), False),
    "vsock": (("object", "vsock"), False),
    "entropy": (("object", "entropy"), False),
    "pmem": (("list", ("object", "pmem")), False),
    "memory-hotplug": (("object", "memory hotplug"), False),
}
"""Keys of a configuration file: kind, and whether it must be there. Any other key is passed over."""


def parse(raw: bytes, name: str, version: Version) -> dict[str, Any]:
    """The body `raw` as an object of schema `name`. Raises Malformed."""
    value = decode(raw)
    check(value, ("object", name), version)
    assert isinstance(value, dict)
    return value


def decode(raw: bytes) -> Any:
    def no_constant(text: str) -> None:
        raise Malformed(f"expected value: {text}")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None


def check_config_file(value: Any, version: Version) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"invalid type: {_name(value)}, expected struct VmmConfig")
    known = {}
    for key, (kind, needed) in CONFIG_FILE.items():
        if key not in value:
            if needed:
                raise Malformed(f"missing field `{key}`")
            continue
        if value[key] is None and not needed and kind[0] != "list":
            continue
        check(value[key], kind, version)
        known[key] = value[key]
    return known


def check(value: Any, kind: Kind, version: Version) -> None:
    if isinstance(kind, tuple):
        form, of = kind
        if form == "list":
            if not isinstance(value, list):
                raise Malformed(f"invalid type: {_name(value)}, expected a sequence")
            for item in value:
                check(item, of, version)
        elif form == "enum":
            if not isinstance(value, str):
                raise Malformed(f"invalid type: {_name(value)}, expected an enumeration")
            if value not in of:
                raise Malformed(f"unknown variant `{value}`, expected one of {_listed(of)}")
        else:
            _check_object(value, of, version)
    elif kind in _INTEGERS:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Malformed(f"invalid type: {_name(value)}, expected {kind}")
        if not 0 <= value < _INTEGERS[kind]:
            raise Malformed(f"invalid value: integer `{value}`, expected {kind}")
    elif kind == "bool":
        if not isinstance(value, bool):
            raise Malformed(f"invalid type: {_name(value)}, expected a boolean")
    elif kind == "cpu config or path":
        if not isinstance(value, str):
            check(value, ("object", "cpu config"), version)
    else:
        if not isinstance(value, str):
            raise Malformed(f"invalid type: {_name(value)}, expected a string")
        if kind == "mac" and not _is_mac(value):
            raise Malformed("The provided MAC address is invalid.")
        if kind == "ipv4" and not _is_ipv4(value):
            raise Malformed("invalid IPv4 address syntax")
        if kind == "level" and value.lower() not in LEVELS:
            raise Malformed("Invalid LevelFilter")


def _check_object(value: Any, name: str, version: Version) -> None:
    if not isinstance(value, dict):
        raise Malformed(f"invalid type: {_name(value)}, expected an object ({name})")
    fields = {key: field for key, field in SCHEMAS[name].items() if versions.has(version, field.since)}
    for key, item in value.items():
        field = fields.get(key)
        if field is None:
            raise Malformed(f"unknown field `{key}`, expected one of {_listed(fields)}")
        if item is None and field.need == OPTION:
            continue
        check(item, field.kind, version)
    for key, field in fields.items():
        if field.need == REQUIRED and key not in value:
            raise Malformed(f"missing field `{key}`")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [key for key, _ in pairs]
        raise Malformed(f"duplicate field `{next(key for key in names if names.count(key) > 1)}`")
    return made


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"boolean `{str(value).lower()}`"
    if isinstance(value, int):
        return f"integer `{value}`"
    if isinstance(value, float):
        return f"floating point `{value}`"
    if isinstance(value, str):
        return f'string "{value}"'
    return "sequence" if isinstance(value, list) else "map"


def _is_mac(text: str) -> bool:
    parts = text.split(":")
    return len(parts) == 6 and all(
        len(part) == 2 and all(c in "0123456789abcdefABCDEF" for c in part) for part in parts
    )


def _is_ipv4(text: str) -> bool:
    parts = text.split(".")
    return len(parts) == 4 and all(part.isdigit() and len(part) <= 3 and int(part) < 256 for part in parts)
