"""The ledger: which workers are there and what they hold, what waits, and which leases are in flight. Pure.

It hears events and keeps what they change; it decides nothing. Fair shares are charged and corrected here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import count
from math import inf

from motet.protocol.residency import NeverFits, Resident, evictions
from scheduler.policy.capability import cannot_hold, lacks_room_beside, on_first_mb, refuses
from scheduler.policy.fairness import CLASS_WEIGHTS, INTERACTIVE, Account, FairQueue, begun
from scheduler.policy.placing.asking import Asks
from scheduler.policy.placing.entries import (
    Flight,
    JobAccount,
    ModelQueue,
    QueuedPass,
    TenantQueue,
    WorkerEntry,
)
from scheduler.policy.placing.predictions import Predictions
from scheduler.policy.placing.records import Demand, DeviceKind, PassId, Placement, UnderWay, WorkerState

#: Outcomes of a queue after which all of them count half. Larger: what it takes is learned anew more slowly when its
#: rows change. Smaller: chance has more part in it.
_REMEMBERED = 1000
_NO_OUTCOMES = (0, 0.0, 0.0)


class Ledger:
    """All that placing knows at a moment, but for rates."""

    def __init__(self, predictions: Predictions, asks: Asks) -> None:
        self._predictions, self._asks = predictions, asks
        self.workers: dict[str, WorkerEntry] = {}
        #: Workers that get no work now, and whose leases are in flight still.
        self._away: dict[str, WorkerEntry] = {}
        self.passes: dict[PassId, QueuedPass] = {}
        #: By digest of the model and numeric class.
        self.queues: dict[tuple[str, str], ModelQueue] = {}
        #: The same by the model alone, "exact" last.
        self.queues_of: dict[str, list[ModelQueue]] = {}
        #: Queues in which something waits.
        self.active: dict[tuple[str, str], ModelQueue] = {}
        #: Queues in which more waits than at the last look.
        self.fresh: dict[tuple[str, str], ModelQueue] = {}
        root = Account(1.0)
        # Interactive work is no part of the others' clock: it is served before its turn.
        self.classes = {
            c: Account(weight, None if c == INTERACTIVE else root) for c, weight in CLASS_WEIGHTS.items()
        }
        self.tenants: dict[tuple[int, str], Account] = {}
        self.jobs: dict[str, JobAccount] = {}
        self._flights: dict[Hashable, Flight] = {}
        #: Passes with a deadline.
        self.dated: dict[PassId, QueuedPass] = {}
        #: Number of workers of each kind.
        self.kinds: Counter[DeviceKind] = Counter()
        #: Workers that rebalancing makes load a model, and its queue.
        self.switching: dict[WorkerEntry, ModelQueue] = {}
        self._numbers = count()
        #: Device-seconds that ended leases took, and those that clones took or are predicted to take.
        self.spent_s = self.cloned_s = 0.0

    # -- workers

    def worker(self, state: WorkerState, now: float) -> None:
        """A worker that may be given work: a new one, or what is new of it."""
        worker = self.workers.get(state.name)
        if worker is not None and worker.kind != state.kind:
            self.gone(state.name)
            worker = None
        if worker is None:
            self._join(state, now)
        elif worker.state != state:
            if worker.state.refused != state.refused or worker.state.boot != state.boot:
                worker.can.clear()
            worker.state = state
            self._hold_with_flights(worker, {d: worker.resident.get(d, -inf) for d in state.resident}, now)

    def _join(self, state: WorkerState, now: float) -> None:
        """A new worker, or the same process after it was silent or drained, with its leases in flight."""
        worker = self._away.pop(state.name, None)
        if worker is None or (worker.state.boot, worker.kind) != (state.boot, state.kind):
            worker = WorkerEntry(state, next(self._numbers), state.name, state.kind)
        worker.state = state
        worker.can.clear()
        self.workers[state.name] = worker
        self.kinds[worker.kind] += 1
        self._hold_with_flights(worker, dict.fromkeys(state.resident, now), now)
        for flight in worker.flights:
            flight.of.queue.flights[id(flight)] = flight
        if worker.flights:
            self.serve(worker, worker.flights[-1].of.queue)
        worker.drain = _end_of(worker, now)
        self._asks.when_little_is_left(worker)

    def gone(self, name: str) -> None:
        """A worker that gets no more work. Its leases stay in flight until each is `closed`."""
        worker = self.workers.pop(name, None)
        if worker is None:
            return
        self.kinds[worker.kind] -= 1
        if not self.kinds[worker.kind]:
            del self.kinds[worker.kind]
        self.switching.pop(worker, None)
        self.serve(worker, None)
        for flight in worker.flights:
            flight.of.queue.flights.pop(id(flight), None)
        self._asks.unpark(worker)
        self._hold(worker, {})
        worker.generation += 1
        if worker.flights:
            self._away[name] = worker
        self.fresh.update(self.active)

    def serve(self, worker: WorkerEntry, queue: ModelQueue | None) -> None:
        """The worker serves this queue from now on; None: no queue."""
        kind = worker.kind
        if worker.serves is not None:
            before, share = worker.serves
            left = before.power[kind] - share
            if left > 1e-9:
                before.power[kind] = left
            else:
                del before.power[kind]
        worker.serves = None
        if queue is not None:
            share = 1 / self._predictions.rates.pace(worker.name)
            queue.power[kind] = queue.power.get(kind, 0.0) + share
            worker.serves = (queue, share)

    # -- models that workers hold

    def fits(self, worker: WorkerEntry, queue: ModelQueue) -> bool:
        """Whether the worker can ever load the queue's model."""
        known = worker.can.get(queue)
        if known is None:
            known = worker.can[queue] = cannot_hold(worker.state, queue.model, queue.numerics) is None
        return known

    def can_run(self, worker: WorkerEntry, entry: QueuedPass) -> bool:
        """Whether the worker can ever run the pass: its model fits, and nothing that it needs was refused."""
        state, demand = worker.state, entry.demand
        return self.fits(worker, entry.queue) and not (
            refuses(state, demand) or lacks_room_beside(state, demand)
        )

    def victims(self, worker: WorkerEntry, queue: ModelQueue) -> Sequence[str]:
        """The models that the worker will evict for a queue's, by the rule that it follows itself."""
        state = worker.state
        if state.memory_mb <= 0 or not worker.resident:
            return ()
        sizes = {
            digest: next((on_first_mb(state, q.model, q.numerics) for q in self.queues_of.get(digest, ())), 0)
            for digest in worker.resident
        }
        residents = [Resident(digest, sizes[digest], used) for digest, used in worker.resident.items()]
        in_use = {f.of.queue.digest for f in worker.flights}
        needed_mb = on_first_mb(state, queue.model, queue.numerics)
        budget_mb = state.memory_mb // state.gpus
        try:
            victims = evictions(residents, needed_mb, budget_mb, in_use)
            if victims is None:
                victims = evictions(residents, needed_mb, budget_mb, ())
        except NeverFits:
            victims = []
        return victims or ()

    def _make_room(self, worker: WorkerEntry, queue: ModelQueue) -> None:
        """Foresee what the worker will evict for a queue's model."""
        for digest in self.victims(worker, queue):
            del worker.resident[digest]
            self._unhost(worker, digest)
        self._host(worker, queue.digest)

    def _hold(self, worker: WorkerEntry, resident: dict[str, float]) -> None:
        """The worker holds these models."""
        idle = worker.idle
        self._asks.unpark(worker)
        for digest in worker.resident.keys() - resident.keys():
            self._unhost(worker, digest)
        for digest in resident.keys() - worker.resident.keys():
            self._host(worker, digest)
        worker.resident = resident
        if idle:
            self._asks.at(worker, -inf)

    def _hold_with_flights(self, worker: WorkerEntry, resident: dict[str, float], now: float) -> None:
        """The worker holds these models, as of a beat that is older than what its flights are still to load."""
        self._hold(worker, resident)
        for flight in worker.flights:
            if flight.of.queue.digest not in worker.resident:
                self._make_room(worker, flight.of.queue)
                worker.resident[flight.of.queue.digest] = now

    def _host(self, worker: WorkerEntry, digest: str) -> None:
        for queue in self.queues_of.get(digest, ()):
            queue.hosts[worker.name] = worker

    def _unhost(self, worker: WorkerEntry, digest: str) -> None:
        for queue in self.queues_of.get(digest, ()):
            queue.hosts.pop(worker.name, None)

    # -- what waits

    def want(self, demand: Demand) -> None:
        """A new pass, or new numbers of one that is known."""
        entry = self.passes.get(demand.id)
        if entry is None:
            if demand.rows_waiting <= 0:
                return
            entry = self._new(demand)
        closed = entry.demand.loading and not demand.loading
        entry.demand = demand
        if demand.deadline is not None:
            self.dated[demand.id] = entry
        entry.tenant.account.weight = demand.weight
        self._set(entry, demand.rows_waiting, demand.bytes_waiting)
        if closed and entry.rows > 0:
            # Workers with work left it to wait for more rows. No more come.
            self.fresh[entry.queue.key] = entry.queue

    def wants(self) -> frozenset[PassId]:
        """Passes with waiting rows."""
        return frozenset(id_ for id_, entry in self.passes.items() if entry.rows > 0)

    def demand(self, id_: PassId) -> Demand | None:
        """A known pass, with the numbers that it was wanted with last."""
        entry = self.passes.get(id_)
        return entry.demand if entry is not None else None

    def rows_waiting(self, id_: PassId) -> int:
        """Rows of a pass that wait by now; 0 of one that is not known."""
        entry = self.passes.get(id_)
        return entry.rows if entry is not None else 0

    def passes_of(self, job: str) -> list[PassId]:
        """The known passes of a job."""
        known = self.jobs.get(job)
        return list(known.passes) if known is not None else []

    def unwanted(self, id_: PassId) -> None:
        """Nothing of this pass waits any more."""
        entry = self.passes.get(id_)
        if entry is not None:
            self._set(entry, 0, 0)
            self._forget(entry)

    def _new(self, demand: Demand) -> QueuedPass:
        queue = self._queue(demand)
        at = (demand.priority, demand.tenant)
        account = self.tenants.get(at)
        if account is None:
            account = self.tenants[at] = Account(demand.weight, self.classes[demand.priority])
        tenant = queue.tenants.get(at)
        if tenant is None:
            tenant = queue.tenants[at] = TenantQueue(account)
            queue.classes.setdefault(demand.priority, FairQueue(TenantQueue.key, TenantQueue.waits))
        job = self.jobs.get(demand.job)
        if job is None:
            job = self.jobs[demand.job] = JobAccount(Account(1.0, account))
        entry = self.passes[demand.id] = job.passes[demand.id] = QueuedPass(
            demand, queue, job.account, tenant
        )
        return entry

    def _queue(self, demand: Demand) -> ModelQueue:
        digest = demand.model.digest
        queue = self.queues.get((digest, demand.numerics))
        if queue is None:
            queue = ModelQueue(digest, demand.numerics, demand.model)
            self.queues[queue.key] = queue
            queue.hosts = {w.name: w for w in self.workers.values() if digest in w.resident}
            same = self.queues_of.setdefault(digest, [])
            same.insert(0 if demand.numerics == "fast" else len(same), queue)
        return queue

    def _set(self, entry: QueuedPass, rows: int, size: int) -> None:
        """So many rows and bytes of a pass wait."""
        queue, before = entry.queue, entry.rows
        queue.rows += rows - before
        queue.bytes += size - entry.bytes
        its_rows, its_bytes = queue.by_rate.get(entry.demand.rate_key, (0, 0))
        its_rows, its_bytes = its_rows + rows - before, its_bytes + size - entry.bytes
        if its_rows > 0:
            queue.by_rate[entry.demand.rate_key] = (its_rows, its_bytes)
        else:
            queue.by_rate.pop(entry.demand.rate_key, None)
        entry.rows, entry.bytes = rows, size
        if rows > before:
            self.fresh[queue.key] = queue
        if rows > 0 and before <= 0:
            queue.waiting += 1
            entry.tenant.waiting += 1
            entry.job.come()
            entry.tenant.queue.join(entry)
            queue.classes[entry.demand.priority].join(entry.tenant)
            self.active[queue.key] = queue
        elif rows <= 0 < before:
            queue.waiting -= 1
            entry.tenant.waiting -= 1
            entry.job.go()
            if queue.waiting == 0:
                del self.active[queue.key]
                self.fresh.pop(queue.key, None)

    def _forget(self, entry: QueuedPass) -> None:
        """Let go of a pass without waiting rows and leases in flight."""
        id_ = entry.demand.id
        if entry.rows > 0 or entry.flights > 0 or self.passes.get(id_) is not entry:
            return
        del self.passes[id_]
        self.dated.pop(id_, None)
        job = self.jobs[entry.demand.job]
        del job.passes[id_]
        if not job.passes:
            del self.jobs[entry.demand.job]

    # -- leases in flight

    def opened(
        self,
        placement: Placement,
        key: Hashable,
        now: float,
        *,
        rows: int,
        size: int,
        seconds: float,
        exclusive: bool = False,
        harmless: bool = True,
    ) -> Flight:
        """The placement was carved: rows, bytes, predicted seconds."""
        entry, worker = self.passes[placement.demand.id], self.workers[placement.worker.name]
        self._set(entry, max(0, entry.rows - rows), max(0, entry.bytes - size))
        flight = self._fly(entry, worker, key, now, rows, size, seconds, exclusive)
        flight.harmless = harmless
        flight.tags = entry.job.charge(seconds)
        if worker.flights[0] is flight:
            begun(flight.tags)
        return flight

    def cloned(self, first: Flight, name: str, key: Hashable, now: float, seconds: float) -> Flight | None:
        """A worker was given a second lease. Its seconds are the system's, not the job's. None: the worker has gone."""
        worker = self.workers.get(name)
        if worker is None:
            return None
        flight = self._fly(first.of, worker, key, now, first.rows, first.bytes, seconds)
        flight.clone = flight.cloned = first.cloned = True
        self.cloned_s += seconds
        return flight

    def adopt(self, demand: Demand, name: str, under_way: UnderWay, now: float) -> Flight | None:
        """A lease that was given before this ledger began. None: its worker is not there."""
        worker = self.workers.get(name)
        if worker is None:
            return None
        entry = self.passes.get(demand.id) or self._new(demand)
        u = under_way
        flight = self._fly(entry, worker, u.key, now, u.rows, u.bytes, u.seconds, u.exclusive)
        flight.opened -= u.age_s
        flight.harmless = not u.exclusive
        flight.clone = flight.cloned = u.clone
        if u.clone:
            self.cloned_s += u.seconds
        else:
            entry.job.charge(u.seconds)
        return flight

    def nothing(self, placement: Placement, now: float) -> None:
        """The placement could not be carved: nothing of its pass waits, until `want` says otherwise."""
        self.unwanted(placement.demand.id)
        self._asks.at(self.workers[placement.worker.name], now)

    def keyed(self, flight: Flight, key: Hashable) -> None:
        """The lease is committed, under this key."""
        del self._flights[flight.key]
        flight.key = key
        self._flights[key] = flight

    def flight(self, key: Hashable) -> Flight | None:
        return self._flights.get(key)

    def flights(self) -> frozenset[Hashable]:
        """Keys of all leases in flight."""
        return frozenset(self._flights)

    def closed(self, key: Hashable, now: float, busy_s: float | None = None) -> None:
        """A lease has ended. ``busy_s``: what the device worked for it; None where it was lost or taken back."""
        flight = self._flights.pop(key, None)
        if flight is None:
            return
        worker, entry = flight.at, flight.of
        queue, flights = entry.queue, worker.flights
        entry.flights -= 1
        queue.flights.pop(id(flight), None)
        interactive = entry.demand.priority == INTERACTIVE
        worker.bulk -= not interactive
        worker.exclusive -= flight.exclusive
        if flights[0] is flight:
            del flights[0]
            if flights:
                flights[0].began = now
                begun(flights[0].tags)
        else:
            flights.remove(flight)
            if busy_s is not None:
                # Interactive work, and what shares a batch, may end before what stands ahead of it.
                begun(flight.tags)
        self._settle(flight, busy_s or 0.0)
        if interactive and queue.waiting:
            # More of it may wait for the place in the lane that is free now.
            self.fresh[queue.key] = queue
        if self.workers.get(worker.name) is worker:
            worker.drain = _end_of(worker, now)
            self._asks.when_little_is_left(worker)
        elif not flights and self._away.get(worker.name) is worker:
            del self._away[worker.name]
        if entry.rows <= 0 and entry.flights <= 0:
            self._forget(entry)

    def _settle(self, flight: Flight, spent_s: float) -> None:
        """Put the accounts right: seconds that a lease truly took, in place of what was predicted."""
        entry = flight.of
        if flight.clone:
            self.cloned_s += spent_s - flight.seconds
        else:
            entry.job.correct(spent_s - flight.seconds)
            if spent_s < flight.seconds:
                # All passes of the job move forward.
                for own in self.jobs[entry.demand.job].passes.values():
                    own.tenant.queue.again(own)
                    own.queue.classes[own.demand.priority].again(own.tenant)
        self.spent_s += spent_s
        if spent_s > 0:
            took, kind = entry.queue.took, flight.at.kind
            n, size, seconds = took.get(kind, _NO_OUTCOMES)
            if n >= _REMEMBERED:
                n, size, seconds = n // 2, size / 2, seconds / 2
            took[kind] = (n + 1, size + flight.bytes, seconds + spent_s)

    def _fly(
        self,
        entry: QueuedPass,
        worker: WorkerEntry,
        key: Hashable,
        now: float,
        rows: int,
        size: int,
        seconds: float,
        exclusive: bool = False,
    ) -> Flight:
        if worker.idle:
            self._asks.unpark(worker)
        load_s = 0.0
        queue, flights = entry.queue, worker.flights
        if queue.digest not in worker.resident:
            load_s = self._predictions.load_s(queue, worker.kind)
            self._make_room(worker, queue)
        worker.resident[queue.digest] = now
        began = worker.drain if flights and worker.drain > now else now
        flight = Flight(key, worker, entry, rows, size, seconds, load_s, now, began, exclusive)
        self._flights[key] = flight
        entry.flights += 1
        queue.flights[id(flight)] = flight
        flights.append(flight)
        worker.bulk += entry.demand.priority != INTERACTIVE
        worker.exclusive += exclusive
        worker.drain = began + load_s + seconds
        if self.switching and self.switching.get(worker) is queue:
            del self.switching[worker]
        if not (worker.serves and worker.serves[0] is queue):
            self.serve(worker, queue)
        self._asks.when_little_is_left(worker)
        return flight


def _end_of(worker: WorkerEntry, now: float) -> float:
    """When all flights of a worker will have ended."""
    end = now
    for i, flight in enumerate(worker.flights):
        left_s = flight.load_s + flight.seconds
        end += left_s if i else max(0.0, left_s - (now - flight.began))
    return end
