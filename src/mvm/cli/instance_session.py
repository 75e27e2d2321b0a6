"""`mvm instance exec` and `logs`."""

from __future__ import annotations

from mvm.cli import session
from mvm.cli.app import App, pass_app
from mvm.cli.base import command
from mvm.cli.params import instance_argument
from mvm.core.ids import InstanceId


@command("exec", examples="mvm instance exec acme/web-1 -- uname -a", failure_code=session.OWN_FAILURE)
@instance_argument
@session.exec_options
@pass_app
def exec_(app: App, /, instance: InstanceId, argv: tuple[str, ...], **options: object) -> None:
    """Run a command in one instance; its output and exit code are this command's.

    Write -- before a command that has options of its own. 125 means that mvm itself failed.
    """
    session.execute(app, instance, argv, session.ExecOptions(**options))  # type: ignore[arg-type]


@command("logs", examples="mvm instance logs acme/web-1 -f")
@instance_argument
@session.logs_options
@pass_app
def logs(app: App, instance: InstanceId, follow: bool, lines: int | None, raw: bool) -> None:
    """Show the console of one instance."""
    session.logs(app, instance, follow=follow, lines=lines, raw=raw)
