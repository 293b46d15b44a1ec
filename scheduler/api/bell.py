"""The bell: wakes requests that wait for a job, without a thread or a query for each.

One connection per process listens to Postgres. It is a hint only: whoever waits looks again every second, so
a lost notification costs a second and a database that is away costs nothing more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar
from uuid import UUID

import psycopg
from starlette.concurrency import run_in_threadpool

from scheduler.store.listening import job_changes

T = TypeVar("T")

log = logging.getLogger(__name__)

#: Longest that a request may ask to wait.
MAX_WAIT_S = 30.0
_POLL_S = 1.0
_RECONNECT_S = 1.0


class Bell:
    """Used from the event loop only, but for ``stop``, which a signal handler calls there too."""

    def __init__(self, libpq_url: str) -> None:
        self._libpq_url = libpq_url
        self._waiting: dict[UUID, set[asyncio.Event]] = {}
        #: Told of every job that changes.
        self.told: Callable[[UUID], object] = lambda _: None
        #: The process is about to end: nobody waits any longer.
        self.stopping = False

    async def run(self) -> None:
        """Listen for ever."""
        while True:
            try:
                async for job in job_changes(self._libpq_url):
                    self._ring(job)
            except (psycopg.Error, OSError) as error:
                log.warning("listening lost", extra={"error": type(error).__name__})
            await asyncio.sleep(_RECONNECT_S)

    def stop(self) -> None:
        """Send everybody home."""
        self.stopping = True
        self._ring(None)

    @contextmanager
    def heard(self, job: UUID) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job changes."""
        rung = asyncio.Event()
        self._waiting.setdefault(job, set()).add(rung)
        try:
            yield rung
        finally:
            self._waiting[job].discard(rung)
            if not self._waiting[job]:
                del self._waiting[job]

    def _ring(self, job: UUID | None) -> None:
        """Wake those who wait for a job; None: everybody, for something may have been missed."""
        if job is not None:
            self.told(job)
        heard = [self._waiting.get(job, set())] if job is not None else list(self._waiting.values())
        for events in heard:
            for rung in events:
                rung.set()

    async def until(
        self,
        job: UUID,
        wait_s: float,
        look: Callable[[], T | None],
        gone: Callable[[], Awaitable[bool]],
    ) -> T | None:
        """What ``look`` finds, as soon as it finds something; None after ``wait_s``, or when nobody listens."""
        clock = asyncio.get_running_loop().time
        end = clock() + min(wait_s, MAX_WAIT_S)
        with self.heard(job) as rung:
            while True:
                # Cleared before looking: a change during the look rings again.
                rung.clear()
                found = await run_in_threadpool(look)
                left_s = end - clock()
                if found is not None or left_s <= 0 or self.stopping or await gone():
                    return found
                with suppress(TimeoutError):
                    await asyncio.wait_for(rung.wait(), min(left_s, _POLL_S))
