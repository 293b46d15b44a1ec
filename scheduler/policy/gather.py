"""Gather: which callers' rows of an open job land together, when, and which are refused. Pure.

An *ask* is one caller's rows; a *group* is the asks that land as one block in one transaction. Nagle's rule
(RFC 896) decides when: a group lands at once where none is under way, soon while fewer than ``width`` are, else when
one of them is answered. A lone caller never waits for company, and groups grow as far as the cluster is behind. Soon,
and not at once, since those who were answered together ask again together: the first of them is not to land alone.
They are complete when a group has its share of all rows that wait or are under way: nobody waits beyond that.

Rows wait here and not in Postgres, since here a refusal is free: nothing was stored that must be undone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Generic, TypeVar

#: Whoever waits for an answer, as the caller of this module knows it.
C = TypeVar("C")

#: Rows that wait for one open job at one process; more are refused. Larger: callers wait seconds for a refusal.
MAX_WAITING_ROWS = 4096
#: Seconds a row takes, as assumed before the first group was answered: it only says when a refused caller comes back.
FIRST_ROW_S = 0.01
#: Weight of the newest group in the measured seconds a row. Larger: one slow group refuses callers for no reason.
_NEWEST = 0.2
#: The shortest ``Retry-After`` of a refusal, in seconds: HTTP counts whole ones. And the longest: after an outage a row
#: seems to take as long as the outage, and callers sent away for hours would not see that it is over.
_RETRY_S, _RETRY_MOST_S = 1.0, 30.0


@dataclass(slots=True, kw_only=True, eq=False)
class Waiting(Generic[C]):
    """One ask that has not landed."""

    caller: C
    rows: int
    #: UTF-8 bytes of its rows.
    bytes: int
    #: On the clock of ``now``: when the caller gives up; ``inf``: never. It may be put off, never brought forward.
    until: float = inf
    #: When it came, on the same clock. ``add`` knows.
    since: float = field(default=0.0, init=False)
    #: It is given up when its caller goes away: it lands with others of which that is so, and a block is dropped whole.
    droppable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group(Generic[C]):
    """Asks that land together, in the order in which they came."""

    asks: tuple[Waiting[C], ...]
    began: float

    @property
    def rows(self) -> int:
        return sum(ask.rows for ask in self.asks)


class GatherFull(Exception):
    """Too many rows wait; the caller may come back after ``retry_after_s`` seconds."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(
            f"{waiting:,} rows wait to land in this job, more than are answered in time;"
            f" come back in {ceil(retry_after_s)} s, or give it more time"
        )
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Gatherer(Generic[C]):
    """The asks of one open job at one process."""

    #: Groups under way at most, before the next one waits for an answer.
    width: int
    #: Rows and bytes of a group at most: about one interactive micro-batch, since a block is answered whole.
    max_rows: int
    max_bytes: int
    #: A group is one ask: where a pass writes text, callers do not wait for each other's answers.
    alone: bool = False
    #: Seconds for which an ask waits for company at most, while others are under way.
    patience_s: float = 0.0
    #: Seconds from landing to answer per row, smoothed.
    row_s: float = FIRST_ROW_S
    #: In the order in which they came; a set, so that one of thousands leaves without a search.
    _queue: OrderedDict[Waiting[C], None] = field(default_factory=OrderedDict)
    _rows: int = 0
    #: Nobody in the queue gives up before.
    _soonest: float = inf
    _under_way: set[Group[C]] = field(default_factory=set)
    #: Rows that waited or were under way when the last group landed.
    _were_here: int = 0

    @property
    def waiting_rows(self) -> int:
        return self._rows

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    def add(self, ask: Waiting[C], now: float) -> None:
        """Let an ask wait. Raises GatherFull where the queue is full, or its caller would give up before it lands."""
        wait_s = self.row_s * self._rows
        if self._rows + ask.rows > MAX_WAITING_ROWS or now + wait_s > ask.until:
            raise GatherFull(self._rows, min(max(_RETRY_S, wait_s), _RETRY_MOST_S))
        ask.since = now
        self._queue[ask] = None
        self._rows += ask.rows
        self._soonest = min(self._soonest, ask.until)

    def leave(self, ask: Waiting[C]) -> bool:
        """Its caller went away: True where the ask had not landed yet, and now never will."""
        if ask not in self._queue:
            return False
        del self._queue[ask]
        self._rows -= ask.rows
        return True

    def waits(self, ask: Waiting[C]) -> bool:
        """Whether it has not landed yet."""
        return ask in self._queue

    def late(self, now: float) -> list[Waiting[C]]:
        """Take out the asks whose callers have given up: nothing of them was stored."""
        if now < self._soonest:
            return []
        late = [ask for ask in self._queue if ask.until <= now]
        for ask in late:
            self.leave(ask)
        self._soonest = min((ask.until for ask in self._queue), default=inf)
        return late

    def next(self, now: float) -> Group[C] | None:
        """The group to land now, or None: nobody waits, enough is under way, or company may come."""
        if not self._queue or len(self._under_way) >= self.width or self.patient_until() > now:
            return None
        self._were_here = self._here()
        asks, rows, size = list[Waiting[C]](), 0, 0
        while self._queue and not (asks and self.alone):
            ask = next(iter(self._queue))
            if asks and (rows + ask.rows > self.max_rows or size + ask.bytes > self.max_bytes):
                break
            if asks and ask.droppable is not asks[0].droppable:
                break
            del self._queue[ask]
            asks.append(ask)
            rows, size = rows + ask.rows, size + ask.bytes
        self._rows -= rows
        group = Group(asks=tuple(asks), began=now)
        self._under_way.add(group)
        return group

    def patient_until(self) -> float:
        """Until when those that wait, wait for company; -inf: they do not."""
        if not self._queue or not self._under_way or self.alone or self._rows >= self._enough():
            return -inf
        return next(iter(self._queue)).since + self.patience_s

    def _enough(self) -> int:
        """Rows with which a group need not wait for more: one group's share of all that are here, or were when the last
        group landed, since who was answered asks again."""
        return min(self.max_rows, ceil(max(self._here(), self._were_here) / self.width))

    def _here(self) -> int:
        return self._rows + sum(group.rows for group in self._under_way)

    def answered(self, group: Group[C], now: float) -> None:
        """Its cells are sealed, and the next group may land. Twice is harmless."""
        if group in self._under_way:
            self._under_way.remove(group)
            row_s = (now - group.began) / group.rows / max(1, self.width)
            self.row_s += _NEWEST * (row_s - self.row_s)

    def failed(self, group: Group[C]) -> None:
        """It did not land, or nobody will answer it: the next one may, and nothing is learned."""
        self._under_way.discard(group)

    def drain(self) -> Sequence[Waiting[C]]:
        """Take out all that wait: the job has ended, or the process does."""
        rest = tuple(self._queue)
        self._queue.clear()
        self._rows, self._soonest = 0, inf
        return rest
