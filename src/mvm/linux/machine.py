"""What machine this is, as its kernel tells it. Parsing is pure and apart from reading.

Sizes are bytes. Nothing is cached except the boot id, which cannot change while we run.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

_MAX_PROC_FILE = 4 << 20


class CpuModel(NamedTuple):
    """The processor as a guest's snapshot depends on it. `features` is sorted; `online` counts CPUs."""

    vendor: str
    name: str
    family: int
    model: int
    stepping: int
    features: tuple[str, ...]
    online: int


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = bytearray()
        while len(parts) < _MAX_PROC_FILE and (chunk := os.read(fd, 1 << 16)):
            parts += chunk
        return parts.decode("utf-8", "replace")
    finally:
        os.close(fd)


@cache
def boot_id() -> str:
    """The kernel's random id of this boot."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def kernel_release() -> str:
    """As `uname -r`."""
    return os.uname().release


def cpu_model() -> CpuModel:
    return parse_cpuinfo(_read("/proc/cpuinfo"))


def parse_cpuinfo(text: str) -> CpuModel:
    """/proc/cpuinfo of x86; on others the fields it lacks are empty or zero."""
    blocks = [block for block in text.split("\n\n") if block.strip()]
    fields: dict[str, str] = {}
    for line in blocks[0].splitlines() if blocks else ():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()

    def number(key: str) -> int:
        value = fields.get(key, "")
        return int(value) if value.isdecimal() and value.isascii() else 0

    return CpuModel(
        vendor=fields.get("vendor_id", ""),
        name=fields.get("model name", ""),
        family=number("cpu family"),
        model=number("model"),
        stepping=number("stepping"),
        features=tuple(sorted(fields.get("flags", fields.get("Features", "")).split())),
        online=sum(1 for block in blocks if "processor" in block.partition(":")[0]),
    )


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo as bytes by name; lines that are no quantity are left out."""
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isascii() and words[0].isdecimal():
            sizes[key] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return sizes


def memory_available() -> int:
    """Bytes a new program could use without swapping."""
    return parse_meminfo(_read("/proc/meminfo"))["MemAvailable"]


def memory_total() -> int:
    return parse_meminfo(_read("/proc/meminfo"))["MemTotal"]


def parse_cgroup_mounts(mountinfo: str) -> tuple[str, str]:
    """(version, unified mount point) from /proc/self/mountinfo.

    Version: `v2` (unified only), `hybrid` (both, controllers may be on v1), `v1`, or `none`.
    """
    v1 = False
    unified = ""
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if not separator or len(fields) < 5 or not kinds:
            continue
        if kinds[0] == "cgroup":
            v1 = True
        elif kinds[0] == "cgroup2" and not unified:
            unified = fields[4]
    if unified:
        return ("hybrid" if v1 else "v2"), unified
    return ("v1" if v1 else "none"), ""


def cgroup_version() -> tuple[str, str]:
    return parse_cgroup_mounts(_read("/proc/self/mountinfo"))
