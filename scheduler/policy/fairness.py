"""Fairness: start-time fair queueing in device-seconds, by class, tenant and job. Pure.

Each account has a virtual time at which its next work starts. Whoever has the smallest goes next; work moves it on
by seconds / weight. An account that comes back after a pause starts where the others are, never at 0, so that
nobody saves up (Goyal, Vin, Cheng, SIGCOMM 1996; reference: performance 4.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar

INTERACTIVE, NORMAL, BULK = 0, 1, 2
#: Shares of the classes where both wait. Interactive work is a lane of its own, before both.
CLASS_WEIGHTS = {INTERACTIVE: 1.0, NORMAL: 4.0, BULK: 1.0}


@dataclass(slots=True, eq=False)
class Account:
    """What a class, a tenant or a job was given."""

    weight: float
    parent: Account | None = None
    #: Virtual time at which its next work starts, on its parent's scale.
    start: float = 0.0
    #: Virtual time of its children: the latest start of what has begun.
    clock: float = 0.0
    #: Things below it that wait or run: without any it is away.
    present: int = 0

    def come(self) -> None:
        """One more thing below it waits or runs."""
        if self.present == 0 and self.parent is not None:
            self.start = max(self.start, self.parent.clock)
            self.parent.come()
        self.present += 1

    def go(self) -> None:
        """One thing less."""
        self.present -= 1
        if self.present == 0 and self.parent is not None:
            self.parent.go()

    def charge(self, seconds: float) -> StartTags:
        """It is given work: its start, and that of all above it, moves on by device-seconds / weight.

        The work may wait for its device for a while: call `begun` with the answer when the device comes to it.
        """
        tags = []
        account, parent = self, self.parent
        while parent is not None:
            start = account.start
            tags.append((parent, start))
            account.start = start + seconds / account.weight
            account, parent = parent, parent.parent
        return tags

    def correct(self, seconds: float) -> None:
        """What it was charged with turned out to be so much more (or less, below 0)."""
        account, parent = self, self.parent
        while parent is not None:
            account.start += seconds / account.weight
            account, parent = parent, parent.parent

    @property
    def owed(self) -> float:
        """Device-seconds that it lags behind those served last; below 0 where it is ahead."""
        return (self.parent.clock - self.start) * self.weight if self.parent is not None else 0.0


#: Of each account above the charged one, the charged child's start tag (Goyal 1996, 2.1).
StartTags = Sequence[tuple[Account, float]]


def begun(tags: StartTags) -> None:
    """Work that was charged has begun: whoever comes now starts no earlier than it did."""
    for account, start in tags:
        if start > account.clock:
            account.clock = start


Item = TypeVar("Item")


@dataclass(slots=True)
class FairQueue(Generic[Item]):
    """A priority queue whose keys change while items wait: a key that has grown is put right when it comes to the top.

    So a change costs nothing, and the first is found in O(log n), amortised. A key that shrinks needs ``again``.
    """

    key: Callable[[Item], tuple[float, ...]]
    waits: Callable[[Item], bool]
    _heap: list[tuple[tuple[float, ...], int, Item]] = field(default_factory=list)
    #: Item -> its newest key in the heap; other entries of it are dead.
    _keys: dict[int, tuple[float, ...]] = field(default_factory=dict)
    _order: count[int] = field(default_factory=count)

    def join(self, item: Item) -> None:
        """Put it into the queue, once."""
        if id(item) not in self._keys:
            self._push(item)

    def again(self, item: Item) -> None:
        """Its key may have shrunk."""
        known = self._keys.get(id(item))
        if known is not None and self.key(item) < known:
            if len(self._heap) == 1:
                # Nothing of before is left behind where it is alone, as most are most of the time.
                self._heap.clear()
            self._push(item)

    def first(self) -> Item | None:
        """The item with the smallest key; items that do not wait any more leave the queue."""
        heap, keys = self._heap, self._keys
        while heap:
            key, _, item = heap[0]
            if keys.get(id(item)) is not key:
                heappop(heap)
            elif not self.waits(item):
                heappop(heap)
                del keys[id(item)]
            elif len(heap) == 1:
                return item
            elif (grown := self.key(item)) > key:
                keys[id(item)] = grown
                heapreplace(heap, (grown, next(self._order), item))
            else:
                return item
        return None

    def _push(self, item: Item) -> None:
        self._keys[id(item)] = key = self.key(item)
        heappush(self._heap, (key, next(self._order), item))
