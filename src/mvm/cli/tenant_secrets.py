"""`mvm tenant secrets set` and `rotate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mvm.cli.app import App, pass_app
from mvm.cli.base import LazyGroup, command
from mvm.cli.params import tenant_argument
from mvm.core.ids import TenantId

if TYPE_CHECKING:
    from mvm.standalone.secrets import SecretsResult

_SOURCE = (
    "Where to read them from: a directory (one secret per file), a JSON object of strings, or a file of NAME=value "
    "lines."
)

group = LazyGroup(
    "secrets",
    entries={
        "set": ("mvm.cli.tenant_secrets", "set_", "Replace the tenant's secrets."),
        "rotate": ("mvm.cli.tenant_secrets", "rotate", "Encrypt them anew and refresh running guests."),
    },
    help="""Set and rotate the tenant's secrets.

    They are stored encrypted. The machine sees them as files in /run/secrets, on a disk made in memory at each
    run and wake. Values are never shown or logged.""",
)


@command(
    "set",
    examples="mvm tenant secrets set acme --from-file secrets.env\nmvm tenant secrets set acme --from-file ./secrets/",
)
@tenant_argument
@click.option(
    "--from-file", "source", required=True, metavar="PATH", type=click.Path(path_type=Path), help=_SOURCE
)
@pass_app
def set_(app: App, tenant: TenantId, source: Path) -> None:
    """Replace the tenant's secrets by those in a file.

    The machine sees them at its next run or wake; `rotate` hands them to one that runs.
    """
    result = app.node().set_secrets(tenant, source)
    _tell(app, tenant, result)
    app.say(f"Running machines see them after: mvm tenant secrets rotate {tenant}")


@command(
    "rotate",
    examples="mvm tenant secrets rotate acme\nmvm tenant secrets rotate acme --from-file secrets.env",
)
@tenant_argument
@click.option("--from-file", "source", metavar="PATH", type=click.Path(path_type=Path), help=_SOURCE)
@pass_app
def rotate(app: App, tenant: TenantId, source: Path | None) -> None:
    """Encrypt the tenant's secrets under a fresh key and hand them to its running machines."""
    result = app.node().rotate_secrets(tenant, source)
    _tell(app, tenant, result)
    for instance in result.refreshed:
        app.say(f"{instance} has the new version.")
    for instance, reason in result.failed:
        app.warn(f"{instance} still has the old version until its next run or wake: {reason}")


def _tell(app: App, tenant: TenantId, result: SecretsResult) -> None:
    app.answer(
        {
            "tenant": tenant,
            "version": result.version,
            "names": result.names,
            "refreshed": result.refreshed,
            "failed": [{"instance": instance, "reason": reason} for instance, reason in result.failed],
        }
    )
    count = len(result.names)
    app.say(f"{tenant} has {count} secret{'s'[: count != 1]}, version {result.version}.")
