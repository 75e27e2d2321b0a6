"""What `mvm node info` shows: the machine, the VMM and why that one, the network in use, what is free, what runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mvm.core.addressing import bridge_name, subnet
from mvm.core.errors import InvalidInput, MvmError, NotFound
from mvm.core.ids import RevisionId
from mvm.core.revision import DOCUMENT, INITRD, KERNEL, REVISION_BYTES, decode_revision
from mvm.hostd.inspect.doctor import Acceleration
from mvm.hostd.inspect.host import HostFacts, read_host
from mvm.hostd.inspect.tools import NftFacts, Tool, read_nft, read_tools
from mvm.linux.files import read_bounded

if TYPE_CHECKING:
    from mvm.core.ids import TenantId
    from mvm.hostd.keys import KeyProvider
    from mvm.hostd.store import Store
    from mvm.hostd.vmm.choice import Choice
    from mvm.hostd.vmm.driver import Driver
    from mvm.hostd.vmm.qemu.driver import QemuDriver

NOT_PROBED = "not probed yet: that happens at the first run, or with: mvm node info --probe"
_UNREADABLE = "only root can see this"


class Vmm(msgspec.Struct, frozen=True):
    """`snapshot`: whether a VM can sleep; `incremental`: whether its next sleep then writes only what changed (None
    until the driver knows what it runs on). `accel`: `kvm`, `tcg`, or "" where no kernel was probed yet; `reason`: why.
    """

    driver: str
    why: str
    version: str
    accel: str
    reason: str
    snapshot: bool
    incremental: bool | None


class TenantNetwork(msgspec.Struct, frozen=True):
    """`up`: whether the bridge is there now; it exists only while an instance of the tenant runs."""

    tenant: str
    bridge: str
    subnet: str
    up: bool


class NodeInfo(msgspec.Struct, frozen=True):
    """`node_id`: "" until the node has one; `unseen`: what could not be read, and why."""

    node_id: str
    root: str
    host: HostFacts
    tools: dict[str, Tool]
    nft: NftFacts
    vmm: Vmm
    key_provider: str
    key_warning: str
    networks: tuple[TenantNetwork, ...]
    instances: dict[str, int]
    unseen: tuple[str, ...]


def read_node(
    store: Store,
    keys: KeyProvider,
    driver: QemuDriver,
    cache: Path,
    *,
    probe: bool,
    choice: Choice | None = None,
) -> NodeInfo:
    """Everything. `choice`: the drivers of this host, if it may have others than QEMU. `probe`: boot the newest
    revision's kernel, at most 15 s a driver, if the answer is not known yet; this needs root and writes the answer to
    `cache`, and is the only thing here that changes anything."""
    unseen: list[str] = []
    tools = read_tools()
    accel = acceleration(store, tools, cache, driver if probe else None)
    vmm, why = _chosen(store, choice, probe)
    networks, instances = _tenants(store, unseen)
    node_id = _node_id(store, unseen)
    return NodeInfo(
        node_id=node_id,
        root=str(store.root),
        host=read_host(store.root),
        tools=tools,
        nft=read_nft(),
        vmm=vmm or _vmm(store, driver, tools, accel, why),
        key_provider=keys.name,
        key_warning=keys.warning,
        networks=tuple(networks),
        instances=instances,
        unseen=tuple(unseen),
    )


def acceleration(
    store: Store, tools: dict[str, Tool], cache: Path, prober: QemuDriver | None = None
) -> Acceleration:
    """What is known of the newest revision's kernel; with `prober`, found out now if it is not."""
    from mvm.hostd.vmm.qemu.driver import QEMU, parse_version
    from mvm.hostd.vmm.qemu.probe import known_acceleration
    from mvm.linux.process import run

    if not tools[QEMU].path:
        return Acceleration("", f"{QEMU} is not installed")
    newest = newest_revision(store)
    if newest is None:
        if prober is not None:
            raise NotFound(
                "there is no guest kernel to probe with",
                details=f"No revision below {store.revisions_dir}.",
                resolution="Build one first: mvm tenant build TENANT",
            )
        return Acceleration("", "no guest was built here yet" if os.geteuid() == 0 else _UNREADABLE)
    kernel, initrd = (store.revisions_dir / newest / name for name in (KERNEL, INITRD))
    if prober is not None:
        found = prober.acceleration(kernel, initrd)
        return Acceleration(found.accel, found.reason)
    try:
        # As the driver names it, distribution's build included: the cached answer is for exactly that one.
        version = parse_version(run([tools[QEMU].path, "--version"], timeout=10).stdout.decode())
        known = known_acceleration(version, kernel, cache)
    except (MvmError, OSError) as error:
        return Acceleration("", f"not known: {error}")
    if known is None:
        return Acceleration("", NOT_PROBED if os.geteuid() == 0 else _UNREADABLE)
    return Acceleration(known.accel, known.reason)


