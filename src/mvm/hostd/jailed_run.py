"""`/run` of a VMM that is in a jail of its own memory: its sockets, and how another process of ours reaches them.

The host has no name for that directory. The way there is `/proc/<pid>/root`, and the pid is in a file of root's, with
the process's start and the uid that owns the directory:

    <runtime>/vmm/process        this file
    <runtime>/vmm/               root's, closed to the VMM

Nothing a VMM makes in there takes room on the host's disk, or can be in anybody's way when it has ended. Every name in
it is the VMM's to change: no link is followed, and a socket must be its uid's.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Final

import msgspec

from mvm.core.record import ProcessIdentity
from mvm.linux.pidfd import is_alive
from mvm.linux.sockets import connect_owned

FOLDER: Final = "vmm"
_FILE: Final = "process"


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the VMM `process`, whose uid is `uid`."""

    process: ProcessIdentity
    uid: int

    def connect(self, name: str, timeout: float) -> socket.socket:
        """Connected to its socket `/run/<name>`; `timeout` in seconds, 0 never waits. OSError if there is none or the
        VMM is gone, IntegrityError if what is there is not its socket."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        root = os.open(f"/proc/{self.process.pid}/root", flags)
        try:
            # The pid may have become another's; what was opened is checked, not the number.
            if not is_alive(self.process):
                raise ProcessLookupError(errno.ESRCH, "the VMM is gone")
            run = os.open("run", flags | os.O_NOFOLLOW, dir_fd=root)
        finally:
            os.close(root)
        try:
            return connect_owned(Path(f"/proc/self/fd/{run}") / name, self.uid, timeout)
        finally:
            os.close(run)


def note(runtime: Path, place: Place) -> None:
    """For others to find. `<runtime>/vmm` is there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(runtime / FOLDER / _FILE, flags, 0o600)
    try:
        os.write(fd, msgspec.json.encode(place))
    finally:
        os.close(fd)


def find(runtime: Path) -> Place | None:
    """That of the VMM which runs there, or did; None if its VMM has none."""
    try:
        return msgspec.json.decode((runtime / FOLDER / _FILE).read_bytes(), type=Place)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
