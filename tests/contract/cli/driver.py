"""`mvm` over a node without VMs, as a process of its own: driver.py ROOT AGENT_SOCKET ARGUMENT...

A running instance's guest is the real agent listening on AGENT_SOCKET ("-" for none).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.unit.standalone.fakes import FakeHost, FakeNode

from mvm.cli import __main__ as program
from mvm.cli import app as app_module
from mvm.core.ids import InstanceId
from mvm.hostd.guest_channel import GuestChannel, connect
from mvm.standalone.facade import Standalone
from mvm.wire.hostd_api import Purpose


def main() -> None:
    state, agent, *arguments = sys.argv[1:]

    @contextmanager
    def channel(
        _self: FakeHost, _instance: InstanceId, _purpose: Purpose, _program: str = ""
    ) -> Iterator[GuestChannel]:
        with connect(Path(agent), deadline=time.monotonic() + 10) as opened:
            yield opened

    def opened(app: app_module.App) -> Standalone:
        return FakeNode(Path(app.root)).open(app.command)

    FakeHost.channel = channel  # type: ignore[assignment,method-assign]
    app_module._open = opened
    sys.argv = ["mvm", "--root", state, *arguments]
    program.main()


if __name__ == "__main__":
    main()
