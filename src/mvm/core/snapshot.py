"""What is known about a snapshot without its bytes: where it fits, which one it is, what making and using
it cost.

A `Fingerprint` is everything that must be the same at wake as it was at sleep for device state and memory
to mean the same thing. Memory formats change between VMM versions and CPU models, so a difference is never
papered over: `mismatches` names each one and the instance can only be started cold."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.core import limits
from mvm.core.ids import InstanceId, SnapshotId

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=limits.NAME_MAX, pattern=r"^[ -~]+\Z")]
OptionalName = Annotated[str, Meta(max_length=limits.NAME_MAX, pattern=r"^[ -~]*\Z")]
Count = Annotated[int, Meta(ge=0, le=limits.INT63_MAX)]
Nanoseconds = Annotated[int, Meta(ge=0, le=limits.INT63_MAX)]


class ArtifactHash(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name`: `kernel`, `rootfs`, `fc-base`, `initrd`."""

    name: Name
    sha256: Sha256


Artifacts = Annotated[tuple[ArtifactHash, ...], Meta(max_length=limits.ARTIFACTS)]


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Empty text means "not known to this driver"; it matches only empty text."""

    vmm: Name
    vmm_version: Name
    machine: Name
    accel: Name
    cpu_model: Name
    vcpus: Annotated[int, Meta(ge=limits.VCPUS_MIN, le=limits.VCPUS_MAX)]
    mem_mib: Annotated[int, Meta(ge=limits.MEM_MIB_MIN, le=limits.MEM_MIB_MAX)]
    artifacts: Artifacts = ()
    vmm_sha256: Sha256 | None = None
    microcode: OptionalName = ""
    host_kernel: OptionalName = ""

    def parts(self) -> dict[str, str]:
        """Every fact under the name a person knows it by; what is not known is "". Names and values are one line."""
        facts = {label: str(getattr(self, name) or "") for name, label in _LABELS.items()}
        return facts | {f"artifact {artifact.name}": artifact.sha256 for artifact in self.artifacts}

    def mismatches(self, other: Fingerprint) -> list[str]:
        """One line for each difference, `self` being the snapshot's and `other` this host's; empty if they
        fit."""
        found = [
            f"{label}: the snapshot has {_text(mine)}, here it is {_text(theirs)}"
            for name, label in _LABELS.items()
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]
        mine_by_name = {artifact.name: artifact.sha256 for artifact in self.artifacts}
        theirs_by_name = {artifact.name: artifact.sha256 for artifact in other.artifacts}
        found += [
            f"artifact {name}: the snapshot has {_text(mine_by_name.get(name))}, "
            f"here it is {_text(theirs_by_name.get(name))}"
            for name in sorted(mine_by_name.keys() | theirs_by_name.keys())
            if mine_by_name.get(name) != theirs_by_name.get(name)
        ]
        return found


_LABELS: Final = {
    "vmm": "VMM",
    "vmm_version": "VMM version",
    "vmm_sha256": "VMM program",
    "machine": "machine type",
    "accel": "acceleration",
    "cpu_model": "CPU model",
    "microcode": "microcode",
    "host_kernel": "host kernel",
    "vcpus": "vCPUs",
    "mem_mib": "memory in MiB",
}


def _text(value: object) -> str:
    return str(value) if value not in (None, "") else "none"


class SnapshotRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The snapshot an instance sleeps in. `stored_bytes`: on disk, all parts; `chain`: snapshots it builds
    on, 0 for a full one; `created_ns`: nanoseconds since 1970, given by the caller."""

    id: SnapshotId
    manifest_sha256: Sha256
    created_ns: Nanoseconds
    stored_bytes: Count
    chain: Annotated[int, Meta(ge=0, le=limits.SNAPSHOT_CHAIN_MAX)] = 0


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    ns: Nanoseconds


Phases = Annotated[tuple[Phase, ...], Meta(max_length=limits.PHASES)]
Row = tuple[str, str, str]


class WakeReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="wake"):
    """`phases` in the order they began, consecutive; `total_ns` from the request to the guest's answer,
    measured by itself, so time that no phase accounts for shows as `other`."""

    instance: InstanceId
    snapshot: SnapshotId
    total_ns: Nanoseconds
    phases: Phases = ()
    # Chunks of memory decrypted before the guest answered, of all in the image.
    chunks_read: Count = 0
    chunks_total: Count = 0

    def rows(self) -> list[Row]:
        """(name, milliseconds, share of the total) for each phase, then the total."""
        return _phase_rows(self.phases, self.total_ns)


class SleepReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="sleep"):
    """`written_bytes`: sealed and on disk; `dirty_bytes`: guest memory that differed from the parent image,
    None where the driver cannot tell; `resident_bytes`: guest memory the host held when it paused."""

    instance: InstanceId
    snapshot: SnapshotId
    total_ns: Nanoseconds
    written_bytes: Count
    resident_bytes: Count
    dirty_bytes: Count | None = None
    phases: Phases = ()

    def rows(self) -> list[Row]:
        """(name, milliseconds, share) for each phase and the total, then (name, bytes, share of resident)."""
        sizes = [
            ("resident", self.resident_bytes),
            ("dirty", self.dirty_bytes),
            ("written", self.written_bytes),
        ]
        return _phase_rows(self.phases, self.total_ns) + [
            (name, f"{size} B", _share(size, self.resident_bytes)) for name, size in sizes if size is not None
        ]


Receipt = WakeReceipt | SleepReceipt


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _phase_rows(phases: tuple[Phase, ...], total_ns: int) -> list[Row]:
    named = [(phase.name, phase.ns) for phase in phases]
    other = total_ns - sum(ns for _, ns in named)
    if other > 0 and named:
        named.append(("other", other))
    named.append(("total", total_ns))
    return [(name, f"{ns / 1e6:.3f} ms", _share(ns, total_ns)) for name, ns in named]
