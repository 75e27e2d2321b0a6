"""A tenant's secrets: set, and rotated into guests that run.

`set` replaces what is stored; a guest sees it at its next run or wake. `rotate` encrypts it anew under a fresh
data key and hands it to every running guest at once. Values are in wiped memory; names and numbers are all
that is reported or logged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mvm.core.errors import InvalidInput, MvmError, NotFound
from mvm.core.ids import InstanceId, TenantId
from mvm.core.lifecycle import State
from mvm.hostd.resources import secrets_store
from mvm.wire.hostd_api import Purpose

if TYPE_CHECKING:
    from mvm.linux.secret import SecretBytes
    from mvm.standalone.facade import Standalone


class SecretsResult(msgspec.Struct, frozen=True):
    """`refreshed`: running guests that have the new version. `failed`: those that could not be given it, with
    the reason; they get it at their next run or wake."""

    version: int
    names: tuple[str, ...]
    refreshed: tuple[InstanceId, ...] = ()
    failed: tuple[tuple[InstanceId, str], ...] = ()


def set_from(node: Standalone, tenant: TenantId, source: Path) -> SecretsResult:
    node.store.load_spec(tenant)
    with node.journal.entry("secrets.set", tenant) as note:
        secrets = _read(source)
        try:
            result = _save(node, tenant, secrets)
        finally:
            secrets_store.wipe_all(secrets)
        note.add(detail=f"version {result.version}: {', '.join(result.names)}"[:1000])
        return result


def rotate(node: Standalone, tenant: TenantId, source: Path | None) -> SecretsResult:
    node.store.load_spec(tenant)
    path = node.store.tenant_dir(tenant) / secrets_store.STORE_NAME
    with node.journal.entry("secrets.rotate", tenant) as note:
        if source is not None:
            secrets = _read(source)
        elif not path.exists():
            raise NotFound(
                f"{tenant} has no secrets",
                details="There is nothing to rotate.",
                resolution=f"Set some with: mvm tenant secrets set {tenant} --from-file FILE",
            )
        else:
            secrets = secrets_store.load(path, node.keys, tenant)
        try:
            result = _save(node, tenant, secrets)
            refreshed, failed = _refresh(node, tenant, secrets)
        finally:
            secrets_store.wipe_all(secrets)
        note.add(detail=f"version {result.version}; {len(refreshed)} guests refreshed, {len(failed)} not")
        return msgspec.structs.replace(result, refreshed=tuple(refreshed), failed=tuple(failed))


def _read(source: Path) -> dict[str, SecretBytes]:
    try:
        return secrets_store.read_source(source)
    except FileNotFoundError:
        raise InvalidInput(
            f"{source} does not exist",
            details="Secrets are read from a directory, a JSON object, or a file of NAME=value lines.",
            resolution="Name a file or directory that is there.",
        ) from None


def _save(node: Standalone, tenant: TenantId, secrets: dict[str, SecretBytes]) -> SecretsResult:
    with node.store.tenant_lock(tenant):
        node.store.load_spec(tenant)
        path = node.store.tenant_dir(tenant) / secrets_store.STORE_NAME
        version = secrets_store.save(path, node.keys, tenant, secrets)
    return SecretsResult(version, tuple(sorted(secrets)))


def _refresh(
    node: Standalone, tenant: TenantId, secrets: dict[str, SecretBytes]
) -> tuple[list[InstanceId], list[tuple[InstanceId, str]]]:
    refreshed: list[InstanceId] = []
    failed: list[tuple[InstanceId, str]] = []
    for instance in node.store.instances(tenant):
        if node.store.load_record(instance).state is not State.RUNNING:
            continue
        views = {name: value.view() for name, value in secrets.items()}
        try:
            with node.host.channel(instance, Purpose.SECRETS) as channel:
                channel.refresh_secrets(views)
            refreshed.append(instance)
        except MvmError as error:
            failed.append((instance, error.brief))
        finally:
            for view in views.values():
                view.release()
    return refreshed, failed
