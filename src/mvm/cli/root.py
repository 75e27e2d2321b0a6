"""The command `mvm` itself."""

from __future__ import annotations

import click

from mvm import __version__
from mvm.cli.app import current
from mvm.cli.base import Entry, Root

ENTRIES: dict[str, Entry] = {
    "tenant": ("mvm.cli.tenant", "group", "Create, build, run, use and put to sleep tenants."),
    "pool": ("mvm.cli.pool", "group", "Groups of like instances inside a tenant."),
    "instance": ("mvm.cli.instance", "group", "Single microVMs."),
    "flake": ("mvm.cli.flake", "group", "What guests are made from."),
    "audit": ("mvm.cli.audit", "group", "What was done, by a log that shows tampering."),
    "net": ("mvm.cli.net", "group", "The network of this node's guests."),
    "node": ("mvm.cli.node", "group", "What this machine is, has and runs."),
    "doctor": ("mvm.cli.doctor", "doctor", "Check whether this host is fit for tenants."),
    "bootstrap": ("mvm.cli.bootstrap", "bootstrap", "Set this host up: mvm-hostd as a service."),
    "start": ("mvm.cli.start", "start", "Start the development node."),
    "stop": ("mvm.cli.stop", "stop", "Shut down the development node."),
    "status": ("mvm.cli.status", "status", "What the development node is, and whether it runs."),
    "shell": ("mvm.cli.shell", "shell", "A shell, or a command, in the development node."),
    "ssh": ("mvm.cli.ssh", "ssh", "The same as shell; there is no SSH."),
    "sync": ("mvm.cli.sync", "sync", "Copy a directory into the development node."),
    "posture": ("mvm.cli.posture", "posture", "Show which guarantees hold on this node now."),
    "completion": ("mvm.cli.completion", "completion", "Print the shell's completion script."),
}


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        app = current(ctx)
        if app.json:
            app.answer({"version": __version__})
        else:
            click.echo(f"mvm {__version__}")
        ctx.exit()


_HELP = """\
mvm runs tenants in microVMs, and puts them to sleep, encrypted, when they have nothing to do.

A tenant is a customer, a project, an agent: something that gets a machine of its own. To begin:

\b
  mvm tenant create acme --flake nix/embedded --profile minimal
  mvm tenant build acme
  mvm tenant run acme
  mvm tenant exec acme -- uname -a
  mvm tenant sleep acme
  mvm tenant wake acme
"""

root = Root(
    "mvm",
    entries=ENTRIES,
    help=_HELP,
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            callback=_version,
            help="Show the version and exit.",
        )
    ],
)
