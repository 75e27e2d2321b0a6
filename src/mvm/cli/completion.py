"""`mvm completion`: the script that a shell sources."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

from mvm.cli.app import App, pass_app
from mvm.cli.base import command
from mvm.cli.params import ChoiceType

VARIABLE = "_MVM_COMPLETE"


@command(
    "completion",
    examples='eval "$(mvm completion bash)"\nmvm completion zsh > ~/.zfunc/_mvm\n'
    "mvm completion fish > ~/.config/fish/completions/mvm.fish",
)
@click.argument("shell", type=ChoiceType(["bash", "zsh", "fish"]))
@pass_app
def completion(app: App, shell: str) -> None:
    """Print the completion script of a shell. It completes commands, options and the names of tenants."""
    from mvm.cli.root import root

    kind = get_completion_class(shell)
    assert kind is not None
    # Not the class's own `source`, which starts a bash to ask its version.
    script = ShellComplete.source(kind(root, {}, "mvm", VARIABLE))
    if app.json:
        app.answer({"shell": shell, "script": script})
    else:
        click.echo(script)
