"""`mvm pool`: groups of like instances inside a tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mvm.cli.app import App, aligned, pass_app
from mvm.cli.base import LazyGroup, command
from mvm.cli.params import POOL, SIZE, optional_tenant, tenant_argument, wipe_option, yes_option
from mvm.cli.progress import Progress
from mvm.core.ids import PoolId, TenantId

if TYPE_CHECKING:
    from mvm.standalone.pools import PoolResult

_HERE = "mvm.cli.pool"

group = LazyGroup(
    "pool",
    entries={
        "create": (_HERE, "create", "Add a pool to a tenant."),
        "scale": (_HERE, "scale", "Change how many instances a pool has."),
        "list": (_HERE, "list_", "List pools."),
        "show": (_HERE, "show", "Show one pool with its instances."),
        "destroy": (_HERE, "destroy", "Remove a pool and its instances."),
    },
    help="""Groups of like instances inside a tenant.

    A tenant begins with the pool `default` and one instance. Another pool can have other sizes; its instances are
    numbered from 0: acme/web-0, acme/web-1.""",
)

_pool_argument = click.argument("pool", type=POOL, metavar="POOL")


@command(
    "create", examples="mvm pool create acme web --count 3\nmvm pool create acme batch --cpus 4 --mem 2G"
)
@tenant_argument
@_pool_argument
@click.option("--count", type=int, default=1, show_default=True, help="How many instances.")
@click.option("--cpus", "vcpus", type=int, help="Virtual CPUs of each; the tenant's if not given.")
@click.option(
    "--mem", "mem_mib", type=SIZE, metavar="SIZE", help="Memory of each; the tenant's if not given."
)
@click.option(
    "--data-disk",
    "data_disk_mib",
    type=SIZE,
    metavar="SIZE",
    help="Data disk of each; the tenant's if not given.",
)
@pass_app
def create(
    app: App,
    tenant: TenantId,
    pool: PoolId,
    count: int,
    vcpus: int | None,
    mem_mib: int | None,
    data_disk_mib: int | None,
) -> None:
    """Add a pool to a tenant. Its instances get addresses; `mvm tenant run` starts them."""
    from mvm.standalone.pools import check_count

    fields = {"count": check_count(count), "vcpus": vcpus, "mem_mib": mem_mib, "data_disk_mib": data_disk_mib}
    result = app.node().create_pool(tenant, pool, fields)
    _answer(app, pool, result)
    if not result.changed:
        app.say(f"Pool {pool} of {tenant} exists already, as asked for; nothing changed.")
        return
    app.say(f"Created pool {pool} of {tenant} with {count} instance{'s'[: count != 1]}.")
    app.say(f"Next: mvm tenant run {tenant}")


@command("scale", examples="mvm pool scale acme web 5\nmvm pool scale acme web 1 --yes")
@tenant_argument
@_pool_argument
@click.argument("count", type=int, metavar="COUNT")
@click.option("--run", "run_them", is_flag=True, help="Start the new instances.")
@wipe_option
@yes_option
@pass_app
def scale(
    app: App, tenant: TenantId, pool: PoolId, count: int, run_them: bool, wipe_volumes: bool, yes: bool
) -> None:
    """Change how many instances a pool has.

    New ones get addresses and are started by `mvm tenant run`, or here with --run. Going down destroys those with
    the highest numbers.
    """
    from mvm.standalone.pools import check_count

    node = app.node()
    check_count(count)
    node.spec(tenant).pool(pool)
    surplus = [i for i in node.store.instances(tenant) if i.pool == pool and i.ordinal >= count]
    if surplus:
        volumes = "and DELETE their data volumes" if wipe_volumes else "keeping their data volumes"
        app.confirm(f"Destroy {', '.join(surplus)}, {volumes}?", yes=yes)
    with Progress(app, f"scaling {pool}") as progress:
        result = node.scale_pool(tenant, pool, count, wipe_volumes=wipe_volumes, progress=progress.phase)
    _answer(app, pool, result)
    if not result.changed:
        app.say(f"Pool {pool} of {tenant} has {count} already.")
    for instance in result.added:
        app.say(f"Added {instance}.")
    for instance in result.removed:
        app.say(f"Destroyed {instance}.")
    if run_them:
        from mvm.cli.life import act
        from mvm.core.lifecycle import Action

        for instance in result.added:
            act(app, instance, Action.RUN)
    elif result.added:
        app.say(f"Next: mvm tenant run {tenant}")


@command("list", examples="mvm pool list\nmvm pool list acme")
@optional_tenant
@pass_app
def list_(app: App, tenant: TenantId | None) -> None:
    """List the pools of a tenant, or all."""
    rows = app.pool_rows(tenant)
    if app.json:
        for row in rows:
            app.answer(row)
        return
    app.table(
        ("TENANT", "POOL", "INSTANCES", "RUNNING", "CPUS", "MEM", "DATA DISK"),
        [
            (
                r.tenant, r.pool, str(r.count), str(r.running), str(r.vcpus), f"{r.mem_mib} MiB",
                f"{r.data_disk_mib} MiB",
            )
            for r in rows
        ],
        "There is no pool.",
    )  # fmt: skip


@command("show", examples="mvm pool show acme web")
@tenant_argument
@_pool_argument
@pass_app
def show(app: App, tenant: TenantId, pool: PoolId) -> None:
    """Show one pool with its instances, as last recorded."""
    app.store().load_spec(tenant).pool(pool)
    row = next(r for r in app.pool_rows(tenant) if r.pool == pool)
    there = [r for r in app.instance_rows(tenant) if r.instance.rpartition("-")[0] == f"{tenant}/{pool}"]
    if app.json:
        app.answer({"pool": row, "instances": there})
        return
    rows = [
        ("pool", f"{tenant}/{pool}"),
        ("machine", f"{row.vcpus} CPU, {row.mem_mib} MiB, data disk {row.data_disk_mib} MiB"),
        ("instances", str(row.count)),
    ]
    click.echo("\n".join(aligned(rows)))
    app.table(
        ("INSTANCE", "STATE", "IP"), [(r.instance, r.state, r.ip) for r in there], "It has no instance."
    )


@command("destroy", examples="mvm pool destroy acme web")
@tenant_argument
@_pool_argument
@wipe_option
@yes_option
@pass_app
def destroy(app: App, tenant: TenantId, pool: PoolId, wipe_volumes: bool, yes: bool) -> None:
    """Remove a pool and its instances. Data volumes stay unless --wipe-volumes is given."""
    node = app.node()
    node.spec(tenant)
    there = [i for i in node.store.instances(tenant) if i.pool == pool]
    if there:
        volumes = "and DELETE their data volumes" if wipe_volumes else "keeping their data volumes"
        app.confirm(f"Destroy {', '.join(there)}, {volumes}?", yes=yes)
    with Progress(app, f"destroying {pool}") as progress:
        result = node.destroy_pool(tenant, pool, wipe_volumes=wipe_volumes, progress=progress.phase)
    _answer(app, pool, result)
    app.say(f"Destroyed pool {pool} of {tenant}.")


def _answer(app: App, pool: PoolId, result: PoolResult) -> None:
    app.answer(
        {
            "tenant": result.tenant,
            "pool": pool,
            "changed": result.changed,
            "count": result.pool.count if result.pool else 0,
            "added": result.added,
            "removed": result.removed,
        }
    )
