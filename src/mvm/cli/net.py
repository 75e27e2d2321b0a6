"""`mvm net verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from mvm.cli.app import App, pass_app
from mvm.cli.base import LazyGroup, command
from mvm.core.errors import Refused

if TYPE_CHECKING:
    from mvm.hostd.net_verify.active import Result

group = LazyGroup(
    "net",
    entries={"verify": ("mvm.cli.net", "verify", "Check bridges, taps and rules against the records.")},
    help="The network of this node's guests.",
)


@command("verify", examples="mvm net verify\nmvm net verify --active\nmvm net verify --output json")
@click.option(
    "--active",
    is_flag=True,
    help="Have running guests send packets, forged ones too, and see that they pass or die as they must.",
)
@pass_app
def verify(app: App, active: bool) -> None:
    """Compare the live network with what must be there, and name every difference with its fix.

    Looks at bridges, taps, addresses, port isolation, IPv6, kernel settings and every packet filter rule, and changes
    nothing. --active sends a few dozen packets from at most 16 running guests; their programs see none of it. Exits
    with 13 if anything differs. A member of mvm-hostd's group is told what the daemon sees; --active needs root.
    """
    report = app.node().verify_network(active=active, progress=lambda text: app.say(text) if active else None)
    for difference in report.differences:
        app.answer({"kind": "difference", **difference._asdict()})
        app.say(f"{difference.where}: {difference.what}\n    fix: {difference.fix}")
    if report.left_out:
        app.say(f"... and {report.left_out} more")
    for result in report.results:
        app.answer({"kind": "probe", **result._asdict()})
        app.say(_line(result))
    failed = [result for result in report.results if not result.ok]
    wrong = len(report.differences) + report.left_out + len(failed)
    summary = {
        "ok": wrong == 0, "tenants": report.tenants, "running": report.running,
        "differences": len(report.differences) + report.left_out, "probes": len(report.results), "failed": len(failed),
    }  # fmt: skip
    app.answer({"kind": "summary", **msgspec.to_builtins(summary)})
    if wrong:
        raise Refused(
            f"the network is not as it must be: {wrong} {'finding' if wrong == 1 else 'findings'}",
            details="\n".join(
                [f"{d.where}: {d.what}" for d in report.differences[:20]]
                + [f"{r.instance}: {r.probe}: {r.seen}, must {r.must}" for r in failed[:20]]
            ),
            resolution="Apply the fixes shown, and verify again.",
        )
    probes = f"; {len(report.results)} probes as they must be" if active else ""
    app.say(
        f"As it must be: {report.tenants} tenants with rules, {report.running} running instances{probes}."
    )
    if active and not report.results:
        app.say("No instance runs, so no packet was sent.")


def _line(result: Result) -> str:
    return f"{'ok' if result.ok else 'FAIL':<5} {result.instance}: {result.probe}: {result.seen} (must {result.must})"
