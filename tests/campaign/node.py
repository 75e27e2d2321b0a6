"""Kills of the installed mvm-hostd, and losses of power of the whole node, with real guests in the development node.

An operation begins by the node's own commands; at a random moment of it the service is killed (`node_kills.py`, which
runs in the node and does several in a row), or the node's QEMU process is. After the restart, `in_node.py` compares
what the node's kernel and disk show with the records, and every guest must still have the last number that it had said
was synced to its data disk.
"""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.node.conftest import START_S, Rig

LOOK = (Path(__file__).parent / "in_node.py").read_bytes()
KILLS = (Path(__file__).parent / "node_kills.py").read_bytes()
KILL_S = 90.0
"""At most, on average, for a kill and what follows."""
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
TOLD_KILLS = 10
"""Kills in a row before it is said how far it has come."""
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
        self._hung: list[str] = []
        self._longest: dict[str, float] = {}
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

    def kill(self, times: int) -> None:
        """So many kills of hostd in a row, each at a random moment of a random operation."""
        config = {
            "kills": times, "seed": self.rng.getrandbits(32), "marks": self.marks, "number": self._n,
            "longest": self._longest,
        }  # fmt: skip
        given = json.dumps({"program": KILLS.decode(), "config": config, "source": LOOK.decode()})
        load = "import json, sys; got = json.load(sys.stdin); exec(compile(got['program'], 'node_kills', 'exec'), got)"
        # The interpreter that the installed command names in its first line.
        python = "$(sed -n '1s/^#!//p' \"$(readlink -f /usr/bin/mvm)\")"
        script = f"exec {python} -I -c \"{load}; got['main'](got['config'], got['source'])\""
        done = self.rig.mvm(
            "shell", "--", "/bin/sh", "-euc", script, stdin=given.encode(), timeout=READY_S + times * KILL_S
        )
        for line in map(json.loads, done.stdout.splitlines()):
            assert "failed" not in line, (line["failed"], line["log"])
            self.counts[f"hostd killed amid {line['verb']}" if line["amid"] else "hostd killed idle"] += 1
            self.counts["marks found"] += line["checked"]
            for state in line["states"].values():
                self.counts[f"then {state}"] += 1
            self.states, self._n, self._longest = line["states"], line["number"], line["longest"]
            self.marks = {tenant: (synced, tried) for tenant, (synced, tried) in line["marks"].items()}
            times -= 1
        assert times == 0, (done.stdout, done.stderr)

    def lose_power(self) -> None:
        """One loss of the node's power at a random moment of a random operation."""
        if not {"running", "sleeping"} & set(self.states.values()):
            self._settled()
        tenant, verb = self._choose()
        thread = threading.Thread(target=self._attempt, args=(f"mvm tenant {verb} {tenant}",))
        thread.start()
        time.sleep(self.rng.uniform(0.5, 0.5 + SECONDS[verb]))
        amid = thread.is_alive()
        self.rig.node.power_loss()
        self.counts[f"power lost amid {verb}" if amid else "power lost idle"] += 1
        thread.join(READY_S)
        assert not thread.is_alive()
        assert self._hung == [], f"did not end when the node's power went: {self._hung}"
        self.rig.mvm("start", timeout=START_S)
        seen = self.look()
        assert seen["counts"]["processes"] == seen["counts"]["links"] == 0, seen
        self._settled()

    def _attempt(self, script: str) -> None:
        """A command whose node may go away under it."""
        try:
            self.rig.mvm("shell", "--", "/bin/sh", "-euc", script, code=None, timeout=READY_S)
        except subprocess.TimeoutExpired:
            self._hung.append(script)

    def _choose(self) -> tuple[str, str]:
        tenant = self.rng.choice(list(self.marks))
        return tenant, self.rng.choice(VERBS[self.states[tenant]])

    def _settled(self) -> None:
        """Every guest that is to be had: what it said it had synced is there, and it syncs the next number."""
        for state in self.states.values():
            self.counts[f"then {state}"] += 1
        awake = {tenant for tenant, state in self.states.items() if state in ("running", "sleeping")}
        for tenant, state in list(self.states.items()):
            # Where every life is cut short in its first start, nothing else is ever tried.
            if awake and state == "created":
                continue
            if state != "running" and (not awake or self.rng.random() < 0.7):
                awake.add(tenant)
                self._wake_or_run(tenant, state)
                self.states[tenant] = "running"
            if self.states[tenant] == "running":
                self._check_mark(tenant)
                if self.rng.random() < 0.5:  # or no operation would ever be a wake
                    self.rig.sh(f"mvm tenant sleep {tenant}", timeout=READY_S)
        self.look()

    def _wake_or_run(self, tenant: str, state: str) -> None:
        """Undisturbed. One that fails is no loss of what this campaign looks for, so it goes on after a second try; but
        it is counted, for the report: nobody disturbed it, so each of them wants an explanation."""
        verb = "wake" if state == "sleeping" else "run"
        done = self.rig.mvm("shell", "--", "mvm", "tenant", verb, tenant, code=None, timeout=READY_S)
        if done.returncode != 0:
            self.counts[f"{verb} undisturbed and failed"] += 1
            self.look()
            verb = "wake" if self.states[tenant] == "sleeping" else "run"
            self.rig.sh(f"mvm tenant {verb} {tenant}", timeout=READY_S)

    def _check_mark(self, tenant: str) -> None:
        synced, tried = self.marks[tenant]
        first = tried == 0
        text = self.rig.sh(f"mvm tenant exec {tenant} -- sh -c 'cat /data/mark || echo 0'").strip()
        assert synced <= int(text or 0) <= tried, f"{tenant}: synced {synced}, tried {tried}, found {text!r}"
        self.counts["marks found"] += not first
        self._n += 1
        self.marks[tenant] = (synced, self._n)
        self.rig.sh(f"mvm tenant exec {tenant} -- sh -c '{_MARK.format(n=self._n)}'")
        self.marks[tenant] = (self._n, self._n)


def batched(items: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


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
    order = ["kill"] * kills + ["power"] * power_losses
    campaign.rng.shuffle(order)
    turns = [
        (kind, len(part))
        for kind, same in groupby(order)
        for part in batched(list(same), TOLD_KILLS if kind == "kill" else 1)
    ]
    number = 0
    for kind, times in turns:
        try:
            if kind == "kill":
                campaign.kill(times)
            else:
                campaign.lose_power()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            where = f"after {number} of {len(order)} turns, in {times} of kind {kind}"
            raise AssertionError(f"seed {seed}, {where}, {dict(campaign.counts)}: {error}") from error
        number += times
        tell(f"node: {number} of {len(order)}; {campaign.states}; {dict(campaign.counts)}")
    return campaign.counts
