"""Which Firecracker this is, and what that version's API knows.

A field that a version does not know makes it refuse the whole request, so every newer field is asked for by name here.
Versions below 1.15 get no security fixes any more and are refused; versions above the newest one whose source these
rules were read from are used, and said to be untested.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from mvm.core.errors import MissingPrerequisite, VmmError


class Version(NamedTuple):
    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


OLDEST: Final = Version(1, 15, 0)
NEWEST: Final = Version(1, 16, 1)
"""The newest version these rules were checked against."""

_PRINTED: Final = re.compile(
    r"^(?:Firecracker|Jailer|seccompiler) v(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?:[-+]\S*)?\s*$", re.MULTILINE
)
_FORMAT: Final = re.compile(r"^v(\d{1,4}\.\d{1,4}\.\d{1,4})\s*$", re.MULTILINE)


class Features(NamedTuple):
    """Fields and habits of one version.

    `clock_realtime`, `vsock_override`, `network_overrides`, `track_dirty_pages`: fields of a load. `deaf_resume`: a
    resume that follows a pause without a snapshot in between makes the guest unreachable for good: the vsock device
    then waits for the guest to acknowledge a reset that was never sent (fixed in 1.17).
    """

    clock_realtime: bool
    vsock_override: bool
    network_overrides: bool
    track_dirty_pages: bool
    deaf_resume: bool


def parse_version(printed: str) -> Version:
    """From what `--version` of firecracker, jailer or seccompiler-bin prints. VmmError if it is not that."""
    found = _PRINTED.search(printed)
    if found is None:
        raise VmmError("Firecracker's version is not readable", details=printed[:200])
    return Version(int(found[1]), int(found[2]), int(found[3]))


def parse_snapshot_format(printed: str) -> str:
    """`10.0.0` from what `--snapshot-version` prints. VmmError if it is not that."""
    found = _FORMAT.search(printed)
    if found is None:
        raise VmmError("Firecracker's snapshot format is not readable", details=printed[:200])
    return found[1]


def features(version: Version) -> Features:
    return Features(
        # Backported: 1.14.4, 1.15.1, and everything from 1.16 on; 1.15.0 lacks it.
        clock_realtime=version >= (1, 15, 1) or (1, 14, 4) <= version < (1, 15, 0),
        vsock_override=version >= (1, 16, 0),
        network_overrides=version >= (1, 12, 0),
        track_dirty_pages=version >= (1, 13, 0),
        deaf_resume=(1, 16, 0) <= version < (1, 17, 0),
    )


def require_supported(version: Version) -> None:
    """MissingPrerequisite for a version that nobody mends any more."""
    if version < OLDEST:
        raise MissingPrerequisite(
            f"Firecracker {version} is too old",
            details=f"Versions below {OLDEST} get no security fixes.",
            resolution=f"Install Firecracker {NEWEST} and its jailer.",
        )


def caution(version: Version) -> str:
    """One line for `node info` about a version this driver was not checked against, else ""."""
    if version > NEWEST:
        return f"Firecracker {version} is newer than {NEWEST}, the newest this driver was checked against"
    return ""
