"""`mvm instance`: the same verbs for a single microVM, named <tenant>/<pool>-<number>."""

from __future__ import annotations

import click

from mvm.cli.app import App, aligned, pass_app
from mvm.cli.base import LazyGroup, command
from mvm.cli.params import instance_argument, optional_tenant, wipe_option, yes_option
from mvm.core.ids import InstanceId, TenantId

_HERE = "mvm.cli.instance"
_USE = "mvm.cli.instance_session"

group = LazyGroup(
    "instance",
    entries={
        "list": (_HERE, "list_", "List instances."),
        "show": (_HERE, "show", "Show one instance as it is now."),
        "start": (_HERE, "start", "Start one instance."),
        "stop": (_HERE, "stop", "Shut one instance down."),
        "sleep": (_HERE, "sleep", "Put one instance to sleep."),
        "wake": (_HERE, "wake", "Wake one instance where it left off."),
        "exec": (_USE, "exec_", "Run a command in one instance."),
        "logs": (_USE, "logs", "Show the console of one instance."),
        "destroy": (_HERE, "destroy", "Remove one instance."),
    },
    help="""Single microVMs, named TENANT/POOL-NUMBER, such as acme/default-0.

    A tenant without pools has one, TENANT/default-0; `mvm tenant` is shorter for it.""",
)


@command("list", examples="mvm instance list\nmvm instance list acme")
@optional_tenant
@pass_app
def list_(app: App, tenant: TenantId | None) -> None:
    """List the instances of a tenant, or all, with what was last recorded of them."""
    from mvm.cli.tenant_show import ago

    rows = app.instance_rows(tenant)
    if app.json:
        for row in rows:
            app.answer(row)
        return
    app.table(
        ("INSTANCE", "STATE", "IP", "REVISION", "SINCE"),
        [(r.instance, r.state, r.ip, r.revision[:12] or "-", ago(r.changed_ns)) for r in rows],
        "There is no instance.",
    )


@command("show", examples="mvm instance show acme/default-0")
@instance_argument
@pass_app
def show(app: App, instance: InstanceId) -> None:
    """Show one instance as it is now; what was interrupted is finished or undone first."""
    from mvm.cli.tenant_show import ago, record_json, state_text

    record = app.node().inspect(instance)
    if app.json:
        app.answer(record_json(record))
        return
    vmm = f"{record.vmm.driver} {record.vmm.version}" if record.vmm else "none"
    snapshot = (
        f"{record.snapshot.stored_bytes} bytes, {ago(record.snapshot.created_ns)}"
        if record.snapshot
        else "none"
    )
    rows = [
        ("instance", record.id),
        ("state", state_text(record)),
        ("since", ago(record.changed_ns)),
        (
            "address",
            f"{record.network.ip}, {record.network.mac}, {record.network.tap} on {record.network.bridge}",
        ),
        ("revision", record.revision or "none yet"),
        ("vmm", vmm + (f", process {record.process.pid}" if record.process else "")),
        ("snapshot", snapshot),
    ]
    click.echo("\n".join(aligned(rows)))
    if record.last_receipt is not None:
        click.echo(f"\nlast {record.last_receipt.__struct_config__.tag}")
        click.echo("\n".join(f"  {line}" for line in aligned(record.last_receipt.rows())))


@command("start", examples="mvm instance start acme/web-1")
@instance_argument
@click.option("--build", "build_first", is_flag=True, help="Build the tenant first, if it was never built.")
@pass_app
def start(app: App, instance: InstanceId, build_first: bool) -> None:
    """Start one instance, and wait until its guest answers."""
    from mvm.cli.life import act
    from mvm.cli.tenant_life import offer_build
    from mvm.core.lifecycle import Action

    offer_build(app, instance.tenant, build_first)
    act(app, instance, Action.RUN)


@command("stop", examples="mvm instance stop acme/web-1")
@instance_argument
@pass_app
def stop(app: App, instance: InstanceId) -> None:
    """Shut one instance down. Its data disk stays; the memory of one that sleeps is deleted."""
    from mvm.cli.life import act
    from mvm.core.lifecycle import Action

    act(app, instance, Action.STOP)


@command("sleep", examples="mvm instance sleep acme/web-1")
@instance_argument
@pass_app
def sleep(app: App, instance: InstanceId) -> None:
    """Put one instance to sleep, its memory encrypted."""
    from mvm.cli.life import act
    from mvm.core.lifecycle import Action

    act(app, instance, Action.SLEEP)


@command("wake", examples="mvm instance wake acme/web-1")
@instance_argument
@pass_app
def wake(app: App, instance: InstanceId) -> None:
    """Wake one instance where it left off, and show where the time went."""
    from mvm.cli.life import act
    from mvm.core.lifecycle import Action

    act(app, instance, Action.WAKE)


@command(
    "destroy",
    examples="mvm instance destroy acme/web-1\nmvm instance destroy acme/web-1 --wipe-volumes --yes",
)
@instance_argument
@wipe_option
@yes_option
@pass_app
def destroy(app: App, instance: InstanceId, wipe_volumes: bool, yes: bool) -> None:
    """Remove one instance: its machine, snapshot and address. Its data volume stays unless --wipe-volumes is given.

    If its pool still asks for it, `mvm tenant run` makes it anew; `mvm pool scale` changes what is asked for.
    """
    from mvm.cli.progress import Progress

    node = app.node()
    node.spec(instance.tenant)
    volume = "and DELETE its data volume" if wipe_volumes else "keeping its data volume"
    if instance in node.store.instances(instance.tenant) or wipe_volumes:
        app.confirm(f"Destroy {instance}, {volume}?", yes=yes)
    with Progress(app, f"destroying {instance}") as progress:
        done = node.destroy_instance(instance, wipe_volumes=wipe_volumes, progress=progress.phase)
    app.answer({"instance": instance, "destroyed": done})
    app.say(f"Destroyed {instance}." if done else f"{instance} is already destroyed.")
