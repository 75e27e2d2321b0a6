"""The development key provider: tenant keys as files beside the data they protect.

    <root>/keys/development/<tenant>/<version, 10 digits>.key    32 random bytes, 0600, root's
    <root>/keys/development/lock                                 held by whoever changes anything

It protects a tenant's files from other tenants and from mix-ups, and makes deletion of one key file the
deletion of what it wrapped. It protects nothing from who reads the disk: keys and data lie side by side.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from mvm.core.errors import Conflict, IntegrityError, NotFound, Refused
from mvm.core.ids import TenantId
from mvm.hostd.keys import KEY_SIZE, MAX_VERSION, LocalTenantKey
from mvm.linux import files
from mvm.linux.secret import SecretBytes

if TYPE_CHECKING:
    from pathlib import Path

_KEY_FILE = re.compile(r"([0-9]{10})\.key", re.ASCII)
_LOCK_WAIT_S = 10.0

WARNING = (
    "development key provider: tenant keys lie unencrypted beside the data. "
    "They protect nothing against anybody who can read this disk."
)


class DevelopmentKeyProvider:
    """Implements KeyProvider over a directory below `root` (the state directory)."""

    name = "development"
    warning = WARNING

    def __init__(self, root: Path) -> None:
        self._folder = root / "keys" / "development"

    def describe(self) -> str:
        return f"WARNING: {WARNING}\nkeys: {self._folder}"

    def versions(self, tenant: TenantId) -> tuple[int, ...]:
        try:
            names = os.listdir(self._of(tenant))
        except FileNotFoundError:
            return ()
        return tuple(sorted(int(match[1]) for name in names if (match := _KEY_FILE.fullmatch(name))))

    def tenant_key(self, tenant: TenantId, version: int | None = None) -> LocalTenantKey:
        if version is None:
            known = self.versions(tenant)
            if not known:
                raise _no_key(tenant, None)
            version = known[-1]
        return LocalTenantKey(TenantId(tenant), version, self._read(tenant, version))

    def create(self, tenant: TenantId) -> LocalTenantKey:
        files.ensure_dir(self._folder, 0o700)
        with files.locked(self._folder / "lock", wait=_LOCK_WAIT_S):
            if not self.versions(tenant):
                files.ensure_dir(self._of(tenant), 0o700)
                self._make(tenant, 1)
        return self.tenant_key(tenant)

    def rotate(self, tenant: TenantId) -> LocalTenantKey:
        if not self.versions(tenant):
            raise _no_key(tenant, None)
        with files.locked(self._folder / "lock", wait=_LOCK_WAIT_S):
            newest = self.versions(tenant)[-1]
            if newest >= MAX_VERSION:
                raise Conflict(f"tenant {tenant} has used up its key versions")
            self._make(tenant, newest + 1)
        return self.tenant_key(tenant, newest + 1)

    def retire(self, tenant: TenantId, before: int) -> None:
        if not self.versions(tenant):
            return
        with files.locked(self._folder / "lock", wait=_LOCK_WAIT_S):
            for version in self.versions(tenant)[:-1]:
                if version < before:
                    files.wipe(self._file(tenant, version))

    def destroy(self, tenant: TenantId) -> None:
        folder = self._of(tenant)
        if not folder.exists():
            return
        with files.locked(self._folder / "lock", wait=_LOCK_WAIT_S):
            # All files, not only keys: a crash inside write_atomic leaves key bytes under a temporary name.
            for name in os.listdir(folder):
                files.wipe(folder / name)
            os.rmdir(folder)
            files.fsync_dir(self._folder)

    def _of(self, tenant: TenantId) -> Path:
        return self._folder / TenantId(tenant)

    def _file(self, tenant: TenantId, version: int) -> Path:
        return self._of(tenant) / f"{version:010d}.key"

    def _make(self, tenant: TenantId, version: int) -> None:
        with SecretBytes.from_random(KEY_SIZE) as secret:
            files.write_atomic(self._file(tenant, version), secret.view(), 0o600)

    def _read(self, tenant: TenantId, version: int) -> SecretBytes:
        path = self._file(tenant, version)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise _no_key(tenant, version) from None
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise Refused(
                    f"the key file of tenant {tenant} is open to others",
                    details=f"{path}: owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}",
                    resolution=f"find out who changed it, then: chown root {path} && chmod 600 {path}",
                )
            if found.st_size != KEY_SIZE:
                raise IntegrityError(
                    f"the key file of tenant {tenant} is damaged",
                    details=f"{path} has {found.st_size} bytes, not {KEY_SIZE}",
                    resolution="restore it from a backup: without it the tenant's data cannot be read",
                )
            return SecretBytes.from_fd(fd, KEY_SIZE)
        finally:
            os.close(fd)


def _no_key(tenant: TenantId, version: int | None) -> NotFound:
    which = "a key" if version is None else f"key version {version}"
    return NotFound(
        f"tenant {tenant} does not have {which}",
        resolution="its data cannot be read; if the tenant was destroyed, this is as it should be",
    )
