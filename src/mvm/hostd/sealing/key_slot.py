"""The `key` file: the only place where a snapshot's key is stored, wrapped by the tenant's key.

tenant key -> wraps the snapshot key -> opens index, device state and working set; the index holds the data
keys of the segments. So one blob of some hundred bytes decides over a whole image: rotation replaces it
(K4), secure deletion destroys it first (S6), opening unwraps once. It is not covered by the manifest's
digest, or rotation would change what the instance record is bound to; the wrapping binds it instead, to
tenant, instance and snapshot (`wrap_context`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mvm.hostd.sealing import plainfile
from mvm.hostd.sealing.faults import damaged
from mvm.hostd.sealing.layout import (
    HEADER_MAX,
    KEY_BYTES,
    KEY_FILE_MAX,
    KEY_NAME,
    MANIFEST_NAME,
    SnapshotIdentity,
    parse_key_file,
    parse_manifest_header,
    render_key_file,
    wrap_context,
)
from mvm.linux.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mvm.linux.secret import SecretBytes

    Wrap = Callable[[SecretBytes, bytes], bytes]
    """(key, context) -> blob that authenticates the context."""
    Unwrap = Callable[[bytes, bytes], SecretBytes]
    """(blob, context) -> key; IntegrityError if the blob is not of this context and wrapping key."""


def unwrap_snapshot_key(directory: int, identity: SnapshotIdentity, unwrap: Unwrap) -> SecretBytes:
    """The snapshot key; the caller wipes it. What `unwrap` raises for its own reasons passes through."""
    wrapped = parse_key_file(plainfile.read_all(directory, KEY_NAME, KEY_FILE_MAX, "the snapshot's key file"))
    key = unwrap(wrapped, wrap_context(identity.instance, identity.snapshot))
    if len(key) != KEY_BYTES:
        key.wipe()
        raise damaged("the snapshot's wrapped key is not a snapshot key")
    return key


def rewrap(directory: Path, unwrap_old: Unwrap, wrap_new: Wrap) -> None:
    """Put the snapshot key under another tenant key. No other file is written, open images stay valid.

    Atomic and durable: a crash leaves the old blob or the new. The old blob is overwritten afterwards, best
    effort: retiring the old tenant key is what makes it useless.
    """
    handle = plainfile.open_directory(directory)
    try:
        start = plainfile.read_start(handle, MANIFEST_NAME, HEADER_MAX, "the snapshot's manifest")
        identity = parse_manifest_header(start).identity
        context = wrap_context(identity.instance, identity.snapshot)
        with unwrap_snapshot_key(handle, identity, unwrap_old) as key:
            fresh = render_key_file(wrap_new(key, context))
        old = plainfile.open_file(handle, KEY_NAME, "the snapshot's key file", os.O_RDWR)
        try:
            write_atomic(directory / KEY_NAME, fresh)
            os.pwrite(old, bytes(os.fstat(old).st_size), 0)
            os.fsync(old)
        finally:
            os.close(old)
    finally:
        os.close(handle)
