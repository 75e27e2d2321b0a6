"""A host's kernel for the simulated node: processes, links, mounts and rules, in one document that outlives hostd.

Guests are here as well. A guest keeps a text and a count in memory, and both on its disk: the count goes up with every
write, so memory that is older than the disk it is restored beside is told from its count, and written down in
`broken`. Every change is an effect (`trip`), before which the process that makes it may be killed.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvm.core.record import ProcessIdentity
from mvm.hostd.resources.volume import PAYLOAD_OFFSET

PAGE = 4096


class Kernel:
    """`trip` is called before each effect of a process; what the test does to the host itself trips nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trip: Callable[[], None] = lambda: None
        if not path.exists():
            self._save(self._fresh(1))

    @staticmethod
    def _fresh(next_pid: int) -> dict[str, Any]:
        return {
            "boot": str(uuid.uuid4()), "next": next_pid, "vms": {}, "links": {}, "mounts": [], "rules": [],
            "generation": 1, "broken": [],
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._path.read_text())
        return found

    def _save(self, state: dict[str, Any]) -> None:
        self._path.write_text(json.dumps(state))

    @contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        self.trip()
        state = self.state()
        yield state
        self._save(state)

    def lose_power(self) -> None:
        before = self.state()
        self._save({**self._fresh(before["next"] + 10), "broken": before["broken"]})

    def hostd_died(self) -> None:
        """What only the process held that is gone now: taps no VMM has been given yet."""
        state = self.state()
        held = {vm["tap"] for vm in state["vms"].values()}
        state["links"] = {n: link for n, link in state["links"].items() if link["kind"] != "tun" or n in held}
        self._save(state)

    # VMs, by their runtime directory.

    def start_vm(self, runtime: Path, tap: str, disk: str, memory: dict[str, Any] | None) -> ProcessIdentity:
        with self.change() as state:
            assert str(runtime) not in state["vms"], "two VMs of one instance"
            pid = state["next"]
            state["next"] += 2
            state["vms"][str(runtime)] = {
                "pid": pid, "tap": tap, "disk": disk, "memory": memory, "status": "waiting" if memory else "paused",
            }  # fmt: skip
            return ProcessIdentity(pid=pid, start_ticks=pid, boot_id=state["boot"])

    def vm(self, runtime: Path) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.state()["vms"].get(str(runtime))
        return found

    def alive(self, identity: ProcessIdentity) -> bool:
        state = self.state()
        return identity.boot_id == state["boot"] and any(
            vm["pid"] == identity.pid for vm in state["vms"].values()
        )

    def set_status(self, runtime: Path, status: str) -> None:
        with self.change() as state:
            vm = state["vms"][str(runtime)]
            vm["status"] = status
            if status == "running":
                self._goes_on(state, vm, str(runtime))

    def _goes_on(self, state: dict[str, Any], vm: dict[str, Any], name: str) -> None:
        """A guest that runs writes to its disk, at once: nothing older may ever be restored beside it."""
        disk = read_disk(vm["disk"])
        if vm["memory"] is None:
            vm["memory"] = {"text": "", "count": disk["count"], "boots": 1}
        if vm["memory"]["count"] != disk["count"]:
            state["broken"].append(f"{name}: memory of {vm['memory']} beside a disk of {disk}")
        vm["memory"]["count"] = disk["count"] + 1
        write_disk(vm["disk"], {**disk, "count": disk["count"] + 1})

    def guest_writes(self, runtime: Path, text: int, *, memory: str) -> str:
        """The guest writes `text` to its disk, not synced, and `memory` to its memory. The disk's path."""
        state = self.state()
        vm = state["vms"][str(runtime)]
        count = vm["memory"]["count"] + 1
        vm["memory"].update(count=count, text=memory)
        write_disk(vm["disk"], {"count": count, "text": text})
        self._save(state)
        return str(vm["disk"])

    def end_vm(self, identity: ProcessIdentity | None, runtime: Path | None = None) -> bool:
        """SIGKILL to VMM and keeper; what only they held goes with them."""
        with self.change() as state:
            for name, vm in list(state["vms"].items()):
                if name == str(runtime) or (identity is not None and vm["pid"] == identity.pid):
                    del state["vms"][name]
                    state["links"].pop(vm["tap"], None)
                    return True
        return False


def read_disk(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        raw = os.pread(file.fileno(), PAGE, PAYLOAD_OFFSET).rstrip(b"\0")
    return json.loads(raw) if raw else {"count": 0, "text": 0}


def write_disk(path: str, content: dict[str, Any]) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, json.dumps(content).encode().ljust(PAGE, b"\0"), PAYLOAD_OFFSET)
    finally:
        os.close(fd)
