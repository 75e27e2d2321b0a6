"""refresh_secrets: a running guest gets a new version of its secrets.

The content comes over the channel into a fresh tmpfs, which then replaces whatever is mounted on the secrets
directory (the disk from boot, or the tmpfs of an earlier refresh). Between the two mount operations the
directory is empty for a moment: a program that opens a secret just then gets ENOENT and tries again. Files
held open keep the old content. At the next sleep the tmpfs is dropped and the next wake brings a new disk.
"""

from __future__ import annotations

import os

from mvm.guest import mounts, process, proto
from mvm.guest.conn import Connection, Refusal
from mvm.guest.lifecycle import Settings
from mvm.guest.proto import Malformed
from mvm.guest.transfer import CopyIn

_STAGING = "/run/mvm-secrets.new"
_SIZE = "4m"


class RefreshVerb:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._busy: RefreshRequest | None = None

    def __call__(self, conn: Connection, number: int, body: bytes) -> None:
        if body:
            raise Malformed
        if not self._settings.disks:
            raise Refusal(proto.E_UNSUPPORTED, "this agent does not mount anything")
        if self._busy is not None and self._busy.open:
            raise Refusal(proto.E_BUSY, "another refresh is under way")
        mounts.unmount(_STAGING)
        os.makedirs(_STAGING, 0o700, exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"size={_SIZE},mode=0755,noexec,nodev,nosuid", "tmpfs", _STAGING)
        self._busy = RefreshRequest(conn, number, self._settings.secrets_dir)
        conn.requests[number] = self._busy


class RefreshRequest(CopyIn):
    def __init__(self, conn: Connection, number: int, where: str) -> None:
        super().__init__(conn, number, _STAGING.encode())
        self._where = where
        self.open = True

    def completed(self) -> None:
        _mount("-o", "remount,ro,noexec,nodev,nosuid", _STAGING)
        os.makedirs(self._where, exist_ok=True)
        if not mounts.unmount(self._where):
            raise Refusal(proto.E_FAILED, f"{self._where}: cannot be unmounted")
        _mount("--move", _STAGING, self._where)
        self.open = False

    def abort(self) -> None:
        super().abort()
        if self.open:
            self.open = False
            mounts.unmount(_STAGING)


def _mount(*arguments: str) -> None:
    code, output = process.run(["mount", *arguments], 10.0)
    if code:
        raise Refusal(proto.E_FAILED, f"mount exits {code}: {output.decode(errors='replace')[:200]}")
