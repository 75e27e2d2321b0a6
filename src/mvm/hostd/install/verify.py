"""What holds once the service runs: the daemon is asked who it is, and the kernel what the daemon may do."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mvm import __version__
from mvm.core.errors import MvmError
from mvm.hostd import confine, settings
from mvm.hostd.inspect.doctor import Check, Result
from mvm.hostd.install.needs import BASELINE
from mvm.linux import capabilities
from mvm.linux.machine import cgroup_version
from mvm.linux.stream import UnixStream
from mvm.wire.hostd_client import HostdClient

SOCKET: Final = Path("/run/mvm/hostd.sock")
SLICE: Final = "mvm.slice"
CONTROLLERS: Final = frozenset({"cpu", "memory", "pids"})
_AGAIN: Final = "systemctl restart mvm-hostd; mvm bootstrap"


def verify(root: Path, mode: str) -> list[Check]:
    """Every row; after the first, none where the daemon does not answer."""
    try:
        node = HostdClient(lambda: UnixStream.dial(SOCKET)).ping()
    except MvmError as error:
        fix = "journalctl -u mvm-hostd -b"
        return [Check("daemon", "mvm-hostd answers", Result.FAIL, f"{error.brief}. {error.details}", fix)]
    rows = [_who(node.version, str(node.node), node.pid, root)]
    rows += _rights(node.pid)
    rows += _socket()
    rows += _cgroup(node.pid, mode)
    rows += _mode(mode)
    return rows


def _row(name: str, what: str, ok: bool, seen: str, fix: str = _AGAIN) -> Check:
    return Check(name, what, Result.OK if ok else Result.FAIL, seen, "" if ok else fix)


def _who(version: str, node: str, pid: int, root: Path) -> Check:
    try:
        ours = (root / "node-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        ours = "unknown"
    seen = f"version {version}, process {pid}, node {node}"
    return _row("daemon", "mvm-hostd answers, as this node", version == __version__ and node == ours, seen)


def _rights(pid: int) -> Iterator[Check]:
    held = capabilities.status(pid)
    # A daemon that turned a driver down, for its version or for the host's, does without that driver's.
    allowed = [frozenset(confine.wanted_by(drivers)) for drivers in ((), confine.DRIVERS)]
    sets = {held.effective, held.permitted, held.bounding}
    ok = len(sets) == 1 and held.effective in allowed and not held.inheritable | held.ambient
    what = "it has the capabilities that are documented and no other"
    yield _row("daemon-capabilities", what, ok, " ".join(sorted(held.effective)) or "none")
    ok = held.no_new_privs and held.seccomp == 2
    seen = f"NoNewPrivs {int(held.no_new_privs)}, Seccomp {held.seccomp}"
    yield _row("daemon-filter", "it can gain no privilege, and a filter is on its system calls", ok, seen)


def _socket() -> Iterator[Check]:
    what = "only root and the group mvm can connect"
    found = os.stat(SOCKET)
    mode, want = stat.S_IMODE(found.st_mode), grp.getgrnam(settings.load(settings.FILE).group).gr_gid
    ok = (found.st_uid, found.st_gid, mode) == (0, want, 0o660)
    yield _row("socket", what, ok, f"{SOCKET}: uid {found.st_uid}, gid {found.st_gid}, mode {mode:04o}")


def _cgroup(pid: int, mode: str) -> Iterator[Check]:
    what = "its slice can limit instances"
    kind, mount = cgroup_version()
    if kind != "v2" and mode != BASELINE:
        yield Check("slice", what, Result.NOT_APPLICABLE, f"cgroup {kind}")
        return
    own = Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii", errors="replace").strip()
    try:
        enabled = set(Path(mount, SLICE, "cgroup.subtree_control").read_text(encoding="ascii").split())
    except OSError:
        enabled = set()
    ok = own == f"0::/{SLICE}/mvm-hostd.service" and enabled >= CONTROLLERS
    yield _row("slice", what, ok, f"{own}, controllers {' '.join(sorted(enabled)) or 'none'}")


def _mode(mode: str) -> Iterator[Check]:
    found = settings.load(settings.FILE).mode
    seen = f"{settings.FILE} says {found}"
    if found == mode == BASELINE:
        yield Check("mode", "it runs in baseline mode", Result.OK, seen)
    else:
        fix = "put right what is missing, then: mvm bootstrap"
        what = "it runs in baseline mode"
        yield Check("mode", what, Result.WARNING if found == mode else Result.FAIL, seen, fix)
