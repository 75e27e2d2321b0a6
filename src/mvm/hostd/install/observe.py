"""What is on this host now, of all that bootstrap sets up. Changes nothing."""

from __future__ import annotations

import grp
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from mvm.core.errors import CommandFailed, MissingPrerequisite
from mvm.hostd import settings
from mvm.hostd.inspect.doctor import Check, Result
from mvm.hostd.inspect.host import path_facts
from mvm.hostd.install import units
from mvm.hostd.install.plan import Observed, StrictFilter, Unit
from mvm.hostd.vmm.firecracker import programs, strict
from mvm.hostd.vmm.firecracker.version import Version, parse_version
from mvm.linux.files import read_bounded
from mvm.linux.pidfd import identify
from mvm.linux.process import run

POLICY: Final = "seccomp-filter.json"
COMPILER: Final = "seccompiler-bin"
"""Of a Firecracker release, beside its programs, where the operator has given them."""
_FILE_MAX: Final = 64 * 1024
_ASK_S: Final = 30.0
_RUNNING: Final = Path("/run/systemd/system")
"""There while systemd is pid 1: sd_booted(3)."""
_PLACES: Final = ("/run/mvm", "/var/lib/mvm", "/var/cache/mvm", "/etc/mvm")
_PACKAGE: Final = Path(__file__).resolve().parents[2]


def require_systemd() -> None:
    """MissingPrerequisite, with how to do without, unless systemd runs this host."""
    if _RUNNING.is_dir():
        return
    raise MissingPrerequisite(
        "systemd does not run this host",
        details=f"There is no {_RUNNING}, so no service can be installed.",
        resolution="Run the daemon by hand, as root and for as long as it is wanted: mvm-hostd. It makes its socket"
        " /run/mvm/hostd.sock, and every mvm command then uses it. Or use mvm without a daemon: as root, it needs"
        " nothing more.",
    )


def program_check() -> Check:
    """Whether what the unit executes is this very mvm, and only root can change it."""
    name, what = "program:mvm-hostd", f"{units.HOSTD} is this mvm, and root's"
    fix = "install mvm for the whole host: packaging/mvm-install.sh; then: /usr/bin/mvm bootstrap"
    real = os.path.realpath(units.HOSTD)
    if not os.access(real, os.X_OK):
        return Check(name, what, Result.FAIL, f"there is no program {units.HOSTD}", fix)
    ours = os.path.realpath(os.path.join(sys.prefix, "bin", units.HOSTD.name))
    if real != ours:
        return Check(name, what, Result.FAIL, f"it is {real}, and this mvm's is {ours}", fix)
    if problem := _changeable([units.HOSTD, Path(real), _PACKAGE]):
        return Check(name, what, Result.FAIL, problem, "chown -R root:root and chmod -R go-w what is named")
    return Check(name, what, Result.OK, real)


def _changeable(paths: Iterable[Path]) -> str:
    """The first of these, or of the directories above them, that somebody but root can change; "" for none."""
    for path in paths:
        for place in (path, *path.parents):
            facts = path_facts(place)
            if facts is None or facts.uid != 0:
                return f"{place} is not root's"
            if facts.kind != "link" and facts.mode & 0o022 and not facts.mode & 0o1000:
                return f"{place} can be written by others"
    return ""


def observe(targets: Iterable[Path], root: Path) -> Observed:
    """`targets`: where files of ours belong."""
    service, pid = _unit(units.SERVICE)
    socket, _ = _unit(units.SOCKET)
    return Observed(
        files={path: data for path in targets if (data := _read(path)) is not None},
        settings=settings_text(),
        group=_has_group(),
        places=all(os.path.isdir(place) for place in _PLACES),
        node_id=(root / "node-id").exists(),
        service=service,
        socket=socket,
        code_changed=pid > 0 and (_older_than_its_code(pid) or runs_another_code(pid, Path(sys.prefix))),
    )


def settings_text() -> str | None:
    """What hostd.toml says; None if there is none."""
    found = _read(settings.FILE)
    return None if found is None else found.decode("utf-8", "replace")


