"""`mvm-hostd`: put the daemon together, give up what it does not need, serve.

Order matters: directories and the socket are made with full rights; then rights are given up and that is read back;
only then does anybody get an answer. Exits 0 after SIGTERM, else with an error's code and one line of JSON on standard
error.
"""

from __future__ import annotations

import argparse
import grp
import os
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mvm.core.errors import MissingPrerequisite, MvmError, Refused
from mvm.hostd import confine, job, ledger, settings
from mvm.hostd.daemon_host import DaemonHost
from mvm.hostd.keys.development import DevelopmentKeyProvider
from mvm.hostd.log import Log
from mvm.hostd.server import Server
from mvm.hostd.service import Service
from mvm.hostd.store import DEFAULT_ROOT, Store
from mvm.hostd.vmm import probe_room
from mvm.hostd.vmm.choice import Choice, choose
from mvm.linux import sd_notify
from mvm.linux.capabilities import status
from mvm.linux.sockets import listen_unix

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from mvm.hostd.vmm.driver import Driver

SOCKET = Path("/run/mvm/hostd.sock")
CACHE = Path("/var/cache/mvm")


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mvm-hostd", description="The privileged executor of mvm.")
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where state is kept")
    parser.add_argument("--cache", type=Path, default=CACHE, help="what can be found out again")
    parser.add_argument("--socket", type=Path, default=SOCKET, help="used when systemd hands over none")
    parser.add_argument("--settings", type=Path, default=settings.FILE, help="limits; see docs/privileges.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = options(sys.argv[1:] if argv is None else argv)
    return serve(given.root, given.socket, given.settings, given.cache, prepare=(given.cache,))


def serve(
    root: Path,
    path: Path,
    settings_file: Path,
    driver: Driver | Path,
    *,
    prepare: Sequence[Path] = (),
    keep: Collection[str] | None = None,
) -> int:
    """The daemon's whole life. `driver`: or the cache directory of those that the settings name. `prepare`: directories
    to make. `keep`: capabilities, in place of those it needs: tests take some away."""
    log = Log()
    notifier = sd_notify.Notifier()
    try:
        os.umask(0o077)
        _standard_input()
        chosen = settings.load(settings_file)
        store = Store(root)
        store.open()
        for folder in prepare:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        gid = _group(chosen.group, log)
        listener = _listener(path, gid)
        baseline = chosen.mode == "baseline"
        drivers = choose(chosen.vmm, driver, confined=baseline) if isinstance(driver, Path) else driver
        if isinstance(drivers, Choice) and keep is None:
            drivers = _possible(drivers)
        names = drivers.names if isinstance(drivers, Choice) else (drivers.name,)
        held = confine.confine(confine.wanted_by(names) if keep is None else keep)
        log.info(
            "confined", capabilities=" ".join(sorted(held.effective)), no_new_privs=held.no_new_privs,
            seccomp=held.seccomp,
        )  # fmt: skip
        # It reads every record, and a heap that grew for that would stay as large for the daemon's whole life.
        job.aside(lambda: ledger.recover_node(store, log))
        if isinstance(driver, Path):
            _sweep_probe(driver, log)
        keys = DevelopmentKeyProvider(root)
        host = DaemonHost(store, keys, drivers, baseline=baseline)
        service = Service(store, host, chosen.limits, drivers.name)
        server = Server(listener, service, gid=gid, operations=chosen.operations, log=log, notifier=notifier)
        server.run()
    except MvmError as error:
        log.error("cannot run", error=error.brief, details=error.details, resolution=error.resolution)
        notifier.tell(f"STATUS={error.brief}")
        return error.exit_code
    return 0


def _possible(drivers: Choice) -> Choice:
    """Without a driver whose VMM needs rights that we were not given."""
    missing = set(confine.wanted_by(drivers.names)) - set(confine.wanted_by([])) - status().permitted
    if not missing:
        return drivers
    lacks = ", ".join(f"CAP_{name}" for name in sorted(missing))
    return drivers.without_firecracker(
        f"mvm-hostd lacks {lacks}: its unit needs the drop-in 10-firecracker.conf (docs/privileges.md)"
    )


def _sweep_probe(cache: Path, log: Log) -> None:
    """No record tells of a probe's VM; its directory does."""
    try:
        if probe_room.sweep(cache):
            log.warning("undone", kind="probe", name=str(cache), why="it was cut short")
    except (MvmError, OSError) as error:
        log.error("not undone", kind="probe", name=str(cache), error=str(error))


def _standard_input() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if null > 2:
        os.close(null)


def _group(name: str, log: Log) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        log.warning("no such group", group=name, effect="only root may connect")
        return None


def _listener(path: Path, gid: int | None) -> socket.socket:
    """The socket systemd hands over, or one of our own in a directory of root's."""
    handed = sd_notify.listen_fds()
    if len(handed) > 1:
        raise Refused("systemd handed over more than one socket", details=f"{len(handed)} of them")
    if handed:
        sock = socket.socket(fileno=handed[0])
        if sock.family != socket.AF_UNIX or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise Refused("what systemd handed over is not a listening Unix socket")
        return sock
    if os.geteuid() != 0:
        raise MissingPrerequisite("mvm-hostd needs root", resolution="Start it by its systemd unit.")
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = os.lstat(path.parent)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or stat.S_IMODE(found.st_mode) & 0o022:
        raise Refused(
            "the socket's directory can be written by others",
            details=f"{path.parent}: owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}",
            resolution=f"Check what is in it, then: chown root {path.parent} && chmod go-w {path.parent}",
        )
    os.chmod(path.parent, 0o755)  # the umask had its share
    # Closed to all but root until it belongs to the group.
    sock = listen_unix(path, mode=0o600, backlog=64)
    if gid is not None:
        os.chown(path, 0, gid)
        os.chmod(path, 0o660)
    return sock


if __name__ == "__main__":
    sys.exit(main())
