"""The revisions kept on this machine: `<root>/revisions/<id>/`, see docs/formats/revision.md.

A revision appears whole or not at all: it is assembled in `.new-*`, synced, then renamed to its id. Files are 0444 and
never written again, so they may share their blocks with the nix store. Importing what is there already
changes only the directory's time stamp, which "the last N" goes by. A deletion starts by renaming to `.del-*`.
Callers serialise `collect` against `import_artifacts`: an import that nobody refers to yet looks unused.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mvm.core.errors import IntegrityError, NotFound
from mvm.core.ids import RevisionId
from mvm.core.revision import (
    DOCUMENT,
    FILES,
    REVISION_BYTES,
    Revision,
    decode_revision,
    encode_revision,
    make_revision,
)
from mvm.linux.files import ensure_dir, fsync_dir, raise_if_full, read_bounded, remove_tree, write_atomic

if TYPE_CHECKING:
    from collections.abc import Collection

    from mvm.builder.model import Artifacts

_FICLONE = 0x40049409  # _IOW(0x94, 9, int)
_SCRATCH = (".new-", ".del-")
_Ids = list[RevisionId]  # inside the class, `list` is its method
_Revisions = list[Revision]


class Imported(NamedTuple):
    """`reused`: the revision was on this machine before."""

    revision: Revision
    reused: bool


class RevisionStore:
    """`root`: mvm's state directory."""

    def __init__(self, root: Path) -> None:
        self._dir = root / "revisions"

    def directory(self, revision: RevisionId) -> Path:
        return self._dir / revision

    def import_artifacts(self, artifacts: Artifacts) -> Imported:
        """Keep a finished build. Raises ResourceExhausted if the disk is full, leaving nothing behind."""
        sources = {
            "kernel": artifacts.kernel, "initrd": artifacts.initrd, "rootfs": artifacts.rootfs,
            "fc-base": artifacts.fc_base,
        }  # fmt: skip
        revision = make_revision(
            flake_ref=artifacts.flake_ref,
            profile=artifacts.profile,
            lock_hash=artifacts.lock_hash,
            store_paths=artifacts.store_paths,
            sha256={name: _sha256(path) for name, path in sources.items()},
        )
        target = self.directory(revision.id)
        if target.is_dir():
            os.utime(target)
            return Imported(self.load(revision.id), True)
        ensure_dir(self._dir, 0o755)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=self._dir))
        try:
            for name, path in sources.items():
                _place(path, work / FILES[name])
                # Hashed again: this is what will be booted, whatever happened to the source meanwhile.
                if _sha256(work / FILES[name]) != revision.sha256[name]:
                    raise IntegrityError(f"{path} changed while it was copied", resolution="build again")
            write_atomic(work / DOCUMENT, encode_revision(revision), mode=0o444)
            work.chmod(0o755)
            fsync_dir(work)
            try:
                work.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return Imported(self.load(revision.id), True)  # another import was faster
            fsync_dir(self._dir)
        except OSError as error:
            raise_if_full(error, self._dir)
            raise
        finally:
            if work.is_dir():
                remove_tree(work)
        return Imported(revision, False)

    def load(self, revision: RevisionId) -> Revision:
        """Raises NotFound, or IntegrityError for a document that is not the one of this id."""
        path = self.directory(revision) / DOCUMENT
        try:
            found = decode_revision(read_bounded(path, REVISION_BYTES))
        except FileNotFoundError:
            raise NotFound(
                f"revision {revision[:12]} is not on this machine",
                details=f"{path} does not exist",
                resolution="build it again: mvm tenant build",
            ) from None
        if found.id != revision:
            raise IntegrityError(
                f"{path} belongs to another revision",
                details=f"it says {found.id}",
                resolution="build the revision again",
            )
        return found

    def list(self) -> _Revisions:
        """All of them, the longest unused first."""
        return [self.load(revision) for revision in self._ids()]

    def verify(self, revision: RevisionId) -> Revision:
        """Read every artifact and compare. Raises IntegrityError naming the first that differs."""
        found = self.load(revision)
        for name, file in FILES.items():
            path = self.directory(revision) / file
            got = _sha256(path) if path.is_file() else "missing"
            if got != found.sha256[name]:
                raise IntegrityError(
                    f"{file} of revision {revision[:12]} is damaged",
                    details=f"sha256 expected {found.sha256[name]}, found {got}",
                    resolution=f"remove {path.parent} and build again",
                )
        return found

    def collect(self, keep: Collection[RevisionId], keep_last: int = 0) -> _Ids:
        """Delete all but `keep` and the `keep_last` most recently imported; returns what was deleted."""
        if not self._dir.is_dir():
            return []
        for path in sorted(self._dir.iterdir()):
            if path.name.startswith(_SCRATCH):
                remove_tree(path)
        order = self._ids()
        kept = set(keep) | set(order[len(order) - min(keep_last, len(order)) :])
        deleted = [revision for revision in order if revision not in kept]
        for revision in deleted:
            doomed = self._dir / f".del-{revision}"
            self.directory(revision).rename(doomed)
            remove_tree(doomed)
        if deleted:
            fsync_dir(self._dir)
        return deleted

    def _ids(self) -> _Ids:
        if not self._dir.is_dir():
            return []
        folders = [path for path in self._dir.iterdir() if path.is_dir() and not path.name.startswith(".")]
        folders.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [RevisionId(path.name) for path in folders]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(source: Path, target: Path) -> None:
    """`target` with the content of `source`, on disk: shared blocks, else a hard link, else a copy."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with source.open("rb") as file:
            try:
                fcntl.ioctl(fd, _FICLONE, file.fileno())
            except OSError:
                if _link(source, target):
                    return
                with open(fd, "wb", closefd=False) as copy:
                    shutil.copyfileobj(file, copy, 1 << 20)
        os.fchmod(fd, 0o444)
        os.fsync(fd)
    finally:
        os.close(fd)


def _link(source: Path, target: Path) -> bool:
    """Replace the empty `target` by a hard link, if `source` is as immutable as nix makes it."""
    if source.stat().st_mode & 0o222 or source.stat().st_uid != 0 or source.is_symlink():
        return False
    spare = target.with_name(target.name + ".link")
    try:
        os.link(source, spare)
    except OSError:  # other file system, or too many links
        return False
    spare.rename(target)
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return True
