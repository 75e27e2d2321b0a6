"""Keeping udev's hands off guests' disks: one rules file, and what is done where nobody has installed it.

udevd runs as root. By its stock rules it reads every mapped device for file systems, which is here what a guest wrote,
and makes links under /dev/disk from labels and uuids that the guest chooses: a guest could take the name of a disk of
the host. The rules are read before device mapper's own and tell all of them to look away; the node is root's.

`mvm bootstrap` installs the file. Without it (one user's machine, no daemon) it is put into /run before the first disk
is opened, until the next boot; who cannot write there opens no disk without it. Of files of one name udev reads the
first by folder, so that one has to say what ours does: a name alone keeps nobody out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from mvm.core.errors import InvalidInput, MissingPrerequisite
from mvm.linux import files, process

NAME: Final = "09-mvm.rules"
FOLDERS: Final = (
    "/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d",
    "/lib/udev/rules.d",
)  # fmt: skip
"""In udev's order."""
_CONTROL: Final = "/run/udev/control"
_WRITABLE: Final = "/run/udev/rules.d"
_MAX_FILE: Final = 64 << 10

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
    if not os.path.exists(_CONTROL):
        return
    # A link to nowhere, or to /dev/null, takes the place of those behind it as well.
    first = next((folder for folder in FOLDERS if os.path.lexists(f"{folder}/{NAME}")), None)
    if first is not None and _says_ours(Path(first) / NAME):
        return
    if first is not None and FOLDERS.index(first) < FOLDERS.index(_WRITABLE):
        raise MissingPrerequisite(
            "udev would read what guests write to their data disks",
            details=f"{first}/{NAME} does not say what this version of mvm needs.",
            resolution="Install it anew: mvm bootstrap",
        )
    folder = Path(_WRITABLE)
    try:
        if not folder.is_dir():
            folder.mkdir()
            folder.chmod(0o755)
        files.write_atomic(folder / NAME, f"# mvm: until the next boot\n{RULES}\n".encode(), 0o644)
    except OSError as error:
        raise MissingPrerequisite(
            "udev would read what guests write to their data disks",
            details=f"No {NAME} of mvm's is in any of {', '.join(FOLDERS)}; {error}",
            resolution="Install it: mvm bootstrap",
        ) from error
    process.run(["udevadm", "control", "--reload"], timeout=10)


def _says_ours(path: Path) -> bool:
    try:
        text = files.read_bounded(path, _MAX_FILE).decode("utf-8", "replace")
    except (OSError, InvalidInput):
        return False
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")] == [RULES]
