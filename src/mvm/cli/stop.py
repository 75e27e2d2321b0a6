"""`mvm stop`."""

from __future__ import annotations

import click

from mvm.cli.app import App, pass_app
from mvm.cli.base import command

_SAID = {
    "absent": "There is no development node.",
    "stopped": "The development node was not running.",
    "shut-down": "The development node was shut down.",
    "killed": "The development node was ended by force.",
}


@command("stop", examples="mvm stop\nmvm stop --discard --yes")
@click.option(
    "--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=90, show_default=True,
    help="How long it may take to shut down before it is ended by force; 0 does that at once.",
)  # fmt: skip
@click.option(
    "--discard", is_flag=True, help="Remove its disks too: all its tenants, and what was synced into it."
)
@click.option("--yes", is_flag=True, help="Do not ask before discarding.")
@pass_app
def stop(app: App, timeout: float, discard: bool, yes: bool) -> None:
    """Shut down the development node. Its disks stay, and the next start goes on from them."""
    from mvm.cli import dev
    from mvm.cli.progress import Progress

    node = dev.node(app)
    if discard:
        app.confirm("Remove the development node's disks, with all tenants in it?", yes=yes)
    with Progress(app, "stopping the development node") as progress:
        how = node.stop(grace_s=timeout, discard=discard, tell=progress)
    app.answer({"how": how, "discarded": discard, "changed": how in ("shut-down", "killed")})
    app.say(_SAID[how])
