"""The whole campaign in one command; `scripts/campaign --help` says what it takes.

    injected       crashes before any effect, on the simulated node           tests/campaign/injected.py
    then power     before every effect of some operations, then a power loss  tests/campaign/then_power.py
    kills          of a real mvm-hostd with the fake VMM, on this computer    tests/campaign/daemon.py
    node kills     of the installed mvm-hostd, with real guests               tests/campaign/node_kills.py
    power losses   of the development node's QEMU process, with real guests   tests/campaign/node.py

After each: no process, tap, bridge, cgroup, mount, mapping, rule or file that no live instance owns; no data lost that
a guest that runs then had synced; every instance in a legal state. A part that fails stops there, and the report says
how far it came; the same seed makes the same choices where the same states come of them. Exits 1 if any part failed.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.campaign.injected import campaign as injected_campaign


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/campaign", description="Kill it, and see what is left.")
    parser.add_argument(
        "--injected", type=int, default=10_000, metavar="N", help="crashes on the simulated node"
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="of mvm-hostd, with the fake VMM")
    parser.add_argument("--node-kills", type=int, default=100, metavar="N", help="of the installed mvm-hostd")
    parser.add_argument("--power-losses", type=int, default=10, metavar="N", help="of a development node")
    parser.add_argument("--seed", type=int, help="to repeat a campaign; by default a new one")
    given = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    gc.freeze()  # every operation of the simulated node is a fork
    parts: list[tuple[str, int, Callable[[], Counter[str]]]] = [
        ("injected crashes", given.injected, lambda: _injected(given.injected, seed)),
        ("crashes before every effect, then a power loss", int(given.injected > 0), _then_power),
        ("kills of mvm-hostd", given.kills, lambda: _kills(given.kills, seed)),
        (
            "kills and power losses in the node",
            given.node_kills + given.power_losses,
            lambda: _node(given.node_kills, given.power_losses, seed),
        ),
    ]
    failed = False
    rows: list[str] = []
    for name, wanted, run in parts:
        if not wanted:
            continue
        began = time.monotonic()
        try:
            counts = run()
        except AssertionError as error:
            failed = True
            rows.append(f"FAILED  {name}: {error}")
            continue
        rows.append(f"passed  {name}, {time.monotonic() - began:.0f} s")
        rows += [f"        {number:7}  {what}" for what, number in sorted(counts.items())]
    print("\n".join(["", *rows, "", f"{'FAILED' if failed else 'passed'}; repeat with --seed {seed}"]))
    return int(failed)


def _injected(crashes: int, seed: int) -> Counter[str]:
    counts = injected_campaign(
        crashes, seed, lambda n, s: _tell(f"injected: {n} of {crashes} crashes, {s:.0f} s")
    )
    counts["crashes in all"] = sum(n for name, n in counts.items() if not name.startswith("done"))
    return counts


def _then_power() -> Counter[str]:
    from tests.campaign.then_power import every_effect

    return Counter({f"effects of a {name}": n for name, n in every_effect(_tell).items()})


def _kills(kills: int, seed: int) -> Counter[str]:
    from tests.campaign.daemon import kill_campaign
    from tests.support.hostd_daemon import daemon_world

    with daemon_world() as world:
        world.daemon.start()
        return kill_campaign(world, kills, seed, lambda n: _tell(f"hostd: {n} of {kills} kills"))


def _node(kills: int, power_losses: int, seed: int) -> Counter[str]:
    from tests.campaign.node import node_campaign
    from tests.node.conftest import MEM_MIB, START_S, Rig
    from tests.node.guests import Guests

    with tempfile.TemporaryDirectory(prefix="mvm-campaign-") as folder:
        rig = Rig(Path(folder) / "node")
        try:
            rig.mvm("start", "--memory", str(MEM_MIB), "--disk", "4", timeout=START_S)
            guests = Guests(rig, Path(folder) / "built")
            tenants = [guests.create(name) for name in ("acme", "beta")]
            return node_campaign(rig, tenants, kills=kills, power_losses=power_losses, seed=seed, tell=_tell)
        finally:
            rig.node.power_loss()
            rig.mvm("stop", "--discard", "--yes", code=None)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
