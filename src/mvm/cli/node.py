"""`mvm node info`."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from mvm.cli.app import App, aligned, pass_app
from mvm.cli.base import LazyGroup, command
from mvm.core.errors import MissingPrerequisite, MvmError

if TYPE_CHECKING:
    from mvm.hostd.inspect.node import NodeInfo
    from mvm.standalone.remote import MemberNode

group = LazyGroup(
    "node",
    entries={"info": ("mvm.cli.node", "info", "Show what this node is, has and runs.")},
    help="This machine.",
)


@command("info", examples="mvm node info\nmvm node info --probe\nmvm node info --output json")
@click.option(
    "--probe", is_flag=True, help="Find out now whether a guest kernel boots with KVM (15 s at most)."
)
@pass_app
def info(app: App, probe: bool) -> None:
    """Show what this node is: machine, kernel, VMM, networks, what is free and what runs.

    Instances are counted as last recorded. Without root less is visible, and it says what.
    """
    from mvm.hostd.inspect.node import read_node
    from mvm.hostd.store import Store
    from mvm.hostd.vmm.qemu.driver import QemuDriver
    from mvm.standalone import compose

    if probe and os.geteuid() != 0:
        raise MissingPrerequisite(
            "--probe needs root",
            details="It boots a guest's kernel, and keeps what it found out.",
            resolution="Run the command with sudo, or without --probe.",
        )
    store = app.store() if not probe else app.node().store
    member = app.member()
    if member is not None:
        store = Store(Path(app.root))  # what of it can be seen; the rest is the daemon's to tell
    keys = compose.key_provider(Path(app.root))
    found = read_node(
        store, keys, QemuDriver(compose.CACHE), compose.CACHE, probe=probe, choice=compose.drivers()
    )
    if member is not None:
        found = told_by_daemon(found, member)
    if app.json:
        app.answer(msgspec.structs.asdict(found))
        return
    click.echo("\n".join(rendered(found)))


def told_by_daemon(found: NodeInfo, member: MemberNode) -> NodeInfo:
    """With what mvm-hostd says that this user cannot read; as it is, and saying so, if it does not answer."""
    try:
        lines = member.recorded()
        node_id = member.node_id()
    except MvmError as error:
        unseen = (*found.unseen, f"what mvm-hostd could tell: {error.brief}")
        return msgspec.structs.replace(found, unseen=unseen)
    counts = dict(Counter(line.state for line in lines))
    unseen = tuple(text for text in found.unseen if not text.startswith(("node id", "tenants")))
    networks = "networks of tenants: only root can see this: sudo mvm node info"
    return msgspec.structs.replace(
        found, node_id=node_id, instances=counts, unseen=(*unseen, networks) if not found.networks else unseen
    )


def rendered(node: NodeInfo) -> list[str]:
    """For people."""
    host, vmm = node.host, node.vmm
    kvm = f"API {host.kvm.api}" if host.kvm.api is not None else host.kvm.problem
    boots = vmm.reason if not vmm.accel else f"{'yes' if vmm.accel == 'kvm' else 'no'}: {vmm.reason}"
    nft = node.tools["nft"]
    tried = {True: "rules load (dry run)", False: "rules do not load", None: node.nft.problem}[node.nft.works]
    has = {name: "yes" if there else "no" for name, there in host.devices.items()}
    incremental = {True: "yes", False: "no", None: "known after the first run"}[vmm.incremental]
    rows = [
        ("node id", node.node_id or _none(node, "node id", "none yet")),
        ("environment", host.environment + (", inside a virtual machine" if host.hypervisor else "")),
        ("state", node.root),
        ("system", f"{host.os}, Linux {host.kernel}, {host.machine}"),
        ("CPU", f"{host.cpu}, {host.cpus} online, load {host.load_1m:.2f}"),
        ("memory", f"{host.mem_available >> 20} MiB available of {host.mem_total >> 20} MiB"),
        ("disk", f"{host.disk_free >> 20} MiB free of {host.disk_total >> 20} MiB"),
        ("KVM", kvm),
        ("guests boot with it", boots),
        ("VMM", f"{vmm.driver} {vmm.version or 'not installed'}: {vmm.why}"),
        ("snapshots", f"{'yes' if vmm.snapshot else 'no'}, incremental: {incremental}"),
        ("Firecracker", _version(node, "firecracker")),
        ("jailer", _version(node, "jailer")),
        ("cgroup", f"{host.cgroup} {' '.join(host.controllers)}".strip()),
        ("jail", _possible(host.no_jail)),
        ("limits", _possible(host.no_limits)),
        ("nftables", f"{nft.version or 'not installed'}, {tried}"),
        ("FUSE", has["/dev/fuse"]),
        ("userfaultfd", has["/dev/userfaultfd"]),
        ("vhost-vsock", has["/dev/vhost-vsock"]),
        ("dm-crypt", host.dm_crypt),
        ("keys", f"{node.key_provider} provider"),
    ]
    if node.key_warning:
        rows.append(("", node.key_warning))
    counts = ", ".join(f"{count} {state}" for state, count in sorted(node.instances.items()))
    rows.append(("instances", counts or _none(node, "tenants", "none")))
    rows += [
        (
            "network" if n == 0 else "",
            f"{net.tenant}: {net.subnet} on {net.bridge}{'' if net.up else ' (down)'}",
        )
        for n, net in enumerate(node.networks)
    ]
    rows += [("not seen", text) for text in node.unseen]
    return aligned(rows)


def _none(node: NodeInfo, what: str, word: str) -> str:
    """Nothing is not the same as nothing that this user may see."""
    return "not seen" if any(text.startswith(what) for text in node.unseen) else word


def _possible(problem: str | None) -> str:
    """Of what every VMM is to have: in development mode it runs without."""
    if problem is None:
        return "only root can see this"
    return f"NONE for VMMs of this host: {problem}" if problem else "for every VMM"


def _version(node: NodeInfo, name: str) -> str:
    tool = node.tools[name]
    return f"{tool.version or 'version not told'} ({tool.path})" if tool.path else "not installed"
