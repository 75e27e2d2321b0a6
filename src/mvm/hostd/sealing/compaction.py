"""Which old segments to rewrite, so that incremental sleeps do not grow without bound.

A segment is immutable; records replaced since are dead bytes in it. After planning, and counting the records
rewritten as part of the new segment:

    dead bytes <= live bytes / 2        segments <= SEGMENTS_MAX

so the segments of an image take at most 1.5 times what a full snapshot in the same layers would.
"""

from __future__ import annotations

from typing import NamedTuple

from mvm.hostd.sealing.index import SEGMENTS_MAX


class Usage(NamedTuple):
    """Bytes of one old segment: `live` in records still used, `dead` in records that are not."""

    live: int
    dead: int


def plan(old: list[Usage], new_live: int) -> frozenset[int]:
    """Numbers of the old segments to leave behind: empty ones, then the worst until both rules hold.

    The worst is the one with the most dead bytes for each live byte to copy. One segment of
    SEGMENTS_MAX is the new one.
    """
    victims = {number for number, usage in enumerate(old) if not usage.live}
    live = new_live + sum(usage.live for usage in old)
    kept = sorted(set(range(len(old))) - victims, key=lambda n: old[n].dead / old[n].live)
    while kept and (len(kept) >= SEGMENTS_MAX or 2 * sum(old[n].dead for n in kept) > live):
        victims.add(kept.pop())
    return frozenset(victims)
