"""Engines that answer a whole batch, as streams, and the micro-batches in which their rows go in.

Rows that were let in run together at the next step, and all of them leave. So letting in is forming a micro-batch: rows
of like length, of one sub-task after the other, under the learned token budget (workers/run/batching.py).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from motet.protocol.columns import CellError, Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from workers.engine import BatchEngine, Detaching, Ended, Engine, Pass, Prepared, Step, Together
from workers.run.assemble import assemble
from workers.run.batching import fitting
from workers.run.work import Work

#: Rows of other sub-tasks fill up a micro-batch where they are nearly as long as its longest; shorter ones too, as long
#: as the padding costs less than another micro-batch.
LIKE_LENGTH = 0.75
#: Tokens of a step, and the pause after one that only waited, where rows run from beginning to end.
STEP_TOKENS, GLANCE_S = 1024, 0.005


@dataclass(slots=True)
class Batches:
    """A loaded model, and the rows of the next micro-batch."""

    handle: Any
    #: What all of these rows ask.
    tasks: tuple[TaskOrder, ...] = ()
    max_tokens: int = 0
    rows: dict[Hashable, Prepared] = field(default_factory=dict)


class BatchAdapter:
    """Makes a stream of a `BatchEngine`."""

    def __init__(self, engine: BatchEngine) -> None:
        self._engine = engine

    def memory_mb(self, model: Manifest, in_format: str) -> int:
        return self._engine.memory_mb(model, in_format)

    def load(self, model: Manifest, files: Mapping[str, Path], *, device: str, in_format: str) -> Batches:
        return Batches(self._engine.load(model, files, device=device, in_format=in_format))

    def attach(self, handle: Batches, task: TaskOrder, files: Mapping[str, Path]) -> None:
        self._engine.attach(handle.handle, task, files)

    def detach(self, handle: Batches, digest: str) -> None:
        if isinstance(self._engine, Detaching):
            self._engine.detach(handle.handle, digest)

    def prepare(self, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
        return self._engine.prepare(replace(pass_, handle=pass_.handle.handle), texts)

    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        """Rows that ask something else wait for another micro-batch."""
        handle: Batches = pass_.handle
        if not handle.rows:
            handle.tasks, handle.max_tokens = pass_.tasks, pass_.max_tokens
        # Equal in value is what counts; the same object is what most rows have.
        elif pass_.tasks is not handle.tasks and (pass_.tasks, pass_.max_tokens) != (
            handle.tasks,
            handle.max_tokens,
        ):
            return False
        handle.rows[ticket] = row
        return True

    def step(self, handle: Batches, tokens: int) -> Step:
        """Run all rows inside, however many tokens those are."""
        if not handle.rows:
            return Step()
        rows = list(handle.rows.values())
        columns = self._engine.run(Pass(handle.handle, handle.tasks, handle.max_tokens), rows)
        tickets = tuple(handle.rows)
        handle.rows.clear()
        return Step([Together(tickets, columns)], max([row.length for row in rows]) * len(rows))

    def abort(self, handle: Batches, tickets: Collection[Hashable]) -> None:
        for ticket in tickets:
            handle.rows.pop(ticket, None)

    def unload(self, handle: Batches) -> None:
        handle.rows.clear()
        self._engine.unload(handle.handle)


def micro_batch(
    first: Work, ready: Sequence[Work], *, tokens: int, max_rows: int, overhead_tokens: float
) -> Iterator[tuple[Work, int, int]]:
    """The rows to run next, as ranges: the longest of ``first``; its last micro-batch is filled up with other sub-tasks'.

    So sub-tasks end one after the other, and not all at the same time with the device idle behind them. The rows of a
    range must be taken out before the next is asked for.
    """
    longest = first.rows[0].length
    count = fitting(first.rows, tokens=tokens, max_rows=max_rows, overhead_tokens=overhead_tokens)
    yield first, 0, count
    if first.rows or first.exclusive:
        return
    room = min(max_rows, tokens // max(1, longest)) - count
    spare = overhead_tokens
    for work in (other for other in ready if _beside(other, first)):
        if room <= 0:
            return
        lo = next((i for i, row in enumerate(work.rows) if row.length <= longest), len(work.rows))
        hi = lo
        for row in work.rows[lo : lo + room]:
            if row.length < LIKE_LENGTH * longest:
                spare -= longest - row.length
                if spare < 0:
                    break
            hi += 1
        yield work, lo, hi
        room -= hi - lo


def _beside(work: Work, first: Work) -> bool:
    """Whether their rows may share a micro-batch."""
    return (
        work is not first
        and work.key == first.key
        and work.interactive == first.interactive
        and not work.exclusive
    )


def run_to_the_end(engine: Engine | BatchEngine, pass_: Pass, rows: Sequence[Prepared]) -> dict[str, Column]:
    """The answers to these rows and no others: task name -> column in their order. Raises what engines raise."""
    if not isinstance(engine, Engine):
        return dict(engine.run(pass_, rows))
    # Tickets of our own: rows of others may be inside.
    waiting = {object(): row for row in rows}
    tickets, found = list(waiting), dict[Hashable, Mapping[str, Column]]()
    while len(found) < len(rows):
        for ticket in list(waiting):
            if not engine.admit(pass_, waiting[ticket], ticket, urgent=False):
                break
            del waiting[ticket]
        if len(waiting) + len(found) == len(rows):
            raise ValueError("the engine lets no row in, though none is inside")
        step = engine.step(pass_.handle, STEP_TOKENS)
        found |= {one.ticket: one.columns for one in step.ended if isinstance(one, Ended)}
        if not step.ended and not step.computed_tokens:
            time.sleep(GLANCE_S)
    return {
        task.name: assemble(
            task.column_kind,
            len(rows),
            [([i], found[ticket][task.name]) for i, ticket in enumerate(tickets)],
            {},
            dim=task.manifest.vector_dim(task.spec) if task.column_kind == "vector" else 0,
        )
        for task in pass_.tasks
    }
