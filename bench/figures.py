"""Samples, their medians, and the ratios that the targets are about: pure.

A sample belongs to a series (what was measured) and a guest size in MiB. Every ratio is one of medians taken in
the same run, so a slower machine moves both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    median: float
    low: float
    high: float


class Samples:
    """Values by series and size, in the order in which they were taken."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, list[float]]] = {}

    def add(self, series: str, size: int, value: float) -> None:
        self._values.setdefault(series, {}).setdefault(size, []).append(value)

    def values(self, series: str, size: int) -> Sequence[float]:
        return self._values.get(series, {}).get(size, ())

    def has(self, series: str) -> bool:
        return series in self._values

    def summary(self, series: str, size: int) -> Summary | None:
        """None where nothing was measured."""
        values = self.values(series, size)
        if not values:
            return None
        return Summary(statistics.median(values), min(values), max(values))

    def as_dict(self) -> Mapping[str, Mapping[str, Sequence[float]]]:
        """Everything, for JSON: series -> size -> samples."""
        return {series: {str(size): v for size, v in by.items()} for series, by in self._values.items()}


class Verdict(NamedTuple):
    """`value` against `bound`; `at_most` says which side holds. `spread`: lowest and highest over the repeats."""

    what: str
    size: int
    value: float
    bound: float
    at_most: bool
    spread: tuple[float, float]

    @property
    def held(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def word(self) -> str:
        return "held" if self.held else "missed"


def ratio(
    samples: Samples,
    what: str,
    over: tuple[str, int],
    under: tuple[str, int],
    bound: float,
    *,
    at_most: bool = True,
) -> Verdict | None:
    """Median over median; the spread is that of the pairs (nth by nth). None where a side was not measured."""
    above, below = samples.values(*over), samples.values(*under)
    if not above or not below:
        return None
    pairs = [a / b for a, b in zip(above, below, strict=False) if b > 0]
    divisor = statistics.median(below)
    if divisor <= 0 or not pairs:
        return None
    value = statistics.median(above) / divisor
    return Verdict(what, over[1], value, bound, at_most, (min(pairs), max(pairs)))


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def mebibytes(value: float) -> str:
    return f"{value / (1 << 20):.2f} MiB"


def table(
    samples: Samples, rows: Sequence[tuple[str, str, Callable[[float], str]]], sizes: Sequence[int]
) -> str:
    """`rows`: (series, label, format). A column for each size, cells `median (low to high)`."""
    lines = [["", *(f"{size} MiB" for size in sizes)]]
    for series, label, form in rows:
        if not samples.has(series):
            continue
        cells = [label]
        for size in sizes:
            found = samples.summary(series, size)
            cells.append(
                "-" if found is None else f"{form(found.median)} ({form(found.low)} to {form(found.high)})"
            )
        lines.append(cells)
    return aligned(lines)


def verdicts_table(verdicts: Sequence[Verdict]) -> str:
    lines = [["target", "guest", "measured", "wanted", ""]]
    for each in verdicts:
        wanted = f"{'at most' if each.at_most else 'at least'} {each.bound:g} x"
        measured = f"{each.value:.2f} x ({each.spread[0]:.2f} to {each.spread[1]:.2f})"
        lines.append([each.what, f"{each.size} MiB", measured, wanted, each.word()])
    return aligned(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
