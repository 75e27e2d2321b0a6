"""`mvm bootstrap`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mvm.cli.app import DEFAULT_ROOT, App, pass_app
from mvm.cli.base import command
from mvm.cli.doctor import checklist, rendered
from mvm.core.errors import InvalidInput, MissingPrerequisite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mvm.hostd.inspect.doctor import Check
    from mvm.hostd.install.needs import Lack
    from mvm.hostd.install.plan import Step, StrictFilter


@command("bootstrap", examples="mvm bootstrap --dry-run\nmvm bootstrap\nmvm bootstrap --development")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option(
    "--development",
    is_flag=True,
    help="Go on where this host cannot protect tenants, and say what is not protected.",
)
@pass_app
def bootstrap(app: App, dry_run: bool, development: bool) -> None:
    """Set up this host: install mvm-hostd as a service, start it, and see that it holds what it should.

    Begins with the checklist of mvm doctor. Where KVM, cgroup v2, nftables, dm-crypt or a program is missing it names
    each with its fix, changes nothing and exits with 15. It writes units, the group mvm, directories, this node's id,
    Firecracker's strict filter where its release can make one, and mode and filter in /etc/mvm/hostd.toml. It may be
    run again at any time: what is as it should be stays, and VMs go on running. Needs root, and an mvm installed by
    mvm-install.sh.
    """
    from mvm.cli.progress import Progress
    from mvm.hostd.install import needs, units
    from mvm.hostd.install.apply import apply
    from mvm.hostd.install.observe import firecracker_is_there, observe, program_check, require_systemd
    from mvm.hostd.install.plan import plan
    from mvm.hostd.install.verify import verify

    _require_root(app)
    mode = needs.DEVELOPMENT if development else needs.BASELINE
    with Progress(app, "looking at this host"):
        checks = checklist(app)
    _show(app, checks)
    require_systemd()
    program = program_check()
    _show(app, [program])
    _require([program], "the installed program is not this mvm, or is not safe")
    lacks = needs.lacking(checks)
    if lacks and not development:
        raise _refusal(lacks)
    _warn(app, lacks)
    shipped = units.load()
    root = Path(DEFAULT_ROOT)
    conditional = {units.FIRECRACKER} if firecracker_is_there() else set()
    if development and needs.emulated(checks):
        conditional.add(units.EMULATION)
    strict = _strict_filter(app)
    observed = observe([*shipped, *([] if strict is None else [strict.path])], root)
    steps = plan(observed, shipped, mode=mode, conditional=conditional, root=root, strict=strict)
    if dry_run:
        _tell(app, steps, done=False)
        app.say("Nothing was changed." if steps else "Nothing would be changed.")
        return
    with Progress(app, "setting up this host") as progress:
        apply(steps, progress.phase)
    _tell(app, steps, done=True)
    held = verify(root, mode)
    _show(app, held)
    _require(held, "the service runs, and not everything holds")
    if steps:
        app.say(
            f"mvm-hostd runs as a service, in {mode} mode. Members of the group mvm may use it without root."
        )
    else:
        app.say(f"Nothing had to be changed: mvm-hostd runs as a service, in {mode} mode.")


def _strict_filter(app: App) -> StrictFilter | None:
    """One that can be pinned in hostd.toml. A host does without: tenants that ask for it do not start then."""
    from mvm.core.errors import MvmError
    from mvm.hostd.install import observe
    from mvm.hostd.install.plan import with_filter

    try:
        found = observe.strict_filter()
        if found is not None:
            with_filter(observe.settings_text() or "", found)
    except (MvmError, OSError) as error:
        why = f"{error.brief}: {error.details}" if isinstance(error, MvmError) else str(error)
        app.warn(f"no strict seccomp filter is made for Firecracker: {why}")
        return None
    return found


def _require_root(app: App) -> None:
    if app.root != DEFAULT_ROOT:
        raise InvalidInput(
            "the service has its state in one place",
            details=f"It serves {DEFAULT_ROOT}, and --root or $MVM_ROOT says {app.root}.",
            resolution="Leave the root out; for another one, run by hand: mvm-hostd --root DIR --socket PATH",
        )
    if os.geteuid() != 0:
        raise MissingPrerequisite("bootstrap needs root", resolution="Run it as root, for example with sudo.")


def _show(app: App, checks: Sequence[Check]) -> None:
    for check in checks:
        app.answer(check)
    if not app.json and not app.quiet:
        click.echo("\n".join(rendered(checks)))


def _require(checks: Sequence[Check], brief: str) -> None:
    from mvm.hostd.inspect.doctor import Result

    failed = [check for check in checks if check.result is Result.FAIL]
    if failed:
        raise MissingPrerequisite(
            brief,
            details="\n".join(f"{check.what}: {check.seen}" for check in failed),
            resolution="; ".join(check.fix for check in failed),
        )


def _refusal(lacks: Sequence[Lack]) -> MissingPrerequisite:
    lines = [f"{check.what}: {check.seen}\n  without it: {lost}\n  fix: {check.fix}" for check, lost in lacks]
    return MissingPrerequisite(
        f"this host lacks {len(lacks)} of the things that protect tenants; nothing was changed",
        details="\n".join(lines),
        resolution="Put them right and run it again. On a machine for development: mvm bootstrap --development",
    )


def _warn(app: App, lacks: Sequence[Lack]) -> None:
    for check, lost in lacks:
        app.warn(f"NOT PROTECTED: {lost} ({check.what}: {check.seen}; fix: {check.fix})")
    if lacks:
        app.warn("NOT PROTECTED: run no tenant on this host whom you do not trust")


def _tell(app: App, steps: Sequence[Step], *, done: bool) -> None:
    for step in steps:
        app.answer({"step": step.describe(), "done": done})
        app.say(f"{'done' if done else 'would':<8} {step.describe()}")
