from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mvm.core.ids import InstanceId, SnapshotId
from mvm.core.snapshot import _LABELS, ArtifactHash, Fingerprint, Phase, SleepReceipt, WakeReceipt

HERE = Fingerprint(
    vmm="qemu",
    vmm_version="7.2.0",
    machine="microvm",
    accel="tcg",
    cpu_model="max",
    vcpus=1,
    mem_mib=256,
    artifacts=(ArtifactHash("kernel", "a" * 64), ArtifactHash("rootfs", "b" * 64)),
)
WEB = InstanceId.parse("acme/web-0")
SNAPSHOT = SnapshotId("1" * 32)


def test_a_fingerprint_fits_itself_whatever_the_order_of_its_artifacts() -> None:
    assert HERE.mismatches(HERE) == []
    assert HERE.mismatches(msgspec.structs.replace(HERE, artifacts=HERE.artifacts[::-1])) == []


@pytest.mark.req("S4")
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vmm", "firecracker", "VMM: the snapshot has qemu, here it is firecracker"),
        ("vmm_version", "7.2.9", "VMM version"),
        ("vmm_sha256", "c" * 64, "VMM program: the snapshot has none"),
        ("machine", "q35", "machine type"),
        ("accel", "kvm", "acceleration"),
        ("cpu_model", "host", "CPU model"),
        ("microcode", "0x1", "microcode"),
        ("host_kernel", "6.1.0", "host kernel"),
        ("vcpus", 2, "vCPUs"),
        ("mem_mib", 512, "memory"),
        ("artifacts", HERE.artifacts[:1], "artifact rootfs"),
    ],
)
def test_each_difference_is_named_alone(field: str, value: Any, words: str) -> None:
    (found,) = HERE.mismatches(msgspec.structs.replace(HERE, **{field: value}))
    assert words in found


def test_no_field_of_a_fingerprint_is_forgotten() -> None:
    assert set(_LABELS) | {"artifacts"} == set(Fingerprint.__struct_fields__)


@pytest.mark.req("S7")
def test_a_wake_receipt_accounts_for_all_of_its_time() -> None:
    receipt = WakeReceipt(
        instance=WEB,
        snapshot=SNAPSHOT,
        total_ns=10_000_000,
        phases=(Phase("load state", 6_000_000), Phase("guest answers", 3_000_000)),
    )
    assert receipt.rows() == [
        ("load state", "6.000 ms", "60.0 %"),
        ("guest answers", "3.000 ms", "30.0 %"),
        ("other", "1.000 ms", "10.0 %"),
        ("total", "10.000 ms", "100.0 %"),
    ]


def test_a_sleep_receipt_shows_bytes_against_resident_memory() -> None:
    receipt = SleepReceipt(
        instance=WEB, snapshot=SNAPSHOT, total_ns=0, written_bytes=25, resident_bytes=100, dirty_bytes=50
    )
    assert receipt.rows() == [
        ("total", "0.000 ms", "-"),
        ("resident", "100 B", "100.0 %"),
        ("dirty", "50 B", "50.0 %"),
        ("written", "25 B", "25.0 %"),
    ]
    unknown = msgspec.structs.replace(receipt, dirty_bytes=None)
    assert [row[0] for row in unknown.rows()] == ["total", "resident", "written"]