def _read(path: Path) -> bytes | None:
    try:
        return read_bounded(path, _FILE_MAX)
    except FileNotFoundError:
        return None


def firecracker_is_there() -> bool:
    """Whether its programs are where the settings say; whether they are any good the daemon finds out."""
    return os.path.exists(Path(settings.load(settings.FILE).vmm.directory) / "firecracker")


def strict_filter() -> StrictFilter | None:
    """The strict filter of the installed Firecracker, compiled from its release's list by its release's compiler.

    None where one of these is not there. Nothing is executed that others than root could have written, and nothing is
    left on the host. Refused, MissingPrerequisite (no such filter is known for this version), InvalidInput (no list of
    such a release), CommandFailed.
    """
    vmm = settings.load(settings.FILE).vmm
    folder = Path(os.path.realpath(vmm.directory))
    policy, compiler = folder / POLICY, folder / COMPILER
    if not (firecracker_is_there() and policy.exists() and compiler.exists()):
        return None
    pins = {str(name): value for name, value in vmm.sha256.items()}
    for path in (policy, compiler):
        programs.require_owned(path)
    with tempfile.TemporaryDirectory(prefix="mvm-filter-") as scratch:
        version = Version(*programs.inspect(folder, Path(scratch), pins=pins, confined=True).version)
        said = run([str(compiler), "--version"], timeout=_ASK_S).stdout.decode("utf-8", "replace")
        if parse_version(said) != version:
            raise MissingPrerequisite(
                f"{compiler} is not of Firecracker {version}",
                details=said.strip()[:200],
                resolution="Install all of one release: mvm-install.sh --firecracker",
            )
        source, made = Path(scratch, "strict.json"), Path(scratch, "strict.bpf")
        source.write_bytes(strict.derive(read_bounded(policy, strict.POLICY_MAX), version))
        argv = [str(compiler), "--target-arch", os.uname().machine]
        run([*argv, "--input-file", str(source), "--output-file", str(made)], timeout=_ASK_S)
        return StrictFilter(str(version), folder, read_bounded(made, strict.POLICY_MAX))


def _has_group() -> bool:
    try:
        grp.getgrnam("mvm")
    except KeyError:
        return False
    return True


def parse_unit(shown: str) -> tuple[Unit, int]:
    """(state, main process or 0) from NAME=VALUE lines; what is not there counts as no."""
    fields = dict(line.partition("=")[::2] for line in shown.splitlines())
    pid = fields.get("MainPID", "0")
    state = fields.get("ActiveState", "")
    unit = Unit(
        enabled=fields.get("UnitFileState") == "enabled",
        # `activating` too: it will be up, with what it was started with.
        active=state in ("active", "activating", "reloading"),
        failed=state == "failed",
        stale=fields.get("NeedDaemonReload") == "yes",
    )
    return unit, int(pid) if pid.isdecimal() else 0


def _unit(name: str) -> tuple[Unit, int]:
    argv = ["systemctl", "show", "--property=ActiveState,UnitFileState,NeedDaemonReload,MainPID", name]
    try:
        return parse_unit(run(argv, timeout=_ASK_S).stdout.decode("utf-8", "replace"))
    except CommandFailed as error:
        raise MissingPrerequisite(
            "systemd does not answer",
            details=error.details,
            resolution="See its state with: systemctl status",
        ) from error


def runs_another_code(pid: int, prefix: Path) -> bool:
    """Whether a Python process has nothing mapped from the environment `prefix`, so that its mvm is another one: after
    going back to an older release, say, whose files are older than the process. Its program says nothing: the
    interpreter of every environment is the host's. False if it is gone."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # An extension module, msgspec's at least, is mapped from the environment's own directory.
    return os.fsencode(os.path.realpath(prefix)) + b"/" not in maps


def _older_than_its_code(pid: int) -> bool:
    """Whether a process began before the package was put in its place. Change times cannot be set back."""
    process = identify(pid)
    if process is None:
        return False
    running_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - process.start_ticks * 10**9 // os.sysconf(
        "SC_CLK_TCK"
    )
    return time.time_ns() - running_ns < os.stat(_PACKAGE / "__init__.py").st_ctime_ns
