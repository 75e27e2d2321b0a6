"""`mvm tenant run`, `sleep`, `wake` and `stop`."""

from __future__ import annotations

import sys

import click

from mvm.cli.app import App, pass_app
from mvm.cli.base import command
from mvm.cli.life import act
from mvm.cli.params import tenant_argument
from mvm.core.errors import NotFound
from mvm.core.ids import TenantId
from mvm.core.lifecycle import Action


@command("run", examples="mvm tenant run acme\nmvm tenant run acme --build")
@tenant_argument
@click.option("--build", "build_first", is_flag=True, help="Build it first, if it was never built.")
@click.option("--verbose", is_flag=True, help="Show the build's log, if there is a build.")
@pass_app
def run(app: App, tenant: TenantId, build_first: bool, verbose: bool) -> None:
    """Start the tenant's instances, and wait until their guests answer.

    What runs already is left alone. What sleeps is woken by `mvm tenant wake`.
    """
    app.verbose = verbose
    offer_build(app, tenant, build_first)
    act(app, tenant, Action.RUN)


def offer_build(app: App, tenant: TenantId, build_first: bool) -> None:
    """Build a tenant that never was, if that is wanted; NotFound, naming the command, if it is not."""
    node = app.node()
    node.spec(tenant)
    if node.history(tenant).current is not None:
        return
    if not build_first:
        if app.json or not sys.stdin.isatty():
            raise NotFound(
                f"{tenant} was never built",
                details="There is nothing to start it from.",
                resolution=f"Build it with: mvm tenant build {tenant} (or in one go: mvm tenant run {tenant} --build)",
            )
        click.confirm(f"{tenant} was never built. Build it now?", default=True, abort=True, err=True)
    from mvm.cli.tenant_build import build_now

    done = build_now(app, tenant)
    app.say(f"Built revision {done.built.revision[:12]}.")


@command("sleep", examples="mvm tenant sleep acme")
@tenant_argument
@pass_app
def sleep(app: App, tenant: TenantId) -> None:
    """Put the tenant to sleep: its memory is written down, encrypted, and everything it used is released.

    `mvm tenant wake` goes on exactly where it left off.
    """
    act(app, tenant, Action.SLEEP)


@command("wake", examples="mvm tenant wake acme\nmvm tenant wake acme --output json")
@tenant_argument
@pass_app
def wake(app: App, tenant: TenantId) -> None:
    """Wake the tenant where it left off, and show where the time went."""
    act(app, tenant, Action.WAKE)


@command("stop", examples="mvm tenant stop acme")
@tenant_argument
@pass_app
def stop(app: App, tenant: TenantId) -> None:
    """Shut the tenant's instances down. The data disk stays; the memory of one that sleeps is deleted."""
    act(app, tenant, Action.STOP)
