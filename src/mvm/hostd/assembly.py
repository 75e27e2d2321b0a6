"""From a plan to a machine: open everything a VMM is started with, and close it again afterwards.

What is opened here is handed to the VMM as descriptors and closed on our side; the tap (or its namespace), the opened
data disk and the secrets then live exactly as long as the VMM does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mvm.core.errors import IntegrityError, MissingPrerequisite, NotFound, ResourceExhausted
from mvm.core.fc_config import FcPaths, overlay_fc_config
from mvm.core.limits import FC_CONFIG_BYTES
from mvm.core.plan import InstancePlan
from mvm.core.revision import (
    DOCUMENT,
    FC_BASE,
    FILES,
    INITRD,
    KERNEL,
    REVISION_BYTES,
    ROOTFS,
    Revision,
    decode_revision,
)
from mvm.hostd import net_policy
from mvm.hostd.keys import KeyProvider
from mvm.hostd.resources import network, private_tap, secrets_disk, secrets_store, volume
from mvm.hostd.store import InstancePaths, Store
from mvm.hostd.vmm.driver import Drive, Machine, Nic, Wants
from mvm.linux.files import ensure_dir, fsync_dir, read_bounded, write_atomic
from mvm.linux.machine import memory_available

# What a VMM needs beside the guest's memory: its own code, translation buffers, page tables.
_OVERHEAD_MIB = 128
_NO_WANTS = Wants()


def load_revision(store: Store, plan: InstancePlan) -> Revision:
    """The plan's revision. NotFound with what to do where it is gone."""
    try:
        return decode_revision(read_bounded(store.revisions_dir / plan.revision / DOCUMENT, REVISION_BYTES))
    except FileNotFoundError:
        raise NotFound(
            f"revision {plan.revision[:12]} is not on this node",
            details=f"Looked in {store.revisions_dir}.",
            resolution=f"Build it again with: mvm tenant build {plan.instance.tenant}",
        ) from None


def verify_artifacts(store: Store, revision: Revision) -> None:
    """IntegrityError unless every file of the revision is what was built. Reads all of them once."""
    for name, expected in revision.sha256.items():
        path = store.revisions_dir / revision.id / FILES[name]
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            found = "no such file"
        if found != expected:
            raise IntegrityError(
                f"the {name} of revision {revision.id[:12]} is not what was built",
                details=f"{path}: expected {expected}, found {found}",
                resolution="Remove the revision's directory and build again: mvm tenant build",
            )


def require_memory(plan: InstancePlan) -> None:
    """ResourceExhausted unless the host has the guest's memory to give now."""
    free = memory_available() >> 20
    if free < plan.mem_mib + _OVERHEAD_MIB:
        raise ResourceExhausted(
            f"not enough memory for {plan.instance}",
            details=f"It needs {plan.mem_mib + _OVERHEAD_MIB} MiB with its VMM; {free} MiB are available.",
            resolution="Put other instances to sleep (mvm tenant sleep), or give this one less memory.",
        )


def has_secrets(store: Store, plan: InstancePlan) -> bool:
    """Whether the tenant was ever given secrets."""
    return secrets_store.version(store.tenant_dir(plan.instance.tenant) / secrets_store.STORE_NAME) > 0


@contextmanager
def assemble(
    store: Store,
    keys: KeyProvider,
    plan: InstancePlan,
    revision: Revision,
    *,
    cold: bool,
    wants: Wants = _NO_WANTS,
) -> Iterator[Machine]:
    """The machine of `plan`. Makes the tenant's bridge and rules where they are missing, and if `cold` the data disk.

    A woken guest has its disk's content in memory, so for it a missing disk is NotFound and never an empty one.
    """
    paths = store.instance_paths(plan.instance)
    paths.make()
    ensure_dir(paths.jail)
    net = plan.network
    if not os.path.exists("/dev/net/tun"):
        raise MissingPrerequisite(
            "this host has no /dev/net/tun", details="No tap can be made.", resolution="modprobe tun"
        )
    with ExitStack() as opened:

        def owned(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        if cold:
            volume.settle(paths.data_disk)
        if cold and not paths.data_disk.exists():
            volume.create(paths.data_disk, plan.data_disk_mib << 20, keys, plan.instance)
        elif cold:
            # Whoever made it may have died before he synced its name, and the guest will rely on it.
            fsync_dir(paths.volumes)
        data = opened.enter_context(volume.attach(paths.data_disk, keys, plan.instance))
        tenant = plan.instance.tenant
        secrets = secrets_store.load(store.tenant_dir(tenant) / secrets_store.STORE_NAME, keys, tenant)
        try:
            secrets_fd = owned(secrets_disk.build(secrets))
        finally:
            secrets_store.wipe_all(secrets)
        with store.network_lock(tenant):
            network.ensure_bridge(network.BridgeSpec(net.bridge, net.gateway, net.prefix))
            net_policy.ensure(store, plan)
            tap = namespace = None
            if wants.tap_by_name:
                namespace = owned(private_tap.open_private_tap(net.tap, plan.uid, net.bridge))
            else:
                tap = owned(network.open_tap(net.tap, plan.uid, net.bridge))
        folder = store.revisions_dir / plan.revision
        config = _final_config(paths, plan, folder, wants)
        yield Machine(
            name=plan.instance.vm_name,
            vcpus=plan.vcpus,
            mem_mib=plan.mem_mib,
            kernel=folder / KERNEL,
            initrd=folder / INITRD,
            boot_args=str(config["boot-source"]["boot_args"]),
            drives=(
                Drive("rootfs", str(folder / ROOTFS), read_only=True),
                Drive("data", data.path, read_only=False, key_fd=data.key_fd, device=data.device),
                Drive("secrets", f"/proc/self/fd/{secrets_fd}", read_only=True),
            ),
            nic=Nic(net.mac, tap, net.tap, namespace),
            uid=plan.uid,
            gid=plan.gid,
            runtime=paths.runtime,
            artifact_hashes=tuple(sorted(revision.sha256.items())),
            jail=paths.jail,
            config=config,
            seccomp=plan.seccomp,
        )


def _final_config(paths: InstancePaths, plan: InstancePlan, folder: Path, wants: Wants) -> dict[str, Any]:
    """Write `fc.final.json` (the base configuration of the flake with this run's values), and return it.

    Every VMM boots from this one document, so what it says is what ran. Its paths are as the VMM sees them.
    """
    base = json.loads(read_bounded(folder / FC_BASE, FC_CONFIG_BYTES))
    config = overlay_fc_config(
        base,
        plan,
        wants.paths
        or FcPaths(
            kernel=str(folder / KERNEL),
            initrd=str(folder / INITRD),
            rootfs=str(folder / ROOTFS),
            data=str(paths.data_disk),
            secrets="secrets",
            vsock=str(paths.runtime / "vsock.sock"),
            log=str(paths.vmm_log),
            metrics=str(paths.metrics / "vmm.json"),
        ),
    )
    write_atomic(paths.fc_config, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    return config
