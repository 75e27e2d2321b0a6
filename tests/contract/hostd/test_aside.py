"""Work that the daemon does in a child, for what it would leave in its memory."""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

import pytest

from mvm.core.errors import CommandFailed
from mvm.hostd.job import aside


@pytest.mark.req("H2")
def test_it_is_done_when_it_returns_and_in_another_process(tmp_path: Path) -> None:
    aside(lambda: (tmp_path / "by").write_text(str(os.getpid())))
    assert int((tmp_path / "by").read_text()) != os.getpid()


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_one_that_fails_is_an_error(how: str) -> None:
    def fail() -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("on purpose")

    with pytest.raises(CommandFailed, match=r"failed|killed"):
        aside(fail)


@pytest.mark.req("L3")
def test_it_dies_with_who_waits_for_it(tmp_path: Path) -> None:
    """Or it would undo things beside the daemon that comes next."""

    def work() -> None:
        (tmp_path / "new").write_text(str(os.getpid()))
        os.rename(tmp_path / "new", tmp_path / "pid")
        time.sleep(60)

    waiting = os.fork()
    if waiting == 0:
        try:
            aside(work)
        finally:
            os._exit(0)
    until = time.monotonic() + 10
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    worker = os.pidfd_open(int((tmp_path / "pid").read_text()))
    os.kill(waiting, signal.SIGKILL)
    os.waitpid(waiting, 0)
    poll = select.poll()
    poll.register(worker, select.POLLIN)
    assert poll.poll(10_000)
    os.close(worker)
