"""One development node for all tests below, started and stopped as its user does: by the command, as a process.

Its image comes from the machine's cache, or is built, which takes about a minute. When all is over, nothing of the node
may be left.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mvm.builder.flakes import embedded_flake_dir
from mvm.core.errors import MvmError
from mvm.dev import image, sources
from mvm.dev.choose import CACHE, FOLDER
from mvm.dev.qemu import QemuNode
from mvm.hostd.keeper import anything_left
from mvm.linux import machine

if TYPE_CHECKING:
    from tests.node.guests import Guests

ROOT = Path(__file__).resolve().parents[2]
MEM_MIB = 3072
START_S = 900  # an image may have to be built first


class Rig:
    """`node`: the driver, for what no command does (power loss)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.node = QemuNode(root / FOLDER, CACHE, embedded_flake_dir)

    def mvm(
        self, *arguments: str, stdin: bytes = b"", code: int | None = 0, timeout: float = 300
    ) -> subprocess.CompletedProcess[bytes]:
        """One `mvm` command on this computer. `code`: the exit code it must have, None for any."""
        argv = [sys.executable, "-m", "mvm.cli", "--root", str(self.root), *arguments]
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout, cwd=ROOT)
        assert code is None or done.returncode == code, (arguments, done.stdout, done.stderr)
        return done

    def sh(self, script: str, *, stdin: bytes = b"", timeout: float = 120, user: str = "root") -> str:
        """Standard output of a shell script in the node, which must succeed."""
        who = () if user == "root" else ("--user", user)
        done = self.mvm("shell", *who, "--", "/bin/sh", "-euc", script, stdin=stdin, timeout=timeout)
        return done.stdout.decode()


def _cannot() -> str:
    if missing := image.missing_programs():
        return f"a node's image is built with {', '.join(missing)}: apt-get install {' '.join(missing)}"
    available = machine.memory_available() >> 20
    if available < MEM_MIB + 1024:
        return f"a node takes {MEM_MIB + 1024} MiB of memory; {available} MiB are available"
    free = shutil.disk_usage("/var").free
    if free < image.NEEDED_BYTES:
        return f"a node's image takes {image.NEEDED_BYTES >> 20} MiB while it is built; {free >> 20} MiB are free"
    try:
        sources.check_keyrings(sources.of_this_machine())
    except MvmError as error:
        return f"{error.brief}: {error.resolution}"
    return ""


@pytest.fixture(scope="session")
def guests(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Guests:
    """What makes tenants in the node."""
    from tests.node.guests import Guests

    return Guests(rig, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if reason := _cannot():
        pytest.skip(reason)
    found = Rig(tmp_path_factory.mktemp("node"))
    try:
        found.mvm("start", "--memory", str(MEM_MIB), "--disk", "4", timeout=START_S)
        yield found
        pid = found.node.status().pid
        found.mvm("stop")
        assert not Path(f"/proc/{pid}").exists()
    finally:
        found.node.power_loss()
        assert anything_left(found.node.runtime) is None
        found.mvm("stop", "--discard", "--yes")
        assert not (found.root / FOLDER).exists()
