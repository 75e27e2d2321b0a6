"""What an image is made of. Pure, but for reading the files that go into it; the digest names the image.

The digest covers everything that decides the image but the archive's present package versions: a node is not replaced
because a mirror moved on. `mvm start --rebuild` takes what the archive offers now.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from mvm.dev.sources import Source
from mvm.dev.wheel import files_below

SCHEMA: Final = 2
"""Changes when `image` does something else with the same recipe."""

PACKAGES: Final = (
    # A machine: the standard kernel, because the cloud kernel has neither kvm_amd nor vhost_vsock.
    "dbus", "e2fsprogs", "initramfs-tools", "iproute2", "kmod", "linux-image-amd64", "lz4", "procps", "systemd",
    "systemd-sysv", "udev", "util-linux",
    # What mvm needs on a host.
    "cryptsetup-bin", "nftables", "nix-bin", "python3", "python3-venv", "qemu-system-x86", "qemu-utils",
    # What people look for in a shell, and tests send packets with.
    "ca-certificates", "git", "iputils-ping", "less", "strace",
)  # fmt: skip

ROOT_GIB: Final = 6
"""Size of the root disk; sparse, like the state disk."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`files`: (path in the image, executable, content); `requirements`: what pip puts into /opt/mvm."""

    sources: tuple[Source, ...]
    packages: tuple[str, ...]
    files: tuple[tuple[str, bool, bytes], ...]
    requirements: str
    root_gib: int = ROOT_GIB
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """Sixteen hex digits."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]


def make(sources: tuple[Source, ...], requirements: str) -> Recipe:
    return Recipe(
        sources=sources,
        packages=tuple(sorted(PACKAGES)),
        files=tuple(image_files()),
        requirements=requirements,
    )


def image_files() -> list[tuple[str, bool, bytes]]:
    folder = Path(__file__).resolve().parent / "image_files"
    return [(name, name.startswith(_SCRIPTS), path.read_bytes()) for name, path in files_below(folder)]


# By place, not by mode: what unpacks a wheel may drop the executable bit.
_SCRIPTS: Final = "etc/initramfs-tools/scripts/"
