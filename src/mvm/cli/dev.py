"""What `mvm start`, `stop`, `status`, `shell` and `sync` have in common: the development node of this root."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mvm.cli.app import DEFAULT_ROOT, App

if TYPE_CHECKING:
    from mvm.dev.model import NodeDriver, NodeStatus


def node(app: App) -> NodeDriver:
    from mvm.dev import choose

    root = Path(app.root)
    if sys.platform == "darwin" and app.root == DEFAULT_ROOT:
        # Lima runs as its user, whom /var/lib does not belong to.
        root = Path.home() / ".mvm"
    return choose.node(root)


def describe(status: NodeStatus) -> list[str]:
    """Lines for people."""
    if status.state == "absent":
        return ["There is no development node. Make it with: mvm start"]
    lines = [f"The development node is {status.state}" + (f" (process {status.pid})." if status.pid else ".")]
    lines.append(f"  machine       {status.vcpus} CPUs, {status.mem_mib} MiB of memory, by {status.driver}")
    if status.accel:
        lines.append(f"  acceleration  {status.accel}: {_short(status.accel_reason)}")
    if status.uptime_s:
        lines.append(f"  up for        {_duration(status.uptime_s)}")
    if status.image:
        lines.append(f"  image         {status.image}")
    lines.append(
        f"  disks         {status.disk_used_bytes >> 20} MiB here; state disk of {status.disk_gib} GiB"
    )
    return lines


def _short(text: str) -> str:
    first = text.partition(";")[0].strip()
    return (
        first if first == text.strip() else f"{first} ...)" if first.count("(") > first.count(")") else first
    )


def _duration(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
