"""`mvm tenant build`, `pin` and `rollback`: where a tenant's revisions come from and which one is current."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mvm.cli.app import App, pass_app
from mvm.cli.base import command
from mvm.cli.params import tenant_argument
from mvm.cli.progress import Progress
from mvm.core.ids import TenantId

if TYPE_CHECKING:
    from mvm.standalone.builds import BuildResult


@command("build", examples="mvm tenant build acme\nmvm tenant build acme --verbose")
@tenant_argument
@click.option("--verbose", is_flag=True, help="Show the build's log as it is written.")
@pass_app
def build(app: App, tenant: TenantId, verbose: bool) -> None:
    """Build what the tenant runs from its flake.

    The result is a revision: the kernel, root file system and configuration, named by their content. Building the
    same input again gives the same revision. It is used from the next cold start on.
    """
    app.verbose = verbose
    done = build_now(app, tenant)
    built = done.built
    app.answer(
        {
            "tenant": tenant,
            "revision": built.revision,
            "changed": done.changed,
            "flake_ref": built.flake_ref,
            "lock_sha256": built.lock_sha256,
            "store_paths": built.store_paths,
            "artifacts": {a.name: a.sha256 for a in built.artifacts},
            "collected": done.collected,
        }
    )
    if not done.changed:
        app.say(f"{tenant} is up to date: revision {built.revision[:12]}.")
        return
    app.say(f"Built revision {built.revision[:12]} from {built.flake_ref}.")
    app.say(f"Next: mvm tenant run {tenant}")


def build_now(app: App, tenant: TenantId) -> BuildResult:
    """Build with progress on standard error."""
    node = app.node()
    node.spec(tenant)
    if node.workshop.notice:
        app.warn(node.workshop.notice)
    with Progress(app, f"building {tenant}") as progress:
        return node.build(tenant, on_line=progress.line, on_step=progress.step)


@command(
    "pin",
    examples="mvm tenant pin acme --flake github:owner/name/v2\nmvm tenant pin acme --flake ./guests --lock "
    "$(sha256sum ./guests/flake.lock | cut -c-64)\nmvm tenant pin acme --clear",
)
@tenant_argument
@click.option("--flake", "flake_ref", metavar="REF", help="The flake reference to build from.")
@click.option(
    "--lock", "lock_sha256", metavar="HASH", help="Refuse to build unless flake.lock has this sha256."
)
@click.option("--clear", is_flag=True, help="Build from the tenant's own flake again.")
@pass_app
def pin(app: App, tenant: TenantId, flake_ref: str | None, lock_sha256: str | None, clear: bool) -> None:
    """Build from this flake reference from now on, whatever the tenant was created with."""
    if clear == (flake_ref is not None):
        raise click.UsageError("give either --flake or --clear")
    if clear and lock_sha256 is not None:
        raise click.UsageError("--lock belongs to --flake")
    node = app.node()
    if flake_ref is not None:
        flake_ref = node.workshop.resolve(flake_ref, Path.cwd())
    history = node.pin(tenant, flake_ref, lock_sha256)
    app.answer({"tenant": tenant, "pinned": history.pinned})
    if history.pinned is None:
        app.say(f"{tenant} builds from {node.spec(tenant).flake_ref} again.")
    else:
        lock = f", only with flake.lock {lock_sha256[:12]}" if lock_sha256 else ""
        app.say(f"{tenant} builds from {history.pinned.flake_ref}{lock}.")
    app.say(f"Next: mvm tenant build {tenant}")


@command(
    "rollback", examples="mvm tenant rollback acme --steps 1\nmvm tenant rollback acme --revision 3f5a91"
)
@tenant_argument
@click.option("--revision", metavar="ID", help="The revision, or the first digits of its id.")
@click.option("--steps", type=click.IntRange(min=1), help="How many revisions to go back.")
@pass_app
def rollback(app: App, tenant: TenantId, revision: str | None, steps: int | None) -> None:
    """Go back to an earlier revision; `mvm tenant show` lists them.

    It is used from the next cold start on: stop the instance and run it. An instance that sleeps keeps its memory
    and wakes with the revision it fell asleep with.
    """
    node = app.node()
    entry, changed = node.rollback(tenant, revision=revision, steps=steps)
    instances = []
    for instance in node.store.instances(tenant):
        record = node.store.load_record(instance)
        on = record.revision == entry.revision
        instances.append(
            {"instance": instance, "state": record.state, "revision": record.revision, "current": on}
        )
    app.answer({"tenant": tenant, "revision": entry.revision, "changed": changed, "instances": instances})
    text = "is the current one now" if changed else "is the current one already"
    app.say(f"Revision {entry.revision[:12]} {text}.")
    for item in instances:
        if item["state"] in ("running", "sleeping") and not item["current"]:
            app.say(
                f"{item['instance']} is {item['state']} with another one; to change it: mvm instance stop "
                f"{item['instance']} && mvm instance start {item['instance']}"
            )
