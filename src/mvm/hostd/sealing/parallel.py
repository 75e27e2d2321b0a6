"""Spread one list of work over a few threads and bring back the first error."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
_BATCH = 16


def spread(work: Sequence[T], threads: int, start: Callable[[], Callable[[T], None]]) -> None:
    """Call `start()` once in each thread and what it returns with every item; no order is kept.

    Returns when all threads have ended. After the first error no new item is begun, and it is raised here.
    """
    lock = threading.Lock()
    errors: list[BaseException] = []
    position = 0

    def take() -> Sequence[T]:
        nonlocal position
        with lock:
            batch = () if errors else work[position : position + _BATCH]
            position += len(batch)
        return batch

    def run() -> None:
        try:
            handle = start()
            while batch := take():
                for item in batch:
                    handle(item)
        except BaseException as error:
            with lock:
                errors.append(error)

    extra: list[threading.Thread] = []
    try:
        for _ in range(min(threads, len(work)) - 1):
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            extra.append(thread)
        run()
    except BaseException as error:
        errors.append(error)
    while extra:
        # Also after an interrupt: the caller is about to close what the threads write to.
        try:
            extra[-1].join()
            extra.pop()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]
