"""`mvm tenant exec`, `ssh`, `cp` and `logs`: which instance is meant, then `mvm.cli.session` does it."""

from __future__ import annotations

import click

from mvm.cli import session
from mvm.cli.app import App, pass_app
from mvm.cli.base import command
from mvm.cli.params import TENANT, tenant_argument
from mvm.core.errors import Conflict, InvalidInput
from mvm.core.ids import InstanceId, TenantId

_instance_option = click.option(
    "--instance", "name", metavar="NAME", help="Which instance, as default-0; needed if there are several."
)


def choose(app: App, tenant: TenantId, name: str | None) -> InstanceId:
    """The named instance, or the only one. InvalidInput that lists them where that is not clear."""
    store = app.store()
    store.load_spec(tenant)
    if name is not None:
        return InstanceId.parse(name if "/" in name else f"{tenant}/{name}")
    there = store.instances(tenant)
    if len(there) == 1:
        return there[0]
    if not there:
        raise Conflict(
            f"{tenant} has no instance",
            details="Nothing of it is running.",
            resolution=f"Run it with: mvm tenant run {tenant}",
        )
    raise InvalidInput(
        f"{tenant} has {len(there)} instances: say which one",
        details=", ".join(i.dir_name for i in there),
        resolution=f"Add, for example, --instance {there[0].dir_name}.",
    )


@command(
    "exec",
    examples="mvm tenant exec acme -- uname -a\nmvm tenant exec acme -i -t -- /bin/sh\n"
    "tar c . | mvm tenant exec acme -i -- tar x -C /data\nmvm tenant exec acme --detach -- /data/worker",
    failure_code=session.OWN_FAILURE,
)
@tenant_argument
@_instance_option
@session.exec_options
@pass_app
def exec_(app: App, /, tenant: TenantId, name: str | None, argv: tuple[str, ...], **options: object) -> None:
    """Run a command in the tenant's machine; its output and exit code are this command's.

    Write -- before a command that has options of its own. A command killed by a signal exits with 128 and the
    signal's number, as in a shell; 125 means that mvm itself failed.
    """
    session.execute(app, choose(app, tenant, name), argv, session.ExecOptions(**options))  # type: ignore[arg-type]


@command(
    "ssh", examples="mvm tenant ssh acme\nmvm tenant ssh acme --user nobody", failure_code=session.OWN_FAILURE
)
@tenant_argument
@_instance_option
@click.option("--user", default="", metavar="NAME", help="Be this user in the machine; root if not given.")
@click.option(
    "--shell", default="/bin/sh", show_default=True, metavar="PATH", help="The shell in the machine."
)
@pass_app
def ssh(app: App, tenant: TenantId, name: str | None, user: str, shell: str) -> None:
    """Open a shell in the tenant's machine.

    There is no SSH in it: this goes over the machine's control channel and needs no network.
    """
    session.shell(app, choose(app, tenant, name), user=user, path=shell)


@command(
    "cp",
    examples="mvm tenant cp ./model.bin acme:/data/\nmvm tenant cp acme:/var/log ./logs\n"
    "mvm tenant cp acme/web-1:/etc/hostname .",
)
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET")
@_instance_option
@pass_app
def cp(app: App, source: str, target: str, name: str | None) -> None:
    """Copy a file or directory into or out of the tenant's machine.

    One of SOURCE and TARGET is TENANT:/PATH or TENANT/NAME:/PATH, the other a path here (with ./ before it if it
    has a colon). A target that ends in / or is a directory receives the source under its own name.
    """
    inside_source, inside_target = _remote(source), _remote(target)
    if (inside_source is None) == (inside_target is None):
        raise InvalidInput(
            "exactly one of source and target must be in a machine",
            details=f"Given: {source[:80]} and {target[:80]}",
            resolution="Write the machine's side as TENANT:/PATH, for example acme:/data/file.",
        )
    where, path = inside_source or inside_target or ("", "")
    if "/" in where:
        instance = InstanceId.parse(where)
    else:
        instance = choose(app, TENANT.convert(where, None, None), name)
    if inside_source is not None:
        session.copy_out(app, instance, path, target)
    else:
        session.copy_in(app, instance, source, path)


def _remote(text: str) -> tuple[str, str] | None:
    """(tenant or instance, path) of `acme:/x`; None for a path on this side."""
    where, colon, path = text.partition(":")
    if not colon or not where or where[0] in "./":
        return None
    return where, path


@command("logs", examples="mvm tenant logs acme\nmvm tenant logs acme -n 20 -f")
@tenant_argument
@_instance_option
@session.logs_options
@pass_app
def logs(app: App, tenant: TenantId, name: str | None, follow: bool, lines: int | None, raw: bool) -> None:
    """Show the console of the tenant's machine: its kernel's messages and what detached commands print.

    The last one to two megabytes are kept.
    """
    session.logs(app, choose(app, tenant, name), follow=follow, lines=lines, raw=raw)
