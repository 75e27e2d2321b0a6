"""What a node is asked to be, what it says it is, and what every driver of one does.

A node is `absent` (no disks), `stopped`, `starting` (its machine runs and does not answer yet) or `running`. All verbs
are idempotent. Two commands at a time are kept apart by the driver: the later one waits, or is told Busy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

ABSENT, STOPPED, STARTING, RUNNING = "absent", "stopped", "starting", "running"
State = Literal["absent", "stopped", "starting", "running"]

SOURCE_AREA = "/srv/mvm"
"""Where `mvm sync` puts directories in the node; it survives a new image."""


class NodeSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The machine. `disk_gib`: the state disk, which grows only as it is filled. It keeps its size once made."""

    vcpus: Annotated[int, Meta(ge=1, le=64)] = 2
    mem_mib: Annotated[int, Meta(ge=1024, le=1 << 20)] = 4096
    disk_gib: Annotated[int, Meta(ge=2, le=4096)] = 16


class StartOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one start does beside starting. None: as it was, or the default.

    `mirror`: take Debian's packages from this URL instead of from the machine's own sources.
    """

    vcpus: int | None = None
    mem_mib: int | None = None
    disk_gib: int | None = None
    rebuild: bool = False
    mirror: str | None = None


class NodeStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`accel`: `kvm`, `tcg`, `vz`, ... or empty while unknown; `image`: what the root disk was made from.

    `disk_used_bytes`: what the node's disks take on this computer.
    """

    driver: str
    state: State
    accel: str = ""
    accel_reason: str = ""
    image: str = ""
    vcpus: int = 0
    mem_mib: int = 0
    disk_gib: int = 0
    disk_used_bytes: int = 0
    uptime_s: int = 0
    pid: int = 0
    folder: str = ""


class Tell(Protocol):
    """Where progress goes; `mvm.cli.progress.Progress` is one."""

    def phase(self, name: str) -> None: ...
    def line(self, text: str) -> None: ...


class Quiet:
    """Progress that nobody watches."""

    def phase(self, name: str) -> None:
        pass

    def line(self, text: str) -> None:
        pass


class NodeDriver(Protocol):
    """`name`: `qemu` or `lima`."""

    name: str

    def start(self, options: StartOptions, tell: Tell) -> bool:
        """Bring the node up and wait until it is usable; whether it was down before.

        Conflict if it runs with another size than `options` names.
        """

    def stop(self, *, grace_s: float, discard: bool, tell: Tell) -> str:
        """Shut it down in order, by force after `grace_s` seconds.

        Says what it took: `absent`, `stopped` (it was), `shut-down` or `killed`. With `discard` its disks go too.
        """

    def status(self) -> NodeStatus: ...

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        tty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
    ) -> int:
        """Run a program in the node on these descriptors; its exit code (128 and the signal's number if killed).

        Conflict if the node does not run.
        """
