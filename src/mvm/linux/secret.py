"""Secrets in memory: locked in RAM, left out of core dumps, zeroed after use.

A SecretBytes is one private anonymous mapping (whole pages, so nothing else shares them), made with
MAP_LOCKED and MADV_DONTDUMP, zeroed by `wipe`, by leaving its context, and when collected. It has no
conversion to `str` or `bytes`: callers hand `view()` to what needs it. Libraries that take a key copy it
inside themselves; such copies are theirs.

Limits. Where RLIMIT_MEMLOCK does not allow the lock, the secret is kept all the same and `locked` is False:
it could be swapped out. A forked child gets the bytes but not the lock (fork(2)), so `locked` speaks of the
process that made it. A page may also be reached by who may read this process's memory: root, and nobody
else.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import NoReturn, Self

_MAP_LOCKED = 0x2000
"""<asm-generic/mman.h>: x86, arm64 and riscv; the mmap module does not name it before Python 3.13."""
_ZEROS = bytes(mmap.PAGESIZE)


class SecretBytes:
    """`size` bytes, zero at first. Compare with `equals`; equality and hash are those of the object."""

    __slots__ = ("_map", "_size", "locked")

    def __init__(self, size: int) -> None:
        self._size = size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._map = mmap.mmap(-1, max(size, 1), flags=flags | _MAP_LOCKED)
            self.locked = True
        except OSError:
            self._map = mmap.mmap(-1, max(size, 1), flags=flags)
            self.locked = False
        self._map.madvise(mmap.MADV_DONTDUMP)

    @classmethod
    def from_random(cls, size: int) -> Self:
        """`size` bytes from the kernel, without the immutable copy that os.urandom would leave behind."""
        fd = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls.from_fd(fd, size)
        finally:
            os.close(fd)

    @classmethod
    def from_fd(cls, fd: int, size: int) -> Self:
        """Exactly `size` bytes read from `fd`; EOFError if it ends before."""
        secret = cls(size)
        view = secret.view()
        at = 0
        while at < size:
            got = os.readv(fd, [view[at:]])
            if not got:
                view.release()
                secret.wipe()
                raise EOFError(f"{at} bytes where {size} were expected")
            at += got
        return secret

    @classmethod
    def copy_of(cls, source: bytes | bytearray | memoryview | mmap.mmap, *, wipe: bool = False) -> Self:
        """A copy; with `wipe`, a mutable source is zeroed. (What is `bytes` already cannot be unmade.)"""
        given = memoryview(source).cast("B")
        secret = cls(len(given))
        secret.view()[:] = given
        if wipe and not given.readonly:
            given[:] = bytes(len(given))
        return secret

    def view(self) -> memoryview:
        """The bytes themselves, writable. ValueError once wiped."""
        return memoryview(self._map)[: self._size]

    def __len__(self) -> int:
        return self._size

    def equals(self, other: SecretBytes) -> bool:
        """Equal content, in time that depends on the lengths only."""
        from hmac import compare_digest

        return compare_digest(self.view(), other.view())

    @property
    def wiped(self) -> bool:
        return self._map.closed

    def wipe(self) -> None:
        """Zero it and give the memory back. Again is harmless."""
        if self._map.closed:
            return
        for at in range(0, len(self._map), len(_ZEROS)):
            piece = _ZEROS[: len(self._map) - at]
            self._map[at : at + len(piece)] = piece
        try:
            self._map.close()
        except BufferError:
            # Somebody still holds a view: it now sees zeros, and the mapping goes with it.
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.wipe()

    def __del__(self) -> None:
        if hasattr(self, "_map"):
            self.wipe()

    def __repr__(self) -> str:
        return f"<SecretBytes {self._size} bytes>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not serialised")
