"""Where the time of one wake goes. Needs root.

    python -m bench.profile_wake [--vmm qemu|firecracker] [--size 256] [--repeats 10] [--output text|json]

Restores one sleeping guest again and again, plain and encrypted in turn, by the steps of a wake, and shows for each
step its wall time and the CPU time that command, keeper and VMM spent meanwhile; for the pager, what the kernel asked
for, what was decrypted, for whom, and how often twice; for the VMM its page faults; for the guest the times of its own
report. All are medians. The pager here is the product's, watched: that costs it a few microseconds per chunk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from bench.cost import Cpu
from bench.figures import aligned
from bench.node import Restored, encrypted, measuring_node, plain
from bench.target import Target, add_options, of_options

from mvm.core.errors import MvmError
from mvm.hostd import pager
from mvm.hostd.sealing import CHUNK, SealedImage

_EVENT = struct.Struct("<ddQII")
_EVENTS_MAX = 1 << 16
READ, DECRYPT, STORE = 1, 2, 3


class Event(NamedTuple):
    """`began`, `took`: seconds, by time.perf_counter. `ahead`: done before it was asked for."""

    began: float
    took: float
    what: int
    kind: int
    ahead: int


class EventLog:
    """Written in the keeper, read in the process that forked it: memory the two share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _EVENT.size * _EVENTS_MAX)
        self._next = itertools.count()  # one step of it is atomic among threads

    def add(self, began: float, what: int, kind: int, *, ahead: bool) -> None:
        slot = next(self._next)
        if slot < _EVENTS_MAX:
            event = (began, time.perf_counter() - began, what, kind, ahead)
            _EVENT.pack_into(self._memory, slot * _EVENT.size, *event)

    def events(self) -> Iterator[Event]:
        for slot in range(_EVENTS_MAX):
            event = Event(*_EVENT.unpack_from(self._memory, slot * _EVENT.size))
            if not event.kind:
                return
            yield event