def newest_revision(store: Store) -> RevisionId | None:
    """The revision that was stored last, None if there is none or we may not look."""
    try:
        with os.scandir(store.revisions_dir) as entries:
            dated = sorted(((entry.stat().st_mtime_ns, entry.name) for entry in entries), reverse=True)
    except OSError:
        return None
    for _, name in dated:
        try:
            raw = read_bounded(store.revisions_dir / name / DOCUMENT, REVISION_BYTES)
            return decode_revision(raw).id
        except (OSError, MvmError):
            continue  # an unfinished build, or no revision at all
    return None


def _vmm(store: Store, driver: QemuDriver, tools: dict[str, Tool], accel: Acceleration, why: str) -> Vmm:
    tool = tools["qemu-system-x86_64"]
    incremental = None
    newest = newest_revision(store)
    if accel.accel and newest is not None:
        folder = store.revisions_dir / newest
        try:
            incremental = driver.capabilities(folder / KERNEL, folder / INITRD).incremental
        except (MvmError, OSError):
            incremental = None
    return Vmm(driver.name, why, tool.version, accel.accel, accel.reason, bool(tool.path), incremental)


def _chosen(store: Store, choice: Choice | None, probe: bool) -> tuple[Vmm | None, str]:
    """What a start would use now and why, the former None if that is QEMU.

    With `probe`, found out by booting the newest revision's kernel with Firecracker, where that is installed.
    """
    if choice is None:
        return None, "the only driver asked for"
    newest = newest_revision(store)
    folder = None if newest is None else store.revisions_dir / newest
    if probe and folder is not None:
        found: tuple[Driver, str] | None = choice.for_start(folder / KERNEL, folder / INITRD)
    else:
        found = choice.known(None if folder is None else folder / KERNEL)
    if found is None:
        version = choice.named("firecracker").version()
        return Vmm(
            "firecracker", "if a guest boots with it, else QEMU", version, "", NOT_PROBED, True, None
        ), ""
    driver, why = found
    if driver.name != "firecracker":
        return None, why
    try:
        return Vmm(driver.name, why, driver.version(), "kvm", why, True, True), why
    except MvmError as error:
        return Vmm(driver.name, why, "", "", error.brief, False, None), why


def _node_id(store: Store, unseen: list[str]) -> str:
    # Not Store.node_id, which makes one.
    try:
        return read_bounded(store.root / "node-id", 64).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""
    except (OSError, InvalidInput):
        unseen.append(f"node id: {_UNREADABLE}")
        return ""


def _tenants(store: Store, unseen: list[str]) -> tuple[list[TenantNetwork], dict[str, int]]:
    networks: list[TenantNetwork] = []
    counts: dict[str, int] = {}
    try:
        os.listdir(store.tenants_dir)
    except FileNotFoundError:
        return networks, counts
    except OSError:
        unseen.append(f"tenants, networks and instances: {_UNREADABLE}")
        return networks, counts
    allocations, links = store.load_allocations(), link_names()
    for tenant in store.tenants():
        _count(store, tenant, counts)
        try:
            index = allocations.index_of(tenant)
        except MvmError:
            continue  # created, and never given a network
        name = bridge_name(index)
        networks.append(TenantNetwork(tenant, name, subnet(index), name in links))
    return networks, counts


def link_names() -> frozenset[str]:
    """Every link of this thread's network namespace; /sys would show that of whoever mounted it."""
    with open("/proc/thread-self/net/dev", encoding="ascii", errors="replace") as file:
        return frozenset(
            line.partition(":")[0].strip() for line in file.read().split("\n")[2:] if ":" in line
        )


def _count(store: Store, tenant: TenantId, counts: dict[str, int]) -> None:
    """Add the tenant's instances, as recorded."""
    for instance in store.instances(tenant):
        try:
            state = store.load_record(instance).state.value
        except MvmError:
            state = "unreadable"
        counts[state] = counts.get(state, 0) + 1
