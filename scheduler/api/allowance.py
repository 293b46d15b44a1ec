"""How often one token may ask: so that a program that runs wild takes from its own share, and from nobody else's.

A bucket for each token, filled at a steady rate, emptied by requests. One per API process, and nothing is stored:
behind several of them a token has as many times as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from threading import Lock

from cachetools import LRUCache

#: A full bucket holds what comes in so many seconds: bursts are no harm.
BURST_S = 10.0
#: Buckets that are kept, the last used ones. One that is forgotten was most likely full.
_KEPT = 10_000


class Allowance:
    """Safe between threads."""

    def __init__(self, requests_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``requests_s``: requests a second in the long run; 0: as many as anybody likes."""
        self._requests_s, self._clock = requests_s, clock
        #: Token -> (requests left, when that was so).
        self._buckets: LRUCache[str, tuple[float, float]] = LRUCache(_KEPT)
        self._lock = Lock()

    def take(self, token: str, cost: float = 1.0) -> float:
        """Take a request, or ``cost`` of one, out of a token's bucket. Seconds until there will be so much; 0: granted."""
        if not 0 < self._requests_s < inf:
            return 0.0
        now, full = self._clock(), max(1.0, self._requests_s * BURST_S)
        with self._lock:
            left, since = self._buckets.get(token, (full, now))
            left = min(full, left + (now - since) * self._requests_s)
            granted = left >= cost
            self._buckets[token] = (left - cost * granted, now)
        return 0.0 if granted else (cost - left) / self._requests_s
