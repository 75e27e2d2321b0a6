"""Doing a plan's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from mvm.core.errors import CommandFailed
from mvm.hostd.install import units
from mvm.hostd.install.plan import MakeNodeId, RemoveFile, Run, Step, WriteFile
from mvm.hostd.store import Store
from mvm.linux.files import fsync_dir, write_atomic
from mvm.linux.process import run

_JOURNAL_S: Final = 30.0
_JOURNAL_LINES: Final = "15"


def apply(steps: Iterable[Step], tell: Callable[[str], None]) -> None:
    """All steps in order. CommandFailed, with the journal's last lines where the service did not come up."""
    for step in steps:
        tell(step.describe())
        execute(step)


def execute(step: Step) -> None:
    match step:
        case WriteFile(path=path, data=data):
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_atomic(path, data, 0o644)
        case RemoveFile(path=path):
            path.unlink(missing_ok=True)
            fsync_dir(path.parent)
        case MakeNodeId(root=root):
            store = Store(root)
            store.open()
            store.node_id()
        case Run(argv=argv, timeout_s=timeout):
            _run(argv, timeout)
        case _:
            raise AssertionError(f"{step!r} is no step")


def _run(argv: tuple[str, ...], timeout: float) -> None:
    try:
        run(argv, timeout=timeout, env={"SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"})
    except CommandFailed as error:
        if units.SERVICE not in argv:
            raise
        raise CommandFailed(
            "mvm-hostd did not come up",
            details="\n".join(part for part in (error.details, _journal()) if part),
            resolution=f"See all it said with: journalctl -u {units.SERVICE} -b; then run mvm bootstrap again",
        ) from error


def _journal() -> str:
    argv = ["journalctl", "--no-pager", "--output=cat", "--lines", _JOURNAL_LINES, "--unit", units.SERVICE]
    try:
        return run(argv, timeout=_JOURNAL_S).stdout.decode("utf-8", "replace").strip()
    except (CommandFailed, OSError):
        return ""  # the failure itself is told; this would only have explained it
