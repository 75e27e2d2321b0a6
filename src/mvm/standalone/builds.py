"""Builds, pins, roll-backs and the collection of revisions nobody can go back to.

A revision is kept while a tenant's history lists it (the last `limits.REVISIONS_LISTED` of each tenant) or an
instance was last started from it. Importing and adopting happen under a shared lock, collecting under an
exclusive one, so that nothing is collected between being imported and being listed.

A roll-back moves what the next cold start uses. A snapshot belongs to the revision it was taken of: waking
always goes on with that one, so a sleeping instance keeps its memory whatever is current.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mvm.core import codec, limits
from mvm.core import history as histories
from mvm.core.errors import Busy, InvalidInput, MvmError, NotFound
from mvm.core.history import Adopted, History, Pin
from mvm.core.ids import RevisionId, TenantId
from mvm.hostd.store import LOCK_WAIT_S
from mvm.linux.files import locked

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mvm.standalone.facade import Standalone
    from mvm.standalone.ports import Built, LineSink, StepSink


class BuildResult(msgspec.Struct, frozen=True):
    """`changed`: the tenant's current revision is another one than before. `collected`: revisions deleted
    because nothing refers to them any more."""

    built: Built
    changed: bool
    collected: tuple[RevisionId, ...]


def build(node: Standalone, tenant: TenantId, *, on_line: LineSink, on_step: StepSink) -> BuildResult:
    spec = node.store.load_spec(tenant)
    with node.journal.entry("tenant.build", tenant) as note:
        pinned = node.store.load_history(tenant).pinned
        flake_ref = pinned.flake_ref if pinned is not None else spec.flake_ref
        note.add(flake_ref=flake_ref)
        with _revisions(node, shared=True):
            built = node.workshop.build(
                flake_ref, spec.profile.value, pinned.lock_sha256 if pinned else None,
                on_line=on_line, on_step=on_step,
            )  # fmt: skip
            entry = codec.checked(
                Adopted(
                    revision=built.revision,
                    flake_ref=built.flake_ref,
                    lock_sha256=built.lock_sha256,
                    adopted_ns=node.clock(),
                ),
                what="the build's record",
            )
            with node.store.tenant_lock(tenant):
                # Gone in the meantime: the build must not bring a destroyed tenant's files back.
                node.store.load_spec(tenant)
                before = node.store.load_history(tenant)
                if before.current != built.revision:
                    node.store.save_history(histories.adopt(before, entry))
        note.add(
            revision=built.revision,
            flake_ref=built.flake_ref,
            lock_hash=built.lock_sha256,
            store_paths=built.store_paths,
            artifacts=built.artifacts,
        )
        return BuildResult(built, before.current != built.revision, tuple(collect_quietly(node)))


def pin(node: Standalone, tenant: TenantId, flake_ref: str | None, lock_sha256: str | None) -> History:
    node.store.load_spec(tenant)
    with node.journal.entry("tenant.pin", tenant) as note:
        wanted = None
        if flake_ref is not None:
            wanted = _checked_pin(flake_ref, lock_sha256)
            note.add(flake_ref=flake_ref)
        with node.store.tenant_lock(tenant):
            before = node.store.load_history(tenant)
            after = histories.pin(before, wanted)
            note.skip = after == before
            if not note.skip:
                node.store.save_history(after)
        return after


def _checked_pin(flake_ref: str, lock_sha256: str | None) -> Pin:
    try:
        return msgspec.convert({"flake_ref": flake_ref, "lock_sha256": lock_sha256}, Pin, strict=True)
    except msgspec.ValidationError as error:
        lock = "lock_sha256" in str(error)
        raise InvalidInput(
            "the lock hash is not a sha256" if lock else "the flake reference is not valid",
            details=f"It is {limits.SHA256_HEX} lower-case hexadecimal digits, of the file flake.lock."
            if lock
            else f"It has 1 to {limits.FLAKE_REF_MAX} printable ASCII characters, no spaces, no hyphen first.",
            resolution="Compute it with: sha256sum flake.lock"
            if lock
            else "Use, for example: github:owner/name",
        ) from error


def rollback(
    node: Standalone, tenant: TenantId, *, revision: str | None, steps: int | None
) -> tuple[Adopted, bool]:
    node.store.load_spec(tenant)
    with node.journal.entry("tenant.rollback", tenant) as note:
        # Keeps the collector from deleting what is about to become current.
        with _revisions(node, shared=True), node.store.tenant_lock(tenant):
            before = node.store.load_history(tenant)
            after = histories.rollback(before, steps=steps, revision=revision)
            entry = after.current_entry()
            if not (node.store.revisions_dir / entry.revision).is_dir():
                raise NotFound(
                    f"revision {entry.revision[:12]} is no longer on this machine",
                    details=f"It was built from {entry.flake_ref}.",
                    resolution=f"Build it again: mvm tenant pin {tenant} --flake {entry.flake_ref} "
                    f"--lock {entry.lock_sha256} && mvm tenant build {tenant}",
                )
            note.skip = after == before
            if not note.skip:
                node.store.save_history(after)
        note.add(revision=entry.revision, flake_ref=entry.flake_ref, lock_hash=entry.lock_sha256)
        return entry, not note.skip


def collect(node: Standalone) -> list[RevisionId]:
    """Delete revisions that nothing refers to; none while a build is under way, whose result nothing refers to
    yet."""
    try:
        with _revisions(node, shared=False):
            return node.workshop.collect(_referenced(node))
    except Busy:
        return []


def _referenced(node: Standalone) -> set[RevisionId]:
    """Raises if any tenant's documents cannot be read: what is not known to be unused is kept."""
    used: set[RevisionId] = set()
    for tenant in node.store.tenants():
        used.update(entry.revision for entry in node.store.load_history(tenant).entries)
        for instance in node.store.instances(tenant):
            revision = node.store.load_record(instance).revision
            if revision is not None:
                used.add(revision)
    return used


def _revisions(node: Standalone, *, shared: bool) -> AbstractContextManager[int]:
    # Builds hold it for minutes, together; a collector does not wait for them.
    return locked(node.store.root / "revisions.lock", wait=LOCK_WAIT_S if shared else 0.0, shared=shared)


def collect_quietly(node: Standalone) -> list[RevisionId]:
    """`collect`, where a failure to tidy up must not undo what succeeded before it."""
    try:
        return collect(node)
    except MvmError:
        return []
