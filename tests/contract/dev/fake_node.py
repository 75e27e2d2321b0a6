"""A node without a machine: the driver interface over a file, for tests of what stands on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from mvm.core.errors import Conflict
from mvm.dev.model import NodeSpec, NodeStatus, StartOptions, Tell
from mvm.dev.qemu import wanted_spec


class FakeNode:
    """Programs run on this computer. `folder` holds what survives."""

    name = "fake"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _spec(self) -> NodeSpec | None:
        try:
            return msgspec.json.decode((self._folder / "node.json").read_bytes(), type=NodeSpec)
        except FileNotFoundError:
            return None

    def _runs(self) -> bool:
        return (self._folder / "running").exists()

    def start(self, options: StartOptions, tell: Tell) -> bool:
        spec = wanted_spec(self._spec(), options, self._runs())
        self._folder.mkdir(exist_ok=True)
        tell.phase("starting")
        (self._folder / "node.json").write_bytes(msgspec.json.encode(spec))
        began = not self._runs()
        (self._folder / "running").touch()
        return began

    def stop(self, *, grace_s: float, discard: bool, tell: Tell) -> str:
        how = "absent" if self._spec() is None else "stopped"
        if self._runs():
            tell.phase("stopping")
            (self._folder / "running").unlink()
            how = "shut-down" if grace_s > 0 else "killed"
        if discard:
            (self._folder / "node.json").unlink(missing_ok=True)
        return how

    def status(self) -> NodeStatus:
        spec = self._spec()
        if spec is None:
            return NodeStatus(self.name, "absent")
        return NodeStatus(
            self.name,
            "running" if self._runs() else "stopped",
            vcpus=spec.vcpus,
            mem_mib=spec.mem_mib,
            disk_gib=spec.disk_gib,
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        tty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
    ) -> int:
        if not self._runs():
            raise Conflict("the node is not running", resolution="Start it with: mvm start")
        done = subprocess.run(
            argv, stdin=stdin, stdout=stdout, stderr=stderr, env={**os.environ, **(env or {})}, cwd=cwd or "/"
        )
        return done.returncode if done.returncode >= 0 else 128 - done.returncode
