"""The daemon's own limits, from a file that only root writes: what no plan may exceed, whoever made it.

    /etc/mvm/hostd.toml

    mode = "baseline"        # or "development", which is what it is without this line: see `mvm bootstrap`
    group = "mvm"            # besides root, members of this group may connect
    operations = 8           # running at once; more are refused as Busy

    [limits]
    vcpus = 8                # of one instance
    mem_mib = 16384
    data_disk_mib = 102400
    running = 200            # instances of this node
    running_mem_mib = 65536  # memory of all of them; left out: what the host has

    [vmm]
    driver = "auto"                      # or "firecracker", "qemu": see mvm.hostd.vmm.choice
    directory = "/usr/lib/mvm/firecracker/current"   # of the programs firecracker and jailer, of one release
    sha256 = { firecracker = "...", jailer = "..." }   # left out: whatever is there

    [[vmm.strict_filters]]               # for tenants with seccomp = "strict"; left out: there is none
    version = "1.16.1"
    path = "/etc/mvm/firecracker-1.16.1-strict.bpf"
    sha256 = "..."

Without the file the bounds of the types hold and nothing more.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from mvm.core import limits
from mvm.core.errors import InvalidInput, Refused
from mvm.hostd.vmm.choice import VmmSettings
from mvm.linux.files import read_bounded

FILE: Final = Path("/etc/mvm/hostd.toml")
_MAX_BYTES: Final = 64 * 1024


class HostLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vcpus: Annotated[int, Meta(ge=1)] = limits.VCPUS_MAX
    mem_mib: Annotated[int, Meta(ge=1)] = limits.MEM_MIB_MAX
    data_disk_mib: Annotated[int, Meta(ge=1)] = limits.DATA_DISK_MIB_MAX
    running: Annotated[int, Meta(ge=0)] = 4096
    running_mem_mib: Annotated[int, Meta(ge=0)] | None = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`mode`: in baseline, no instance starts without what a production host must have."""

    mode: Literal["development", "baseline"] = "development"
    group: Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[a-z_][a-z0-9_-]*\Z")] = "mvm"
    operations: Annotated[int, Meta(ge=1, le=64)] = 8
    limits: HostLimits = HostLimits()
    vmm: VmmSettings = VmmSettings()


def parse(text: str) -> Settings:
    """Raises InvalidInput naming the field."""
    import tomllib

    try:
        return msgspec.convert(tomllib.loads(text), Settings, strict=True)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInput(
            "hostd's settings are not valid", details=str(error)[:500], resolution=f"Correct {FILE}."
        ) from error


def load(path: Path) -> Settings:
    """The defaults if there is no file. Refused if anybody but root could have written it."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return Settings()
    if found.st_uid != 0 or stat.S_IMODE(found.st_mode) & 0o022:
        raise Refused(
            "hostd's settings can be written by others",
            details=f"{path}: owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}",
            resolution=f"Check what it says, then: chown root {path} && chmod go-w {path}",
        )
    try:
        return parse(read_bounded(path, _MAX_BYTES).decode())
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8", details=str(error)) from error
