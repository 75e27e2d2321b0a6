"""What bootstrap will do, as values: from what is wanted and what was observed, nothing else.

The order of the steps: files, then what reads them (group, directories), then settings and the node's id, then systemd.
A host that is as wanted gives no steps.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec

from mvm.core.errors import Conflict, InvalidInput
from mvm.hostd import settings
from mvm.hostd.install import units

SYSTEMD_S: Final = 60.0
START_S: Final = 660.0
"""Beyond the unit's own TimeoutStartSec: recovery looks at every instance before the daemon is ready."""
_FILTERS: Final = re.compile(r"\s*\[\[\s*vmm\.strict_filters\s*\]\]\s*(?:#.*)?")
_MODE_KEY: Final = "mode"
_HEAD: Final = "# Limits of mvm-hostd, and its mode. docs/privileges.md lists what may be said here.\n"


class Step(msgspec.Struct, frozen=True):
    """`why`: for people, what it is for."""

    why: str

    def describe(self) -> str:
        return self.why


class WriteFile(Step, frozen=True):
    path: Path
    data: bytes

    def describe(self) -> str:
        return f"write {self.path}: {self.why}"


class RemoveFile(Step, frozen=True):
    path: Path

    def describe(self) -> str:
        return f"remove {self.path}: {self.why}"


class Run(Step, frozen=True):
    argv: tuple[str, ...]
    timeout_s: float = SYSTEMD_S

    def describe(self) -> str:
        return f"{' '.join(self.argv)}: {self.why}"


class MakeNodeId(Step, frozen=True):
    root: Path

    def describe(self) -> str:
        return f"write {self.root / 'node-id'}: {self.why}"


class StrictFilter(msgspec.Struct, frozen=True):
    """Compiled for a version of Firecracker whose programs are in `folder`."""

    version: str
    folder: Path
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def path(self) -> Path:
        """By its content: what is pinned is never written over."""
        return self.folder / _filter_name(self.sha256)


class Unit(msgspec.Struct, frozen=True):
    """Of systemctl show. `stale`: systemd has read an older file than there is."""

    enabled: bool
    active: bool
    failed: bool
    stale: bool


class Observed(msgspec.Struct, frozen=True):
    """`files`: what is at the targets, of those that are there. `code_changed`: the daemon began before the code that
    is installed now was put there. `group`, `places`, `node_id`: whether they are there."""

    files: Mapping[Path, bytes]
    settings: str | None
    group: bool
    places: bool
    node_id: bool
    service: Unit
    socket: Unit
    code_changed: bool


def plan(
    observed: Observed,
    shipped: Mapping[Path, bytes],
    *,
    mode: str,
    conditional: Collection[Path],
    root: Path,
    strict: StrictFilter | None = None,
) -> list[Step]:
    """`conditional`: those of `units.CONDITIONAL` that are wanted. `strict`: a filter to pin. Conflict if a file of
    ours was written by somebody else; InvalidInput if hostd.toml is not valid."""
    steps: list[Step] = []
    changed: set[Path] = set()
    for target, data in shipped.items():
        there = observed.files.get(target)
        if there is not None and not there.startswith(units.MARK.encode()):
            raise Conflict(
                f"{target} is not mvm's",
                details="It does not begin as a file that `mvm bootstrap` installed.",
                resolution=f"See what it is for. To have mvm's own instead: rm {target}",
            )
        if target in units.CONDITIONAL and target not in conditional:
            if there is not None:
                steps.append(RemoveFile("this host does not need it", target))
                changed.add(target)
        elif there != data:
            why = "an older one is there" if there is not None else _PURPOSE[target]
            steps.append(WriteFile(why, target, data))
            changed.add(target)
    if units.SYSUSERS in changed or not observed.group:
        steps.append(Run("the group mvm", ("systemd-sysusers", str(units.SYSUSERS))))
    if units.TMPFILES in changed or not observed.places:
        steps.append(Run("mvm's directories", ("systemd-tmpfiles", "--create", str(units.TMPFILES))))
    if any(path.is_relative_to("/etc/udev") for path in changed):
        steps.append(Run("udev reads its rules again", ("udevadm", "control", "--reload")))
    wanted = with_mode(observed.settings, mode)
    why = f"mode {mode}"
    if strict is not None:
        pinned = with_filter(wanted, strict)
        ours = any(one.path == str(strict.path) for one in settings.parse(pinned).vmm.strict_filters)
        if ours and observed.files.get(strict.path) != strict.data:
            steps.append(WriteFile("for tenants whose seccomp is strict", strict.path, strict.data))
        if pinned != wanted:
            wanted, why = pinned, f"{why}; its strict filter, by hash"
    if wanted != observed.settings:
        steps.append(WriteFile(why, settings.FILE, wanted.encode()))
        changed.add(settings.FILE)
    if not observed.node_id:
        steps.append(MakeNodeId("this node's id, which stays", root))
    return steps + _systemd(observed, changed)


