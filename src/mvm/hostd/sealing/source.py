"""What a sleep reads guest memory from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable


class MemorySource(Protocol):
    """The memory of a paused guest. `read_into` is called from several threads at once.

    Only pages of `dirty_runs` are ever asked for.
    """

    @property
    def size(self) -> int:
        """Bytes; a multiple of 128 KiB."""

    def dirty_runs(self) -> Iterable[tuple[int, int]]:
        """(first page, page count) of all that may differ from the parent image; without one, from zero."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with guest memory from byte `offset`; both are whole pages inside one chunk."""
