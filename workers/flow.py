"""Rows of several sub-tasks inside one continuous engine: who is let in, who has ended, and who was at fault.

Belongs to the executor's thread. Interactive rows first, then sub-tasks in the order of their arrival; a suspect of
killing its process is inside with nobody else, and so are the rows of a failed step, until the one at fault is found.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from workers.attempts import Key
from workers.batching import longest_first
from workers.engine import ContinuousEngine, DeviceBroken, Ended, OutOfMemory, Pass, Prepared, Step
from workers.work import Work

Held = tuple[Work, Prepared]


class Unsound(Exception):
    """The engine cannot put rows out: nobody knows what is inside it any more, so the model must be given up."""


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
        #: The row for which there was no memory, though no other was inside.
        self._too_large: Held | None = None

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

    def forget(self, held: Callable[[Work], bool]) -> list[Held]:
        """Put out the rows that nobody waits for any more. None of them is an error."""
        gone = [ticket for ticket, (work, _) in self._inside.items() if not held(work)]
        if gone:
            self._abort(gone)
            for ticket in gone:
                del self._inside[ticket]
        groups = ([one for one in group if held(one[0])] for group in self._suspects)
        self._suspects = [group for group in groups if group]
        return []

    def let_in(self, works: Sequence[Work]) -> list[tuple[Work, Prepared, Exception]]:
        """Let in what there is room for. ``works``: those with rows ready for this model, in their order.

        Returns the rows that the engine refused with an error. Raises OutOfMemory where one row alone does not fit,
        DeviceBroken.
        """
        refused: list[tuple[Work, Prepared, Exception]] = []
        if self._suspects:
            if not self._inside:
                waiting = deque(self._suspects.pop())
                try:
                    self._admit(waiting, refused)
                finally:
                    self._suspects += [list(waiting)] if waiting else []
            return refused
        if self.alone:
            return refused
        for work in works:
            if work.order.exclusive and self._inside:
                break
            if not self._take_from(work, refused) or work.order.exclusive:
                break
        return refused

    def step(self, tokens: int) -> tuple[Step, list[tuple[Work, Prepared, Ended]]]:
        """Go on, and take out what has ended. Raises what engines raise; then all rows are still inside."""
        step = self._engine.step(self._handle, tokens)
        # Read as a whole before anything is taken out; a row ends once, and only if it was inside.
        ended = {one.ticket: one for one in step.ended if one.ticket in self._inside}
        return step, [(*self._inside.pop(ticket), one) for ticket, one in ended.items()]

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

        The only row, where there was but one, or the one that was to be the first.
        """
        tickets = list(self._inside)
        if len(tickets) <= 1:
            # It was this row, and not how many were beside it.
            self._most = None
            if self._too_large is None:
                return self._out(tickets)
            work, row = self._too_large
            self._too_large = None
            return self._taken(work, row)
        kept = len(tickets) // 2
        self._most = kept
        for work, row in self._out(tickets[kept:]):
            work.rows = longest_first([row, *work.rows])
        return []

    def _take_from(self, work: Work, refused: list[tuple[Work, Prepared, Exception]]) -> bool:
        """Let in its rows, the longest first. False: there was no room for all of them."""
        waiting = deque((work, row) for row in work.rows)
        try:
            self._admit(waiting, refused)
        finally:
            work.rows = [row for _, row in waiting]
        return not waiting

    def _admit(self, waiting: deque[Held], refused: list[tuple[Work, Prepared, Exception]]) -> None:
        """Let in as many as there is room for. Each row is then inside, or it waits, or it is refused."""
        while waiting and (self._most is None or len(self._inside) < self._most):
            work, row = waiting[0]
            ticket = next(self._tickets)
            pass_ = Pass(self._handle, work.tasks, work.key.max_tokens, tenant=work.order.tenant)
            try:
                entered = self._engine.admit(pass_, row, ticket, urgent=work.interactive)
            except DeviceBroken:
                raise
            except Exception as error:
                # Whatever it had done of letting the row in is undone: the row must not be inside, and wait as well.
                self._abort([ticket])
                if isinstance(error, OutOfMemory):
                    if not self._inside:
                        self._too_large = (work, row)
                        raise
                    self._most = len(self._inside)
                    return
                refused.append((work, row, error))
                waiting.popleft()
                continue
            if not entered and self._inside:
                return
            waiting.popleft()
            if not entered:
                # Waiting longer would change nothing: no other row could make room.
                refused.append((work, row, ValueError("no room, though no row is inside")))
                continue
            self._inside[ticket] = (work, row)

    def _taken(self, work: Work, row: Prepared) -> list[Held]:
        """A row that waits, taken from where it waits."""
        work.rows = [one for one in work.rows if one is not row]
        groups = ([held for held in group if held[1] is not row] for group in self._suspects)
        self._suspects = [group for group in groups if group]
        return [(work, row)]

    def _out(self, tickets: Sequence[Hashable]) -> list[Held]:
        self._abort(tickets)
        return [self._inside.pop(ticket) for ticket in tickets]

    def _abort(self, tickets: Sequence[Hashable]) -> None:
        try:
            self._engine.abort(self._handle, tickets)
        except DeviceBroken:
            raise
        except Exception as error:
            raise Unsound(type(error).__name__) from error
