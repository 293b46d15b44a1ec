"""Rebalancing: workers made to switch models, and near a pass' end what is recalled or doubled. Pure.

Once a second `tend` looks after fair shares against residency, after deadlines and after models that end late;
`late` finds work for idle workers among that which waits or lags at others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import inf

from scheduler.policy.carve import MIN_S
from scheduler.policy.fairness import BULK, INTERACTIVE, NORMAL
from scheduler.policy.placing.asking import ALL, Asks
from scheduler.policy.placing.choice import SAMPLE, Choice
from scheduler.policy.placing.entries import Flight, ModelQueue, QueuedPass, WorkerEntry
from scheduler.policy.placing.ledger import Ledger
from scheduler.policy.placing.predictions import Predictions
from scheduler.policy.placing.records import WorkerState

#: Seconds between two calls of `Rebalancing.tend`. Longer: what is owed comes later. Shorter: more CPU for all models.
TEND_S = 1.0
#: A model that nobody serves is loaded by force when its tenant lags this many load times behind its share. Larger: a
#: tenant with a model of its own waits longer. Smaller: more time goes into loads.
OWED_TENANT = 1.0
#: The same by how far its job lags within the tenant. Larger: a job waits longer for its siblings. Smaller: more loads.
OWED_JOB = 10.0
#: A model that is served is loaded by one more worker, by force, when its tenant lags this many load times behind.
#: Larger: the tenant catches up later. Smaller: more loads for shares that even out by themselves.
OWED_MORE = 10.0
#: A worker moves between models only while even shares of the work would end later than this many load times from now.
#: Larger: it moves too early to know. Smaller: the load takes what the move gains.
_MOVE_BEFORE = 2.0
#: And only while they would end earlier than this many load times from now. Larger: workers move on predictions that
#: still change. Smaller: the late model gets help too late.
_MOVE_AFTER = 8.0
#: And only where the late model lacks at least this share of the seconds that the worker would give it. Larger: late
#: models get no help. Smaller: workers load to work for a moment.
_NEED = 0.5
#: After a switch by force a worker stays for this many load times, so switching takes a tenth of its time at most.
#: Larger: shares are evened out later. Smaller: workers load most of the time.
_STAY = 10.0
#: Seconds from a message to a worker until its first word back. Larger: what begins soon is not recalled. Smaller: what
#: is recalled has begun.
_TRIP_S = 0.1
#: A sub-task is a straggler when it takes this many times its predicted seconds. Larger: stragglers are doubled later.
#: Smaller: clones of sub-tasks that are merely long.
_OVERDUE = 1.3
#: A straggler is doubled where its own end is further away than this many times the clone's. Larger: fewer clones.
#: Smaller: clones that lose the race.
_CLONE_GAIN = 1.5
#: Share of all device-seconds that clones may take. Larger: more work is done twice. Smaller: stragglers hold jobs up.
_CLONE_SHARE = 0.02
#: Sub-tasks of a model that must have ended before it gets a reserve. Larger: callers of a new job wait for a load that
#: could have been done. Smaller: models that few ask are loaded twice.
_ASKED = 8
#: A deadline is near when the remaining work takes this share of the remaining time, on all workers that serve it.
#: Larger: deadlines are missed. Smaller: passes with a deadline push others aside without need.
_HURRY = 0.7


@dataclass(frozen=True, slots=True)
class Recall:
    """Take this sub-task back: it has not begun where it waits, and ends sooner elsewhere."""

    flight: Flight


@dataclass(frozen=True, slots=True)
class Clone:
    """Lease this sub-task a second time, to this worker."""

    flight: Flight
    worker: WorkerState
    seconds: float
    #: The seconds rest on outcomes of such devices.
    measured: bool = False


class Rebalancing:
    """Which workers switch models, and what idle workers take over."""

    def __init__(
        self, ledger: Ledger, predictions: Predictions, asks: Asks, choice: Choice, *, subtask_s: float
    ) -> None:
        self._ledger, self._predictions, self._asks, self._choice = ledger, predictions, asks, choice
        self._subtask_s = subtask_s

    # -- once a second: deadlines, fair shares against residency, models that end late

    def tend(self, now: float) -> None:
        """O(models + passes with a deadline)."""
        ledger = self._ledger
        self._hurry(now)
        for queue in list(ledger.active.values()):
            for entry in [e for c in queue.classes if (e := queue.first(c)) is not None]:
                self.pay(queue, entry, now)
        self.balance(now)
        for key, queue in ledger.active.items():
            if queue.first(INTERACTIVE) is not None:
                ledger.fresh[key] = queue
        if ledger.active:
            # Idle workers look again: what ends late may have become worth a load.
            for kind in self._asks.idle.get(ALL, {}).values():
                for worker in list(islice(kind.values(), SAMPLE)):
                    self._asks.at(worker, now)

    def _hurry(self, now: float) -> None:
        """Passes whose deadline is near go first in their tenant's queue."""
        for entry in self._ledger.dated.values():
            if entry.demand.deadline is not None and entry.rows > 0 and not entry.urgent:
                left_s = entry.demand.deadline - now
                if self._predictions.ends_s(entry.queue) > _HURRY * left_s > 0:
                    entry.urgent = True
                    entry.tenant.queue.again(entry)

    def pay(self, queue: ModelQueue, entry: QueuedPass, now: float) -> None:
        """Have a worker load a model for a tenant or job that is owed it: one whose own work was served most."""
        ledger, load_s = self._ledger, self._predictions.load_s
        tenant_s = max(entry.tenant.account.owed, ledger.classes[entry.demand.priority].owed)
        job_s = entry.job.owed
        served = self._choice.is_served(queue)

        def owed(load_s: float) -> bool:
            if served:
                return tenant_s > OWED_MORE * load_s
            return tenant_s > OWED_TENANT * load_s or job_s > OWED_JOB * load_s

        # Mostly nobody is: then no worker is looked at.
        if queue in ledger.switching.values() or not any(owed(load_s(queue, kind)) for kind in ledger.kinds):
            return
        able = (w for w in ledger.workers.values() if self._may_switch(w, entry, now))
        some = list(islice(able, 4 * SAMPLE))
        if not some or not owed(load_s(queue, some[0].kind)):
            return
        best = max(
            some,
            key=lambda w: (w.serves is None, self._rank(w), -w.drain - self._choice.reload_s(w, queue)),
        )
        self._switch(best, queue, load_s(queue, best.kind), now)

    def balance(self, now: float) -> None:
        """Have a worker of a queue that ends early load the model of the one that ends last, while that is worth a load.

        All would end together if work were spread evenly. A queue that ends before that can spare one of its workers
        from the moment on at which the others can do the rest by then. It goes then, alone: if all of them went on
        to the end, each of them would have to load another model for the little time that is left.
        """
        ledger, predictions = self._ledger, self._predictions
        #: Queue -> seconds until it ends, and the devices that serve it.
        ends: dict[ModelQueue, tuple[float, float]] = {}
        for queue in ledger.active.values():
            if not queue.power:
                # A queue that nobody serves is served by the next idle worker: first things first.
                return
            speed = sum(n / max(1e-9, predictions.measured_s(queue, kind)) for kind, n in queue.power.items())
            ends[queue] = (1 / speed, sum(queue.power.values()))
        if len(ends) < 2:
            return
        together_s = sum(end_s * n for end_s, n in ends.values()) / sum(n for _, n in ends.values())
        helped = set(ledger.switching.values())
        late = sorted(
            ((end_s, q) for q, (end_s, _) in ends.items() if q not in helped and end_s > together_s),
            key=lambda pair: -pair[0],
        )
        early = sorted(ends.items(), key=lambda item: item[1][0])
        spared: set[ModelQueue] = set()
        for end_s, queue in late:
            for other, (early_s, n) in early:
                if other in spared or n < 2 or early_s >= together_s or early_s * n > together_s * (n - 1):
                    continue
                worker = self._spare(other, queue, now)
                if worker is None:
                    continue
                load_s = predictions.load_s(queue, worker.kind) + self._choice.reload_s(worker, queue)
                needed_s = (end_s - together_s) * ends[queue][1]
                in_time = _MOVE_BEFORE * load_s < together_s < _MOVE_AFTER * load_s
                if in_time and needed_s >= _NEED * (together_s - load_s):
                    worker.taken_from = other
                    self._switch(worker, queue, load_s, now)
                    spared.add(other)
                    break

    def _spare(self, of: ModelQueue, to: ModelQueue, now: float) -> WorkerEntry | None:
        """A worker that one queue can give to another: the one that ends its work first."""
        rank = self._choice.rank
        mine, theirs = of.first(NORMAL) or of.first(BULK), to.first(NORMAL) or to.first(BULK)
        if mine is None or theirs is None or rank(theirs)[:2] > rank(mine)[:2]:
            return None
        able = (
            worker
            for worker in of.hosts.values()
            if worker.serves is not None and worker.serves[0] is of and self._may_switch(worker, theirs, now)
        )
        return min(islice(able, 4 * SAMPLE), key=lambda worker: worker.drain, default=None)

    def _may_switch(self, worker: WorkerEntry, entry: QueuedPass, now: float) -> bool:
        """Whether a worker may be made to load a pass' model."""
        return (
            worker.stays_until <= now
            and worker not in self._ledger.switching
            and entry.queue.digest not in worker.resident
            and self._ledger.can_run(worker, entry)
            and not self._choice.waits_for_more(worker, entry)
        )

    def _switch(self, worker: WorkerEntry, queue: ModelQueue, load_s: float, now: float) -> None:
        self._ledger.switching[worker] = queue
        worker.stays_until = now + _STAY * load_s
        self._asks.at(worker, now)

    def _rank(self, worker: WorkerEntry) -> tuple[float, ...]:
        """How far ahead in their shares those are whom a worker serves."""
        last = worker.flights[-1] if worker.flights else None
        return self._choice.rank(last.of)[:2] if last is not None else (inf, inf)

    # -- near the end of a pass

    def late(self, now: float) -> list[Recall | Clone]:
        """What idle workers should take over of that which waits or lags elsewhere, and clones that make one of them the
        reserve of a model. O(leases in flight there)."""
        found: list[Recall | Clone] = []
        if not any(self._asks.idle.get(ALL, {}).values()):
            return found
        clones_s = _CLONE_SHARE * self._ledger.spent_s + self._subtask_s - self._ledger.cloned_s
        for queue in list(self._ledger.queues.values()):
            if not queue.flights:
                continue
            words = list[Recall | Clone](self._reserve(queue))
            if not words and queue.rows == 0:
                words += self._late(queue, now)
            for word in words:
                if isinstance(word, Clone):
                    if word.seconds > clones_s:
                        continue
                    clones_s -= word.seconds
                found.append(word)
        return found

    def _reserve(self, queue: ModelQueue) -> Iterator[Clone]:
        """A clone by which an idle worker comes to hold a model that callers ask, as a reserve: one worker more than serve
        them now. When they become more, nobody waits for a load. Nothing is evicted for it.

        The first lease answers, as a rule, while the second one loads. A language model has none: its load takes long,
        it writes many answers at once, and who reads along would be told of a second attempt.
        """
        if INTERACTIVE not in queue.classes or queue.model.answers in ("text", "models"):
            return
        if sum(n for n, *_ in queue.took.values()) < _ASKED:
            return
        newest = list(islice(reversed(queue.flights.values()), SAMPLE))
        asked = [flight for flight in newest if flight.demand.priority == INTERACTIVE]
        if len(queue.hosts) > len({flight.at.number for flight in asked}):
            return
        clonable = (f for f in asked if f.harmless and not f.exclusive and not f.cloned)
        if (flight := next(clonable, None)) is None:
            return
        ledger = self._ledger
        for kind in self._asks.idle.get(ALL, {}).values():
            for worker in islice(kind.values(), SAMPLE):
                cold = not worker.flights and queue.digest not in worker.resident
                if cold and ledger.can_run(worker, flight.of) and not ledger.victims(worker, queue):
                    seconds = self._predictions.price(worker, flight.of).of(flight.rows, flight.bytes)
                    measured = self._predictions.measured(worker, flight.of)
                    yield Clone(flight, worker.state, seconds, measured)
                    return

    def _late(self, queue: ModelQueue, now: float) -> Iterator[Recall | Clone]:
        price = self._predictions.price
        any_of = next(iter(queue.flights.values()))
        idle = [
            (price(worker, any_of.of).of(any_of.rows, any_of.bytes), worker)
            for kind in self._asks.idle.get(queue.digest, {}).values()
            for worker in islice(kind.values(), SAMPLE)
            if not worker.flights and self._ledger.fits(worker, queue)
        ]
        if not idle:
            return
        idle.sort(key=lambda pair: (pair[0], pair[1].number))
        ends = {
            worker.number: _ends(worker, now) if _may_give(worker, now) else {}
            for worker in {f.at.number: f.at for f in queue.flights.values()}.values()
        }
        late = sorted(
            ((ends[f.at.number][id(f)], f) for f in queue.flights.values() if id(f) in ends[f.at.number]),
            key=lambda pair: -pair[0][1],
        )
        for (starts, end), flight in late:
            if not idle:
                return
            if flight.exclusive or flight.demand.priority == INTERACTIVE:
                continue
            _, worker = idle[0]
            if not self._ledger.can_run(worker, flight.of):
                continue
            seconds = price(worker, flight.of).of(flight.rows, flight.bytes)
            gain_s = end - (now + _TRIP_S + seconds)
            if starts > now + _TRIP_S:
                if not flight.clone and not flight.cloned and gain_s > max(MIN_S, seconds / 4):
                    idle.pop(0)
                    yield Recall(flight)
            elif _worth_a_clone(flight, seconds, end, now):
                idle.pop(0)
                yield Clone(flight, worker.state, seconds, self._predictions.measured(worker, flight.of))


