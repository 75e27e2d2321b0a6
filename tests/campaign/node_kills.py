"""Runs in the node: kills its mvm-hostd, many times in a row, at random moments of random operations on real guests.

By the node's own Python, which is sent this file and calls `main`. Every operation is a process of its own that runs
the installed `mvm`; it is forked from here, where the command line is loaded already, because starting an interpreter
takes seconds in a node that is emulated. The service is killed at any moment from an operation's first to a little past
its last.

Prints one JSON object per kill, `{"verb", "amid", "states", "marks", "checked"}`, and stops with `{"failed": why}`.
`marks`: tenant -> [the last number that its guest said was synced to its data disk, the last it was told to write].
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

VERBS = {
    "created": ["run"],
    "running": ["sleep", "sleep", "sleep", "stop"],
    "sleeping": ["wake", "wake", "wake", "wake", "stop"],
    "stopped": ["run"],
    "failed": ["run"],
}
SECONDS = {"run": 30.0, "sleep": 4.0, "wake": 4.0, "stop": 6.0}
"""How long each takes, before one has been seen to the end."""
HANGS_S = 240.0
EARLY_S = 5.0
UNIT = "mvm-hostd.service"


class Failed(Exception):
    """A sentence."""


def load() -> Any:
    """The entry point, with what it loads later loaded now."""
    import mvm.cli.__main__ as entry

    pid = begin(entry, ["tenant", "list"], "/dev/null")
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise Failed("mvm tenant list fails")
    import mvm.cli.life
    import mvm.cli.session
    import mvm.cli.tenant
    import mvm.standalone.remote  # noqa: F401

    return entry


def begin(entry: Any, words: list[str], output: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.argv = ["mvm", *words]
    try:
        entry.main()
    finally:
        os._exit(70)


def ended(pid: int, what: str) -> int:
    deadline = time.monotonic() + HANGS_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Failed(f"{what} hung for {HANGS_S:.0f} s")
        time.sleep(0.05)


def text(path: str) -> str:
    with open(path) as file:
        return file.read()


def mvm(entry: Any, *words: str) -> str:
    output = f"/tmp/campaign-{os.getpid()}"
    code = ended(begin(entry, list(words), output), " ".join(words))
    if code != 0:
        raise Failed(f"mvm {' '.join(words)}: exit {code}: {text(output)}")
    return text(output)


def main_pid() -> int:
    return int(
        subprocess.run(["systemctl", "show", "-P", "MainPID", UNIT], capture_output=True, check=True).stdout
    )


def back(killed: int) -> None:
    """Return when another mvm-hostd has recovered everything and says that it is ready."""
    subprocess.run(["systemctl", "reset-failed", UNIT], capture_output=True, check=False)
    deadline = time.monotonic() + HANGS_S
    while subprocess.run(["systemctl", "start", UNIT], capture_output=True, check=False).returncode != 0 or (
        main_pid() in (0, killed)
    ):
        if time.monotonic() > deadline:
            raise Failed("mvm-hostd does not come back")
        time.sleep(0.2)


def look(source: str, tenants: Iterable[str]) -> dict[str, str]:
    """Tenant -> state of its instance, after checking that there is nothing that should not be there."""
    seen = json.loads(
        subprocess.run([sys.executable, "-I", "-c", source], capture_output=True, check=True).stdout
    )
    if seen["problems"]:
        raise Failed(f"{seen['problems']}")
    return {tenant: seen["states"].get(f"{tenant}/default-0", "created") for tenant in tenants}


def check_mark(entry: Any, tenant: str, marks: dict[str, list[int]], number: int) -> None:
    synced, tried = marks[tenant]
    marks[tenant] = [synced, number]
    script = f"cat /data/mark || echo 0; echo {number} >/data/new && sync && mv /data/new /data/mark && sync"
    found = re.findall(
        r"^[0-9]+$", mvm(entry, "tenant", "exec", tenant, "--", "sh", "-c", script), re.MULTILINE
    )
    if not found or not synced <= int(found[0]) <= tried:
        raise Failed(f"{tenant}: synced {synced}, tried {tried}, found {found}")
    marks[tenant] = [number, number]


def one(entry: Any, rng: random.Random, states: dict[str, str], longest: dict[str, float]) -> dict[str, Any]:
    awake = [tenant for tenant in sorted(states) if states[tenant] in ("running", "sleeping")]
    # Of those that have a life to lose, mostly: a start that is killed leaves nothing for the next to be.
    tenant = rng.choice(awake if awake and rng.random() < 0.8 else sorted(states))
    verb = rng.choice(VERBS[states[tenant]])
    victim = main_pid()
    began = time.monotonic()
    pid = begin(entry, ["tenant", verb, tenant], "/tmp/campaign-verb")
    # A start is mostly the guest's boot, with nothing for hostd to do; what it does itself lies in the first seconds.
    until = 1.1 * longest[verb]
    time.sleep(rng.uniform(0, min(until, EARLY_S) if rng.random() < 0.5 else until))
    amid = os.waitpid(pid, os.WNOHANG)[0] == 0
    if not amid:
        longest[verb] = min(longest[verb], time.monotonic() - began)
    os.kill(victim, signal.SIGKILL)
    if amid:
        ended(pid, f"mvm tenant {verb}, whose daemon was killed,")
    back(victim)
    return {"verb": verb, "amid": amid}


def main(config: dict[str, Any], look_source: str) -> None:
    """`config`: kills, seed, number, marks, longest; `look_source`: in_node.py."""
    marks: dict[str, list[int]] = config["marks"]
    rng, number = random.Random(config["seed"]), config["number"]
    longest = {**SECONDS, **config["longest"]}

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    try:
        entry = load()
        states = look(look_source, marks)
        for _ in range(config["kills"]):
            if not {"running", "sleeping"} & set(states.values()):
                mvm(entry, "tenant", "run", rng.choice(sorted(states)))
                states = look(look_source, marks)
            line = one(entry, rng, states, longest)
            states = look(look_source, marks)
            checked = 0
            for tenant in sorted(states):
                if states[tenant] == "running":
                    number += 1
                    check_mark(entry, tenant, marks, number)
                    checked += 1
            say(
                {
                    **line,
                    "states": states,
                    "marks": marks,
                    "checked": checked,
                    "number": number,
                    "longest": longest,
                }
            )
    except Failed as why:
        log = subprocess.run(
            ["journalctl", "-u", UNIT, "-o", "cat", "-n", "40", "--no-pager"],
            capture_output=True,
            check=False,
        )
        say({"failed": str(why), "log": log.stdout.decode(errors="replace")})
