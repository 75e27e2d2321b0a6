"""`mvm shell`."""

from __future__ import annotations

import os

import click

from mvm.cli import session
from mvm.cli.app import App, pass_app
from mvm.cli.base import command, is_terminal
from mvm.cli.params import environment


@command(
    "shell",
    examples="mvm shell\nmvm shell -- mvm tenant list\ntar c . | mvm shell -- tar x -C /tmp",
    failure_code=session.OWN_FAILURE,
)
@click.option("--user", default="", metavar="NAME", help="Be this user in the node; root if not given.")
@click.option(
    "--cwd", default="", metavar="DIR", help="Directory in the node to be in; the user's home if not given."
)
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="A variable of the environment. Repeatable.")
@click.argument("argv", nargs=-1, metavar="[-- COMMAND [ARGUMENT]...]")
@pass_app
def shell(app: App, user: str, cwd: str, env: tuple[str, ...], argv: tuple[str, ...]) -> None:
    """Open a shell in the development node, or run a command in it.

    The command gets this one's standard input, output and error, and a terminal where these are one; its exit code is
    this command's, and 125 means that mvm itself failed. On Linux this is no SSH: it goes over the node's control
    channel and needs no network.
    """
    import sys

    from mvm.cli import dev

    terminal = is_terminal(0) and is_terminal(1)
    words = argv or (("/bin/bash", "-l") if terminal else ("/bin/bash",))
    variables = environment(env)
    if terminal:
        variables.setdefault("TERM", os.environ.get("TERM", "dumb"))
    node = dev.node(app)
    sys.stdout.flush()
    with session.raw_terminal(terminal and node.name != "lima"):
        code = node.run(words, stdin=0, stdout=1, stderr=2, tty=terminal, env=variables, cwd=cwd, user=user)
    click.get_current_context().exit(code)
