"""Every request this driver makes of Firecracker's API, one frozen type each: pure.

Names are the API's own. A field that is None is left out, because a version that does not know a field refuses the
request; `mvm.hostd.vmm.firecracker.version` says which version knows which. Bodies are written to the VMM's log, so
nothing secret is ever in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final, Literal

import msgspec

from mvm.core.errors import InvalidInput

BODY_MAX: Final = 51_200
"""Bytes of a body; the API refuses more."""


class Call(msgspec.Struct, frozen=True):
    """One HTTP request. `path` is absolute; `body` is JSON, or None for a GET."""

    method: Literal["GET", "PUT", "PATCH"]
    path: str
    body: bytes | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class _Request(msgspec.Struct, frozen=True, omit_defaults=True):
    method: ClassVar[Literal["GET", "PUT", "PATCH"]] = "PUT"
    path: ClassVar[str] = ""

    def call(self) -> Call:
        return call(self.method, self.path, self)


class Action(_Request, frozen=True, omit_defaults=True):
    path: ClassVar[str] = "/actions"
    action_type: Literal["InstanceStart"]


class SetState(_Request, frozen=True, omit_defaults=True):
    method: ClassVar[Literal["GET", "PUT", "PATCH"]] = "PATCH"
    path: ClassVar[str] = "/vm"
    state: Literal["Paused", "Resumed"]


class CreateSnapshot(_Request, frozen=True, omit_defaults=True):
    path: ClassVar[str] = "/snapshot/create"
    snapshot_path: str
    mem_file_path: str
    snapshot_type: Literal["Full", "Diff"]


class MemoryBackend(msgspec.Struct, frozen=True):
    backend_type: Literal["File"]
    backend_path: str


class NetworkOverride(msgspec.Struct, frozen=True):
    iface_id: str
    host_dev_name: str


class VsockOverride(msgspec.Struct, frozen=True):
    uds_path: str


class LoadSnapshot(_Request, frozen=True, omit_defaults=True):
    path: ClassVar[str] = "/snapshot/load"
    snapshot_path: str
    mem_backend: MemoryBackend
    resume_vm: bool | None = None
    track_dirty_pages: bool | None = None
    clock_realtime: bool | None = None
    network_overrides: tuple[NetworkOverride, ...] | None = None
    vsock_override: VsockOverride | None = None


GET_INSTANCE: Final = Call("GET", "/")


def call(method: Literal["GET", "PUT", "PATCH"], path: str, body: object) -> Call:
    """InvalidInput if the body is larger than the API takes."""
    encoded = msgspec.json.encode(body)
    if len(encoded) > BODY_MAX:
        raise InvalidInput(
            f"the Firecracker configuration is too large for {method} {path}",
            details=f"{len(encoded)} bytes; the API takes {BODY_MAX}.",
            resolution="Shorten that section of the flake's base configuration and build again.",
        )
    return Call(method, path, encoded)


# In the order in which they are asked for: MMDS names a network interface, so it comes after those.
_SECTIONS: Final = (
    "machine-config",
    "boot-source",
    "drives",
    "network-interfaces",
    "vsock",
    "entropy",
    "balloon",
)


def collect(config: Mapping[str, Any]) -> Iterator[Call]:
    """Where the VMM's log and metrics go: all that may be set before a snapshot is loaded."""
    for section in ("logger", "metrics"):
        if section in config:
            yield call("PUT", f"/{section}", config[section])


def boot(config: Mapping[str, Any]) -> Iterator[Call]:
    """The requests that make and start the machine of a final configuration (`mvm.core.fc_config`), in order.

    A top-level section that is none of Firecracker's is passed over, as its own `--config-file` does.
    """
    yield from collect(config)
    for section in _SECTIONS:
        found = config.get(section)
        if section == "drives":
            for drive in found or ():
                yield call("PUT", f"/drives/{drive['drive_id']}", drive)
        elif section == "network-interfaces":
            for interface in found or ():
                yield call("PUT", f"/network-interfaces/{interface['iface_id']}", interface)
        elif found is not None:
            yield call("PUT", f"/{section}", found)
    if "mmds-config" in config:
        yield call("PUT", "/mmds/config", config["mmds-config"])
    yield Action("InstanceStart").call()
