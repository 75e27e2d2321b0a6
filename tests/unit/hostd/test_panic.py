"""A kernel's last words on a console that a guest may write anything to."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.hostd.panic import find_panic, panic_message

pytestmark = pytest.mark.req("L7")
REPORT = """[    1.2] VFS: Unable to mount root fs
[    1.3] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r
[    1.4] CPU: 0 PID: 1 Comm: swapper/0
[    1.5] Rebooting in 1 seconds..
[    1.5] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0) ]---
"""


def test_a_panic_and_its_reason() -> None:
    assert find_panic(REPORT).startswith("VFS: Unable to mount root fs on unknown-block(0,0)")
    assert find_panic("Kernel panic - not syncing: ") == "it did not say why"


@pytest.mark.parametrize("last", ["reboot: Restarting system", "reboot: Power down", "reboot: System halted"])
def test_what_came_after_it_counts(last: str) -> None:
    assert find_panic(f"{REPORT}[    0.0] Linux version\n[   50.0] {last}\n") == ""
    assert find_panic(f"[   50.0] {last}\n{REPORT}") != ""


def test_an_end_without_words_is_none(tmp_path: Path) -> None:
    assert panic_message(tmp_path / "console.log") == ""
    (tmp_path / "console.log").write_text(REPORT + "x" * 40_000)
    assert panic_message(tmp_path / "console.log") == ""


@given(st.text())
def test_any_reason_is_printable_and_short(reason: str) -> None:
    found = find_panic(f"Kernel panic - not syncing: {reason}")
    assert len(found) <= 200
    assert all(" " <= c <= "~" for c in found)
