"""Building an image, cut short."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.node.conftest import Rig

from mvm.dev import image, recipe, sources


class Interrupted(BaseException):
    """As Ctrl-C: no Exception."""


class CutShort:
    """Raises once packages are being installed: directories are mounted in the tree then, and programs run in it."""

    def phase(self, name: str) -> None:
        pass

    def line(self, text: str) -> None:
        if "installing" in text:
            raise Interrupted


@pytest.mark.node
@pytest.mark.req("O4")
def test_an_interrupted_build_leaves_nothing(rig: Rig, tmp_path: Path) -> None:
    """`rig` comes first: it says whether images can be built here at all."""
    cache = tmp_path / "cache"
    made = recipe.make(sources.of_this_machine(), "")
    with pytest.raises(Interrupted):
        image.obtain(made, cache, CutShort())
    assert sorted(p.name for p in cache.iterdir()) == ["images", "lock"]
    assert list((cache / "images").iterdir()) == []
    assert str(cache) not in Path("/proc/mounts").read_text()
    commands = b"".join(_command(p) for p in Path("/proc").iterdir() if p.name.isdigit())
    assert str(cache).encode() not in commands


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
