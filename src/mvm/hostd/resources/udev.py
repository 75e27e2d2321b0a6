"""Keeping udev's hands off guests' disks: one rules file, and what is done where nobody has installed it.

udevd runs as root. By its stock rules it reads every mapped device for file systems, which is here what a guest wrote,
and makes links under /dev/disk from labels and uuids that the guest chooses: a guest could take the name of a disk of
the host. The rules are read before device mapper's own and tell all of them to look away; the node is root's.

`mvm bootstrap` installs the file. Without it (one user's machine, no daemon) it is put into /run before the first disk
is opened, until the next boot; who cannot write there opens no disk without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from mvm.core.errors import MissingPrerequisite
from mvm.linux import files, process

NAME: Final = "09-mvm.rules"
FOLDERS: Final = ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d")
_CONTROL: Final = "/run/udev/control"
_WRITABLE: Final = Path("/run/udev/rules.d")

RULES: Final = ", ".join(
    (
        'SUBSYSTEM=="block"', 'KERNEL=="dm-[0-9]*"', 'ATTR{dm/name}=="mvm-*"', 'ATTR{dm/uuid}=="CRYPT-LUKS*"',
        'ENV{DM_UDEV_DISABLE_DM_RULES_FLAG}="1"', 'ENV{DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG}="1"',
        'ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1"', 'ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1"',
        'ENV{UDISKS_IGNORE}="1"', 'GROUP:="root"', 'MODE:="0600"', 'OPTIONS:="nowatch"',
    )
)  # fmt: skip
"""systemd/09-mvm.rules, but for its comment."""


def keep_out() -> None:
    """Return when udev, if there is one, knows the rules. MissingPrerequisite if it does not and cannot be told."""
    if not os.path.exists(_CONTROL) or any(os.path.exists(f"{folder}/{NAME}") for folder in FOLDERS):
        return
    try:
        if not _WRITABLE.is_dir():
            _WRITABLE.mkdir()
            _WRITABLE.chmod(0o755)
        files.write_atomic(_WRITABLE / NAME, f"# mvm: until the next boot\n{RULES}\n".encode(), 0o644)
    except OSError as error:
        raise MissingPrerequisite(
            "udev would read what guests write to their data disks",
            details=f"{NAME} is in none of {', '.join(FOLDERS)}; {error}",
            resolution="Install it: mvm bootstrap",
        ) from error
    process.run(["udevadm", "control", "--reload"], timeout=10)
