"""The choice: which pass an asking worker gets, which model it loads, and who answers interactive work. Pure.

A worker serves the models that it holds, fairly; when those have nothing for it, it loads the model whose work would
end last without it. Each answer costs O(log n) in workers and jobs; only a load, which takes seconds, looks at every
model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from math import ceil, inf

from motet.protocol.manifest import decode_slots
from scheduler.policy.carve import MAX_BYTES, MAX_ROWS, MIN_S, WHOLE_ROWS, size_s
from scheduler.policy.fairness import INTERACTIVE
from scheduler.policy.placing.asking import ALL, Asks, unfilled
from scheduler.policy.placing.entries import ModelQueue, QueuedPass, WorkerEntry
from scheduler.policy.placing.ledger import Ledger
from scheduler.policy.placing.predictions import Predictions
from scheduler.policy.placing.records import Placement

#: A sub-task of a language model has rows for this part (1/n) of the decode slots at least. Larger n: more messages
#: for the same rows. Smaller n: slots stay empty until enough of them are free for another sub-task.
_SLOTS_PART = 4
#: Tokens of the pictures of one sub-task at most: of 256 pixels each, so 77 MB while they wait for the device. Larger: a
#: worker's memory. Smaller: more messages for the same pictures.
PICTURE_TOKENS = 100_000
#: A further worker loads a model where that ends its work earlier by this many load times. Larger: jobs end later than
#: they could. Smaller: workers load for little, and evict what others need.
JOIN_GAIN = 0.5
#: However many workers serve a model, one more loads it where its work would end later than this many load times from
#: now. Larger: on large clusters nobody joins the last long job. Smaller: too many join at once.
JOIN_AT = 3.25
#: Workers looked at, at most, where the best of many is wanted. Larger: more CPU for each choice. Smaller: a worse one.
SAMPLE = 16
#: Interactive sub-tasks that a worker holds at most, as a multiple of ``depth``. Larger: they wait behind each other.
#: Smaller: the lane is full while the worker has room.
_LANE = 2
#: Seconds until a worker comes to interactive work where it is busy with other work: one micro-batch.
_BUSY_S = 0.05
#: Rows that callers wait for are shared out among the workers that hold their model and come to them soon, where they take
#: more seconds than this. Larger: callers wait for the rows of others while another worker is idle. Smaller: more messages.
_TOGETHER_S = 0.1
#: Interactive work hangs that has taken this many times what was predicted, and so many seconds beside. Larger: callers are
#: sent to a worker that hangs for longer. Smaller: chance decides who answers.
_HANGS, _HANGS_S = 3.0, 0.25


class Choice:
    """Who works on what now."""

    def __init__(
        self, ledger: Ledger, predictions: Predictions, asks: Asks, *, subtask_s: float, depth: int
    ) -> None:
        self._ledger, self._predictions, self._asks = ledger, predictions, asks
        self._subtask_s, self._depth = subtask_s, depth

    def place(self, now: float) -> Iterator[Placement]:
        """Placements in the order they should be carved. Call `opened` or `nothing` for each before the next one."""
        ledger, asks = self._ledger, self._asks
        while ledger.fresh:
            # It stays fresh until all of it was offered: a caller that stops here comes back to it.
            key, queue = next(iter(ledger.fresh.items()))
            self._wake(queue)
            yield from self._express(queue, now)
            ledger.fresh.pop(key, None)
        while (worker := asks.next()) is not None and asks.due[0][0] <= now:
            placement = self._answer(worker, now)
            if placement is not None:
                # The worker goes on asking until the caller has said what became of this: a failure loses nothing.
                yield placement
            else:
                if not worker.flights:
                    ledger.serve(worker, None)
                asks.park(worker)

    def next_due(self) -> float:
        """When a worker will ask next; inf where none will, and -inf where one should be asked now."""
        if self._ledger.fresh:
            return -inf
        return self._asks.due[0][0] if self._asks.next() is not None and self._ledger.active else inf

    # -- for a worker that asks

    def _answer(self, worker: WorkerEntry, now: float) -> Placement | None:
        """The worker's next sub-task."""
        if worker.exclusive or self._lane_is_full(worker):
            return None
        if worker.bulk >= self._depth:
            filling = unfilled(worker)
            first = self.first(filling, worker) if filling is not None else None
            return self._placement(worker, first, now) if first is not None else None
        switching = self._ledger.switching
        ordered = switching.get(worker)
        if ordered is not None and self.first(ordered, worker) is None:
            del switching[worker]
            ordered = None
        if now > worker.stays_until:
            worker.taken_from = None
        entry = self._of_residents(worker, worker.taken_from)
        if entry is None and worker.taken_from is not None and ordered is None:
            entry, worker.taken_from = self._of_residents(worker), None
        if entry is None or ordered is not None:
            queue = ordered or self._to_load(worker, now)
            if queue is not None:
                entry = self.first(queue, worker)
        return self._placement(worker, entry, now) if entry is not None else None

    def _of_residents(self, worker: WorkerEntry, but: ModelQueue | None = None) -> QueuedPass | None:
        """The fairest pass among those whose model the worker holds, except those of one queue."""
        best: QueuedPass | None = None
        for digest in worker.resident:
            for queue in self._ledger.queues_of.get(digest, ()):
                if not queue.waiting or queue is but:
                    continue
                first = self.first(queue, worker)
                if first is not None and (best is None or self.rank(first) < self.rank(best)):
                    best = first
        return best

    def first(self, queue: ModelQueue, worker: WorkerEntry) -> QueuedPass | None:
        """The fairest pass of a queue that this worker can run."""
        if not self._ledger.fits(worker, queue):
            return None
        best: QueuedPass | None = None
        for class_ in queue.classes:
            first = queue.first(class_)
            if first is not None and (best is None or self.rank(first) < self.rank(best)):
                best = first
        if best is None or self._suits(worker, best):
            return best
        # A head of it cannot be loaded there, or it waits for more rows. Rare, so all passes of the queue are looked at.
        able = (
            entry
            for entry in self._ledger.passes.values()
            if entry.queue is queue and entry.rows > 0 and self._suits(worker, entry)
        )
        return min(able, key=self.rank, default=None)

    def _suits(self, worker: WorkerEntry, entry: QueuedPass) -> bool:
        return self._ledger.can_run(worker, entry) and not self.waits_for_more(worker, entry)

    def waits_for_more(self, worker: WorkerEntry, entry: QueuedPass) -> bool:
        """Whether a pass of an upload leaves a worker with work alone: what has landed makes no whole sub-task yet."""
        demand = entry.demand
        if not demand.loading or not worker.bulk or demand.priority == INTERACTIVE:
            return False
        if unfilled(worker) is entry.queue or entry.rows >= MAX_ROWS or entry.bytes >= MAX_BYTES:
            return False
        return self._predictions.price(worker, entry).of(entry.rows, entry.bytes) < self._subtask_s

    def rank(self, entry: QueuedPass) -> tuple[float, ...]:
        """The smaller, the earlier it is served."""
        class_ = entry.demand.priority
        first = -inf if class_ == INTERACTIVE else self._ledger.classes[class_].start
        return (first, entry.tenant.account.start, *entry.key())

    def _to_load(self, worker: WorkerEntry, now: float) -> ModelQueue | None:
        """The queue whose model is worth loading here: one that nobody serves, or the one that would end last."""
        predictions = self._predictions
        best: ModelQueue | None = None
        best_key: tuple[float, ...] = ()
        for queue in self._ledger.active.values():
            if queue.digest in worker.resident:
                continue
            entry = self.first(queue, worker)
            if entry is None:
                continue
            price = predictions.price(worker, entry)
            if not self.is_served(queue):
                # Among equals the longest first: what is left for the end is short (LPT, Graham 1969).
                key = (0.0, *self.rank(entry)[:2], -price.of(queue.rows, queue.bytes))
            else:
                ends_s = predictions.ends_s(queue)
                load_s = predictions.load_s(queue, worker.kind) + self.reload_s(worker, queue)
                row_s = price.of(1, queue.bytes / queue.rows)
                devices = predictions.devices(queue, worker, now)
                if ends_s < min(JOIN_AT, 1 + JOIN_GAIN * (1 + devices)) * load_s + row_s:
                    continue
                key = (1.0, *self.rank(entry)[:2], -ends_s - load_s)
            if best is None or key < best_key:
                best, best_key = queue, key
        return best

    def is_served(self, queue: ModelQueue) -> bool:
        """A worker serves it, has its work in line, or holds its model and will come to it."""
        return bool(queue.power or queue.flights) or any(
            self.first(queue, worker) is not None for worker in queue.hosts.values()
        )

    def reload_s(self, worker: WorkerEntry, queue: ModelQueue) -> float:
        """Seconds that it will cost to load again what must give way for a model: of those for which work waits.

        The more other workers hold such a model, the less likely it comes back here.
        """
        return sum(
            self._predictions.load_s(victim, worker.kind) / max(1, len(victim.hosts))
            for digest in self._ledger.victims(worker, queue)
            for victim in self._ledger.queues_of.get(digest, ())
            if victim.waiting and victim is not queue
        )

    def _placement(self, worker: WorkerEntry, entry: QueuedPass, now: float) -> Placement:
        price = self._predictions.price(worker, entry)
        work_s = price.of(entry.rows, entry.bytes)
        devices = self._predictions.devices(entry.queue, worker, now) / entry.queue.waiting
        least, interactive = 1, entry.demand.priority == INTERACTIVE
        if entry.queue.model.answers == "text":
            # A row's seconds depend on how many rows are beside it. A sub-task fills a part of the slots, whatever was
            # learned of rows that were alone.
            part = decode_slots(worker.kind[0], entry.queue.model.engine) // _SLOTS_PART
            least = max(1, min(part, int(entry.rows / (2 * devices))))
        elif interactive and WHOLE_ROWS * work_s <= self._subtask_s * entry.rows:
            least = WHOLE_ROWS
        # Of an upload more is on its way: what has landed is shared out whole, and nothing is kept for an even end.
        remaining_s = 2 * work_s if entry.demand.loading else work_s
        budget_s = size_s(self._subtask_s, remaining_s, devices)
        if interactive and entry.queue.model.answers != "text":
            hosts = islice(entry.queue.hosts.values(), SAMPLE)
            soon = sum(_comes_in_s(host, now) <= work_s / 2 for host in hosts)
            budget_s = min(budget_s, max(_TOGETHER_S, work_s / max(1, soon)))
        if entry.queue.model.reads != "text":
            most = max(1, PICTURE_TOKENS // max(1, entry.queue.model.max_tokens))
            budget_s = min(budget_s, price.of(most, entry.bytes * most / max(1, entry.rows)))
        measured = self._predictions.measured(worker, entry)
        return Placement(worker.state, entry.demand, budget_s, price, least, measured)

    def _lane_is_full(self, worker: WorkerEntry, queue: ModelQueue | None = None) -> bool:
        """``queue``: whose interactive work is to come. A language model writes many answers at once: its lane is wider."""
        most = _LANE * self._depth
        if queue is not None and queue.model.answers == "text":
            most = decode_slots(worker.kind[0], queue.model.engine)
        return len(worker.flights) - worker.bulk >= most

    def _wake(self, queue: ModelQueue) -> None:
        """More waits: idle workers ask again, those that hold the model first, the fastest kind first."""
        left: float = queue.rows
        for held in (queue.digest, ALL):
            kinds = self._asks.idle.get(held, {})
            for kind in sorted(kinds, key=lambda kind: self._predictions.waiting_s(queue, kind)):
                most = ceil(min(left, self._predictions.waiting_s(queue, kind) / MIN_S + 1))
                able = (
                    worker for worker in kinds.get(kind, {}).values() if self.first(queue, worker) is not None
                )
                for worker in list(islice(able, most)):
                    self._asks.at(worker, -inf)
                    left -= 1

    # -- interactive work

    def _express(self, queue: ModelQueue, now: float) -> Iterator[Placement]:
        """Interactive work waits for no worker to ask: it goes at once to the one that can begin soonest."""
        while (entry := queue.first(INTERACTIVE)) is not None:
            worker = self._soonest(queue, entry, now)
            if worker is None:
                return
            yield self._placement(worker, entry, now)

    def _soonest(self, queue: ModelQueue, entry: QueuedPass, now: float) -> WorkerEntry | None:
        """The worker where a row is answered first: a few hosts of the model, then a few others, are looked at."""
        hosts = list(islice(queue.hosts.values(), SAMPLE))
        idle = [
            worker
            for held in (queue.digest, ALL)
            for kind in self._asks.idle.get(held, {}).values()
            for worker in islice(kind.values(), 2)
        ]
        best = self._quickest((*idle, *hosts), queue, entry, now) or self._quickest(
            islice(self._ledger.workers.values(), 4 * SAMPLE), queue, entry, now
        )
        if best is not None and best.name in queue.hosts:
            # To the end, so that the sample is another one next time.
            queue.hosts[best.name] = queue.hosts.pop(best.name)
        return best

    def _quickest(
        self, workers: Iterable[WorkerEntry], queue: ModelQueue, entry: QueuedPass, now: float
    ) -> WorkerEntry | None:
        best, best_s = None, inf
        for worker in workers:
            if (
                worker.exclusive
                or self._lane_is_full(worker, queue)
                or not self._ledger.can_run(worker, entry)
            ):
                continue
            wait_s = _comes_in_s(worker, now)
            if queue.digest not in worker.resident:
                wait_s += self._predictions.load_s(queue, worker.kind) + self.reload_s(worker, queue)
            wait_s += self._predictions.price(worker, entry).of(entry.rows, entry.bytes)
            if wait_s < best_s:
                best, best_s = worker, wait_s
        return best


def _comes_in_s(worker: WorkerEntry, now: float) -> float:
    """Seconds until a worker comes to more interactive work."""
    if not worker.flights:
        return 0.0
    lane = [f for f in worker.flights if f.demand.priority == INTERACTIVE]
    first = worker.flights[0]
    # While it loads a model nobody is answered, whomever it loads that for.
    loading_s = max(0.0, first.began + first.load_s - now)
    for flight in lane:
        loading_s = max(loading_s, flight.opened + flight.load_s - now)
    wait_s = sum(f.seconds for f in lane) + (_BUSY_S if worker.bulk else 0.0)
    # How long a text becomes nobody knows before.
    if lane and lane[0].of.queue.model.answers != "text":
        taken_s = now - lane[0].opened - lane[0].load_s
        if taken_s > _HANGS * wait_s + _HANGS_S:
            # Nothing is known but that what hangs for long hangs on.
            wait_s += taken_s
    return loading_s + wait_s