def _may_give(worker: WorkerEntry, now: float) -> bool:
    """Whether something waits or lags there. Near the end most workers run their last sub-task, and in time."""
    first = worker.flights[0]
    return len(worker.flights) > 1 or now - first.began - first.load_s > _OVERDUE * first.seconds


def _worth_a_clone(flight: Flight, seconds: float, end: float, now: float) -> bool:
    taken_s = now - flight.began - flight.load_s
    return (
        flight.harmless
        and not flight.cloned
        # How long a training run takes nobody predicts, and a second one would begin where the first one did.
        and flight.demand.model.answers != "models"
        and taken_s > _OVERDUE * flight.seconds
        and end - now > _CLONE_GAIN * (seconds + _TRIP_S)
    )


def _ends(worker: WorkerEntry, now: float) -> dict[int, tuple[float, float]]:
    """When each flight of a worker starts and ends, as far as can be told."""
    found = {}
    at = now
    for i, flight in enumerate(worker.flights):
        left_s = flight.load_s + flight.seconds
        starts = at
        if i == 0:
            taken_s = now - flight.began
            # Overdue: nothing is known but that long ones stay long.
            left_s = max(left_s - taken_s, taken_s / 2 if taken_s > left_s else 0.0)
            starts = flight.began
        at += left_s
        found[id(flight)] = (starts, at)
    return found
