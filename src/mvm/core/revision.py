"""A revision: one finished build, named by its content.

The id is the sha256 of the canonical JSON of (profile, lock_hash, store_paths, sha256): what was built and from which
pinned inputs. Where the flake lay (`flake_ref`) is recorded and is not part of the id, so the same build from
a checkout, a copy or an installed wheel is one revision. A document whose id does not follow from its
content is refused.

docs/formats/revision.md describes the directory; its files are named here.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mvm.core import codec, limits
from mvm.core.errors import IntegrityError
from mvm.core.ids import RevisionId

KERNEL: Final = "vmlinux"
INITRD: Final = "initrd"
ROOTFS: Final = "rootfs.ext4"
FC_BASE: Final = "fc-base.json"
DOCUMENT: Final = "revision.json"

FILES: Final = {"kernel": KERNEL, "initrd": INITRD, "rootfs": ROOTFS, "fc-base": FC_BASE}
"""Artifact name, as audit records and snapshots call it -> file name in the revision's directory."""

REVISION_BYTES: Final = 64 * 1024

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Text = Annotated[str, Meta(min_length=1, max_length=limits.FLAKE_REF_MAX)]


class Revision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`lock_hash`: sha256 of flake.lock. `store_paths`: the nix outputs, sorted. `sha256`: by artifact name."""

    id: RevisionId
    flake_ref: Text
    profile: Text
    lock_hash: Sha256
    store_paths: Annotated[tuple[Text, ...], Meta(max_length=16)]
    sha256: dict[str, Sha256]


def make_revision(
    *, flake_ref: str, profile: str, lock_hash: str, store_paths: tuple[str, ...], sha256: dict[str, str]
) -> Revision:
    """The revision of a build. Raises InvalidInput if a value is not of its form."""
    paths, hashes = tuple(sorted(store_paths)), dict(sorted(sha256.items()))
    revision = Revision(
        id=_id(profile, lock_hash, paths, hashes), flake_ref=flake_ref, profile=profile, lock_hash=lock_hash,
        store_paths=paths, sha256=hashes,
    )  # fmt: skip
    return codec.checked(revision, what="the revision")


def encode_revision(revision: Revision) -> bytes:
    return codec.encode(revision)


def decode_revision(untrusted: bytes) -> Revision:
    """Raises InvalidInput for a malformed document, IntegrityError for one that does not match its own id."""
    revision = codec.decode(
        untrusted,
        Revision,
        limit=REVISION_BYTES,
        what="revision.json",
        resolution="Build the revision again.",
    )
    complete = set(revision.sha256) == set(FILES)
    expected = _id(revision.profile, revision.lock_hash, revision.store_paths, revision.sha256)
    if not complete or revision.id != expected:
        raise IntegrityError(
            f"the document of revision {revision.id[:12]} was altered",
            details=f"its content has the id {expected}" if complete else "it does not list every artifact",
            resolution="Build the revision again.",
        )
    return revision


def _id(profile: str, lock_hash: str, store_paths: tuple[str, ...], sha256: dict[str, str]) -> RevisionId:
    content = {"profile": profile, "lock_hash": lock_hash, "store_paths": store_paths, "sha256": sha256}
    return RevisionId(hashlib.sha256(codec.encode_line(content)).hexdigest())
