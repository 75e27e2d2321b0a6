"""`mvm tenant destroy`."""

from __future__ import annotations

from mvm.cli.app import App, pass_app
from mvm.cli.base import command
from mvm.cli.params import tenant_argument, wipe_option, yes_option
from mvm.cli.progress import Progress
from mvm.core.errors import NotFound
from mvm.core.ids import TenantId


@command("destroy", examples="mvm tenant destroy acme\nmvm tenant destroy acme --wipe-volumes --yes")
@tenant_argument
@wipe_option
@yes_option
@pass_app
def destroy(app: App, tenant: TenantId, wipe_volumes: bool, yes: bool) -> None:
    """Remove the tenant: its instances, snapshots, secrets and revisions.

    Data volumes stay, with the keys that open them, unless --wipe-volumes is given: a tenant created again under
    this name finds its data. The audit log stays in any case. The subnet is never used again.
    """
    node = app.node()
    try:
        node.spec(tenant)
    except NotFound:
        pass  # may have been destroyed before: the facade knows
    else:
        count = len(node.store.instances(tenant))
        volumes = "and DELETE their data volumes" if wipe_volumes else "keeping their data volumes"
        app.confirm(f"Destroy {tenant} with {count} instance{'s'[: count != 1]}, {volumes}?", yes=yes)
    with Progress(app, f"destroying {tenant}") as progress:
        done = node.destroy(tenant, wipe_volumes=wipe_volumes, progress=progress.phase)
    app.answer(
        {
            "tenant": tenant,
            "destroyed": done.existed,
            "instances": done.instances,
            "kept_volumes": done.kept_volumes,
        }
    )
    app.say(f"Destroyed {tenant}." if done.existed else f"{tenant} was destroyed already.")
    if done.kept_volumes:
        names = ", ".join(done.kept_volumes)
        app.say(
            f"Kept the data volumes of {names}. To delete them: mvm tenant destroy {tenant} --wipe-volumes --yes"
        )
