"""What is told of a daemon that runs, from a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.hostd.install import observe
from mvm.hostd.install.plan import Unit

UP = Unit(enabled=True, active=True, failed=False, stale=False)


@pytest.fixture
def daemon() -> Iterator[int]:
    """A process that has loaded this mvm."""
    code = "import mvm.hostd.settings; print(flush=True); input()"
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.mark.req("O3")
def test_a_daemon_of_another_release_is_known_however_old_that_release_is(
    daemon: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back: the files that are installed now are older than the process, which runs none of them."""
    monkeypatch.setattr(observe, "_unit", lambda name: (UP, daemon))
    assert not observe.observe([], tmp_path).code_changed
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert observe.observe([], tmp_path).code_changed


def test_a_link_to_the_environment_is_that_environment(daemon: int, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sys.prefix)
    assert not observe.runs_another_code(daemon, tmp_path / "link")
    # A name that only begins the same is not.
    assert observe.runs_another_code(daemon, Path(os.path.realpath(sys.prefix)[:-1]))


def test_a_process_that_is_gone_runs_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not observe.runs_another_code(process.pid, tmp_path)
