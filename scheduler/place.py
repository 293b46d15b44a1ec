"""Place: which worker gets work of which pass now, and what is taken back or doubled near the end. Pure.

The `Placer` hears of workers, of waiting passes and of what is under way, and answers whoever asks for work. A
worker asks when it has less than a moment of work left, so the choice is made late. It serves the models that it
holds, fairly; when those have nothing for it, it loads the model whose work would end last without it. Every
answer costs O(log n) in workers and jobs; only a load, which takes seconds, looks at every model.

The dispatcher and the simulator drive the same class. It has no clock: ``now`` is any one that only rises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count, islice
from math import ceil, inf

from motet.manifest import Manifest
from motet.residency import NeverFits, Resident, evictions
from scheduler.carve import MIN_S, size_s
from scheduler.cost import Price, Rates
from scheduler.fairness import CLASS_WEIGHTS, INTERACTIVE, Account, Line, Turn, begun

#: (job, pass number).
PassId = tuple[str, int]
#: (device kind, device name): devices of one kind share what is learned.
Kind = tuple[str, str]

#: Sub-tasks at a worker at least, the running one included, however long they are: the next one is there at its end.
_READY = 2
#: One more host of a model is opened where that ends its work by half a load's time earlier; or where it would end later than
#: this many load times, however many hosts it has.
_JOIN, _JOIN_MOST = 0.5, 3.25
#: A job whose model nobody holds is owed its load once by its tenant's share, ten times by its own within the tenant.
_OWED_TENANT, _OWED_JOB = 1.0, 10.0
#: A tenant whose model too few hold is owed another host when it lags so many load times behind.
_OWED_MORE = 10.0
#: After a switch that fairness forced a worker stays so many load times, so switching costs a tenth at most.
_STAY = 10.0
#: Workers that are looked at where the best of many is wanted.
_SAMPLE = 16
#: A message to a worker and its first word back.
_TRIP_S = 0.1
#: A straggler is doubled when it has taken so much longer than predicted, if the clone ends well before it.
_OVERDUE, _CLONE_GAIN = 1.3, 1.5
#: Share of all device-seconds that clones may take.
_CLONE_SHARE = 0.02
#: A deadline comes near when the work left, on all that can do it, takes this share of the time left.
_HURRY = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One pass with waiting rows."""

    job: str
    pass_number: int
    tenant: str
    weight: float
    priority: int
    #: Position by submission: older first among equals.
    age: int
    #: Ids of all models that the pass needs: the one that is loaded, and its heads.
    model_ids: frozenset[int]
    model: Manifest
    numerics: str = "fast"
    rows_waiting: int
    bytes_waiting: int
    #: Learned of this job; 0: not yet.
    bytes_per_token: float = 0.0
    #: On the clock of ``now``; None: no deadline.
    deadline: float | None = None

    @property
    def id(self) -> PassId:
        return (self.job, self.pass_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One live worker that may be given work, as of its newest beat."""

    name: str
    boot: str
    device_kind: str
    device_name: str
    engines: tuple[str, ...]
    #: Memory that models may hold; 0: not known.
    memory_mb: int = 0
    #: Numeric formats beside fp32 that the device is fast at.
    formats: tuple[str, ...] = ()
    resident: tuple[str, ...] = ()
    #: Ids of models that it could not load.
    refused: frozenset[int] = frozenset()

    @property
    def kind(self) -> Kind:
        return (self.device_kind, self.device_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderWay:
    """A live lease, as the store tells it."""

    key: Hashable
    rows: int
    bytes: int
    seconds: float
    age_s: float
    exclusive: bool = False
    clone: bool = False


def need_mb(worker: Worker, model: Manifest, numerics: str) -> int:
    """Memory that a model takes on a worker, in the numeric format that it would run in there."""
    fast = numerics == "fast" and "bf16" in worker.formats and "bf16" in model.formats
    return model.memory_mb("bf16" if fast else "fp32")


@dataclass(frozen=True, slots=True)
class Placement:
    """Give this worker the next sub-task of this pass, of about so many seconds."""

    worker: Worker
    demand: Demand
    budget_s: float
    price: Price


@dataclass(slots=True, eq=False)
class Flight:
    """One lease under way, as the policy sees it."""

    key: Hashable
    at: _Place
    of: _Waiting
    rows: int
    bytes: int
    #: Predicted, loading apart.
    seconds: float
    #: Loading before it, predicted.
    load_s: float
    opened: float
    #: When its worker came to it, as far as is known.
    began: float
    exclusive: bool = False
    #: May be doubled: not suspected of anything.
    harmless: bool = True
    #: This lease is a second one.
    clone: bool = False
    cloned: bool = False
    #: What its charge has to tell when it begins.
    turn: Turn = ()

    @property
    def worker(self) -> Worker:
        return self.at.worker

    @property
    def demand(self) -> Demand:
        return self.of.demand


@dataclass(frozen=True, slots=True)
class Recall:
    """Take this sub-task back: it has not begun where it waits, and ends sooner elsewhere."""

    flight: Flight


@dataclass(frozen=True, slots=True)
class Clone:
    """Lease this sub-task a second time, to this worker."""

    flight: Flight
    worker: Worker
    seconds: float


@dataclass(slots=True, eq=False)
class _Job:
    """A job's account, while any of its passes is known."""

    account: Account
    passes: int = 0


@dataclass(slots=True, eq=False)
class _Waiting:
    """A pass, and what of it waits."""

    demand: Demand
    pool: _Pool
    job: Account
    tenant: _Tenant
    rows: int = 0
    bytes: int = 0
    flights: int = 0
    urgent: bool = False

    def waits(self) -> bool:
        return self.rows > 0

    def key(self) -> tuple[float, ...]:
        if self.urgent and self.demand.deadline is not None:
            return (0.0, self.demand.deadline, self.demand.age, self.demand.pass_number)
        return (1.0, self.job.start, self.demand.age, self.demand.pass_number)


@dataclass(slots=True, eq=False)
class _Tenant:
    """A tenant's passes that one model answers, in one class."""

    account: Account
    line: Line[_Waiting] = field(default_factory=lambda: Line(_Waiting.key, _Waiting.waits))
    #: Passes that wait.
    waiting: int = 0

    def waits(self) -> bool:
        return self.waiting > 0

    def key(self) -> tuple[float, ...]:
        return (self.account.start,)


@dataclass(slots=True, eq=False)
class _Pool:
    """All passes that one loaded model answers."""

    digest: str
    numerics: str
    model: Manifest
    classes: dict[int, Line[_Tenant]] = field(default_factory=dict)
    tenants: dict[tuple[int, str], _Tenant] = field(default_factory=dict)
    rows: int = 0
    bytes: int = 0
    #: Passes that wait.
    waiting: int = 0
    #: Workers that work for it, as devices of their kind at its usual pace.
    power: dict[Kind, float] = field(default_factory=dict)
    #: Workers that hold the model, or are told to load it.
    hosts: dict[str, _Place] = field(default_factory=dict)
    #: What is under way at workers that are there.
    flights: dict[int, Flight] = field(default_factory=dict)
    #: Workers counted as devices of a kind, as of a moment ago: it is asked for each sub-task, and changes slowly.
    devices: dict[Kind, tuple[float, float]] = field(default_factory=dict)

    @property
    def served(self) -> bool:
        """Somebody works for it, or has work of it in line behind that of another pool."""
        return bool(self.power or self.flights)

    def first(self, class_: int) -> _Waiting | None:
        line = self.classes.get(class_)
        tenant = line.first() if line is not None else None
        return tenant.line.first() if tenant is not None else None


@dataclass(slots=True, eq=False)
class _Place:
    """A worker, and what is under way there."""

    worker: Worker
    number: int
    flights: list[Flight] = field(default_factory=list)
    #: Of these the ones that are not interactive, and those that nothing may run beside.
    bulk: int = 0
    exclusive: int = 0
    #: When all of that will be done.
    drain: float = 0.0
    #: Digest of each model that it holds, or will by then, and when it was used last.
    resident: dict[str, float] = field(default_factory=dict)
    can: dict[tuple[str, str], bool] = field(default_factory=dict)
    #: The pool it works for, and with how much of a usual device of its kind.
    serves: tuple[_Pool, float] | None = None
    #: It is not switched again by force before then.
    stays: float = -inf
    #: Pool that fairness wants it to load.
    forced: _Pool | None = None
    idle: bool = False
    turn: int = 0


class Placer:
    """Who works on what. Events in, placements out."""

    def __init__(self, rates: Rates, *, subtask_s: float, ahead_s: float, depth: int) -> None:
        """``subtask_s``: seconds of a sub-task at most. ``ahead_s``: a worker asks when it has less left than this.
        ``depth``: bulk sub-tasks at a worker at most, the running one included."""
        self.rates = rates
        self.subtask_s, self.ahead_s, self.depth = subtask_s, ahead_s, depth
        self._places: dict[str, _Place] = {}
        self._passes: dict[PassId, _Waiting] = {}
        self._pools: dict[tuple[str, str], _Pool] = {}
        #: Pools in which something waits.
        self._active: dict[tuple[str, str], _Pool] = {}
        #: Pools in which more waits than at the last look.
        self._fresh: dict[tuple[str, str], _Pool] = {}
        self._root = Account(1.0)
        # Interactive work is no part of the others' clock: it is served before its turn.
        self._classes = {
            c: Account(w, None if c == INTERACTIVE else self._root) for c, w in CLASS_WEIGHTS.items()
        }
        self._tenants: dict[tuple[int, str], Account] = {}
        self._jobs: dict[str, _Job] = {}
        self._flights: dict[Hashable, Flight] = {}
        #: Who will ask, by when: (due, tie, number, turn, place).
        self._due: list[tuple[float, float, int, int, _Place]] = []
        #: Idle places by a model that they hold ("": all of them) and kind.
        self._idle: dict[str, dict[Kind, dict[str, _Place]]] = {}
        self._numbers = count()
        self._spent_s = self._cloned_s = 0.0

    # -- workers

    def worker(self, worker: Worker, now: float) -> None:
        """A worker that may be given work: a new one, or what is new of it."""
        place = self._places.get(worker.name)
        if place is not None and place.worker.kind != worker.kind:
            self.gone(worker.name)
            place = None
        if place is None:
            place = self._places[worker.name] = _Place(worker, next(self._numbers), drain=now)
            self._hold(place, dict.fromkeys(worker.resident, now))
            self._ask_at(place, -inf)
            return
        if place.worker == worker:
            return
        if place.worker.refused != worker.refused or place.worker.boot != worker.boot:
            place.can.clear()
        place.worker = worker
        self._hold(place, {d: place.resident.get(d, -inf) for d in worker.resident})
        for flight in place.flights:
            # The beat is older than what is still to be loaded.
            if flight.of.pool.digest not in place.resident:
                self._make_room(place, flight.of.pool, now)
                place.resident[flight.of.pool.digest] = now

    def gone(self, name: str) -> None:
        """A worker that gets no more work. What is under way there stays so until it is `closed`."""
        place = self._places.pop(name, None)
        if place is None:
            return
        self._serve(place, None)
        for flight in place.flights:
            flight.of.pool.flights.pop(id(flight), None)
        self._unpark(place)
        self._hold(place, {})
        place.turn += 1
        self._fresh.update(self._active)

    def workers(self) -> frozenset[str]:
        return frozenset(self._places)

    # -- what waits

    def want(self, demand: Demand) -> None:
        """So much of a pass waits now: a new pass, or new numbers of one that is known."""
        waiting = self._passes.get(demand.id)
        if waiting is None:
            if demand.rows_waiting <= 0:
                return
            waiting = self._passes[demand.id] = self._new(demand)
        waiting.demand = demand
        waiting.tenant.account.weight = demand.weight
        self._set(waiting, demand.rows_waiting, demand.bytes_waiting)

    def wants(self) -> frozenset[PassId]:
        """Passes of which something waits."""
        return frozenset(key for key, waiting in self._passes.items() if waiting.rows > 0)

    def unwanted(self, id_: PassId) -> None:
        """Nothing of this pass waits any more."""
        waiting = self._passes.get(id_)
        if waiting is not None:
            self._set(waiting, 0, 0)
            self._forget(waiting)

    def _new(self, demand: Demand) -> _Waiting:
        digest = demand.model.digest
        pool = self._pools.get((digest, demand.numerics))
        if pool is None:
            pool = self._pools[digest, demand.numerics] = _Pool(digest, demand.numerics, demand.model)
            pool.hosts = {p.worker.name: p for p in self._places.values() if digest in p.resident}
        class_ = demand.priority
        account = self._tenants.get((class_, demand.tenant))
        if account is None:
            account = self._tenants[class_, demand.tenant] = Account(demand.weight, self._classes[class_])
        tenant = pool.tenants.get((class_, demand.tenant))
        if tenant is None:
            tenant = pool.tenants[class_, demand.tenant] = _Tenant(account)
            pool.classes.setdefault(class_, Line(_Tenant.key, _Tenant.waits))
        job = self._jobs.get(demand.job)
        if job is None:
            job = self._jobs[demand.job] = _Job(Account(1.0, account))
        job.passes += 1
        return _Waiting(demand, pool, job.account, tenant)

    def _set(self, waiting: _Waiting, rows: int, size: int) -> None:
        pool, before = waiting.pool, waiting.rows
        pool.rows += rows - before
        pool.bytes += size - waiting.bytes
        waiting.rows, waiting.bytes = rows, size
        key = (pool.digest, pool.numerics)
        if rows > before:
            self._fresh[key] = pool
        if rows > 0 and before <= 0:
            pool.waiting += 1
            waiting.tenant.waiting += 1
            waiting.job.come()
            waiting.tenant.line.join(waiting)
            pool.classes[waiting.demand.priority].join(waiting.tenant)
            self._active[key] = pool
        elif rows <= 0 < before:
            pool.waiting -= 1
            waiting.tenant.waiting -= 1
            waiting.job.go()
            if pool.waiting == 0:
                del self._active[key]
                self._fresh.pop(key, None)

    def _forget(self, waiting: _Waiting) -> None:
        """Let go of what nothing waits for and nothing is under way of."""
        if waiting.rows > 0 or waiting.flights > 0 or self._passes.get(waiting.demand.id) is not waiting:
            return
        del self._passes[waiting.demand.id]
        job = self._jobs[waiting.demand.job]
        job.passes -= 1
        if job.passes == 0:
            del self._jobs[waiting.demand.job]

    # -- what is under way

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
        """What was placed was carved: so many rows and bytes, predicted to take so long."""
        waiting, place = self._passes[placement.demand.id], self._places[placement.worker.name]
        self._set(waiting, max(0, waiting.rows - rows), max(0, waiting.bytes - size))
        flight = self._fly(waiting, place, key, now, rows, size, seconds, exclusive)
        flight.harmless = harmless
        flight.turn = waiting.job.charge(seconds)
        if place.flights[0] is flight:
            begun(flight.turn)
        return flight

    def cloned(self, clone: Clone, key: Hashable, now: float) -> Flight | None:
        """A second lease was given. Its seconds are the system's, not the job's. None: the worker has gone."""
        place = self._places.get(clone.worker.name)
        if place is None:
            return None
        f = clone.flight
        flight = self._fly(f.of, place, key, now, f.rows, f.bytes, clone.seconds)
        flight.clone = flight.cloned = f.cloned = True
        self._cloned_s += clone.seconds
        return flight

    def adopt(self, demand: Demand, worker: str, under_way: UnderWay, now: float) -> Flight | None:
        """A lease that was given before this policy began. None where its worker gets no work now."""
        place = self._places.get(worker)
        if place is None:
            return None
        waiting = self._passes.get(demand.id)
        if waiting is None:
            waiting = self._passes[demand.id] = self._new(demand)
        u = under_way
        flight = self._fly(waiting, place, u.key, now, u.rows, u.bytes, u.seconds, u.exclusive)
        flight.opened -= u.age_s
        flight.harmless = not u.exclusive
        flight.clone = flight.cloned = u.clone
        if u.clone:
            self._cloned_s += u.seconds
        else:
            waiting.job.charge(u.seconds)
        return flight

    def nothing(self, placement: Placement, now: float) -> None:
        """What was placed could not be carved: nothing of it waits after all, until `want` says otherwise."""
        self.unwanted(placement.demand.id)
        self._ask_at(self._places[placement.worker.name], now)

    def keyed(self, flight: Flight, key: Hashable) -> None:
        """Its lease is committed, under this key."""
        del self._flights[flight.key]
        flight.key = key
        self._flights[key] = flight

    def flight(self, key: Hashable) -> Flight | None:
        return self._flights.get(key)

    def flights(self) -> frozenset[Hashable]:
        """Keys of all that is under way."""
        return frozenset(self._flights)

    def closed(self, key: Hashable, now: float, busy_s: float | None = None) -> None:
        """A lease has ended. ``busy_s``: what the device worked for it; None where it was lost or taken back."""
        flight = self._flights.pop(key, None)
        if flight is None:
            return
        place, waiting = flight.at, flight.of
        waiting.flights -= 1
        waiting.pool.flights.pop(id(flight), None)
        was_head = place.flights[0] is flight
        place.flights.remove(flight)
        place.bulk -= flight.demand.priority != INTERACTIVE
        place.exclusive -= flight.exclusive
        if busy_s is not None:
            # Interactive work, and what shares a batch, may end before what stands ahead of it.
            begun(flight.turn)
        if was_head and place.flights:
            place.flights[0].began = now
            begun(place.flights[0].turn)
        if flight.clone:
            self._cloned_s += (busy_s or 0.0) - flight.seconds
        else:
            waiting.job.correct((busy_s or 0.0) - flight.seconds)
            if (busy_s or 0.0) < flight.seconds:
                waiting.tenant.line.again(waiting)
                waiting.pool.classes[waiting.demand.priority].again(waiting.tenant)
        self._spent_s += busy_s or 0.0
        if flight.demand.priority == INTERACTIVE and waiting.pool.waiting:
            # More of it may wait for the place in the lane that is free now.
            self._fresh[waiting.pool.digest, waiting.pool.numerics] = waiting.pool
        if self._places.get(place.worker.name) is place:
            place.drain = self._end_of(place, now)
            self._ask_later(place)
        self._forget(waiting)

    def _fly(
        self,
        waiting: _Waiting,
        place: _Place,
        key: Hashable,
        now: float,
        rows: int,
        size: int,
        seconds: float,
        exclusive: bool = False,
    ) -> Flight:
        self._unpark(place)
        load_s = 0.0
        pool = waiting.pool
        if pool.digest not in place.resident:
            load_s = self._load_s(pool, place)
            self._make_room(place, pool, now)
        place.resident[pool.digest] = now
        began = max(now, place.drain if place.flights else now)
        flight = Flight(key, place, waiting, rows, size, seconds, load_s, now, began, exclusive)
        self._flights[key] = flight
        waiting.flights += 1
        pool.flights[id(flight)] = flight
        place.flights.append(flight)
        place.bulk += waiting.demand.priority != INTERACTIVE
        place.exclusive += exclusive
        place.drain = began + load_s + seconds
        if place.forced is pool:
            place.forced = None
        if not (place.serves and place.serves[0] is pool):
            self._serve(place, pool)
        self._ask_later(place)
        return flight

    # -- placing

    def place(self, now: float) -> Iterator[Placement]:
        """Placements in the order they should be carved. Call `opened` or `nothing` for each before the next one."""
        while self._fresh:
            # It stays fresh until it was gone through: whoever stops asking here comes back to it.
            key, pool = next(iter(self._fresh.items()))
            self._wake(pool)
            yield from self._express(pool, now)
            self._fresh.pop(key, None)
        while self._due and self._due[0][0] <= now:
            _, _, _, turn, place = heappop(self._due)
            if turn != place.turn:
                continue
            placement = self._answer(place, now)
            if placement is not None:
                yield placement
            else:
                self._rest(place)

    def next_due(self) -> float:
        """When a worker will ask next; inf where nobody will, and -inf where somebody should be asked."""
        if self._fresh:
            return -inf
        while self._due and self._due[0][3] != self._due[0][4].turn:
            heappop(self._due)
        return self._due[0][0] if self._due and self._active else inf

    def _answer(self, place: _Place, now: float) -> Placement | None:
        """What this worker should do next."""
        if place.exclusive or place.bulk >= self.depth or self._express_full(place):
            return None
        waiting = self._of_residents(place)
        forced = place.forced
        if forced is not None and (self._first(forced, place) is None or not self._fits(place, forced)):
            place.forced = None
        if waiting is None or place.forced is not None:
            pool = place.forced or self._to_load(place, now)
            if pool is not None:
                waiting = self._first(pool, place)
        return self._placement(place, waiting, now) if waiting is not None else None

    def _of_residents(self, place: _Place) -> _Waiting | None:
        """The fairest pass among those whose model the worker holds."""
        found = [
            waiting
            for digest in place.resident
            for key in ((digest, "fast"), (digest, "exact"))
            if (pool := self._active.get(key)) is not None
            and self._fits(place, pool)
            and (waiting := self._first(pool, place)) is not None
        ]
        return min(found, key=self._rank) if len(found) > 1 else found[0] if found else None

    def _first(self, pool: _Pool, place: _Place) -> _Waiting | None:
        """The fairest pass of a pool that this worker may run."""
        found = [w for c in pool.classes if (w := pool.first(c)) is not None]
        if not found:
            return None
        best = found[0] if len(found) == 1 else min(found, key=self._rank)
        refused = place.worker.refused
        if refused and best.demand.model_ids & refused:
            # A head of it cannot be loaded there. Rare, so all of the pool's passes are looked at.
            able = (
                w
                for w in self._passes.values()
                if w.pool is pool and w.rows > 0 and not w.demand.model_ids & refused
            )
            return min(able, key=self._rank, default=None)
        return best

    def _rank(self, waiting: _Waiting) -> tuple[float, ...]:
        class_ = waiting.demand.priority
        first = -inf if class_ == INTERACTIVE else self._classes[class_].start
        return (first, waiting.tenant.account.start, *waiting.key())

    def _to_load(self, place: _Place, now: float) -> _Pool | None:
        """The model that is worth loading here: one that nobody serves, or the one that would end last."""
        best: _Pool | None = None
        best_key: tuple[float, ...] = ()
        for pool in self._active.values():
            if pool.digest in place.resident or not self._fits(place, pool):
                continue
            waiting = self._first(pool, place)
            if waiting is None:
                continue
            work_s = self._price(place, waiting).of(pool.rows, pool.bytes)
            if not pool.served:
                # Among equals the longest first: what is left for the end is short (LPT, Graham 1969).
                key = (0.0, *self._rank(waiting)[:2], -work_s)
            else:
                ends_s, load_s = self._ends_s(pool), self._load_s(pool, place)
                row_s = self._price(place, waiting).of(1, pool.bytes / pool.rows)
                hosts = self._devices(pool, place, now)
                if ends_s < min(_JOIN_MOST, 1 + _JOIN * (1 + hosts)) * load_s + row_s:
                    continue
                key = (1.0, *self._rank(waiting)[:2], -ends_s - load_s)
            if best is None or key < best_key:
                best, best_key = pool, key
        return best

    def _placement(self, place: _Place, waiting: _Waiting, now: float) -> Placement:
        price = self._price(place, waiting)
        pool = waiting.pool
        work_s = price.of(waiting.rows, waiting.bytes)
        devices = self._devices(pool, place, now) / pool.waiting
        return Placement(place.worker, waiting.demand, size_s(self.subtask_s, work_s, devices), price)

    def _devices(self, pool: _Pool, place: _Place, now: float) -> float:
        """How many devices as fast as this one work for a pool, at least one."""
        at, usual = pool.devices.get(place.worker.kind, (-inf, 0.0))
        if now > at + _TRIP_S:
            mine = self._kind_s(pool, place.worker.kind)
            usual = sum(n * mine / max(1e-9, self._kind_s(pool, kind)) for kind, n in pool.power.items())
            pool.devices[place.worker.kind] = (now, usual)
        return max(1.0, usual * self.rates.pace(place.worker.name))

    def _ends_s(self, pool: _Pool) -> float:
        """Seconds until those who serve it have done all that waits in a pool."""
        power = pool.power or Counter(
            kind for kind in {f.at.number: f.worker.kind for f in pool.flights.values()}.values()
        )
        speed = sum(n / max(1e-9, self._kind_s(pool, kind)) for kind, n in power.items())
        return 1 / speed if speed > 0 else inf

    def _kind_s(self, pool: _Pool, kind: Kind) -> float:
        """Seconds of all that waits in a pool on one usual device of a kind."""
        model = pool.model
        rate = self.rates.of(
            (model.trunk or pool.digest, kind[1], pool.numerics),
            device_kind=kind[0],
            parameters=model.parameters,
        )
        return rate.price().of(pool.rows, pool.bytes)

    def _price(self, place: _Place, waiting: _Waiting) -> Price:
        model, worker = waiting.pool.model, place.worker
        rate = self.rates.of(
            (model.trunk or waiting.pool.digest, worker.device_name, waiting.pool.numerics),
            device_kind=worker.device_kind,
            parameters=model.parameters,
        )
        return rate.price(self.rates.pace(worker.name), waiting.demand.bytes_per_token)

    def _load_s(self, pool: _Pool, place: _Place) -> float:
        return self.rates.load_s(
            pool.digest, place.worker.device_name, weights_bytes=pool.model.weights_bytes()
        )

    # -- interactive work

    def _express(self, pool: _Pool, now: float) -> Iterator[Placement]:
        """Interactive work waits for nobody to ask: it goes at once to whoever can begin soonest."""
        while (waiting := pool.first(INTERACTIVE)) is not None:
            place = self._soonest(pool, waiting, now)
            if place is None:
                return
            yield self._placement(place, waiting, now)

    def _soonest(self, pool: _Pool, waiting: _Waiting, now: float) -> _Place | None:
        """The worker where a row is answered first: a few hosts of the model, then a few others, are looked at."""
        hosts = list(islice(pool.hosts.values(), _SAMPLE))
        idle = [
            place
            for held in (pool.digest, "")
            for kind in self._idle.get(held, {}).values()
            for place in islice(kind.values(), 2)
        ]
        best = self._quickest((*idle, *hosts), pool, waiting) or self._quickest(
            islice(self._places.values(), 4 * _SAMPLE), pool, waiting
        )
        if best is not None and best.worker.name in pool.hosts:
            # To the end of the line, so that the sample is another one next time.
            pool.hosts[best.worker.name] = pool.hosts.pop(best.worker.name)
        return best

    def _quickest(self, places: Iterable[_Place], pool: _Pool, waiting: _Waiting) -> _Place | None:
        best, best_s = None, inf
        for place in places:
            if place.exclusive or self._express_full(place):
                continue
            express = [f for f in place.flights if f.demand.priority == INTERACTIVE]
            if not self._fits(place, pool) or waiting.demand.model_ids & place.worker.refused:
                continue
            wait_s = sum(f.seconds for f in express) + (0.05 if len(place.flights) > len(express) else 0.0)
            if pool.digest not in place.resident:
                wait_s += self._load_s(pool, place)
            wait_s += self._price(place, waiting).of(waiting.rows, waiting.bytes)
            if wait_s < best_s:
                best, best_s = place, wait_s
        return best

    # -- fairness against residency, deadlines: once a second

    def tend(self, now: float) -> None:
        """Look after those who are owed a load, and after deadlines. O(models + jobs with a deadline)."""
        for waiting in self._passes.values():
            if waiting.demand.deadline is not None and waiting.rows > 0 and not waiting.urgent:
                left_s = waiting.demand.deadline - now
                if self._ends_s(waiting.pool) > _HURRY * left_s > 0:
                    waiting.urgent = True
                    waiting.tenant.line.again(waiting)
        for pool in list(self._active.values()):
            for waiting in [w for c in pool.classes if (w := pool.first(c)) is not None]:
                self._pay(pool, waiting, now)
        for key, pool in self._active.items():
            if pool.first(INTERACTIVE) is not None:
                self._fresh[key] = pool
        if self._active:
            # Idle workers look again: what ends late may have become worth a load.
            for kind in self._idle.get("", {}).values():
                for place in list(islice(kind.values(), _SAMPLE)):
                    self._ask_at(place, now)

    def _pay(self, pool: _Pool, waiting: _Waiting, now: float) -> None:
        """Have a worker load a model for those who are owed it: one of those that serve whom was served most."""
        tenant = waiting.tenant.account
        able = (
            place
            for place in self._places.values()
            if place.stays <= now
            and place.forced is None
            and pool.digest not in place.resident
            and self._fits(place, pool)
            and not waiting.demand.model_ids & place.worker.refused
        )
        some = list(islice(able, 4 * _SAMPLE))
        if not some or any(place.forced is pool for place in self._places.values()):
            return
        load_s = self._load_s(pool, some[0])
        owed_s = max(tenant.owed, self._classes[waiting.demand.priority].owed)
        if pool.served:
            if owed_s <= _OWED_MORE * load_s:
                return
        elif owed_s <= _OWED_TENANT * load_s and waiting.job.owed <= _OWED_JOB * load_s:
            return
        best = max(some, key=lambda p: (p.serves is None, self._served(p), -p.drain))
        best.forced, best.stays = pool, now + _STAY * self._load_s(pool, best)
        self._ask_at(best, now)

    def _served(self, place: _Place) -> tuple[float, ...]:
        """How far ahead those are whom a worker serves."""
        last = place.flights[-1] if place.flights else None
        return self._rank(last.of)[:2] if last is not None else (inf, inf)

    # -- near the end

    def late(self, now: float) -> list[Recall | Clone]:
        """What idle workers should take over of that which waits or lags elsewhere. O(what is under way there)."""
        found: list[Recall | Clone] = []
        if not any(self._idle.get("", {}).values()):
            return found
        clones_s = _CLONE_SHARE * self._spent_s + self.subtask_s - self._cloned_s
        for pool in list(self._pools.values()):
            if pool.rows == 0 and pool.flights:
                for word in self._late(pool, now):
                    if isinstance(word, Clone):
                        if word.seconds > clones_s:
                            continue
                        clones_s -= word.seconds
                    found.append(word)
        return found

    def _late(self, pool: _Pool, now: float) -> Iterator[Recall | Clone]:
        any_of = next(iter(pool.flights.values()))
        idle = [
            (self._price(place, any_of.of).of(any_of.rows, any_of.bytes), place)
            for kind in self._idle.get(pool.digest, {}).values()
            for place in islice(kind.values(), _SAMPLE)
            if not place.flights and self._fits(place, pool)
        ]
        idle.sort(key=lambda pair: (pair[0], pair[1].number))
        ends = {
            place.number: self._ends(place, now)
            for place in {f.at.number: f.at for f in pool.flights.values()}.values()
        }
        late = sorted(
            ((ends[f.at.number][id(f)], f) for f in pool.flights.values() if id(f) in ends[f.at.number]),
            key=lambda pair: -pair[0][1],
        )
        for (starts, end), flight in late:
            if not idle:
                return
            if flight.exclusive or flight.demand.priority == INTERACTIVE:
                continue
            _, place = idle[0]
            if flight.demand.model_ids & place.worker.refused:
                continue
            seconds = self._price(place, flight.of).of(flight.rows, flight.bytes)
            gain = end - (now + _TRIP_S + seconds)
            if starts > now + _TRIP_S:
                if not flight.clone and not flight.cloned and gain > max(MIN_S, seconds / 4):
                    idle.pop(0)
                    yield Recall(flight)
            elif self._worth_a_clone(flight, seconds, end, now):
                idle.pop(0)
                yield Clone(flight, place.worker, seconds)

    def _worth_a_clone(self, flight: Flight, seconds: float, end: float, now: float) -> bool:
        taken = now - flight.began - flight.load_s
        return (
            flight.harmless
            and not flight.cloned
            and taken > _OVERDUE * flight.seconds
            and end - now > _CLONE_GAIN * (seconds + _TRIP_S)
        )

    def _ends(self, place: _Place, now: float) -> dict[int, tuple[float, float]]:
        """When each sub-task at a worker starts and ends, as far as can be told."""
        found = {}
        at = now
        for i, flight in enumerate(place.flights):
            left = flight.load_s + flight.seconds
            starts = at
            if i == 0:
                taken = now - flight.began
                # Overdue: nothing is known but that long ones stay long.
                left = max(left - taken, taken / 2 if taken > left else 0.0)
                starts = flight.began
            at += left
            found[id(flight)] = (starts, at)
        return found

    # -- small parts

    def _express_full(self, place: _Place) -> bool:
        return len(place.flights) - place.bulk >= 2 * self.depth

    def _fits(self, place: _Place, pool: _Pool) -> bool:
        key = (pool.digest, pool.numerics)
        known = place.can.get(key)
        if known is None:
            worker = place.worker
            known = place.can[key] = pool.model.engine in worker.engines and (
                worker.memory_mb <= 0 or need_mb(worker, pool.model, pool.numerics) <= worker.memory_mb
            )
        return known

    def _make_room(self, place: _Place, pool: _Pool, now: float) -> None:
        """Foresee what the worker will evict for a model."""
        worker = place.worker
        if worker.memory_mb <= 0:
            self._host(place, pool.digest)
            return
        sizes = {
            digest: next(
                (
                    need_mb(worker, p.model, p.numerics)
                    for n in ("fast", "exact")
                    if (p := self._pools.get((digest, n)))
                ),
                0,
            )
            for digest in place.resident
        }
        residents = [Resident(d, sizes[d], used) for d, used in place.resident.items()]
        in_use = {f.of.pool.digest for f in place.flights}
        needed_mb = need_mb(worker, pool.model, pool.numerics)
        try:
            victims = evictions(residents, needed_mb, worker.memory_mb, in_use)
            if victims is None:
                victims = evictions(residents, needed_mb, worker.memory_mb, ())
        except NeverFits:
            victims = []
        for digest in victims or ():
            del place.resident[digest]
            self._unhost(place, digest)
        self._host(place, pool.digest)

    def _hold(self, place: _Place, resident: dict[str, float]) -> None:
        """The worker holds these models."""
        idle = place.idle
        self._unpark(place)
        for digest in place.resident.keys() - resident.keys():
            self._unhost(place, digest)
        for digest in resident.keys() - place.resident.keys():
            self._host(place, digest)
        place.resident = resident
        if idle:
            self._ask_at(place, -inf)

    def _host(self, place: _Place, digest: str) -> None:
        for numerics in ("fast", "exact"):
            pool = self._pools.get((digest, numerics))
            if pool is not None:
                pool.hosts[place.worker.name] = place

    def _unhost(self, place: _Place, digest: str) -> None:
        for numerics in ("fast", "exact"):
            pool = self._pools.get((digest, numerics))
            if pool is not None:
                pool.hosts.pop(place.worker.name, None)

    def _serve(self, place: _Place, pool: _Pool | None) -> None:
        """The worker works for this pool from now on."""
        kind = place.worker.kind
        if place.serves is not None:
            before, share = place.serves
            left = before.power[kind] - share
            if left > 1e-9:
                before.power[kind] = left
            else:
                del before.power[kind]
        place.serves = None
        if pool is not None:
            share = 1 / self.rates.pace(place.worker.name)
            pool.power[kind] = pool.power.get(kind, 0.0) + share
            place.serves = (pool, share)

    def _end_of(self, place: _Place, now: float) -> float:
        end = now
        for i, flight in enumerate(place.flights):
            left = flight.load_s + flight.seconds
            if i == 0:
                left = max(0.0, left - (now - flight.began))
            end += left
        return end

    def _ask_later(self, place: _Place) -> None:
        """It will ask when it has little left, or too few to go on with."""
        if place.bulk < min(_READY, self.depth):
            self._ask_at(place, -inf)
        elif place.bulk < self.depth:
            self._ask_at(place, place.drain - self.ahead_s)
        else:
            place.turn += 1

    def _ask_at(self, place: _Place, due: float) -> None:
        place.turn += 1
        # The emptiest first, so that work spreads before it deepens; among the empty, the fastest.
        tie = len(place.flights) + self.rates.pace(place.worker.name) / 100
        heappush(self._due, (due, tie, place.number, place.turn, place))

    def _rest(self, place: _Place) -> None:
        """There is nothing for it now."""
        place.turn += 1
        self._unpark(place)
        if not place.flights:
            self._serve(place, None)
        place.idle = True
        for held in ("", *place.resident):
            self._idle.setdefault(held, {}).setdefault(place.worker.kind, {})[place.worker.name] = place

    def _unpark(self, place: _Place) -> None:
        if not place.idle:
            return
        place.idle = False
        for held in ("", *place.resident):
            kinds = self._idle[held]
            del kinds[place.worker.kind][place.worker.name]
            if not kinds[place.worker.kind]:
                del kinds[place.worker.kind]
            if not kinds:
                del self._idle[held]

    def _wake(self, pool: _Pool) -> None:
        """More waits: idle workers ask again, those that hold the model first, the fastest kind first."""
        left: float = pool.rows
        for held in (pool.digest, ""):
            kinds = self._idle.get(held, {})
            for kind in sorted(kinds, key=lambda kind: self._kind_s(pool, kind)):
                most = ceil(min(left, self._kind_s(pool, kind) / MIN_S + 1))
                able = (
                    place
                    for place in kinds.get(kind, {}).values()
                    if self._fits(place, pool) and self._first(pool, place) is not None
                )
                for place in list(islice(able, most)):
                    self._ask_at(place, -inf)
                    left -= 1
