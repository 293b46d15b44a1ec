"""A mapping that keeps what was used last, and no more of it than it may. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Newest(Generic[K, V]):
    """The newest values of ``most`` in all: what is read is as new as what was just added. At least one is kept."""

    def __init__(
        self,
        most: float = math.inf,
        size: Callable[[K], int] = lambda _: 1,
        gone: Callable[[K], object] = lambda _: None,
    ) -> None:
        """``size``: what a value counts for, by its key. ``gone``: told of each key whose value was let go of."""
        self._most, self._size, self._gone = most, size, gone
        self._held: OrderedDict[K, V] = OrderedDict()
        #: What all values in it count for.
        self.size = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: K) -> bool:
        return key in self._held

    def get(self, key: K) -> V | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: K, value: V) -> None:
        if key not in self._held:
            self.size += self._size(key)
        self._held[key] = value
        self.shrink(self._most)

    def shrink(self, most: float) -> None:
        """Let go of what was used longest ago until no more than this is left, or one value."""
        while len(self._held) > 1 and self.size > most:
            key, _ = self._held.popitem(last=False)
            self.size -= self._size(key)
            self._gone(key)

    def clear(self) -> None:
        self._held.clear()
        self.size = 0
