"""`mvm status`."""

from __future__ import annotations

from mvm.cli.app import App, pass_app
from mvm.cli.base import command


@command("status", examples="mvm status\nmvm status --output json")
@pass_app
def status(app: App) -> None:
    """Say what the development node is: whether it runs, how fast, since when, and what it takes of this computer."""
    from mvm.cli import dev

    found = dev.node(app).status()
    app.answer({"node": found})
    for line in dev.describe(found):
        app.say(line)
