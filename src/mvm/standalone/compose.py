"""The real builder, host, key provider and audit log, put together for this machine. Imports happen at use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvm.core.audit import AuditEntry, Verified
    from mvm.core.ids import TenantId
    from mvm.hostd.keys import KeyProvider
    from mvm.hostd.store import Store
    from mvm.hostd.vmm.choice import Choice
    from mvm.standalone.ports import Host, Workshop

CACHE = Path("/var/cache/mvm")
"""What can be found out again: whether acceleration works here, what nix has evaluated."""


HOSTD_SOCKET = Path("/run/mvm/hostd.sock")


def daemon_socket(root: Path) -> Path | None:
    """Where mvm-hostd listens for this state root, or None: the command then does its work itself.

    $MVM_HOSTD names the socket, or is empty for "no daemon". Without it, the installed daemon's socket is used where it
    is there, for the root that daemon serves.
    """
    from mvm.hostd.store import DEFAULT_ROOT

    named = os.environ.get("MVM_HOSTD")
    if named is not None:
        return Path(named) if named else None
    return HOSTD_SOCKET if root == DEFAULT_ROOT and os.path.exists(HOSTD_SOCKET) else None


def key_provider(root: Path) -> KeyProvider:
    """The development provider: the others need a coordinator or a vault."""
    from mvm.hostd.keys.development import DevelopmentKeyProvider

    return DevelopmentKeyProvider(root)


def host(store: Store, keys: KeyProvider) -> Host:
    """The daemon if there is one, else this process with the VMMs of this host (`drivers`)."""
    path = daemon_socket(store.root)
    if path is not None:
        from mvm.standalone.remote import SocketHost

        return SocketHost(path)
    from mvm.hostd.host import Host as RealHost

    return RealHost(store, keys, drivers())


def drivers() -> Choice:
    """As hostd's settings say, where there are any, and the environment over them: $MVM_VMM (auto, firecracker, qemu)
    and $MVM_FIRECRACKER, the directory of its programs."""
    import msgspec

    from mvm.hostd import settings
    from mvm.hostd.vmm.choice import VmmSettings, choose

    try:
        chosen = settings.load(settings.FILE).vmm
    except PermissionError:
        chosen = VmmSettings()  # whoever may not read them cannot start anything either
    given = {
        "driver": os.environ.get("MVM_VMM") or chosen.driver,
        "directory": os.environ.get("MVM_FIRECRACKER") or chosen.directory,
    }
    return choose(msgspec.convert({**msgspec.structs.asdict(chosen), **given}, VmmSettings), CACHE)


def workshop(store: Store) -> Workshop:
    from mvm.standalone.host_workshop import HostWorkshop

    return HostWorkshop(store.root, CACHE)


class FileAuditLog:
    """`tenants/<tenant>/audit.log`, by `mvm.hostd.resources.audit`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def append(self, entry: AuditEntry) -> None:
        from mvm.hostd.resources import audit

        audit.append(self._path(entry.tenant), entry)

    def verify(self, tenant: TenantId) -> Verified:
        from mvm.hostd.resources import audit

        return audit.verify(self._path(tenant), tenant)

    def _path(self, tenant: TenantId) -> Path:
        from mvm.hostd.resources import audit

        return self._store.tenant_dir(tenant) / audit.LOG_NAME
