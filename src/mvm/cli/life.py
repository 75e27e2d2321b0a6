"""Run, sleep, wake and stop, for a tenant or one instance: do it, show progress, tell what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mvm.cli.progress import Progress
from mvm.core.lifecycle import Action
from mvm.core.snapshot import SleepReceipt, WakeReceipt

if TYPE_CHECKING:
    from mvm.cli.app import App
    from mvm.core.ids import InstanceId, TenantId
    from mvm.core.record import InstanceRecord
    from mvm.standalone.instances import Outcome

_DOING = {
    Action.RUN: "starting",
    Action.SLEEP: "putting to sleep",
    Action.WAKE: "waking",
    Action.STOP: "stopping",
}
_DONE = {
    Action.RUN: "is running at {ip}",
    Action.SLEEP: "sleeps",
    Action.WAKE: "is awake at {ip}",
    Action.STOP: "is stopped",
}


def act(app: App, who: TenantId | InstanceId, action: Action) -> None:
    node = app.node()
    with Progress(app, f"{_DOING[action]} {who}") as progress:
        outcomes = node.act(who, action, progress.phase)
    for outcome in outcomes:
        app.answer(as_json(outcome, action))
        if not app.json:
            _tell(app, outcome, action)
        if action in (Action.RUN, Action.WAKE):
            for what in outcome.record.unconfined:
                app.warn(f"{outcome.record.id} runs {what}. This is for development only: see mvm posture")


def as_json(outcome: Outcome, action: Action) -> dict[str, Any]:
    record = outcome.record
    shown: dict[str, Any] = {
        "instance": record.id,
        "action": action.value,
        "state": record.state.value,
        "changed": outcome.changed,
        "skipped": outcome.skipped,
        "note": outcome.note,
        "ip": record.network.ip,
        "revision": record.revision,
    }
    receipt = _receipt(outcome.record, action) if outcome.changed else None
    if receipt is not None:
        shown["receipt"] = receipt
    return shown


def _receipt(record: InstanceRecord, action: Action) -> WakeReceipt | SleepReceipt | None:
    wanted = {Action.WAKE: WakeReceipt, Action.SLEEP: SleepReceipt}.get(action)
    receipt = record.last_receipt
    return receipt if wanted is not None and isinstance(receipt, wanted) else None


def _tell(app: App, outcome: Outcome, action: Action) -> None:
    record = outcome.record
    if outcome.skipped:
        app.warn(f"skipped {record.id}: {outcome.note}")
        return
    if not outcome.changed:
        app.say(f"{record.id} {outcome.note}.")
        return
    receipt = _receipt(record, action)
    took = f", {receipt.total_ns / 1e9:.2f} s" if receipt is not None else ""
    app.say(f"{record.id} {_DONE[action].format(ip=record.network.ip)}{took}.")
    if receipt is not None and not app.quiet:
        rows = receipt.rows()
        name_width = max(len(name) for name, _, _ in rows)
        value_width = max(len(value) for _, value, _ in rows)
        for name, value, share in rows:
            click.echo(f"  {name:<{name_width}}  {value:>{value_width}}  {share:>8}")
