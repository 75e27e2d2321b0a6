"""What every VMM driver does, and the values that go in and out.

Life of a VM, in the only legal order:

    start(machine)            -> Vm, running          cold boot
    restore(machine, memory)  -> Vm, waiting          started on a snapshot's memory; takes only `load_state`
    vm.load_state(state)                              now paused where the snapshot left off
    vm.pause / vm.resume      idempotent
    vm.save_state()           only while paused; the guest's memory is read through vm.memory() beside it
    vm.stop(grace_s)          ends it, in every state; idempotent
    adopt(identity, runtime)  -> Vm                   the same VM from another process of ours

A VM is three processes at most and owns nothing beyond them: the VMM, its keeper (`mvm.hostd.keeper`). When the
VMM ends, by whatever hand, its sockets stay behind as names in the runtime directory and everything else is gone (the
kernel takes a moment for a network namespace).
Differences between VMMs are in `Capabilities`; there are no methods that some driver does not implement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from mvm.core.fc_config import FcPaths
from mvm.core.record import ProcessIdentity
from mvm.core.snapshot import Fingerprint
from mvm.core.spec import SeccompPolicy
from mvm.hostd.keeper import Serve

CHANNELS = 8
"""Guest control channels of a VM: 0 is the host's own, the others carry sessions."""


class Capabilities(msgspec.Struct, frozen=True):
    """What a driver can do here. `incremental`: `dirty_runs` after a restore names only what the guest wrote."""

    incremental: bool
    accel: str
    accel_reason: str


class Drive(msgspec.Struct, frozen=True):
    """A block device, in guest order (vda, vdb, ...). `path` is opened by us, not by the VMM's uid.

    `key_fd`: a descriptor whose content is the LUKS passphrase, where the file is a LUKS volume the VMM itself unlocks.
    `device`: it is a block device.
    """

    id: str
    path: str
    read_only: bool
    key_fd: int | None = None
    device: bool = False


class Wants(msgspec.Struct, frozen=True):
    """What a driver has to be given otherwise than by default.

    `tap_by_name`: the VMM opens its tap by name, so the tap is in a network namespace of the VMM's own; else it is
    given as a descriptor, and lives as long as the VMM holds that. `paths`: under which names it will find its files,
    if they are not the host's.
    """

    tap_by_name: bool = False
    paths: FcPaths | None = None


class Nic(msgspec.Struct, frozen=True):
    """The guest's eth0, on its bridge already. `fd`: an open tap, None for one that is opened by its `name`, in the
    network namespace that `namespace` is open on."""

    mac: str
    fd: int | None
    name: str = ""
    namespace: int | None = None


class Machine(msgspec.Struct, frozen=True):
    """Everything a VMM is started with. Descriptors and the data disk's device are borrowed until `start` returns,
    after a `restore` until `load_state` does: only then a VMM has to have opened them.

    `jail`: an empty directory of root's, over which the VMM's root is made in a namespace of its own; None: without.
    `cgroup`: the control group to run in, a directory. `confined`: whether it is an error if the host has no jail.
    `config`: the final Firecracker configuration (`mvm.core.fc_config`), which the fields here agree with.
    """

    name: str
    vcpus: int
    mem_mib: int
    kernel: Path
    initrd: Path
    boot_args: str
    drives: tuple[Drive, ...]
    nic: Nic | None
    uid: int
    gid: int
    runtime: Path
    artifact_hashes: tuple[tuple[str, str], ...] = ()
    jail: Path | None = None
    cgroup: Path | None = None
    confined: bool = False
    config: Mapping[str, Any] = {}
    seccomp: SeccompPolicy = SeccompPolicy.BASELINE

    @property
    def mem_bytes(self) -> int:
        return self.mem_mib << 20


def _nothing() -> None: ...


class GuestMemory(msgspec.Struct, frozen=True):
    """Where a restored VM's memory comes from: a file the VMM maps privately and never changes.

    `fd`: opens as /proc/self/fd/N in the VMM. `serve`: what has to run, in the keeper, for the file to have content
    (`mvm.hostd.keeper.Serve`, None for a file that simply has it); it needs the descriptors `keep`. `handed_over`: to
    be called once the VMM has it, or never will: drops what would keep the file alive without the VMM and its keeper.
    `close`: drops all of our hold; both may be called twice, and the VMM keeps its own. `decrypted`: chunks decrypted
    so far. `answered`: to be called with the VMM's pid when the guest answered, before `close`.
    """

    fd: int
    keep: tuple[int, ...]
    serve: Serve | None
    close: Callable[[], None]
    decrypted: Callable[[], int]
    answered: Callable[[int], None]
    handed_over: Callable[[], None] = _nothing


class MemorySource(Protocol):
    """Guest memory of a paused VM, as 4 KiB pages from guest offset 0. `size` in bytes."""

    size: int

    def dirty_runs(self) -> Iterator[tuple[int, int]]:
        """(first page, page count) of what the guest wrote since start or restore."""
        ...

    def present_pages(self) -> bytearray:
        """One byte a page, 1 where it was touched at all."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None: ...


class Vm(Protocol):
    """A running VM. Every call is bounded in time and raises VmmError when the VMM is gone or will not answer."""

    @property
    def identity(self) -> ProcessIdentity:
        """The VMM's process."""
        ...

    def is_alive(self) -> bool: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def save_state(self) -> bytearray:
        """The state of the devices and CPUs, without memory. It holds guest secrets (registers): treat as memory."""
        ...

    def load_state(self, state: bytes) -> None:
        """Give a restored VM its device state; it is paused then. VmmError if it does not fit."""
        ...

    def memory(self) -> AbstractContextManager[MemorySource]: ...
    def stop(self, grace_s: float) -> None:
        """End it: SIGTERM, after `grace_s` SIGKILL; returns when VMM and keeper are gone."""
        ...

    def close(self) -> None:
        """Let go of it without ending it."""
        ...


class Driver(Protocol):
    """One VMM on this host."""

    name: str
    wants: Wants

    def version(self) -> str: ...
    def capabilities(self, kernel: Path, initrd: Path) -> Capabilities: ...
    def fingerprint(self, machine: Machine) -> Fingerprint:
        """Everything that must be the same at wake as at sleep."""
        ...

    def start(self, machine: Machine) -> Vm: ...
    def restore(self, machine: Machine, memory: GuestMemory) -> Vm: ...
    def adopt(self, identity: ProcessIdentity, machine_name: str, mem_mib: int, runtime: Path) -> Vm:
        """The running VM whose VMM is `identity`. Raises VmmError if it is gone."""
        ...
