"""`mvm doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from mvm.cli.app import App, pass_app, printable
from mvm.cli.base import command
from mvm.core.errors import MissingPrerequisite
from mvm.hostd.inspect.doctor import Check, Facts, Result, diagnose

_MARKS = {Result.OK: "ok", Result.WARNING: "warning", Result.FAIL: "FAIL", Result.NOT_APPLICABLE: "n/a"}


@command("doctor", examples="mvm doctor\nmvm doctor --output json")
@pass_app
def doctor(app: App) -> None:
    """Check whether this host is fit for tenants who do not trust each other.

    Looks at the processor, memory, kernel, devices, firewall, disk, programs and clock, and changes nothing: the
    firewall is tried by a dry run. Every finding comes with what was seen and the command that puts it right. Exits
    with 0 if nothing fails, else with 15; warnings do not count. Without root less can be seen, and it says what.
    """
    checks = checklist(app)
    for check in checks:
        app.answer(check)
    if not app.json:
        click.echo("\n".join(map(printable, rendered(checks))))
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
    return lines


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
    )
