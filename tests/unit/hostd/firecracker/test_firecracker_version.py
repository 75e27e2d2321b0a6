from __future__ import annotations

import pytest

from mvm.core.errors import MissingPrerequisite, VmmError
from mvm.hostd.vmm.firecracker.version import (
    Version,
    caution,
    features,
    parse_snapshot_format,
    parse_version,
    require_supported,
)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (
            "Firecracker v1.16.1\n\n2026-01-01T00:00:00 [anonymous-instance:main] exiting. exit_code=0\n",
            (1, 16, 1),
        ),
        ("Jailer v1.16.1\n\n", (1, 16, 1)),
        ("Firecracker v1.17.0-dev\n", (1, 17, 0)),
    ],
)
def test_versions_are_read(printed: str, expected: tuple[int, int, int]) -> None:
    assert parse_version(printed) == expected


@pytest.mark.parametrize("printed", ["", "QEMU v1.2.3", "Firecracker 1.16.1", "Firecracker v1.16"])
def test_what_is_no_version_is_an_error(printed: str) -> None:
    with pytest.raises(VmmError):
        parse_version(printed)


def test_the_snapshot_format_is_read() -> None:
    assert parse_snapshot_format("v10.0.0\n2026 [x] exiting\n") == "10.0.0"
    with pytest.raises(VmmError):
        parse_snapshot_format("10")


@pytest.mark.parametrize(
    ("version", "clock", "vsock", "deaf"),
    [
        ((1, 14, 3), False, False, False),
        ((1, 14, 4), True, False, False),
        ((1, 15, 0), False, False, False),
        ((1, 15, 1), True, False, False),
        ((1, 16, 0), True, True, True),
        ((1, 16, 1), True, True, True),
        ((1, 17, 0), True, True, False),
    ],
)
def test_fields_are_gated_by_version(
    version: tuple[int, int, int], clock: bool, vsock: bool, deaf: bool
) -> None:
    known = features(Version(*version))
    assert (known.clock_realtime, known.vsock_override, known.deaf_resume) == (clock, vsock, deaf)
    assert known.network_overrides
    assert known.track_dirty_pages


def test_old_versions_are_refused_and_new_ones_are_said_to_be_untested() -> None:
    with pytest.raises(MissingPrerequisite):
        require_supported(Version(1, 14, 4))
    require_supported(Version(1, 15, 0))
    assert caution(Version(1, 16, 1)) == ""
    assert "newer" in caution(Version(1, 17, 0))
