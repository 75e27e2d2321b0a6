"""How an instance's snapshots are bound to it."""

from __future__ import annotations

from mvm.core.errors import VmmError
from mvm.core.ids import SnapshotId
from mvm.core.snapshot import Fingerprint, SnapshotRef
from mvm.hostd import sealing
from mvm.hostd.operations.context import Context


def identity_of(
    context: Context, snapshot: SnapshotId, fingerprint: Fingerprint | None = None
) -> sealing.SnapshotIdentity:
    """The identity that is authenticated with every byte: instance, snapshot, and what it can run on.

    `fingerprint`: of this host for the instance; by default the one the running VM was started with.
    """
    found = fingerprint if fingerprint is not None else context.record.fingerprint
    if found is None:
        raise VmmError(f"{context.id} has no VM whose fingerprint is known")
    return sealing.SnapshotIdentity(context.id, snapshot, sealing.render_fingerprint(found.parts()))


def open_latest(
    context: Context, ref: SnapshotRef, fingerprint: Fingerprint | None = None
) -> sealing.SealedImage:
    """The snapshot that the record names. IntegrityError if what lies there is anything else or damaged."""
    with context.keys.tenant_key(context.id.tenant) as key:
        return sealing.SealedImage.open(
            context.paths.latest, identity_of(context, ref.id, fingerprint), key.unwrap, ref.manifest_sha256
        )
