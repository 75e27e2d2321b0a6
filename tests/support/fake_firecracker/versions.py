"""What differs between Firecracker's versions, as far as the fake knows: `Version` is (major, minor, patch).

A feature's `since` is a tuple of versions, because fixes are carried back: it is there from the last of them on, and in
each earlier minor series from the patch that is named.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    Version = tuple[int, int, int]
    Since = tuple[Version, ...]

ALWAYS: Since = ((0, 0, 0),)
SERIAL: Since = ((1, 14, 0),)
PMEM: Since = ((1, 14, 0),)
MEMORY_HOTPLUG: Since = ((1, 14, 0),)
HINTING: Since = ((1, 14, 0),)
CREATES_LOG_FILES: Since = ((1, 14, 0),)
IMDS_COMPAT: Since = ((1, 13, 0),)
TRACK_DIRTY_AT_LOAD: Since = ((1, 13, 0),)
NETWORK_OVERRIDES: Since = ((1, 12, 0),)
CLOCK_REALTIME: Since = ((1, 14, 4), (1, 15, 1), (1, 16, 0))
VSOCK_OVERRIDE: Since = ((1, 16, 0),)
MTU: Since = ((1, 16, 0),)
SERIAL_LIMIT: Since = ((1, 16, 0),)
PMEM_LIMIT: Since = ((1, 16, 0),)
HOTPLUG: Since = ((1, 16, 0),)
BZIMAGE: Since = ((1, 17, 0),)


def parse(text: str) -> Version:
    """ValueError for anything but three decimal numbers."""
    major, minor, patch = text.split(".")
    return int(major), int(minor), int(patch)


def has(version: Version, since: Since) -> bool:
    if version >= since[-1]:
        return True
    return any(version[:2] == first[:2] and version >= first for first in since)


def vsock_dies_of_a_bare_pause(version: Version) -> bool:
    """1.16 waits, at every resume, for the guest to acknowledge a reset that only a snapshot sends."""
    return version[:2] == (1, 16)


def snapshot_format(version: Version) -> str:
    """The number of the device state's format: that of 1.16 is real, the others only differ from it."""
    return f"{version[1] - 6}.0.0"
