"""`mvm posture`. As a program it prints docs/posture.md: `python -m mvm.cli.posture > docs/posture.md`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from mvm.cli.app import App, pass_app, printable
from mvm.cli.base import command
from mvm.core.errors import Refused
from mvm.core.posture import MEANING, Finding, Mode, Posture, Status, assess, render_page


@command("posture", examples="mvm posture\nmvm posture --output json\nmvm posture --require baseline")
@click.option(
    "--require",
    type=click.Choice([mode.value for mode in Mode]),
    help="Exit with 13 unless this mode, or a higher one, is reached.",
)
@pass_app
def posture(app: App, require: str | None) -> None:
    """Show which guarantees hold on this node right now, each with what its check saw.

    Every check is executed: processes of running VMs, their files, snapshots, disks, keys, links and logs are looked
    at; nothing is changed. What mvm does not do yet is listed as such. The last lines say which mode (development,
    baseline, hardened) is reached, and what is missing for the next. Needs root to see most of it.
    """
    findings = examined(app)
    reached = assess(findings)
    if app.json:
        for finding in findings:
            app.answer(_row(finding))
        app.answer({"mode": reached.mode, "missing": reached.missing, "unseen": reached.unseen})
    else:
        click.echo("\n".join(map(printable, rendered(findings, reached))))
    order = [mode.value for mode in Mode]
    if require is not None and order.index(reached.mode) < order.index(require):
        raise Refused(
            f"this node is in {reached.mode} mode, not in {require} mode",
            details=f"Missing for the next mode: {', '.join(reached.missing)}.",
            resolution="See what each of them saw: mvm posture",
        )


def examined(app: App) -> list[Finding]:
    """All findings, read now. Without root most are unknown."""
    from mvm.hostd.inspect.doctor import Acceleration, Facts, diagnose
    from mvm.hostd.inspect.guarantees import examine
    from mvm.hostd.inspect.host import read_host
    from mvm.hostd.inspect.scene import read_scene
    from mvm.hostd.inspect.tools import read_nft, read_tools
    from mvm.standalone import compose

    root = Path(app.root)
    host = read_host(root)
    checks = diagnose(Facts(app.root, host, read_tools(), read_nft(), Acceleration("", "not asked for")))
    scene = None
    if os.geteuid() == 0:
        scene = read_scene(app.store(), compose.key_provider(root), compose.daemon_socket(root))
    return examine(app.root, host, checks, scene)


def rendered(findings: Sequence[Finding], reached: Posture) -> list[str]:
    """For people: what is not held stands out."""
    lines, area = [], ""
    for finding in findings:
        guarantee = finding.guarantee
        if guarantee.area != area:
            area = guarantee.area
            lines += ["", area]
        lines.append(f"  {finding.status.value:<24} {guarantee.id}: {guarantee.statement}")
        lines.append(f"  {'':<24}   {guarantee.mode}; {finding.seen or 'not looked at'}")
    held = sum(finding.status is Status.HELD for finding in findings)
    lines += [
        "",
        f"mode: {reached.mode} ({held} of {len(findings)} guarantees held)",
        f"  {MEANING[reached.mode]}",
    ]
    if reached.missing:
        lines.append(f"  missing for the next mode: {', '.join(reached.missing)}")
    if reached.unseen:
        lines.append(f"  nothing to look at: {', '.join(reached.unseen)}")
    return lines[1:]


def _row(finding: Finding) -> dict[str, object]:
    guarantee = finding.guarantee
    return {
        "id": guarantee.id,
        "area": guarantee.area,
        "mode": guarantee.mode,
        "status": finding.status.name.lower().replace("_", "-"),
        "statement": guarantee.statement,
        "check": guarantee.check,
        "seen": finding.seen,
        "requires": guarantee.requires,
    }


if __name__ == "__main__":
    print(render_page(), end="")
