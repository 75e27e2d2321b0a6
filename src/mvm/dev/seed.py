"""What each start carries into the node, on a small read-only disk: a tar archive, at the start of the device.

    agent.py, mvm/guest/...      the control channel's other end, ready before anything is installed
    mvm-<version>-*.whl          the mvm that started the node
    wheel.sha256, install.*      installed at boot if it is not there already
    steady.py                    holds what keeps an emulated kernel from hanging, before anything runs guests
    bootstrap.sh                 then `mvm bootstrap`, so that mvm-hostd is a service of the node

So a node always runs the mvm of the command that started it, and the image does not change with the sources.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from mvm.dev import wheel
from mvm.dev.archive import Entry, tar

SECTOR: Final = 4096


def contents(package: Path, wheel_name: str, wheel_bytes: bytes) -> list[Entry]:
    node = package / "dev" / "node"
    digest = hashlib.sha256(wheel_bytes).hexdigest()
    entries = [
        Entry("agent.py", (node / "agent.py").read_bytes()),
        *(
            Entry(name, (node / name).read_bytes())
            for name in ("install.sh", "install.py", "bootstrap.sh", "steady.py")
        ),
        Entry("mvm/__init__.py", b""),
        Entry(wheel_name, wheel_bytes),
        Entry("wheel.sha256", f"{digest}\n".encode()),
    ]
    guest = package / "guest"
    entries += [Entry(f"mvm/guest/{name}", path.read_bytes()) for name, path in wheel.files_below(guest)]
    return entries


def build(flake: Path) -> bytes:
    """The disk's bytes, a whole number of sectors, the same for the same mvm."""
    name, data = wheel.build(flake)
    archive = tar(contents(wheel.package_dir(), name, data))
    return archive + bytes(-len(archive) % SECTOR)
