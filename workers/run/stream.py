"""Rows of several sub-tasks inside one loaded model: who is let in, who has ended, and who was at fault.

Belongs to the thread that owns the device. A row waits in its attempt (`Work.rows`), or is inside, or runs again among
suspects, or has ended: it is in one of these places at any time, whatever an engine raises. What is lost to a lack of
memory is made smaller first (the tokens of a step, then the rows inside), and only a row that is alone ends with it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

from motet.protocol.columns import CellError, Column, cut
from motet.protocol.wire import TaskOrder
from workers.engine import Consumed, DeviceBroken, Ended, Engine, OutOfMemory, Prepared, Together
from workers.run.attempts import Key
from workers.run.batch_adapter import micro_batch
from workers.run.batching import (
    LEAST_TOKENS,
    LONGEST_S,
    LONGEST_STEP_S,
    MOST_ROWS,
    Budget,
    Pace,
    limit,
    overhead_tokens,
    padded_tokens,
)
from workers.run.work import Work

#: Deadlines of the watchdog. The first step of a model may compile, tune and allocate.
RUN_S, FIRST_RUN_S = 8.0, 60.0
#: The first one of a model whose speed other processes have measured on such a device.
FIRST_MEASURED_S = 10.0

WorkRow = tuple[Work, Prepared]
Lost = tuple[Work, Prepared, CellError]
#: Rows of one attempt that left the engine, their answers, and what a single one consumed where the engine tells.
RowAnswers = tuple[Work, Sequence[Prepared], Mapping[str, Column], Mapping[str, Consumed] | None]

NO_MEMORY = CellError("out_of_memory", "one row alone does not fit", retriable=True)
NO_ROOM = CellError(
    "engine", "the engine has no room for this row, though no other is inside", retriable=True
)


class Unsound(Exception):
    """The engine cannot put rows out: nobody knows what is inside it any more, so the model must be given up."""


@dataclass(slots=True, eq=False)
class Suspects:
    """Rows of a step that failed. They go in again with no others beside them, by halves, until one is alone."""

    rows: list[WorkRow]

    @property
    def interactive(self) -> bool:
        """Somebody waits for all of them."""
        return all(work.interactive for work, _ in self.rows)


class WrittenText(NamedTuple):
    """Text that was written for a row in one step."""

    work: Work
    #: Position in the sub-task.
    row: int
    #: Of the row's stay inside: after another one it is written anew from its beginning.
    ticket: Hashable
    #: What was asked.
    ask: str
    text: str


@dataclass(slots=True)
class StepResult:
    """What a step brought."""

    answered: list[RowAnswers] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    #: Tokens that ran, padding included, and those of them that were rows' own.
    computed: int = 0
    tokens: int = 0
    #: The rows inside wait for another machine, and nothing was computed.
    waits: bool = False
    #: Text that was written for rows that are inside, or have ended now.
    written: list[WrittenText] = field(default_factory=list)


class Stream:
    """The rows inside one loaded model."""

    def __init__(
        self,
        engine: Engine,
        handle: Any,
        *,
        whole: bool,
        pace: Pace,
        device_kind: str,
        free: Callable[[], bool],
    ) -> None:
        """``whole``: all rows inside leave at the next step, each for the price of the longest (a `BatchAdapter`).
        ``free``: frees the memory of other models that nobody uses; False where there was none to free."""
        self.engine, self.handle, self.pace, self.whole = engine, handle, pace, whole
        #: Rows of failed steps that wait to go in again; the last ones first.
        self.suspects: list[Suspects] = []
        self._kind, self._free = device_kind, free
        self._tickets = itertools.count()
        self._inside: dict[Hashable, WorkRow] = {}
        #: Suspects are inside, and nobody joins them.
        self._closed = False
        #: Rows inside at most: fewer once there was no memory for more.
        self._most = Budget(MOST_ROWS, settled=True)
        #: Budget and most rows before memory was short, and the rows that ran then.
        self._roomy: tuple[Budget, Budget, frozenset[tuple[Key, int]]] | None = None

    def __len__(self) -> int:
        return len(self._inside)

    @property
    def waits(self) -> bool:
        """Rows are inside, or must go in again."""
        return bool(self._inside or self.suspects)

    @property
    def waited_for(self) -> bool:
        """Somebody waits for a row that is inside."""
        return any(work.interactive for work, _ in self._inside.values())

    @property
    def alone(self) -> bool:
        """A suspect of killing its process is inside."""
        return any(work.exclusive for work, _ in self._inside.values())

    def running(self) -> dict[Key, tuple[int, ...]]:
        """The rows inside, by attempt: evidence for poison."""
        rows: defaultdict[Key, list[int]] = defaultdict(list)
        for work, held in _by_work(self._inside.values()):
            rows[work.order.key] += [row.row for _, row in held]
        return {key: tuple(positions) for key, positions in rows.items()}

    def holds(self, work: Work) -> bool:
        """Some of its rows are inside."""
        return any(one is work for one, _ in self._inside.values())

    def limit(self, *, interactive_waits: bool, waited_for: bool) -> tuple[int, int]:
        """Most tokens and rows of the next step. ``waited_for``: somebody waits for the rows that have the turn."""
        longest_s = LONGEST_S if self.whole else LONGEST_STEP_S[self._kind]
        pace = self.pace
        return limit(
            pace.budget,
            pace.cost,
            self._kind,
            # A language model's step for somebody who waits is not cut for others who might come: it would take in a
            # prompt by a few tokens at a time, each for the price of a step.
            interactive_waits=interactive_waits and (self.whole or not waited_for),
            waited_for=waited_for and self.whole,
            longest_s=longest_s,
        )

    def deadline_s(self, tokens: int) -> float:
        """When a step of at most ``tokens`` with the rows inside has run for so long, it hangs."""
        if self.pace.cost.known:
            # A micro-batch has no more tokens than that, unless it is one row; its longest row went in first.
            longest = next(iter(self._inside.values()))[1].length if self.whole else 0
            return max(RUN_S, 10 * self.pace.cost.seconds(max(tokens, longest)))
        held = [(work, [row.row for _, row in rows]) for work, rows in _by_work(self._inside.values())]
        if not all(work.order.measured for work, _ in held):
            return FIRST_RUN_S
        return max(FIRST_MEASURED_S, 10 * sum(work.predicted_s(rows) for work, rows in held if self.whole))

    # -- in and out

    def let_in(self, first: Work, ready: Sequence[Work], tokens: int, rows: int) -> list[Lost]:
        """Let in rows of ``ready``, which wait for this model, as far as there is room; ``first`` has the turn.

        Returns the rows that ended with an error. Raises DeviceBroken, Unsound.
        """
        lost: list[Lost] = []
        if self._closed and self._inside:
            return lost
        self._closed = False
        alone = self.alone
        for work, lo, hi in self._offers(first, ready, tokens, rows):
            if (alone or work.exclusive) and self._inside:
                break
            gone = self._enter(work, work.rows[lo:hi], lost)
            del work.rows[lo : lo + gone]
            if gone < hi - lo or work.exclusive:
                break
        return lost

    def _offers(
        self, first: Work, ready: Sequence[Work], tokens: int, rows: int
    ) -> Iterable[tuple[Work, int, int]]:
        """Ranges of waiting rows to let in; those of one that get in have left it when the next is asked for."""
        if self.whole:
            overhead = overhead_tokens(self.pace.cost, self._kind)
            return micro_batch(first, ready, tokens=tokens, max_rows=rows, overhead_tokens=overhead)
        in_order = sorted(ready, key=lambda work: (not work.interactive, work.arrived))
        return ((work, 0, len(work.rows)) for work in in_order)

    def let_in_again(self, group: Suspects) -> list[Lost]:
        """Let suspects in, once nothing else is inside. Returns and raises what `let_in` does."""
        lost: list[Lost] = []
        if self._inside:
            return lost
        self._closed = True
        self.suspects.remove(group)
        for work, held in _by_work(group.rows):
            rows = [row for _, row in held]
            gone = self._enter(work, rows, lost)
            self._return(work, rows[gone:])
        return lost

    def forget(self, held: Callable[[Work], bool]) -> None:
        """Put out the rows for which nobody waits any more. Raises DeviceBroken, Unsound."""
        # Asked for each work, not for each of its rows: this is done at every turn.
        left = {work for work in {work for work, _ in self._inside.values()} if not held(work)}
        if left:
            self._take_out([ticket for ticket, (work, _) in self._inside.items() if work in left])
        for group in self.suspects:
            group.rows = [one for one in group.rows if held(one[0])]
        self.suspects = [group for group in self.suspects if group.rows]

    def _enter(self, work: Work, rows: Sequence[Prepared], lost: list[Lost]) -> int:
        """Let in the leading rows, as many as there is room for. How many are inside or lost: the others wait."""
        inside, admit, urgent = self._inside, self.engine.admit, work.interactive
        pass_, room = work.pass_, max(0, self._most.tokens - len(inside))
        assert pass_ is not None
        for done, (row, ticket) in enumerate(zip(rows[:room], self._tickets, strict=False)):
            try:
                if admit(pass_, row, ticket, urgent=urgent):
                    inside[ticket] = (work, row)
                elif inside:
                    return done
                else:
                    lost.append((work, row, NO_ROOM))
            except DeviceBroken:
                raise
            except Exception as error:  # noqa: BLE001 - a stranger's engine: the row's own error
                self._abort([ticket])
                if isinstance(error, OutOfMemory) and inside:
                    self._most = self._most.out_of_memory(2 * len(inside))
                    return done
                if isinstance(error, OutOfMemory) and self._free():
                    return done + self._enter(work, rows[done:], lost)
                lost.append((work, row, NO_MEMORY if isinstance(error, OutOfMemory) else _blame(error)))
        return min(len(rows), room)

    # -- one step

    def step(self, tokens: int) -> StepResult:
        """Go on with all rows inside, and take out those that have ended. Raises DeviceBroken, Unsound."""
        before = len(self._inside)
        try:
            progress = self._stepped(tokens)
        except DeviceBroken:
            raise
        except OutOfMemory:
            return self._too_large(tokens)
        except Exception as error:  # noqa: BLE001 - a stranger's engine: the row at fault is found by halves
            return StepResult(lost=self._failed(self._take_out(list(self._inside)), error))
        self._most = self._most.observed(before, before, 1.0)
        return progress

    def _stepped(self, tokens: int) -> StepResult:
        """Everything that an engine told is read before a row is taken out."""
        step = self.engine.step(self.handle, tokens)
        inside, ended = self._inside, set[Hashable]()
        progress = StepResult(computed=max(0, int(step.computed_tokens)))
        bad: list[tuple[list[WorkRow], Exception]] = []
        for delta in step.deltas:
            # One that was put out meanwhile is nobody's any more.
            if delta.ticket in inside:
                work, row = inside[delta.ticket]
                progress.written.append(WrittenText(work, row.row, delta.ticket, delta.task, delta.text))
        for one in step.ended:
            if isinstance(one, Ended):
                # One that was put out meanwhile, or has ended already, is nobody's any more.
                known = one.ticket in inside and one.ticket not in ended
                tickets: Sequence[Hashable] = [one.ticket] if known else []
            else:
                tickets = one.tickets
            held = [inside[ticket] for ticket in tickets]
            if not held:
                continue
            before = len(ended)
            ended.update(tickets)
            if len(ended) < before + len(held):
                raise ValueError("a row ends twice")
            try:
                progress.answered += _answers(one, held)
            except Exception as why:  # noqa: BLE001 - a stranger's answer
                bad.append((held, why))
            if self.whole:
                progress.tokens += sum([row.length for _, row in held])
        progress.waits = not (ended or progress.computed or step.deltas)
        progress.tokens = progress.tokens or progress.computed
        if len(ended) == len(inside):
            inside.clear()
        else:
            for ticket in ended:
                del inside[ticket]
        for rows, error in bad:
            progress.lost += self._failed(rows, error)
        return progress

    def _failed(self, rows: list[WorkRow], error: Exception) -> list[Lost]:
        """Rows that failed for a reason nobody knows go in again by halves. Returns the row at fault, once it is alone."""
        if len(rows) == 1:
            return [(*rows[0], _blame(error))]
        middle = len(rows) // 2
        self.suspects += [Suspects(half) for half in (rows[middle:], rows[:middle]) if half]
        return []

    def _too_large(self, tokens: int) -> StepResult:
        """There was no memory: fewer tokens in a step, then fewer rows inside, then the row that is alone has ended."""
        rows = frozenset((work.order.key, row.row) for work, row in self._inside.values())
        budget, most, among = self._roomy or (self.pace.budget, self._most, frozenset())
        if not rows <= among:
            self._roomy = budget, most, among = self.pace.budget, self._most, rows
        if self.whole and len(rows) > 1:
            self.pace.budget = self.pace.budget.out_of_memory(
                padded_tokens([row for _, row in self._inside.values()])
            )
            self._wait_again(list(self._inside))
        elif not self.whole and tokens > LEAST_TOKENS:
            self.pace.budget = self.pace.budget.out_of_memory(tokens)
        elif len(rows) > 1:
            self._most = self._most.out_of_memory(len(rows))
            self._wait_again(list(self._inside)[self._most.tokens :])
        elif self._free():
            self._wait_again(list(self._inside))
        else:
            # It was this row, and not how much ran with it: what fitted before will fit again.
            self.pace.budget, self._most, self._roomy = budget, most, None
            return StepResult(
                lost=[(work, row, NO_MEMORY) for work, row in self._take_out(list(self._inside))]
            )
        return StepResult()

    def _wait_again(self, tickets: Sequence[Hashable]) -> None:
        for work, held in _by_work(self._take_out(tickets)):
            self._return(work, [row for _, row in held])

    def _return(self, work: Work, rows: list[Prepared]) -> None:
        if rows:
            work.wait_again(rows)

    def _take_out(self, tickets: Sequence[Hashable]) -> list[WorkRow]:
        self._abort(tickets)
        return [self._inside.pop(ticket) for ticket in tickets]

    def _abort(self, tickets: Sequence[Hashable]) -> None:
        try:
            self.engine.abort(self.handle, tickets)
        except DeviceBroken:
            raise
        except Exception as error:
            raise Unsound(type(error).__name__) from error


def _answers(one: Ended | Together, held: Sequence[WorkRow]) -> list[RowAnswers]:
    """What rows were answered, by attempt. Raises ValueError and more for what an engine should not have answered."""
    for task in held[0][0].tasks:
        _check(one.columns[task.name], task, len(held))
    if isinstance(one, Ended):
        for tokens_in, cached, written, seconds in one.spent.values():
            if not (0 <= cached <= tokens_in < 1 << 32 and 0 <= written < 1 << 32 and math.isfinite(seconds)):
                raise ValueError("tokens or seconds that cannot be")
        return [(held[0][0], [held[0][1]], one.columns, one.spent)]
    answers: list[RowAnswers] = []
    lo = 0
    for work, group in _by_work(held):
        rows = [row for _, row in group]
        hi = lo + len(rows)
        columns = {task.name: cut(one.columns[task.name], lo, hi) for task in work.tasks}
        answers.append((work, rows, columns, None))
        lo = hi
    return answers


def _by_work(held: Iterable[WorkRow]) -> Iterator[tuple[Work, Iterator[WorkRow]]]:
    """Rows of one attempt beside each other, as they come."""
    return itertools.groupby(held, key=itemgetter(0))


def _blame(error: Exception) -> CellError:
    """Never its words: they may be a user's."""
    return CellError("engine", type(error).__name__)


def _check(column: Column, task: TaskOrder, rows: int) -> None:
    """Raise ValueError for an answer that an engine should not have given."""
    if column.kind != task.column_kind or len(column) != rows:
        raise ValueError(
            f"{len(column)} answers of kind {column.kind}; expected {rows} of kind {task.column_kind}"
        )
    if column.kind == "vector" and (column.dim, column.dtype) != (
        dim := task.manifest.vector_dim(task.spec),
        task.spec.get("dtype", "fp32"),
    ):
        raise ValueError(f"vectors of {column.dim} {column.dtype}; expected {dim}")
    column.check()
