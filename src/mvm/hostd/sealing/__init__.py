"""Sealed memory: a sleeping guest's RAM and device state, encrypted as they are written.

Runs as: root, in hostd. Talks to: the files of one snapshot directory, and the tenant's key through `wrap`
and `unwrap`. May never: let plain text reach a file, or hand out bytes that are not authentic and of this
snapshot.

    layout.py       headers, sizes, limits          chunks.py       dirty pages -> layers
    index.py        which layers make a chunk       compaction.py   which old segments to rewrite
    records.py      compress and encrypt            directory.py    commit, recover, destroy
    writer.py       SealWriter                      key_slot.py     the wrapped key, rotation
    reader.py       SealedImage                     working_set.py  what the last wake touched
"""

from mvm.hostd.sealing.directory import bytes_on_disk, commit, destroy, recover
from mvm.hostd.sealing.faults import FingerprintMismatch
from mvm.hostd.sealing.key_slot import rewrap
from mvm.hostd.sealing.layout import CHUNK, PAGE, SnapshotIdentity, render_fingerprint
from mvm.hostd.sealing.reader import SealedImage, peek
from mvm.hostd.sealing.source import MemorySource
from mvm.hostd.sealing.working_set import load_working_set, runs_of, save_working_set
from mvm.hostd.sealing.writer import SealedInfo, SealWriter

__all__ = [
    "CHUNK",
    "PAGE",
    "FingerprintMismatch",
    "MemorySource",
    "SealWriter",
    "SealedImage",
    "SealedInfo",
    "SnapshotIdentity",
    "bytes_on_disk",
    "commit",
    "destroy",
    "load_working_set",
    "peek",
    "recover",
    "render_fingerprint",
    "rewrap",
    "runs_of",
    "save_working_set",
]
