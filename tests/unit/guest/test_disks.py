"""A data disk is formatted only if nothing that anybody could miss is on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvm.guest import disks

SIZE = 6 << 20


def disk(tmp_path: Path, *writes: tuple[int, bytes]) -> str:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, data in writes:
            file.seek(offset)
            file.write(data)
    return str(path)


@pytest.mark.req("B2")
def test_a_blank_disk_is_unused(tmp_path: Path) -> None:
    assert disks.used_by(disk(tmp_path)) is None


@pytest.mark.req("B2")
def test_a_disk_smaller_than_every_signature_is_unused(tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(bytes(100))
    assert disks.used_by(str(path)) is None


@pytest.mark.req("B2")
@pytest.mark.parametrize(("offset", "magic"), disks.SIGNATURES)
def test_every_signature_keeps_the_disk_from_being_formatted(
    tmp_path: Path, offset: int, magic: bytes
) -> None:
    assert disks.used_by(disk(tmp_path, (offset, magic))) is not None


@pytest.mark.req("B2")
@pytest.mark.parametrize(
    ("offset", "magic"),
    [
        (SIZE - 512, b"EFI PART"),
        (SIZE - 8192, b"\xfc\x4e\x2b\xa9"),
        (SIZE - 65536, b"\xfc\x4e\x2b\xa9"),
    ],
)
def test_signatures_at_the_end_count_too(tmp_path: Path, offset: int, magic: bytes) -> None:
    assert disks.used_by(disk(tmp_path, (offset, magic))) is not None


def test_no_block_device_is_absent(tmp_path: Path) -> None:
    assert disks.prepare_data(str(tmp_path / "none"), str(tmp_path / "data")) == "absent"
    assert disks.prepare_data(disk(tmp_path), str(tmp_path / "data")) == "absent"
    assert disks.mount_secrets(str(tmp_path / "none"), str(tmp_path / "secrets")) == "absent"
