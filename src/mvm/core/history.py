"""The revisions a tenant can go back to: `revisions.json`, one document per tenant.

Entries are in the order in which they were adopted, newest last, each revision once; the last
`limits.REVISIONS_LISTED` stay. One of them is `current`: what the next start uses. Rolling back moves
`current` and leaves the list as it is, so that rolling forward again is the same operation. The current one
is never dropped.

`pinned` is what `mvm tenant pin` asked for: builds use that flake reference (and must give that lock hash,
if there is one) instead of the spec's. Times are nanoseconds since 1970 and come from the caller."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.core import codec, limits
from mvm.core.errors import InvalidInput, NotFound
from mvm.core.ids import RevisionId, TenantId
from mvm.core.snapshot import Nanoseconds, Sha256
from mvm.core.spec import FlakeRef

SCHEMA: Final = 1


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    flake_ref: FlakeRef
    lock_sha256: Sha256 | None = None


class Adopted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    revision: RevisionId
    flake_ref: FlakeRef
    lock_sha256: Sha256
    adopted_ns: Nanoseconds


class History(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: TenantId
    entries: Annotated[tuple[Adopted, ...], Meta(max_length=limits.REVISIONS_LISTED)] = ()
    current: RevisionId | None = None
    pinned: Pin | None = None
    schema: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA

    def current_entry(self) -> Adopted:
        """Raises NotFound if nothing was built yet."""
        for entry in self.entries:
            if entry.revision == self.current:
                return entry
        raise NotFound(
            f"{self.tenant} has no revision",
            details="Nothing was built for it yet.",
            resolution=f"Build it with: mvm tenant build {self.tenant}",
        )


def adopt(history: History, entry: Adopted) -> History:
    """`entry` becomes the newest and the current one; the oldest others go once there are too many."""
    kept = [old for old in history.entries if old.revision != entry.revision]
    entries = (*kept, entry)[-limits.REVISIONS_LISTED :]
    return msgspec.structs.replace(history, entries=entries, current=entry.revision)


def rollback(history: History, *, steps: int | None = None, revision: str | None = None) -> History:
    """Make an older entry current: `steps` back from the current one, or the one whose id starts with
    `revision`.

    Exactly one of the two. Raises NotFound with the list of what there is, InvalidInput for an unclear wish.
    """
    history.current_entry()
    ids = [entry.revision for entry in history.entries]
    listed = ", ".join(found[:12] for found in ids)
    if (steps is None) == (revision is None):
        raise InvalidInput(
            "say either a revision or a number of steps",
            details=f"Revisions, oldest first: {listed}.",
            resolution=f"Use, for example: mvm tenant rollback {history.tenant} --steps 1",
        )
    if steps is not None:
        at = next(n for n, found in enumerate(ids) if found == history.current) - steps
        found = ids[at : at + 1] if steps >= 1 and at >= 0 else []
        wish = f"{steps} steps back"
    else:
        found = [full for full in ids if revision and full.startswith(revision)]
        wish = f"revision {revision!a}"
    if len(found) != 1:
        raise NotFound(
            f"{history.tenant} has no revision {wish}" if not found else f"{wish} is more than one of them",
            details=f"Revisions, oldest first: {listed}; current: {(history.current or '')[:12]}.",
            resolution="Name one of these, with enough of its digits to tell it from the others.",
        )
    return msgspec.structs.replace(history, current=found[0])


def pin(history: History, wanted: Pin | None) -> History:
    """Pin, or with None unpin."""
    return msgspec.structs.replace(history, pinned=wanted)


def encode_history(history: History) -> bytes:
    return codec.encode(history)


def decode_history(untrusted: bytes) -> History:
    """Raises InvalidInput, and nothing else, whatever the bytes."""
    what = "the tenant's revision history"
    history = codec.decode(untrusted, History, limit=limits.REVISIONS_JSON_BYTES, what=what)
    ids = [entry.revision for entry in history.entries]
    problem = ""
    if len(set(ids)) != len(ids):
        problem = "field `entries`: a revision is listed twice"
    elif (history.current is None) != (not ids) or (ids and history.current not in ids):
        problem = "field `current`: it is not one of the entries"
    if problem:
        raise InvalidInput(
            f"{what} is not valid: {problem}",
            details=f"Tenant {history.tenant}.",
            resolution=f"Move the file away and build again: mvm tenant build {history.tenant}",
        )
    return history
