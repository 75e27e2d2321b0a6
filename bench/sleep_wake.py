"""Measure sleeping and waking, and hold the figures against the targets. Needs root.

    python -m bench.sleep_wake [--vmm qemu|firecracker] [--sizes 256,512,1024,2048] [--repeats 5]
                               [--quick] [--brief] [--output text|json]

One guest of each size, the same working set in all of them (`bench.worker`). Every repeat takes each of them from
cold boot through all variants; guest sizes alternate in the innermost loop and the variants begin at another one each
time, so noise of the machine meets all alike. Plain and encrypted restores of one image are measured within a second of
each other. One VM runs at a time. All of it is a measurement: exit status 0 whether a target is held or missed, 1 for
an error.

The figures and what they mean are in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bench import figures
from bench.cost import Cpu
from bench.figures import Samples, Verdict, ratio
from bench.node import (
    WINDOW_S,
    Guest,
    Node,
    Timed,
    encrypted,
    measuring_node,
    plain,
    sleep_receipt,
    wake_receipt,
)
from bench.target import add_options, of_options

from mvm.core.errors import MvmError
from mvm.linux.machine import cpu_model

SIZES = (256, 512, 1024, 2048)
REPEATS = 5
DIRTY_MIB = (0, 8, 32)
PAIRS = 2
"""Plain and encrypted restores of one image, in turn, in each repeat."""
BRIEF_MIB = 8

_BYTES, _TIME = figures.mebibytes, figures.seconds
ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("boot", "cold boot", _TIME),
    ("plain", "plain restore: answered", _TIME),
    ("encrypted", "encrypted restore, same steps: answered", _TIME),
    ("plain whole", "plain restore with disks, tap, configuration", _TIME),
    ("encrypted whole", "encrypted restore with the same", _TIME),
    ("plain served", "  plain: worker answered", _TIME),
    ("encrypted served", "  encrypted: worker answered", _TIME),
    ("wake", "wake", _TIME),
    ("wake served", "wake: worker answered", _TIME),
    ("first wake", "first wake (working set unknown)", _TIME),
    ("first sleep", "first sleep", _TIME),
    *((f"sleep {n}", f"sleep after {n} MiB dirtied", _TIME) for n in DIRTY_MIB),
    ("command run", "command: mvm tenant run, cold", _TIME),
    ("command wake", "command: mvm tenant wake", _TIME),
    ("command sleep", "command: mvm tenant sleep", _TIME),
    ("resident", "first sleep: guest memory resident", _BYTES),
    ("stored", "first sleep: snapshot on disk", _BYTES),
    *((f"dirty {n}", f"{n} MiB dirtied: found dirty", _BYTES) for n in DIRTY_MIB),
    *((f"written {n}", f"{n} MiB dirtied: written", _BYTES) for n in DIRTY_MIB),
    ("stored last", "snapshot on disk at the end of a repeat", _BYTES),
    ("chunks", "wake: chunks decrypted until the answer", lambda value: f"{value:.0f}"),
    *(
        (f"{series} cpu {who}", f"CPU, {label}: {who}", _TIME)
        for series, label in (
            ("boot", "cold boot"),
            ("plain", "plain restore"),
            ("encrypted", "encrypted restore"),
            ("wake", "wake"),
            ("first sleep", "first sleep"),
            ("sleep 8", "sleep after 8 MiB"),
        )
        for who in Cpu._fields
    ),
    ("command wake cpu command", "CPU, command wake: command", _TIME),
    ("command sleep cpu command", "CPU, command sleep: command", _TIME),
)


class Run:
    """The measurements on one node."""

    def __init__(self, node: Node, repeats: int, say: Callable[[str], None], *, brief: bool = False) -> None:
        self.samples = Samples()
        self._guests = node.guests
        self._repeats = repeats
        self._say = say
        self._brief = brief
        self._pairs = 1 if brief else PAIRS
        self._steps = repeats * len(node.guests) * (2 - brief + self._pairs + len(self._variants()))
        self._done = 0

    def _variants(self) -> Sequence[Callable[[Guest], str]]:
        if self._brief:
            return [partial(self._wake_and_sleep, BRIEF_MIB)]
        later = [partial(self._wake_and_sleep, mib) for mib in DIRTY_MIB[1:]]
        return [*later, self._commands]

    def all(self) -> None:
        for repeat in range(self._repeats):
            if not self._brief:
                self._each(repeat, self._cold_command)
            self._each(repeat, self._first_life)
            for turn in range(self._pairs):
                self._each(repeat, partial(self._pair, plain_first=(repeat + turn) % 2 == 0))
            variants = self._variants()
            at = repeat % len(variants)
            for variant in [*variants[at:], *variants[:at]]:
                self._each(repeat, variant)
            for guest in self._guests:
                stored = guest.record().snapshot
                if stored is not None:
                    self.samples.add("stored last", guest.size, stored.stored_bytes)
                guest.stop()

    def _each(self, repeat: int, step: Callable[[Guest], str]) -> None:
        for guest in self._guests:
            told = step(guest)
            self._done += 1
            share = 100 * self._done // self._steps
            self._say(f"{share:3d} %  repeat {repeat + 1}/{self._repeats}  {guest.size} MiB  {told}")

    def _take(self, series: str, guest: Guest, timed: Timed) -> None:
        self.samples.add(series, guest.size, timed.wall)
        self._cpu(series, guest, timed.cpu)

    def _cpu(self, series: str, guest: Guest, cpu: Cpu) -> None:
        for who, value in zip(cpu._fields, cpu, strict=True):
            self.samples.add(f"{series} cpu {who}", guest.size, value)

    def _cold_command(self, guest: Guest) -> str:
        timed = guest.command("run")
        self._take("command run", guest, timed)
        guest.stop()
        return f"cold boot as a command {timed.wall:.2f} s"

    def _first_life(self, guest: Guest) -> str:
        """Boot, first sleep, first wake, and a second sleep that nothing dirtied memory for."""
        booted = guest.boot()
        self._take("boot", guest, booted)
        guest.start_worker()
        slept = guest.sleep()
        self._take("first sleep", guest, slept)
        self.samples.add("resident", guest.size, sleep_receipt(slept).resident_bytes)
        assert slept.record.snapshot is not None
        self.samples.add("stored", guest.size, slept.record.snapshot.stored_bytes)
        woken = guest.wake()
        self._take("first wake", guest, woken)
        guest.worker.ask("touch")
        time.sleep(WINDOW_S)
        self._second_sleep(guest, 0)
        return f"boot {booted.wall:.2f} s, first sleep {slept.wall:.2f} s, first wake {woken.wall:.2f} s"

    def _second_sleep(self, guest: Guest, mib: int) -> Timed:
        slept = guest.sleep()
        receipt = sleep_receipt(slept)
        self._take(f"sleep {mib}", guest, slept)
        self.samples.add(f"dirty {mib}", guest.size, receipt.dirty_bytes or 0)
        self.samples.add(f"written {mib}", guest.size, receipt.written_bytes)
        return slept

    def _pair(self, guest: Guest, *, plain_first: bool) -> str:
        guest.make_plain()
        told = []
        for way in (plain, encrypted) if plain_first else (encrypted, plain):
            name = "plain" if way is plain else "encrypted"
            restored = guest.restore(way)
            self.samples.add(name, guest.size, restored.core)
            self.samples.add(f"{name} whole", guest.size, restored.wall)
            self.samples.add(f"{name} served", guest.size, restored.served)
            self._cpu(name, guest, restored.cpu)
            told.append(f"{name} restore {restored.core:.3f} s")
        return ", ".join(told)

    def _wake_and_sleep(self, mib: int, guest: Guest) -> str:
        began = time.perf_counter()
        woken = guest.wake()
        guest.worker.ask("touch")
        served = time.perf_counter() - began
        self._take("wake", guest, woken)
        self.samples.add("wake served", guest.size, served)
        self.samples.add("chunks", guest.size, wake_receipt(woken).chunks_read)
        guest.worker.ask(f"dirty {mib}")
        slept = self._second_sleep(guest, mib)
        return f"wake {woken.wall:.3f} s, sleep after {mib} MiB {slept.wall:.3f} s"

    def _commands(self, guest: Guest) -> str:
        woken = guest.command("wake")
        self._take("command wake", guest, woken)
        guest.worker.ask("touch")
        slept = guest.command("sleep")
        self._take("command sleep", guest, slept)
        return f"wake as a command {woken.wall:.3f} s, sleep {slept.wall:.3f} s"


def judge(samples: Samples, sizes: Sequence[int]) -> list[Verdict]:
    """The targets, for every size they can be read from."""
    low, high = min(sizes), max(sizes)
    found: list[Verdict | None] = [
        ratio(samples, "encrypted restore / plain restore", ("encrypted", n), ("plain", n), 1.10)
        for n in sizes
    ]
    if low != high:
        what = f"wake / wake of the {low} MiB guest"
        found.append(ratio(samples, what, ("wake", high), ("wake", low), 1.15))
    for n in sizes:
        what = "cold boot command / wake command"
        found.append(ratio(samples, what, ("command run", n), ("command wake", n), 10, at_most=False))
    for mib in DIRTY_MIB:
        for n in sizes:
            what = f"second sleep written / found dirty ({mib} MiB)"
            found.append(ratio(samples, what, (f"written {mib}", n), (f"dirty {mib}", n), 1.2))
    for n in sizes:
        found.append(ratio(samples, "snapshot / resident", ("stored", n), ("resident", n), 0.4))
    return [verdict for verdict in found if verdict is not None]


def machine(node: Node) -> dict[str, Any]:
    """What the figures were taken on."""
    folder = node.facade.store.revisions_dir / node.guests[0].plan.revision
    capabilities = node.driver.capabilities(folder / "vmlinux", folder / "initrd")
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": cpu_model().name,
        "kernel": platform.release(),
        node.driver.name: node.driver.version(),
        "acceleration": capabilities.accel,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.sleep_wake", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--sizes", default=",".join(map(str, SIZES)), help="guest memory in MiB, comma separated"
    )
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="at least 5, unless --quick (default %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two repeats: shows that it works, proves nothing"
    )
    parser.add_argument(
        "--brief", action="store_true", help=f"no commands, one pair a repeat, {BRIEF_MIB} MiB dirtied only"
    )
    add_options(parser)
    parser.add_argument("--output", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    try:
        options.sizes = tuple(sorted({int(size) for size in options.sizes.split(",")}))
    except ValueError:
        parser.error("--sizes takes whole numbers, for example 256,2048")
    if options.quick:
        options.repeats = min(options.repeats, 2)
    elif options.repeats < 5:
        parser.error("fewer than 5 repeats give no median worth reading; --quick takes two")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        with measuring_node(options.sizes, say, of_options(options)) as node:
            about = machine(node)
            run = Run(node, options.repeats, say, brief=options.brief)
            run.all()
    except MvmError as error:
        print(f"error: {error.brief}\n{error.details}\n{error.resolution}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    verdicts = judge(run.samples, options.sizes)
    if options.output == "json":
        targets = [{**v._asdict(), "verdict": v.word()} for v in verdicts]
        print(json.dumps({"machine": about, "repeats": options.repeats, "targets": targets,
                          "samples": run.samples.as_dict()}))  # fmt: skip
        return 0
    print("\n" + ", ".join(f"{name}: {value}" for name, value in about.items()))
    print(f"medians of {options.repeats} repeats (lowest to highest)\n")
    print(figures.table(run.samples, ROWS, options.sizes), "", figures.verdicts_table(verdicts), sep="\n")
    if options.quick:
        print("\n--quick: too few samples to conclude anything from.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
