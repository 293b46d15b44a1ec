"""Rows of several sub-tasks inside one continuous engine: who is let in, who has ended, and who was at fault.

Belongs to the executor's thread. Interactive rows first, then sub-tasks in the order of their arrival; a suspect of
killing its process is inside with nobody else, and so are the rows of a failed step, until the one at fault is found.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from workers.attempts import Key
from workers.batching import longest_first
from workers.engine import ContinuousEngine, Ended, Pass, Prepared, Step
from workers.work import Work

Held = tuple[Work, Prepared]


class Flow:
    """The rows inside one loaded model."""

    def __init__(self, engine: ContinuousEngine, handle: Any) -> None:
        self._engine, self._handle = engine, handle
        self._tickets = itertools.count()
        self._inside: dict[Hashable, Held] = {}
        #: Rows of a step that failed, in groups that go in one after the other.
        self._suspects: list[list[Held]] = []
        #: Rows inside at most, once there was no memory for more.
        self._most: int | None = None

    def __len__(self) -> int:
        return len(self._inside)

    @property
    def waits(self) -> bool:
        """Rows are inside, or must go in before any other."""
        return bool(self._inside or self._suspects)

    @property
    def interactive(self) -> bool:
        """Somebody waits for all that is inside."""
        return bool(self._inside) and all(work.interactive for work, _ in self._inside.values())

    @property
    def alone(self) -> bool:
        """A suspect of killing its process is inside."""
        return any(work.order.exclusive for work, _ in self._inside.values())

    def running(self) -> dict[Key, tuple[int, ...]]:
        """The rows inside, by attempt: evidence for poison."""
        rows: defaultdict[Key, list[int]] = defaultdict(list)
        for work, row in self._inside.values():
            rows[work.order.key].append(row.row)
        return {key: tuple(positions) for key, positions in rows.items()}

    def holds(self, work: Work) -> bool:
        """Some of its rows are inside, or wait among the suspects."""
        waiting = itertools.chain(self._inside.values(), *self._suspects)
        return any(one is work for one, _ in waiting)

    def forget(self, held: Callable[[Work], bool]) -> None:
        """Put out the rows that nobody waits for any more."""
        gone = [ticket for ticket, (work, _) in self._inside.items() if not held(work)]
        if gone:
            self._engine.abort(self._handle, gone)
            for ticket in gone:
                del self._inside[ticket]
        groups = ([one for one in group if held(one[0])] for group in self._suspects)
        self._suspects = [group for group in groups if group]

    def let_in(self, works: Sequence[Work]) -> None:
        """Let in what there is room for. ``works``: those with rows ready for this model, in their order."""
        if self._suspects:
            if not self._inside:
                group = self._suspects.pop()
                rest = group[self._admitted(group) :]
                self._suspects += [rest] if rest else []
            return
        if self.alone:
            return
        for work in works:
            if work.order.exclusive:
                if not self._inside:
                    self._take_from(work)
                return
            if not self._take_from(work):
                return

    def step(self, tokens: int) -> tuple[Step, list[tuple[Work, Prepared, Ended]]]:
        """Go on, and take out what has ended. Raises what engines raise; then all rows are still inside."""
        step = self._engine.step(self._handle, tokens)
        return step, [(*self._inside.pop(ended.ticket), ended) for ended in step.ended]

    def failed(self) -> list[Held]:
        """A step failed for a reason nobody knows: its rows go in again by halves. The row at fault, once it is alone."""
        rows = self._out(list(self._inside))
        if len(rows) == 1:
            return rows
        middle = len(rows) // 2
        self._suspects += [rows[middle:], rows[:middle]]
        return []

    def out_of_memory(self) -> list[Held]:
        """There was no memory: the newest half waits again, and so many are the most from now on.

        The only row, where there was but one.
        """
        tickets = list(self._inside)
        if len(tickets) == 1:
            # It was this row, and not how many were beside it.
            self._most = None
            return self._out(tickets)
        kept = len(tickets) // 2
        self._most = kept
        for work, row in self._out(tickets[kept:]):
            work.rows = longest_first([row, *work.rows])
        return []

    def _take_from(self, work: Work) -> bool:
        """Let in its rows, the longest first. False: there was no room for all of them."""
        count = self._admitted([(work, row) for row in work.rows])
        del work.rows[:count]
        return not work.rows

    def _admitted(self, rows: Sequence[Held]) -> int:
        """Let in as many as there is room for. How many."""
        for count, (work, row) in enumerate(rows):
            if self._most is not None and len(self._inside) >= self._most:
                return count
            ticket = next(self._tickets)
            pass_ = Pass(self._handle, work.tasks, work.key.max_tokens, tenant=work.order.tenant)
            if not self._engine.admit(pass_, row, ticket, urgent=work.interactive):
                return count
            self._inside[ticket] = (work, row)
        return len(rows)

    def _out(self, tickets: Sequence[Hashable]) -> list[Held]:
        self._engine.abort(self._handle, tickets)
        return [self._inside.pop(ticket) for ticket in tickets]
