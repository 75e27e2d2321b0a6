"""`mvm tenant show`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from mvm.cli.app import App, aligned, pass_app
from mvm.cli.base import command
from mvm.cli.params import tenant_argument
from mvm.core import addressing
from mvm.core.errors import MvmError
from mvm.core.ids import TenantId

if TYPE_CHECKING:
    from mvm.core.history import History
    from mvm.core.ids import InstanceId
    from mvm.core.record import InstanceRecord
    from mvm.core.spec import TenantSpec


@command("show", examples="mvm tenant show acme\nmvm tenant show acme --output json")
@tenant_argument
@pass_app
def show(app: App, tenant: TenantId) -> None:
    """Show one tenant: what it asks for, its instances as they are now, and the revisions it can go back to."""
    node = app.node()
    spec = node.spec(tenant)
    history = node.history(tenant)
    subnet = addressing.subnet(node.store.load_allocations().index_of(tenant))
    records = [inspected(app, instance) for instance in node.store.instances(tenant)]
    if app.json:
        app.answer(
            {
                "tenant": tenant,
                "spec": msgspec.structs.asdict(spec),
                "subnet": subnet,
                "instances": [record_json(record) for record in records],
                "revisions": history.entries,
                "current": history.current,
                "pinned": history.pinned,
            }
        )
        return
    _about(spec, history, subnet)
    click.echo("\ninstances")
    rows = [
        (record.id.dir_name, state_text(record), record.network.ip, ago(record.changed_ns))
        for record in records
    ]
    click.echo("\n".join(f"  {line}" for line in aligned(rows)) if rows else "  none")
    click.echo("\nrevisions, newest last")
    listed = [
        ("*" if e.revision == history.current else " ", e.revision[:12], ago(e.adopted_ns), e.flake_ref)
        for e in history.entries
    ]
    click.echo(
        "\n".join(f" {line}" for line in aligned(listed))
        if listed
        else f"  none; build one with: mvm tenant build {tenant}"
    )


def inspected(app: App, instance: InstanceId) -> InstanceRecord:
    """The instance after recovery; as recorded, with a warning, where it cannot be looked at."""
    node = app.node()
    try:
        return node.inspect(instance)
    except MvmError as error:
        app.warn(f"{instance} could not be looked at, this is what is recorded: {error.brief}")
        return node.store.load_record(instance)


def record_json(record: InstanceRecord) -> dict[str, Any]:
    """The fields of the record that say what it is, without those that only mvm needs."""
    return {
        "instance": record.id,
        "state": record.state.value,
        "pending": record.pending,
        "ip": record.network.ip,
        "mac": record.network.mac,
        "tap": record.network.tap,
        "bridge": record.network.bridge,
        "revision": record.revision,
        "vmm": record.vmm,
        "pid": record.process.pid if record.process else None,
        "snapshot": record.snapshot,
        "created_ns": record.created_ns,
        "changed_ns": record.changed_ns,
        "last_receipt": record.last_receipt,
        "last_error": record.last_error,
    }


def state_text(record: InstanceRecord) -> str:
    text = record.state.value
    if record.pending is not None:
        text += f" ({record.pending.intent})"
    return f"{text}: {record.last_error}" if record.last_error else text


def ago(then_ns: int) -> str:
    """`3 minutes ago`"""
    seconds = max(0, (time.time_ns() - then_ns) // 1_000_000_000)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s'[: count != 1]} ago"
    return "just now"


def _about(spec: TenantSpec, history: History, subnet: str) -> None:
    sleep = (
        "never by itself" if spec.sleep.idle_s is None else f"after {spec.sleep.idle_s} s without activity"
    )
    egress = (
        "anywhere outside the fleet" if spec.egress is None else ", ".join(map(str, spec.egress)) or "nowhere"
    )
    pinned = history.pinned.flake_ref if history.pinned else "no"
    rows = [
        ("tenant", spec.id), ("flake", spec.flake_ref), ("pinned to", pinned), ("profile", spec.profile.value),
        ("machine", f"{spec.vcpus} CPU, {spec.mem_mib} MiB, data disk {spec.data_disk_mib} MiB"),
        ("seccomp", spec.seccomp.value), ("metadata", "yes" if spec.metadata else "no"), ("egress", egress),
        ("subnet", subnet), ("sleeps", "never by policy" if spec.sleep.pinned else sleep),
        ("pools", ", ".join(f"{p.id} x {p.count}" for p in spec.pools)),
    ]  # fmt: skip
    click.echo("\n".join(aligned(rows)))
