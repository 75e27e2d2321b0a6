"""Status, sleep, wake and shutdown with the real agent, and what it may import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mvm.guest
from mvm.hostd.guest_channel import GuestChannel, GuestRefusal

# What the agent may load, and nothing else: modules of Debian's python3.11-minimal and libpython3.11-minimal, and
# ctypes with its extension, which the image adds for mount(2).
ALLOWED = {
    "__future__", "__main__", "_abc", "_codecs", "_collections_abc", "_frozen_importlib", "_frozen_importlib_external",
    "_imp", "_io", "_signal", "_socket", "_stat", "_struct", "_thread", "_warnings", "_weakref", "abc", "builtins",
    "codecs", "encodings", "errno", "fcntl", "gc", "genericpath", "io", "marshal", "math", "os", "posix", "posixpath",
    "_ctypes", "ctypes", "types", "pwd", "select", "stat", "struct", "sys", "time", "zipimport",
}  # fmt: skip


@pytest.mark.req("L6")
def test_the_agent_loads_only_what_a_minimal_python_has() -> None:
    root = Path(mvm.guest.__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import mvm.guest.__main__, pwd\n"
        "print(*sorted({n.partition('.')[0] for n in sys.modules} - {'mvm'}))"
    )
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) <= ALLOWED


@pytest.mark.req("L6")
def test_status(channel: GuestChannel) -> None:
    status = channel.status()
    assert status.memory_total_kib >= status.memory_available_kib > 0
    assert status.uptime_ms > 0
    assert status.busy_ms > 0
    assert status.sessions == 0


@pytest.mark.req("S1", "S2")
def test_a_sleep_and_a_wake_are_answered_with_reports(agent: Any) -> None:
    with agent.port() as channel:
        assert channel.prepare_sleep().memory_free_kib > 0
    with agent.port() as channel:
        report = channel.after_wake()
    assert report.secrets == "none"
    assert report.network_ok
    # Nothing but the answer was outstanding, so the next wake needs no resynchronisation.
    assert agent.lock.read_bytes() == b"clean\n"


@pytest.mark.req("K3")
def test_an_agent_that_mounts_nothing_says_so(channel: GuestChannel) -> None:
    with pytest.raises(GuestRefusal, match="does not mount"):
        channel.refresh_secrets({"token": b"x"})


@pytest.mark.req("L7")
def test_shutdown_is_agreed_to_before_it_happens(agent: Any, eventually: Callable[..., None]) -> None:
    with agent.channel() as channel:
        channel.shutdown()
    eventually(lambda: agent.process.poll() == 0)
