"""The attempts that this process knows: held, seen before, dropped, left. Shared by all its threads.

Held is told to the scheduler in every beat, from the moment the message leaves the queue until the outcome is
on the stream: an attempt that is neither held, nor queued, nor on the stream is lost, and its rows are rescued.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable

Key = tuple[int, int]

#: Attempts remembered as seen, so that one that is delivered twice runs once.
REMEMBERED = 20_000
#: Seconds for which an attempt is told to have been left.
LEFT_S = 30.0


class Attempts:
    """One owner for what is held, seen, dropped and left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._held: set[Key] = set()
        self._begun: dict[Key, None] = {}
        self._dropped: frozenset[Key] = frozenset()
        #: Attempt -> when it was left.
        self._left: dict[Key, float] = {}

    def receive(self, key: Key) -> None:
        """Its message has left the queue. Twice is harmless."""
        with self._lock:
            if key not in self._begun:
                self._held.add(key)

    def begin(self, key: Key) -> bool:
        """Begin to work on it. False where that happened before, or where it was dropped: then leave it."""
        with self._lock:
            if key in self._begun:
                return False
            self._begun[key] = None
            if len(self._begun) > REMEMBERED:
                self._begun.pop(next(iter(self._begun)))
            if key in self._dropped:
                self._held.discard(key)
                return False
            self._held.add(key)
            return True

    def release(self, key: Key) -> None:
        """It is no longer held: its outcome is on the stream, or nobody waits for one. Twice is harmless."""
        with self._lock:
            self._held.discard(key)

    def leave(self, key: Key) -> None:
        """It came here and cannot run: it is no longer held, and that is told for a while."""
        with self._lock:
            self._held.discard(key)
            self._left[key] = self._clock()

    def drop(self, keys: Iterable[Key]) -> Collection[Key]:
        """Replace the attempts that must stop, as the newest control word says; return those held here."""
        with self._lock:
            self._dropped = frozenset(keys)
            return self._dropped & self._held

    def dropped(self, key: Key) -> bool:
        return key in self._dropped

    def held(self) -> tuple[Key, ...]:
        with self._lock:
            return tuple(sorted(self._held))

    def left(self) -> tuple[Key, ...]:
        """Those that were left lately."""
        with self._lock:
            oldest = self._clock() - LEFT_S
            self._left = {key: at for key, at in self._left.items() if at >= oldest}
            return tuple(sorted(self._left))