_PURPOSE: Final = {f.target: f"{f.source}, which mvm ships" for f in units.FILES}


def _systemd(observed: Observed, changed: set[Path]) -> list[Step]:
    steps: list[Step] = []
    service, socket = observed.service, observed.socket
    unit_files = {path for path in changed if path.is_relative_to("/etc/systemd")}
    if not (service.enabled and socket.enabled):
        # It has systemd read all units again as well.
        enable = ("systemctl", "enable", units.SOCKET, units.SERVICE)
        steps.append(Run("the service starts with the host", enable))
    elif unit_files or service.stale or socket.stale:
        steps.append(Run("systemd reads the units again", ("systemctl", "daemon-reload")))
    if service.failed or socket.failed:
        forget = ("systemctl", "reset-failed", units.SOCKET, units.SERVICE)
        steps.append(Run("forget earlier failures", forget))
    new_socket = any(path.name == units.SOCKET for path in changed) or socket.stale
    if service.active and new_socket:
        # A socket in use cannot be made anew. VMs do not notice: they are not the daemon's children.
        steps.append(Run("its socket changes; VMs go on", ("systemctl", "stop", units.SOCKET, units.SERVICE)))
    elif service.active and (
        unit_files or settings.FILE in changed or service.stale or observed.code_changed
    ):
        restart = ("systemctl", "restart", units.SERVICE)
        steps.append(Run("the daemon takes up what changed; VMs go on", restart, START_S))
        return steps
    if not (service.active and socket.active) or new_socket:
        start = ("systemctl", "start", units.SOCKET, units.SERVICE)
        steps.append(Run("start it, and wait until it is ready", start, START_S))
    return steps


def with_mode(text: str | None, mode: str) -> str:
    """hostd.toml saying `mode`, and everything else as it was, comments included. InvalidInput if it is not valid."""
    line = f'{_MODE_KEY} = "{mode}"'
    if text is None:
        return f"{_HEAD}{line}\n"
    settings.parse(text)
    lines = text.split("\n")
    # Top-level keys come before the first table.
    end = next((n for n, have in enumerate(lines) if have.lstrip().startswith("[")), len(lines))
    at = next((n for n in range(end) if _is_mode(lines[n])), None)
    if at is None:
        lines.insert(0, line)
    elif _value(lines[at]) != mode:
        lines[at] = line
    made = "\n".join(lines)
    if settings.parse(made).mode != mode:
        raise InvalidInput(
            f"{settings.FILE} cannot be changed",
            details=f"Where it says its {_MODE_KEY} was not found.",
            resolution=f"Write {line} into it, before the first table.",
        )
    return made


def with_filter(text: str, strict: StrictFilter) -> str:
    """hostd.toml with this filter for its version, and everything else as it was, comments included.

    The same where the operator has named a filter of another origin for that version. InvalidInput if it is not valid,
    or says what it says in a form that cannot be changed here.
    """
    there = [one for one in settings.parse(text).vmm.strict_filters if one.version == strict.version]
    if any(Path(one.path).name != _filter_name(one.sha256) for one in there):
        return text
    lines = text.rstrip("\n").split("\n")
    tables = [n for n, line in enumerate(lines) if line.lstrip().startswith("[")] + [len(lines)]
    for start, end in pairwise(tables):
        table = range(start + 1, end)
        if _FILTERS.fullmatch(lines[start]) and strict.version in (
            _value_of(lines[n], "version") for n in table
        ):
            for n in table:
                for key, value in (("path", str(strict.path)), ("sha256", strict.sha256)):
                    lines[n] = re.sub(rf"^(\s*{key}\s*=\s*)\"[^\"]*\"", rf'\g<1>"{value}"', lines[n])
            break
    else:
        lines += ["", "[[vmm.strict_filters]]", f'version = "{strict.version}"']
        lines += [f'path = "{strict.path}"', f'sha256 = "{strict.sha256}"']
    made = "\n".join([*lines, ""])
    try:
        found = [one for one in settings.parse(made).vmm.strict_filters if one.version == strict.version]
    except InvalidInput:
        found = []
    if [(one.path, one.sha256) for one in found] != [(str(strict.path), strict.sha256)]:
        raise InvalidInput(
            f"{settings.FILE} cannot be changed",
            details="Its strict filters are not written as tables [[vmm.strict_filters]], each key on a line.",
            resolution="Write them so, or name a filter of your own for this version.",
        )
    return made


def _filter_name(sha256: str) -> str:
    return f"strict-{sha256[:12]}.bpf"


def _value_of(line: str, key: str) -> str | None:
    return _value(line) if line.partition("=")[0].strip() == key else None


def _is_mode(line: str) -> bool:
    key, equals, _ = line.partition("=")
    return bool(equals) and key.strip().strip("\"'") == _MODE_KEY


def _value(line: str) -> str:
    return line.partition("=")[2].partition("#")[0].strip().strip("\"'")
