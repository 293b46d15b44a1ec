"""Asking: which worker asks for work when, and which workers are idle. Pure.

A worker asks when it has less than a moment of work left, so that the choice is made late.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf

from motet.protocol.manifest import decode_slots
from scheduler.policy.placing.entries import ModelQueue, WorkerEntry
from scheduler.policy.placing.predictions import Predictions
from scheduler.policy.placing.records import DeviceKind

#: Sub-tasks that a worker holds at least, so that the next one is there when the first ends. Fewer: the device idles
#: for a round trip after each sub-task. More: work is bound early, and must be recalled near the end of a pass.
_READY = 2
#: A language model's worker asks while it holds fewer rows than this many times its decode slots. Smaller: slots are
#: empty between two answers. Larger: rows wait at one worker while another has free slots.
_SLOTS_FILLED = 2
#: Sub-tasks that a language model's worker holds at most. Larger: with those of the lane they are more than it takes
#: off its Celery queue at once. Smaller: slots are empty where sub-tasks have few rows.
_FILLERS = 10
#: Key of the list of all idle workers, beside the lists by the model that they hold.
ALL = ""


class Asks:
    """A priority queue of workers by when they ask, and lists of those that are idle."""

    def __init__(self, predictions: Predictions, *, ahead_s: float, depth: int) -> None:
        self._predictions = predictions
        self._ahead_s, self._depth = ahead_s, depth
        self._ready = min(_READY, depth)
        #: (due, tie, number, generation, worker).
        self.due: list[tuple[float, float, int, int, WorkerEntry]] = []
        #: Idle workers by a model that they hold, or `ALL`; then by kind, then by name.
        self.idle: dict[str, dict[DeviceKind, dict[str, WorkerEntry]]] = {}

    def at(self, worker: WorkerEntry, due: float) -> None:
        """The worker asks then, and not when it was to ask before."""
        worker.generation += 1
        # The emptiest first, so that work spreads before it deepens; among the empty, the fastest.
        tie = len(worker.flights) + self._predictions.rates.pace(worker.name) / 100
        heappush(self.due, (due, tie, worker.number, worker.generation, worker))

    def when_little_is_left(self, worker: WorkerEntry) -> None:
        """The worker asks when its work runs out, or now if it holds too few sub-tasks or rows to go on with."""
        if worker.bulk < self._ready or unfilled(worker) is not None:
            self.at(worker, -inf)
        elif worker.bulk < self._depth:
            self.at(worker, worker.drain - self._ahead_s)
        else:
            worker.generation += 1

    def next(self) -> WorkerEntry | None:
        """The worker that asks first."""
        due = self.due
        while due:
            if due[0][3] == due[0][4].generation:
                return due[0][4]
            heappop(due)
        return None

    def park(self, worker: WorkerEntry) -> None:
        """The worker is idle until it is woken."""
        worker.generation += 1
        self.unpark(worker)
        worker.idle = True
        for held in (ALL, *worker.resident):
            self.idle.setdefault(held, {}).setdefault(worker.kind, {})[worker.name] = worker

    def unpark(self, worker: WorkerEntry) -> None:
        if not worker.idle:
            return
        worker.idle = False
        for held in (ALL, *worker.resident):
            kinds = self.idle[held]
            del kinds[worker.kind][worker.name]
            if not kinds[worker.kind]:
                del kinds[worker.kind]
            if not kinds:
                del self.idle[held]


def unfilled(worker: WorkerEntry) -> ModelQueue | None:
    """The queue that a worker serves, if a language model answers it that could write more answers at once."""
    queue = worker.serves[0] if worker.serves is not None else None
    if queue is None or queue.model.answers != "text" or queue.waiting == 0 or worker.bulk >= _FILLERS:
        return None
    rows = sum(flight.rows for flight in worker.flights if flight.of.queue is queue)
    return queue if rows < _SLOTS_FILLED * decode_slots(worker.kind[0], queue.model.engine) else None
