from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.hostd.log import Log


@pytest.mark.req("H2")
@given(st.text(max_size=2000), st.text(max_size=2000))
def test_one_line_whatever_a_client_chose(first: str, second: str) -> None:
    lines: list[bytes] = []
    Log(lines.append).warning("refused", error=first, details=second)
    (line,) = lines
    assert line.count(b"\n") == 1
    assert len(line) < 8000
    read = json.loads(line)
    assert (read["level"], read["event"]) == ("warning", "refused")
    assert read["error"] == first[:500]


def test_a_log_nobody_reads_stops_nothing() -> None:
    def broken(_: bytes) -> None:
        raise BrokenPipeError

    Log(broken).info("x")
