"""A directory that is read-only for everybody, root included."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvm.linux.mount import detach, mount

_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 0x1, 0x20, 0x1000


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Where `folder` is seen so, for as long as this lasts."""
    with tempfile.TemporaryDirectory(prefix="mvm-read-only-") as there:
        mount(str(folder), there, "", _MS_BIND, "")
        try:
            mount("none", there, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY, "")
            yield Path(there)
        finally:
            detach(there)
