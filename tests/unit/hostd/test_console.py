"""A console log is read whole, from any number of lines before its end, in bounded pieces, across its rotations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvm.hostd.bounded_log import LOG_BYTES
from mvm.hostd.console import read_console
from mvm.wire.hostd_api import CONSOLE_CHUNK, ConsolePlace

pytestmark = pytest.mark.req("L5")


def everything(log: Path, lines: int | None, place: ConsolePlace | None = None) -> tuple[bytes, ConsolePlace]:
    found = b""
    while True:
        answer = read_console(log, lines, place)
        assert len(answer.data) <= CONSOLE_CHUNK
        found += answer.data
        place = answer.place
        if not answer.more:
            return found, place


def last_lines(text: bytes, count: int) -> bytes:
    return b"".join(text.splitlines(keepends=True)[-count:]) if count else b""


_TEXT = st.binary(max_size=60).map(lambda raw: bytes(b"\nab"[b % 3] for b in raw))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(older=st.none() | _TEXT, newer=st.none() | _TEXT, lines=st.none() | st.integers(0, 70))
def test_any_end_of_any_log(
    tmp_path: Path, older: bytes | None, newer: bytes | None, lines: int | None
) -> None:
    log = tmp_path / "console.log"
    for path, text in ((log, newer), (tmp_path / "console.log.1", older)):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_bytes(text)
    whole = (older or b"") + (newer or b"")
    found, place = everything(log, lines)
    assert found == (whole if lines is None else last_lines(whole, lines))
    assert everything(log, None, place)[0] == b""


@pytest.mark.parametrize("lines", [1, 5000, LOG_BYTES, LOG_BYTES + 7, 3 * LOG_BYTES])
def test_a_guest_that_writes_line_ends_only(tmp_path: Path, lines: int) -> None:
    log = tmp_path / "console.log"
    log.with_name("console.log.1").write_bytes(b"\n" * LOG_BYTES)
    log.write_bytes(b"\n" * LOG_BYTES)
    assert len(everything(log, lines)[0]) == min(lines, 2 * LOG_BYTES)


def test_what_was_rotated_away_twice_is_not_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"one")
    _, place = everything(log, None)
    for text in (b"two", b"three"):
        kept = log.with_name("console.log.1")
        log.rename(kept)
        log.write_bytes(text)
    found, _ = everything(log, None, place)
    # Some of it is lost, all the more if the third file has got the inode of the first.
    assert found in (b"twothree", b"three", b"ee")


def test_a_place_that_never_was(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"text")
    inode = log.stat().st_ino
    for place in (ConsolePlace(inode, 1 << 62), ConsolePlace(1 << 62, 1), ConsolePlace(0, 0)):
        assert everything(log, None, place)[0] == b"text"


def test_what_is_no_log_is_empty(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    log = tmp_path / "console.log"
    assert everything(log, None)[0] == b""
    log.symlink_to(secret)
    os.mkfifo(tmp_path / "console.log.1")
    assert everything(log, None)[0] == b""
