"""`mvm ssh`."""

from __future__ import annotations

from typing import Any

import click

from mvm.cli import session
from mvm.cli.base import command
from mvm.cli.shell import shell


def _of_shell(function: Any) -> Any:
    """With the same options and arguments, so that the two cannot differ."""
    function.__click_params__ = list(shell.own)[::-1]
    return function


@command("ssh", examples="mvm ssh\nmvm ssh -- mvm tenant list", failure_code=session.OWN_FAILURE)
@_of_shell
@click.pass_context
def ssh(ctx: click.Context, /, **options: Any) -> None:
    """Open a shell in the development node, or run a command in it: the same as mvm shell.

    There is no SSH: no daemon, no key, no network. It goes over the node's control channel, as mvm tenant ssh does for
    a guest. (On macOS the node is Lima's, and Lima reaches its machines by SSH of its own.)
    """
    ctx.invoke(shell, **options)
