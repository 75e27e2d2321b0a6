"""Guest memory in a bytearray, a tenant's key, and one call that puts a guest to sleep."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mvm.core.ids import InstanceId, SnapshotId
from mvm.hostd.keys import LocalTenantKey
from mvm.hostd.sealing import PAGE, SealedImage, SealedInfo, SealWriter, SnapshotIdentity, render_fingerprint
from mvm.linux.secret import SecretBytes

INSTANCE = InstanceId.parse("acme/default-0")
FINGERPRINT = render_fingerprint({"vmm": "qemu 7.2", "cpu": "EPYC", "kernel": "ab" * 32})
STATE = b"PLAINTEXT-MARKER device state " * 200
MARKER = b"PLAINTEXT-MARKER"


def tenant_key(version: int = 1, tenant: str = "acme", fill: int = 7) -> LocalTenantKey:
    secret = SecretBytes.copy_of(bytes([fill + version]) * 32)
    return LocalTenantKey(InstanceId(tenant, "default", 0).tenant, version, secret)


KEY = tenant_key()


def identity(instance: InstanceId = INSTANCE, fingerprint: bytes = FINGERPRINT) -> SnapshotIdentity:
    return SnapshotIdentity(instance, SnapshotId(os.urandom(16).hex()), fingerprint)


class Memory:
    """A MemorySource that fails the test if a clean page is read."""

    def __init__(self, data: bytearray, dirty: Iterable[int]) -> None:
        self.data = data
        self.dirty = set(dirty)
        self.size = len(data)

    def dirty_runs(self) -> Iterable[tuple[int, int]]:
        start = None
        for page in range(self.size // PAGE + 1):
            if page in self.dirty:
                start = page if start is None else start
            elif start is not None:
                yield start, page - start
                start = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        pages = range(offset // PAGE, (offset + len(buffer)) // PAGE)
        assert self.dirty.issuperset(pages), "a clean page was read"
        buffer[:] = self.data[offset : offset + len(buffer)]


class Sleep:
    """What the instance record would hold after a sleep, and where the snapshot is."""

    def __init__(self, directory: Path, who: SnapshotIdentity, info: SealedInfo) -> None:
        self.directory = directory
        self.identity = who
        self.info = info

    def open(self, key: LocalTenantKey = KEY) -> SealedImage:
        return SealedImage.open(self.directory, self.identity, key.unwrap, self.info.manifest_sha256)


def everything(data: bytearray) -> Memory:
    return Memory(data, range(len(data) // PAGE))


def sleep(
    directory: Path,
    memory: Memory,
    *,
    parent: SealedImage | None = None,
    who: SnapshotIdentity | None = None,
    key: LocalTenantKey = KEY,
    state: bytes = STATE,
    working_set: Iterable[tuple[int, int]] | None = None,
) -> Sleep:
    who = who or identity()
    with SealWriter(directory, who, key.wrap, parent=parent) as writer:
        writer.write_pages(memory)
        writer.write_state(state)
        if working_set is not None:
            writer.write_working_set(working_set)
        return Sleep(directory, who, writer.finish())


def contents(image: SealedImage) -> bytes:
    return b"".join(image.read_chunk(chunk) for chunk in range(image.chunk_count))


def some_memory(chunks: int, seed: int = 1) -> bytearray:
    """Text, noise, zero pages and whole zero chunks, as a guest's memory has them; the marker is all over."""
    import random

    draw = random.Random(seed)
    data = bytearray(chunks * 32 * PAGE)
    for page in range(chunks * 32):
        kind = draw.randrange(4) if page // 32 % 4 != 3 else 0
        at = page * PAGE
        if kind == 1:
            data[at : at + PAGE] = draw.randbytes(PAGE - 16) + MARKER
        elif kind >= 2:
            text = MARKER + b" %d " % draw.randrange(1000)
            data[at : at + PAGE] = (text * (PAGE // len(text) + 1))[:PAGE]
    return data
