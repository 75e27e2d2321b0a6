"""Kills of the installed mvm-hostd, and losses of power of the whole node, with real guests in the development node.

An operation begins by the node's own commands; at a random moment of it the service is killed, or the node's QEMU
process is. After the restart, `in_node.py` compares what the node's kernel and disk show with the records, and every
guest must still have the last number that it had said was synced to its data disk.
"""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.node.conftest import Rig

LOOK = (Path(__file__).parent / "in_node.py").read_bytes()
VERBS = {
    "created": ["run"],
    "running": ["sleep", "sleep", "stop"],
    "sleeping": ["wake", "wake", "stop"],
    "stopped": ["run"],
    "failed": ["run", "stop"],
}
SECONDS = {"run": 20.0, "sleep": 5.0, "wake": 4.0, "stop": 6.0}
"""About how long each takes in a node that is itself emulated; a moment past the end is one of idleness."""
READY_S = 180.0
_MARK = "echo {n} >/data/mark.new && sync && mv /data/mark.new /data/mark && sync"


class NodeCampaign:
    """`tenants`: with one instance each, created and built. `marks`: (said to be synced, last tried) of each."""

    def __init__(self, rig: Rig, tenants: Sequence[str], seed: int) -> None:
        self.rig = rig
        self.rng = random.Random(seed)
        self.marks = dict.fromkeys(tenants, (0, 0))
        self.states: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self._n = 0
        self.look()

    def look(self) -> dict[str, Any]:
        """What there is, once hostd says that it has recovered everything. AssertionError for every problem."""
        script = (
            "systemctl reset-failed mvm-hostd.service 2>/dev/null || true; systemctl start mvm-hostd.service; "
            "until systemctl is-active --quiet mvm-hostd.service; do sleep 0.2; done; python3 -I -"
        )
        seen: dict[str, Any] = json.loads(self.rig.sh(script, stdin=LOOK, timeout=READY_S))
        assert seen["problems"] == [], (seen["problems"], self.log())
        self.states = {tenant: seen["states"].get(f"{tenant}/default-0", "created") for tenant in self.marks}
        return seen

    def log(self) -> str:
        return self.rig.sh("journalctl -u mvm-hostd.service -o cat -n 40 --no-pager")

    def kill(self) -> None:
        """One kill of hostd at a random moment of a random operation."""
        tenant, verb = self._choose()
        after = self.rng.uniform(0, SECONDS[verb])
        self.counts[f"hostd killed in {verb}"] += 1
        self.rig.sh(
            f"mvm tenant {verb} {tenant} >/tmp/campaign.log 2>&1 & sleep {after:.2f}; "
            "systemctl kill --kill-whom=main --signal=KILL mvm-hostd.service || true; wait || true",
            timeout=READY_S,
        )
        self.look()
        self._settled()

    def lose_power(self) -> None:
        """One loss of the node's power at a random moment of a random operation."""
        tenant, verb = self._choose()
        self.counts[f"power lost in {verb}"] += 1
        thread = threading.Thread(target=self._attempt, args=(f"mvm tenant {verb} {tenant}",))
        thread.start()
        time.sleep(self.rng.uniform(0.5, 0.5 + SECONDS[verb]))
        self.rig.node.power_loss()
        thread.join(READY_S)
        assert not thread.is_alive()
        self.rig.mvm("start", timeout=READY_S)
        seen = self.look()
        assert seen["counts"]["processes"] == seen["counts"]["links"] == 0, seen
        self._settled()

    def _attempt(self, script: str) -> None:
        """A command whose node may go away under it."""
        try:
            self.rig.mvm("shell", "--", "/bin/sh", "-euc", script, code=None, timeout=READY_S)
        except subprocess.TimeoutExpired:
            self.counts["commands that hung"] += 1

    def _choose(self) -> tuple[str, str]:
        tenant = self.rng.choice(list(self.marks))
        return tenant, self.rng.choice(VERBS[self.states[tenant]])

    def _settled(self) -> None:
        """Every guest that is to be had: what it said it had synced is there, and it syncs the next number."""
        for state in self.states.values():
            self.counts[f"then {state}"] += 1
        for tenant, state in list(self.states.items()):
            if state == "created":
                continue
            if state != "running" and self.rng.random() < 0.7:
                self.rig.sh(
                    f"mvm tenant {'wake' if state == 'sleeping' else 'run'} {tenant}", timeout=READY_S
                )
                self.states[tenant] = "running"
            if self.states[tenant] == "running":
                self._check_mark(tenant)
        self.look()

    def _check_mark(self, tenant: str) -> None:
        synced, tried = self.marks[tenant]
        text = self.rig.sh(f"mvm tenant exec {tenant} -- sh -c 'cat /data/mark || echo 0'").strip()
        assert synced <= int(text or 0) <= tried, f"{tenant}: synced {synced}, tried {tried}, found {text!r}"
        self.counts["marks found"] += 1
        self._n += 1
        self.marks[tenant] = (synced, self._n)
        self.rig.sh(f"mvm tenant exec {tenant} -- sh -c '{_MARK.format(n=self._n)}'")
        self.marks[tenant] = (self._n, self._n)


def node_campaign(
    rig: Rig,
    tenants: Sequence[str],
    *,
    kills: int,
    power_losses: int,
    seed: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Counter[str]:
    """So many of each, in random order. AssertionError says which of the turns, and the seed."""
    campaign = NodeCampaign(rig, tenants, seed)
    turns = ["kill"] * kills + ["power"] * power_losses
    campaign.rng.shuffle(turns)
    for number, kind in enumerate(turns, 1):
        try:
            campaign.kill() if kind == "kill" else campaign.lose_power()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, turn {number} ({kind}): {error}") from error
        tell(f"node: {number} of {len(turns)} ({kind}); {campaign.states}")
    return campaign.counts
