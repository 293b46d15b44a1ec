"""Looks: what many requests want to know at one moment is looked up once, in a thread, and told to all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Looks(Generic[K, V]):
    """The looks under way. Used from the event loop only.

    Callers come together: those that were answered together ask again together, and after a pause all do. A look for
    each of them would be as many threads, connections and round trips before the first of them is served.
    """

    def __init__(self) -> None:
        self._under_way: dict[K, asyncio.Future[V]] = {}

    def under_way(self, key: K) -> bool:
        return key in self._under_way

    async def at(self, key: K, look: Callable[[], V]) -> V:
        """What ``look`` finds, or the one that is under way. Raises what that raises."""
        found = self._under_way.get(key)
        if found is None:
            # A task of its own: the others are told, though the first of them goes away.
            found = self._under_way[key] = asyncio.ensure_future(run_in_threadpool(look))
            found.add_done_callback(lambda ended: self._end(key, ended))
        return await asyncio.shield(found)

    def _end(self, key: K, ended: asyncio.Future[V]) -> None:
        del self._under_way[key]
        # All that waited may have gone: then nobody else looks at the error.
        if not ended.cancelled():
            ended.exception()
