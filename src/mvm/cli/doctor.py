"""`mvm doctor`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from mvm.cli.app import App, pass_app, printable
from mvm.cli.base import command
from mvm.core.errors import MissingPrerequisite, MvmError, NotFound
from mvm.hostd.inspect.doctor import Check, Facts, Leftovers, Result, diagnose

_MARKS = {Result.OK: "ok", Result.WARNING: "warning", Result.FAIL: "FAIL", Result.NOT_APPLICABLE: "n/a"}


@command("doctor", examples="mvm doctor\nmvm doctor --output json\nmvm doctor --repair")
@click.option(
    "--repair",
    is_flag=True,
    help="First undo what nobody owns any more: processes, links, mounts, open disks and half-written files.",
)
@pass_app
def doctor(app: App, repair: bool) -> None:
    """Check whether this host is fit for tenants who do not trust each other.

    Looks at the processor, memory, kernel, devices, firewall, disk, programs, clock, and what earlier commands may have
    left over, and changes nothing: the firewall is tried by a dry run. Every finding comes with what was seen and the
    command that puts it right. Exits with 0 if nothing fails, else with 15; warnings do not count. Without root less
    can be seen, and it says what.

    With --repair it first does what mvm-hostd does at its start, and what nobody does where there is no mvm-hostd:
    undoes what no instance owns and finishes what was cut short. What may be somebody else's, or is being worked on,
    it leaves alone.
    """
    if repair:
        _repair(app)
    checks = checklist(app)
    for check in checks:
        app.answer(check)
    if not app.json:
        click.echo("\n".join(rendered(checks)))
    failed = [check.id for check in checks if check.result is Result.FAIL]
    if failed:
        raise MissingPrerequisite(
            f"{len(failed)} of {len(checks)} checks fail on this host",
            details=", ".join(failed),
            resolution="Put them right with the commands shown; a development machine may run mvm without.",
        )


def checklist(app: App) -> list[Check]:
    """Every row, for this host and the app's root."""
    return diagnose(_facts(app))


def rendered(checks: Sequence[Check]) -> list[str]:
    """For people."""
    lines = []
    for check in checks:
        lines.append(f"{_MARKS[check.result]:<8} {check.what}: {check.seen}")
        if check.fix:
            lines.append(f"{'':<8}   fix: {check.fix}")
    return [printable(line) for line in lines]


def _repair(app: App) -> None:
    from mvm.hostd.admission import all_instances
    from mvm.hostd.ledger import recover_node

    if os.geteuid() != 0:
        raise MissingPrerequisite(
            "only root can undo what is left over", resolution="Run it with sudo: sudo mvm doctor --repair"
        )
    if not Path(app.root).is_dir():
        app.say(f"{app.root} is not there yet: nothing of it can be left over.")
        return
    node = app.node()
    report = recover_node(node.store)
    for action in report.undone:
        app.answer({"undone": action})
        app.say(f"undone: {action.kind} {action.name}: {action.why}")
    for action, error in report.failed:
        app.warn(f"not undone: {action.kind} {action.name}: {error}")
    for instance in all_instances(node.store):
        try:
            node.host.inspect_instance(instance)
        except NotFound:
            continue  # its destroy was finished just now
        except MvmError as problem:
            app.warn(f"{instance} was not recovered: {problem.brief}")


def _leftovers(app: App) -> Leftovers:
    from mvm.core.ledger import Foreign, Undo
    from mvm.hostd.ledger import survey

    if os.geteuid() != 0:
        return Leftovers(unseen=("only root can see it",))
    if not Path(app.root).is_dir():
        return Leftovers()
    actions, blind = survey(app.store())
    return Leftovers(
        undo=tuple(f"{a.kind} {a.name}: {a.why}" for a in actions if isinstance(a, Undo)),
        left=tuple(f"{a.kind} {a.name}: {a.why}" for a in actions if isinstance(a, Foreign)),
        lacks=tuple(a.describe() for a in actions if not isinstance(a, Undo | Foreign)),
        unseen=tuple(f"not looked at: {text}" for text in blind),
    )


def _facts(app: App) -> Facts:
    from mvm.hostd.inspect.host import read_host
    from mvm.hostd.inspect.node import acceleration
    from mvm.hostd.inspect.tools import read_nft, read_tools
    from mvm.standalone.compose import CACHE

    tools = read_tools()
    return Facts(
        root=app.root,
        host=read_host(Path(app.root)),
        tools=tools,
        nft=read_nft(),
        accel=acceleration(app.store(), tools, CACHE),
        leftovers=_leftovers(app),
    )
