"""Phases of an operation, for progress while it runs and for its receipt afterwards."""

from __future__ import annotations

import time

from mvm.core.snapshot import Phase
from mvm.wire.executor import Progress


class Stopwatch:
    """Consecutive named phases. `phase(name)` ends the one before; names are what a person reads."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._began = self._since = time.perf_counter_ns()
        self._name = ""
        self._phases: list[Phase] = []

    def phase(self, name: str) -> None:
        self._end()
        self._name = name
        self._progress(name)

    def stop(self) -> tuple[tuple[Phase, ...], int]:
        """(phases, nanoseconds in all)."""
        self._end()
        self._name = ""
        return tuple(self._phases), time.perf_counter_ns() - self._began

    def _end(self) -> None:
        now = time.perf_counter_ns()
        if self._name:
            self._phases.append(Phase(name=self._name, ns=now - self._since))
        self._since = now
