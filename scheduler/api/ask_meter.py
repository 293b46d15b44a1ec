"""Counts the asks that end at this API process: for its own ``/metrics``, and in spans for the page of each open job.

Asks are refused and given up where they are gathered, so Postgres alone could not tell of them; and a page must not
show the share of one process. So each writes a row for a job and span to Postgres, once in five seconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal
from uuid import UUID

from motet.errors import Late, Overloaded
from scheduler.ask_times import place
from scheduler.identity import own_name
from scheduler.store import ask_spans
from scheduler.store.ask_spans import KEPT_S, SPAN_S, AskSpan
from scheduler.store.database import Database, StoreUnavailable

log = logging.getLogger(__name__)

#: How an ask may end.
Result = Literal["answered", "late", "refused", "failed"]


class AskMeter:
    """Used from the event loop only; what was counted is written in a thread."""

    def __init__(self, database: Database, waiting: Callable[[], Mapping[UUID, int]]) -> None:
        """``waiting``: rows that wait to land here now, of each open job."""
        self._database, self._waiting = database, waiting
        self._me = own_name()
        self._spans: dict[tuple[UUID, int], AskSpan] = {}
        #: Called with how each ask ended, and the seconds that it took.
        self.heard: Callable[[Result, float], None] = lambda result, seconds: None

    @contextmanager
    def ask(self, job: UUID, rows: int) -> Iterator[None]:
        """Around all that is done for one ask of so many rows."""
        began = time.monotonic()
        try:
            yield
        except Overloaded:
            self._saw(job, 0, "refused", began)
            raise
        except (Late, asyncio.CancelledError, GeneratorExit):
            # Its caller has given up, with a word or without.
            self._saw(job, 0, "late", began)
            raise
        except Exception:
            self._saw(job, 0, "failed", began)
            raise
        self._saw(job, rows, "answered", began)

    @contextmanager
    def door(self, job: UUID) -> Iterator[None]:
        """Around the door, which an ask passes before it is read: one that is turned away there was refused."""
        began = time.monotonic()
        try:
            yield
        except Overloaded:
            self._saw(job, 0, "refused", began)
            raise

    def _saw(self, job: UUID, rows: int, result: Result, began: float) -> None:
        seconds = time.monotonic() - began
        self.heard(result, seconds)
        span = self._span(job, _at(time.time()))
        setattr(span, result, getattr(span, result) + 1)
        if result == "answered":
            span.n_rows += rows
            span.times[place(seconds)] += 1

    def _span(self, job: UUID, at: int) -> AskSpan:
        found = self._spans.get((job, at))
        if found is None:
            found = self._spans[job, at] = AskSpan(at=at)
        return found

    async def keep_told(self) -> None:
        """Write each span as soon as it is over, until cancelled."""
        while True:
            await asyncio.sleep(SPAN_S - time.time() % SPAN_S)
            await self.tell(time.time())

    async def tell(self, now: float) -> None:
        """Write the spans that are over. While Postgres is away they wait, for as long as anybody would ask of them."""
        over = _at(now) - SPAN_S
        for job, rows in self._waiting().items():
            if rows:
                self._span(job, over).waiting = rows
        ended = [(job, span) for (job, at), span in self._spans.items() if at <= over]
        try:
            await asyncio.to_thread(self._store, ended)
        except Exception as error:
            # Whatever it was: the next span is written all the same.
            if not isinstance(error, StoreUnavailable):
                log.error("asks were not counted", exc_info=error)
            over -= KEPT_S
        self._spans = {key: span for key, span in self._spans.items() if key[1] > over}

    def _store(self, spans: list[tuple[UUID, AskSpan]]) -> None:
        if spans:
            with self._database.transaction() as connection:
                ask_spans.store(connection, self._me, spans)


def _at(now: float) -> int:
    return int(now) // SPAN_S * SPAN_S
