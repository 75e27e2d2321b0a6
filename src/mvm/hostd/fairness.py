"""How much of the daemon one user may take: so many things of a kind at once, and so many a second after that.

For what costs others something: an entry in a tenant's audit log, which is fsynced by the loop and stays for ever, and
a line in the daemon's own log, which a journal cuts off for everybody when there are too many. Root is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_USERS = 1024


class Allowance:
    """Per user: `burst` at once, `rate` a second. A user who has not asked for long has all of it again."""

    def __init__(self, burst: int, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = float(burst)
        self._rate = rate
        self._clock = clock
        self._left: dict[int, tuple[float, float]] = {}
        self._kept_back: dict[int, int] = {}

    def take(self, uid: int) -> bool:
        """Whether one more is within what `uid` may have."""
        if uid == 0:
            return True
        now = self._clock()
        left, then = self._left.get(uid, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        if left < 1.0:
            self._kept_back[uid] = self._kept_back.get(uid, 0) + 1
            self._left[uid] = (left, now)
            return False
        self._left[uid] = (left - 1.0, now)
        if len(self._left) > _USERS:
            self._forget(now)
        return True

    def kept_back(self, uid: int) -> int:
        """How many were refused since this was asked last."""
        return self._kept_back.pop(uid, 0)

    def _forget(self, now: float) -> None:
        full = [
            uid for uid, (left, then) in self._left.items() if left + (now - then) * self._rate >= self._burst
        ]
        for uid in full:
            del self._left[uid]
            self._kept_back.pop(uid, None)