class WatchedPager(pager.Pager):
    """The pager, noting what it does."""

    log = EventLog()

    def __init__(self, image: SealedImage, device: int, uid: int, gid: int) -> None:
        super().__init__(image, device, uid, gid)
        self._log = WatchedPager.log
        self._who = threading.local()
        store = self._server.store

        def watched_store(offset: int, data: bytes | bytearray | memoryview) -> None:
            began = time.perf_counter()
            store(offset, data)
            self._log.add(began, offset // CHUNK, STORE, ahead=True)

        # The server is the pager's own, so there is no subclass to put in its place.
        self._server.store = watched_store  # type: ignore[method-assign]

    def read(self, offset: int, size: int) -> list[bytes | memoryview]:
        began = time.perf_counter()
        found = super().read(offset, size)
        self._log.add(began, size, READ, ahead=False)
        return found

    def _store(self, numbers: list[int], wanted: dict[int, list[tuple[int, int]]]) -> None:
        self._who.ahead = True
        super()._store(numbers, wanted)

    def _decrypt(self, number: int) -> bytes | bytearray:
        began = time.perf_counter()
        found = super()._decrypt(number)
        self._log.add(began, number, DECRYPT, ahead=getattr(self._who, "ahead", False))
        return found


@contextmanager
def watched() -> Iterator[EventLog]:
    """Pagers made inside note what they do in the log given."""
    original, WatchedPager.log = pager.Pager, EventLog()
    # A class is no variable to a type checker; what the operation makes is made by this name.
    pager.Pager = WatchedPager  # type: ignore[misc]
    try:
        yield WatchedPager.log
    finally:
        pager.Pager = original  # type: ignore[misc]


class PagerUse(NamedTuple):
    """Of one wake until the guest's answer. Times in seconds, summed over threads that ran at once."""

    reads: int
    read_mib: float
    read_s: float
    decrypted: int
    different: int
    ahead: int
    on_demand: int
    decrypt_s: float
    store_s: float
    decrypted_before_resume: int


def pager_use(events: Sequence[Event], restored: Restored) -> PagerUse:
    """What of `events` ended before the guest answered."""
    seen = [e for e in events if e.began + e.took <= restored.answered_at]
    reads = [e for e in seen if e.kind == READ]
    decrypts = [e for e in seen if e.kind == DECRYPT]
    resumed = restored.began_at
    for step in restored.steps:
        resumed += step.wall
        if step.name == "resume":
            break
    return PagerUse(
        reads=len(reads),
        read_mib=sum(e.what for e in reads) / (1 << 20),
        read_s=sum(e.took for e in reads),
        decrypted=len(decrypts),
        different=len({e.what for e in decrypts}),
        ahead=sum(e.ahead for e in decrypts),
        on_demand=sum(not e.ahead for e in decrypts),
        decrypt_s=sum(e.took for e in decrypts),
        store_s=sum(e.took for e in seen if e.kind == STORE),
        decrypted_before_resume=sum(e.began + e.took <= resumed for e in decrypts),
    )


def profile(size: int, repeats: int, say: Callable[[str], None], target: Target) -> dict[str, Any]:
    """Medians, as a JSON-able object."""
    without: list[Restored] = []
    sealed: list[Restored] = []
    used: list[PagerUse] = []
    with measuring_node((size,), say, target) as node:
        guest = node.guests[0]
        guest.put_to_sleep()
        for repeat in range(repeats):
            say(f"{100 * repeat // repeats:3d} %  repeat {repeat + 1}/{repeats}")
            for is_plain in (True, False) if repeat % 2 else (False, True):
                with watched() as log:
                    restored = guest.restore(plain if is_plain else encrypted)
                if is_plain:
                    without.append(restored)
                else:
                    sealed.append(restored)
                    used.append(pager_use(list(log.events()), restored))
    return {
        "size_mib": size,
        "repeats": repeats,
        "plain": _medians(without),
        "encrypted": _medians(sealed),
        "pager": {name: statistics.median(getattr(use, name) for use in used) for name in PagerUse._fields},
    }


def _medians(all_of_them: Sequence[Restored]) -> dict[str, Any]:
    def median(of: Callable[[Restored], float]) -> float:
        return statistics.median(of(each) for each in all_of_them)

    def by_process(costs: Sequence[Sequence[float]]) -> dict[str, float]:
        """`costs`: a Cpu of each wake."""
        return {who: statistics.median(cost[w] for cost in costs) for w, who in enumerate(Cpu._fields)}

    steps = {
        step.name: {
            "wall": statistics.median(each.steps[n].wall for each in all_of_them),
            **by_process([each.steps[n].cpu for each in all_of_them]),
        }
        for n, step in enumerate(all_of_them[0].steps)
    }
    report = all_of_them[0].report
    own = [name for name in type(report).__struct_fields__ if name.endswith("_us")]
    return {
        "core": median(lambda r: r.core),
        "wall": median(lambda r: r.wall),
        "served": median(lambda r: r.served),
        "cpu": by_process([each.cpu for each in all_of_them]),
        "steps": steps,
        "guest_us": {
            name: statistics.median(getattr(each.report, name) for each in all_of_them) for name in own
        },
        "faults": {"minor": median(lambda r: r.faults.minor), "major": median(lambda r: r.faults.major)},
    }


def render(found: dict[str, Any]) -> str:
    """The profile for people."""
    parts = [f"{found['size_mib']} MiB guest, medians of {found['repeats']} restores of one image\n"]
    for name in ("plain", "encrypted"):
        one = found[name]
        rows = [[f"{name} restore", "wall", *(f"CPU {who}" for who in Cpu._fields)]]
        for step, spent in one["steps"].items():
            rows.append([f"  {step}", *(_ms(spent[key]) for key in ("wall", *Cpu._fields))])
        rows.append(
            ["  until the guest answers", _ms(one["wall"]), *(_ms(one["cpu"][w]) for w in Cpu._fields)]
        )
        rows.append(["  of that, without `assemble`", _ms(one["core"]), "", "", ""])
        parts.append(aligned(rows))
        guest = ", ".join(
            f"{key.removesuffix('_us')} {value / 1000:.2f} ms" for key, value in one["guest_us"].items()
        )
        parts.append(f"  guest, by its own clock: {guest}")
        parts.append(
            f"  VMM page faults: {one['faults']['minor']:.0f} minor, {one['faults']['major']:.0f} major\n"
        )
    use = PagerUse(**found["pager"])
    parts.append(
        aligned(
            [
                ["pager, until the guest answers", ""],
                [
                    "  reads by the kernel",
                    f"{use.reads:.0f}, {use.read_mib:.1f} MiB, {_ms(use.read_s)} in them",
                ],
                ["  chunks decrypted", f"{use.decrypted:.0f}, of which {use.different:.0f} different ones"],
                ["  ahead of the guest", f"{use.ahead:.0f}; on demand {use.on_demand:.0f}"],
                ["  before the vCPUs went on", f"{use.decrypted_before_resume:.0f}"],
                ["  time in decryption", f"{_ms(use.decrypt_s)}; in storing ahead {_ms(use.store_s)}"],
            ]
        )
    )
    parts.append(f"\nencrypted / plain: {found['encrypted']['core'] / found['plain']['core']:.2f} x")
    return "\n".join(parts)


def _ms(value: float) -> str:
    return f"{value * 1000:.1f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.profile_wake", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", type=int, default=256, help="guest memory in MiB (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=10)
    add_options(parser)
    parser.add_argument("--output", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats is at least 1")
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        found = profile(options.size, options.repeats, say, of_options(options))
    except MvmError as error:
        print(f"error: {error.brief}\n{error.details}\n{error.resolution}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(found) if options.output == "json" else render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
