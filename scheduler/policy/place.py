"""Place: which worker gets work of which pass now, and what is taken back or doubled near the end. Pure.

The `Placer` hears of workers, of waiting passes and of what is under way, and answers whoever asks for work. A
worker asks when it has less than a moment of work left, so the choice is made late. It serves the models that it
holds, fairly; when those have nothing for it, it loads the model whose work would end last without it. Every
answer costs O(log n) in workers and jobs; only a load, which takes seconds, looks at every model.

The dispatcher and the simulator drive the same class. It has no clock: ``now`` is any one that only rises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count, islice
from math import ceil, inf
from typing import Literal, NamedTuple

from motet.protocol.manifest import Manifest, decode_slots
from motet.protocol.residency import NeverFits, Resident, evictions
from scheduler.policy.carve import MIN_S, size_s
from scheduler.policy.cost import Price, Rate, RateKey, Rates, learned_as
from scheduler.policy.fairness import BULK, CLASS_WEIGHTS, INTERACTIVE, NORMAL, Account, Line, Turn, begun

#: (job, pass number).
PassId = tuple[str, int]
#: (device kind, device name): devices of one kind share what is learned.
DeviceKind = tuple[str, str]

#: Sub-tasks at a worker at least, the running one included, however long they are: the next one is there at its end.
_READY = 2
#: A language model writes many answers at once and lets the next row in when one ends: its worker asks while fewer
#: rows are there than it has decode slots, so many times over.
_FILLED = 2
#: A sub-task of a language model has rows for such a part of the decode slots at least.
_PART = 4
#: Sub-tasks that fill decode slots, at most: with those of the lane no more than a worker takes off its queue at once.
_FILLERS = 10
#: One more host of a model is opened where that ends its work by half a load's time earlier; or where it would end later than
#: this many load times, however many hosts it has.
_JOIN, _JOIN_MOST = 0.5, 3.25
#: A job whose model nobody holds is owed its load once by its tenant's share, ten times by its own within the tenant.
_OWED_TENANT, _OWED_JOB = 1.0, 10.0
#: A tenant whose model too few hold is owed another host when it lags so many load times behind.
_OWED_MORE = 10.0
#: One of two pools' workers goes from one to the other where that ends so many load times too late, and so many are left.
_SPARE, _NEAR, _NEED = 2.0, 8.0, 0.5
#: After a switch that fairness forced a worker stays so many load times, so switching costs a tenth at most.
_STAY = 10.0
#: Workers that are looked at where the best of many is wanted.
_SAMPLE = 16
#: A message to a worker and its first word back.
_TRIP_S = 0.1
#: Nothing was counted yet.
_NEVER = (-inf, 0.0)
_NOTHING = (0, 0.0, 0.0)
#: Outcomes from which it is told when a pool ends: many, since a worker that moves for nothing loads for nothing.
_REMEMBERED, _ENOUGH = 1000, 50
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
    #: Name under which its speed is learned; "": that of its model's trunk.
    rate_key: str = ""
    #: It reads other tasks' answers. What of it may run goes first in its job: then blocks are done while others wait.
    dependent: bool = False
    rows_waiting: int
    bytes_waiting: int
    #: Learned of this job; 0: not yet.
    bytes_per_token: float = 0.0
    #: On the clock of ``now``; None: no deadline.
    deadline: float | None = None

    @property
    def id(self) -> PassId:
        return (self.job, self.pass_number)

    @property
    def learned_as(self) -> str:
        """The name under which its speed is learned."""
        return learned_as(self.rate_key, self.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One live worker that may be given work, as of its newest beat."""

    name: str
    boot: str
    device_kind: str
    device_name: str
    engines: tuple[str, ...]
    #: Memory that models may hold, of all GPUs of a group; 0: not known.
    memory_mb: int = 0
    #: GPUs of the group, and the engines that lay a model out over all of them: others use the first one alone.
    gpus: int = 1
    spreads: tuple[str, ...] = ()
    #: Numeric formats beside fp32 that the device is fast at.
    formats: tuple[str, ...] = ()
    resident: tuple[str, ...] = ()
    #: Ids of models that it could not load.
    refused: frozenset[int] = frozenset()

    @property
    def kind(self) -> DeviceKind:
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


def need_mb(worker: WorkerState, model: Manifest, numerics: str) -> int:
    """Memory that a model takes on a worker, in the numeric format that it would run in there."""
    fast = (name for name in worker.formats if name in model.formats) if numerics == "fast" else ()
    return model.memory_mb(next(iter(fast), "fp32"))


def room_mb(worker: WorkerState, engine: str) -> int:
    """Memory that a model of an engine can have on a worker that holds no other; 0: not known."""
    return worker.memory_mb if engine in worker.spreads else worker.memory_mb // worker.gpus


def on_first_mb(worker: WorkerState, model: Manifest, numerics: str) -> int:
    """What the first GPU of a worker holds of a model. It is the fullest of a group, since most engines use it alone."""
    whole_mb = need_mb(worker, model, numerics)
    return ceil(whole_mb / worker.gpus) if model.engine in worker.spreads else whole_mb


def cannot_hold(
    worker: WorkerState, model: Manifest, numerics: str
) -> Literal["no_engine", "too_small"] | None:
    """Why a worker can never load a model, however free it is; None where nothing is known against it."""
    if model.engine not in worker.engines:
        return "no_engine"
    too_small = 0 < room_mb(worker, model.engine) < need_mb(worker, model, numerics)
    return "too_small" if too_small else None


def cannot_run(worker: WorkerState, demand: Demand) -> Literal["no_engine", "too_small", "refused"] | None:
    """Why a worker can never run a pass, however free it is; None where nothing is known against it."""
    lacks = cannot_hold(worker, demand.model, demand.numerics)
    return lacks or ("refused" if demand.model_ids & worker.refused else None)


class Placement(NamedTuple):
    """Give this worker the next sub-task of this pass, of about so many seconds."""

    worker: WorkerState
    demand: Demand
    budget_s: float
    price: Price
    #: Rows at least, where so many wait.
    least: int = 1


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
    def worker(self) -> WorkerState:
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
    worker: WorkerState
    seconds: float


@dataclass(slots=True, eq=False)
class _Job:
    """A job's account, and those of its passes that are known."""

    account: Account
    passes: dict[PassId, _Waiting] = field(default_factory=dict)


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
        number = -self.demand.pass_number if self.demand.dependent else self.demand.pass_number
        if self.urgent and self.demand.deadline is not None:
            return (0.0, self.demand.deadline, self.demand.age, number)
        return (1.0, self.job.start, self.demand.age, number)


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
    #: The same by how its speed is learned: rate key -> rows, bytes.
    by_rate: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: Passes that wait.
    waiting: int = 0
    #: Workers that work for it, as devices of their kind at its usual pace.
    power: dict[DeviceKind, float] = field(default_factory=dict)
    #: Workers that hold the model, or are told to load it.
    hosts: dict[str, _Place] = field(default_factory=dict)
    #: What is under way at workers that are there.
    flights: dict[int, Flight] = field(default_factory=dict)
    #: Workers counted as devices of a kind, as of a moment ago: it is asked for each sub-task, and changes slowly.
    devices: dict[DeviceKind, tuple[float, float]] = field(default_factory=dict)
    #: What its work took, by kind: outcomes, bytes, device-seconds.
    took: dict[DeviceKind, tuple[int, float, float]] = field(default_factory=dict)
    #: Under which the rates of its passes are kept, by kind and their own names.
    keys: dict[tuple[DeviceKind, str], RateKey] = field(default_factory=dict)

    def first(self, class_: int) -> _Waiting | None:
        line = self.classes.get(class_)
        tenant = line.first() if line is not None else None
        return tenant.line.first() if tenant is not None else None


@dataclass(slots=True, eq=False)
class _Place:
    """A worker, and what is under way there."""

    worker: WorkerState
    number: int
    #: The worker's, which never changes here.
    kind: DeviceKind
    flights: list[Flight] = field(default_factory=list)
    #: Of these the ones that are not interactive, and those that nothing may run beside.
    bulk: int = 0
    exclusive: int = 0
    #: When all of that will be done.
    drain: float = 0.0
    #: Digest of each model that it holds, or will by then, and when it was used last.
    resident: dict[str, float] = field(default_factory=dict)
    can: dict[_Pool, bool] = field(default_factory=dict)
    #: The pool it works for, and with how much of a usual device of its kind.
    serves: tuple[_Pool, float] | None = None
    #: It is not switched again by force before then.
    stays: float = -inf
    #: Pool that it left to others: it does not go back before then while there is something else.
    left: _Pool | None = None
    idle: bool = False
    turn: int = 0


class Placer:
    """Who works on what. Events in, placements out."""

    def __init__(self, rates: Rates, *, subtask_s: float, ahead_s: float, depth: int) -> None:
        """``subtask_s``: seconds of a sub-task at most. ``ahead_s``: a worker asks when it has less left than this.
        ``depth``: bulk sub-tasks at a worker at most, the running one included."""
        self.rates = rates
        self.subtask_s, self.ahead_s, self.depth = subtask_s, ahead_s, depth
        self._ready = min(_READY, depth)
        self._places: dict[str, _Place] = {}
        self._passes: dict[PassId, _Waiting] = {}
        self._pools: dict[tuple[str, str], _Pool] = {}
        #: The same by the model alone, "exact" last.
        self._pools_of: dict[str, list[_Pool]] = {}
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
        #: Passes with a deadline; workers of each kind; and those that are told to load a model, with its pool.
        self._dated: dict[PassId, _Waiting] = {}
        self._kinds: Counter[DeviceKind] = Counter()
        self._forced: dict[_Place, _Pool] = {}
        #: Who will ask, by when: (due, tie, number, turn, place).
        self._due: list[tuple[float, float, int, int, _Place]] = []
        #: Idle places by a model that they hold ("": all of them) and kind.
        self._idle: dict[str, dict[DeviceKind, dict[str, _Place]]] = {}
        self._numbers = count()
        self._spent_s = self._cloned_s = 0.0

    # -- workers

    def worker(self, worker: WorkerState, now: float) -> None:
        """A worker that may be given work: a new one, or what is new of it."""
        place = self._places.get(worker.name)
        if place is not None and place.kind != worker.kind:
            self.gone(worker.name)
            place = None
        if place is None:
            place = self._places[worker.name] = _Place(worker, next(self._numbers), worker.kind, drain=now)
            self._kinds[place.kind] += 1
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
        self._kinds[place.kind] -= 1
        if not self._kinds[place.kind]:
            del self._kinds[place.kind]
        self._forced.pop(place, None)
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
        if demand.deadline is not None:
            self._dated[demand.id] = waiting
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
            same = self._pools_of.setdefault(digest, [])
            same.insert(0 if demand.numerics == "fast" else len(same), pool)
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
        waiting = job.passes[demand.id] = _Waiting(demand, pool, job.account, tenant)
        return waiting

    def _set(self, waiting: _Waiting, rows: int, size: int) -> None:
        pool, before = waiting.pool, waiting.rows
        pool.rows += rows - before
        pool.bytes += size - waiting.bytes
        its_rows, its_bytes = pool.by_rate.get(waiting.demand.rate_key, (0, 0))
        its_rows, its_bytes = its_rows + rows - before, its_bytes + size - waiting.bytes
        if its_rows > 0:
            pool.by_rate[waiting.demand.rate_key] = (its_rows, its_bytes)
        else:
            pool.by_rate.pop(waiting.demand.rate_key, None)
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
        self._dated.pop(waiting.demand.id, None)
        job = self._jobs[waiting.demand.job]
        del job.passes[waiting.demand.id]
        if not job.passes:
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
        place, waiting, flights = flight.at, flight.of, flight.at.flights
        pool = waiting.pool
        waiting.flights -= 1
        pool.flights.pop(id(flight), None)
        interactive = waiting.demand.priority == INTERACTIVE
        place.bulk -= not interactive
        place.exclusive -= flight.exclusive
        if flights[0] is flight:
            del flights[0]
            if flights:
                flights[0].began = now
                begun(flights[0].turn)
        else:
            flights.remove(flight)
            if busy_s is not None:
                # Interactive work, and what shares a batch, may end before what stands ahead of it.
                begun(flight.turn)
        spent_s = busy_s or 0.0
        if flight.clone:
            self._cloned_s += spent_s - flight.seconds
        else:
            waiting.job.correct(spent_s - flight.seconds)
            if spent_s < flight.seconds:
                # All passes of the job have its place.
                for mine in self._jobs[waiting.demand.job].passes.values():
                    mine.tenant.line.again(mine)
                    mine.pool.classes[mine.demand.priority].again(mine.tenant)
        self._spent_s += spent_s
        if spent_s > 0:
            n, size, seconds = pool.took.get(place.kind, _NOTHING)
            if n >= _REMEMBERED:
                n, size, seconds = n // 2, size / 2, seconds / 2
            pool.took[place.kind] = (n + 1, size + flight.bytes, seconds + spent_s)
        if interactive and pool.waiting:
            # More of it may wait for the place in the lane that is free now.
            self._fresh[pool.digest, pool.numerics] = pool
        if self._places.get(place.worker.name) is place:
            place.drain = self._end_of(place, now)
            self._ask_later(place)
        if waiting.rows <= 0 and waiting.flights <= 0:
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
        if place.idle:
            self._unpark(place)
        load_s = 0.0
        pool, flights = waiting.pool, place.flights
        if pool.digest not in place.resident:
            load_s = self._load_s(pool, place)
            self._make_room(place, pool, now)
        place.resident[pool.digest] = now
        began = place.drain if flights and place.drain > now else now
        flight = Flight(key, place, waiting, rows, size, seconds, load_s, now, began, exclusive)
        self._flights[key] = flight
        waiting.flights += 1
        pool.flights[id(flight)] = flight
        flights.append(flight)
        place.bulk += waiting.demand.priority != INTERACTIVE
        place.exclusive += exclusive
        place.drain = began + load_s + seconds
        if self._forced and self._forced.get(place) is pool:
            del self._forced[place]
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
            _, _, _, turn, place = self._due[0]
            if turn != place.turn:
                heappop(self._due)
                continue
            placement = self._answer(place, now)
            if placement is not None:
                # It goes on asking until the caller has said what became of this: whoever fails in between comes back.
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
        if place.exclusive or self._express_full(place):
            return None
        if place.bulk >= self.depth:
            filling = self._unfilled(place)
            first = self._first(filling, place) if filling is not None else None
            return self._placement(place, first, now) if first is not None else None
        forced = self._forced.get(place)
        if forced is not None and (self._first(forced, place) is None or not self._fits(place, forced)):
            del self._forced[place]
            forced = None
        if now > place.stays:
            place.left = None
        waiting = self._of_residents(place, place.left)
        if waiting is None and place.left is not None and forced is None:
            waiting, place.left = self._of_residents(place), None
        if waiting is None or forced is not None:
            pool = forced or self._to_load(place, now)
            if pool is not None:
                waiting = self._first(pool, place)
        return self._placement(place, waiting, now) if waiting is not None else None

    def _of_residents(self, place: _Place, but: _Pool | None = None) -> _Waiting | None:
        """The fairest pass among those whose model the worker holds, but for those of a pool."""
        best: _Waiting | None = None
        for digest in place.resident:
            for pool in self._pools_of.get(digest, ()):
                if not pool.waiting or pool is but or not self._fits(place, pool):
                    continue
                first = self._first(pool, place)
                if first is not None and (best is None or self._rank(first) < self._rank(best)):
                    best = first
        return best

    def _first(self, pool: _Pool, place: _Place) -> _Waiting | None:
        """The fairest pass of a pool that this worker may run."""
        best: _Waiting | None = None
        for class_ in pool.classes:
            first = pool.first(class_)
            if first is not None and (best is None or self._rank(first) < self._rank(best)):
                best = first
        if best is None:
            return None
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
            if not self._is_served(pool):
                # Among equals the longest first: what is left for the end is short (LPT, Graham 1969).
                key = (0.0, *self._rank(waiting)[:2], -work_s)
            else:
                ends_s, load_s = self._ends_s(pool), self._load_s(pool, place) + self._room_s(place, pool)
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
        work_s = price.of(waiting.rows, waiting.bytes)
        devices = self._devices(waiting.pool, place, now) / waiting.pool.waiting
        least = 1
        if waiting.pool.model.answers == "text":
            # What a row takes there depends on how many are beside it. A sub-task fills a part of the slots, whatever
            # was learned of rows that were alone.
            least = max(1, min(decode_slots(place.kind[0]) // _PART, int(waiting.rows / (2 * devices))))
        return Placement(place.worker, waiting.demand, size_s(self.subtask_s, work_s, devices), price, least)

    def _devices(self, pool: _Pool, place: _Place, now: float) -> float:
        """How many devices as fast as this one work for a pool, at least one."""
        kind = place.kind
        at, usual = pool.devices.get(kind, _NEVER)
        if now > at + _TRIP_S:
            mine = self._kind_s(pool, kind)
            usual = sum(n * mine / max(1e-9, self._kind_s(pool, other)) for other, n in pool.power.items())
            pool.devices[kind] = (now, usual)
        return max(1.0, usual * self.rates.pace(place.worker.name))

    def _is_served(self, pool: _Pool) -> bool:
        """Somebody works for it, has work of it in line behind that of another pool, or holds its model for its next turn."""
        return bool(pool.power or pool.flights) or any(
            self._fits(place, pool) and self._first(pool, place) is not None for place in pool.hosts.values()
        )

    def _ends_s(self, pool: _Pool) -> float:
        """Seconds until those who serve it have done all that waits in a pool."""
        power: Mapping[DeviceKind, float] = pool.power
        if not power:
            # Workers that are at others' work now, and will come to it.
            power = Counter({f.at.number: f.at.kind for f in pool.flights.values()}.values()) or Counter(
                place.kind for place in islice(pool.hosts.values(), _SAMPLE)
            )
        speed = sum(n / max(1e-9, self._kind_s(pool, kind)) for kind, n in power.items())
        return 1 / speed if speed > 0 else inf

    def _kind_s(self, pool: _Pool, kind: DeviceKind) -> float:
        """Seconds of all that waits in a pool on one usual device of a kind."""
        return sum(
            self._rate(pool, kind, name).price().of(rows, size) for name, (rows, size) in pool.by_rate.items()
        )

    def _all_s(self, pool: _Pool, kind: DeviceKind) -> float:
        """The same, from so many outcomes that chance has little part in it."""
        n, size, seconds = pool.took.get(kind, _NOTHING)
        return seconds / size * pool.bytes if n >= _ENOUGH and size > 0 else self._kind_s(pool, kind)

    def _rate(self, pool: _Pool, kind: DeviceKind, name: str) -> Rate:
        """``name``: under which a pass' speed is learned, where it is not that of all passes of its model."""
        key = pool.keys.get((kind, name))
        if key is None:
            key = pool.keys[kind, name] = (name or pool.model.trunk or pool.digest, kind[1], pool.numerics)
        known = self.rates.learned.get(key)
        if known is None:
            known = self.rates.of(key, device_kind=kind[0], parameters=pool.model.parameters)
        return known

    def _price(self, place: _Place, waiting: _Waiting) -> Price:
        rate = self._rate(waiting.pool, place.kind, waiting.demand.rate_key)
        return rate.price(self.rates.pace(place.worker.name), waiting.demand.bytes_per_token)

    def _load_s(self, pool: _Pool, place: _Place) -> float:
        return self._loading_s(pool, place.kind)

    def _loading_s(self, pool: _Pool, kind: DeviceKind) -> float:
        return self.rates.load_s(pool.digest, kind[1], weights_bytes=pool.model.weights_bytes())

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
                wait_s += self._load_s(pool, place) + self._room_s(place, pool)
            wait_s += self._price(place, waiting).of(waiting.rows, waiting.bytes)
            if wait_s < best_s:
                best, best_s = place, wait_s
        return best

    # -- fairness against residency, deadlines: once a second

    def tend(self, now: float) -> None:
        """Look after those who are owed a load, and after deadlines. O(models + jobs with a deadline)."""
        for waiting in self._dated.values():
            if waiting.demand.deadline is not None and waiting.rows > 0 and not waiting.urgent:
                left_s = waiting.demand.deadline - now
                if self._ends_s(waiting.pool) > _HURRY * left_s > 0:
                    waiting.urgent = True
                    waiting.tenant.line.again(waiting)
        for pool in list(self._active.values()):
            for waiting in [w for c in pool.classes if (w := pool.first(c)) is not None]:
                self._pay(pool, waiting, now)
        self._balance(now)
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
        tenant_s = max(waiting.tenant.account.owed, self._classes[waiting.demand.priority].owed)
        job_s = waiting.job.owed
        served = self._is_served(pool)

        def owed(load_s: float) -> bool:
            if served:
                return tenant_s > _OWED_MORE * load_s
            return tenant_s > _OWED_TENANT * load_s or job_s > _OWED_JOB * load_s

        # Mostly nobody is: then no worker is looked at.
        if pool in self._forced.values() or not any(
            owed(self._loading_s(pool, kind)) for kind in self._kinds
        ):
            return
        able = (
            place
            for place in self._places.values()
            if place.stays <= now
            and place not in self._forced
            and pool.digest not in place.resident
            and self._fits(place, pool)
            and not waiting.demand.model_ids & place.worker.refused
        )
        some = list(islice(able, 4 * _SAMPLE))
        if not some or not owed(self._load_s(pool, some[0])):
            return
        best = max(some, key=lambda p: (p.serves is None, self._served(p), -p.drain - self._room_s(p, pool)))
        self._forced[best], best.stays = pool, now + _STAY * self._load_s(pool, best)
        self._ask_at(best, now)

    def _balance(self, now: float) -> None:
        """Have a worker of a pool that ends early load the model of the one that ends last, while that is worth a load.

        All would end together if work were spread evenly. A pool that ends before that can spare one of its workers
        from the moment on at which the others can do the rest by then. It goes then, alone: if all of them went on
        to the end, each of them would have to load another model for the little time that is left.
        """
        ends = {}
        for pool in self._active.values():
            if not pool.power:
                # What nobody serves is loaded by whoever has nothing to do: first things first.
                return
            speed = sum(n / max(1e-9, self._all_s(pool, kind)) for kind, n in pool.power.items())
            ends[pool] = (1 / speed, sum(pool.power.values()))
        if len(ends) < 2:
            return
        together_s = sum(end_s * n for end_s, n in ends.values()) / sum(n for _, n in ends.values())
        forced = set(self._forced.values())
        late = sorted(
            ((end_s, pool) for pool, (end_s, _) in ends.items() if pool not in forced and end_s > together_s),
            key=lambda pair: -pair[0],
        )
        spared: set[_Pool] = set()
        for end_s, pool in late:
            for other, (early_s, n) in sorted(ends.items(), key=lambda item: item[1][0]):
                if other in spared or n < 2 or early_s >= together_s or early_s * n > together_s * (n - 1):
                    continue
                place = self._spare(other, pool, now)
                if place is None:
                    continue
                load_s = self._load_s(pool, place) + self._room_s(place, pool)
                needed_s = (end_s - together_s) * ends[pool][1]
                if not _SPARE * load_s < together_s < _NEAR * load_s or needed_s < _NEED * (
                    together_s - load_s
                ):
                    continue
                self._forced[place], place.left, place.stays = pool, other, now + _STAY * load_s
                self._ask_at(place, now)
                spared.add(other)
                break

    def _spare(self, of: _Pool, for_: _Pool, now: float) -> _Place | None:
        """A worker of one pool that may go to another."""
        mine, theirs = of.first(NORMAL) or of.first(BULK), for_.first(NORMAL) or for_.first(BULK)
        if mine is None or theirs is None or self._rank(theirs)[:2] > self._rank(mine)[:2]:
            return None
        able = (
            place
            for place in of.hosts.values()
            if place.serves is not None
            and place.serves[0] is of
            and place not in self._forced
            and place.stays <= now
            and for_.digest not in place.resident
            and self._fits(place, for_)
            and not theirs.demand.model_ids & place.worker.refused
        )
        return min(islice(able, 4 * _SAMPLE), key=lambda place: place.drain, default=None)

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
            # How long a training run takes nobody predicts, and a second one would begin where the first one did.
            and flight.demand.model.answers != "models"
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

    def _unfilled(self, place: _Place) -> _Pool | None:
        """The pool that it works for, if a language model answers it that could write more answers at once."""
        pool = place.serves[0] if place.serves is not None else None
        if pool is None or pool.model.answers != "text" or pool.waiting == 0 or place.bulk >= _FILLERS:
            return None
        rows = sum(flight.rows for flight in place.flights if flight.of.pool is pool)
        return pool if rows < _FILLED * decode_slots(place.kind[0]) else None

    def _express_full(self, place: _Place) -> bool:
        return len(place.flights) - place.bulk >= 2 * self.depth

    def _fits(self, place: _Place, pool: _Pool) -> bool:
        known = place.can.get(pool)
        if known is None:
            known = place.can[pool] = cannot_hold(place.worker, pool.model, pool.numerics) is None
        return known

    def _make_room(self, place: _Place, pool: _Pool, now: float) -> None:
        """Foresee what the worker will evict for a model."""
        for digest in self._victims(place, pool):
            del place.resident[digest]
            self._unhost(place, digest)
        self._host(place, pool.digest)

    def _victims(self, place: _Place, pool: _Pool) -> Sequence[str]:
        """What the worker will evict for a model, by the rule that it follows itself."""
        worker = place.worker
        if worker.memory_mb <= 0 or not place.resident:
            return ()
        sizes = {
            digest: next(
                (on_first_mb(worker, p.model, p.numerics) for p in self._pools_of.get(digest, ())), 0
            )
            for digest in place.resident
        }
        residents = [Resident(d, sizes[d], used) for d, used in place.resident.items()]
        in_use = {f.of.pool.digest for f in place.flights}
        needed_mb = on_first_mb(worker, pool.model, pool.numerics)
        budget_mb = worker.memory_mb // worker.gpus
        try:
            victims = evictions(residents, needed_mb, budget_mb, in_use)
            if victims is None:
                victims = evictions(residents, needed_mb, budget_mb, ())
        except NeverFits:
            victims = []
        return victims or ()

    def _room_s(self, place: _Place, pool: _Pool) -> float:
        """Seconds that it will cost to load again what must give way for a model: of those for which work waits.

        The more others hold such a model, the less likely it comes back here.
        """
        return sum(
            self._load_s(victim, place) / max(1, len(victim.hosts))
            for digest in self._victims(place, pool)
            for victim in self._pools_of.get(digest, ())
            if victim.waiting and victim is not pool
        )

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
        for pool in self._pools_of.get(digest, ()):
            pool.hosts[place.worker.name] = place

    def _unhost(self, place: _Place, digest: str) -> None:
        for pool in self._pools_of.get(digest, ()):
            pool.hosts.pop(place.worker.name, None)

    def _serve(self, place: _Place, pool: _Pool | None) -> None:
        """The worker works for this pool from now on."""
        kind = place.kind
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
        head = True
        for flight in place.flights:
            left = flight.load_s + flight.seconds
            if head:
                head, left = False, left - (now - flight.began)
                if left < 0.0:
                    continue
            end += left
        return end

    def _ask_later(self, place: _Place) -> None:
        """It will ask when it has little left, or too few to go on with."""
        if place.bulk < self._ready or self._unfilled(place) is not None:
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
            self._idle.setdefault(held, {}).setdefault(place.kind, {})[place.worker.name] = place

    def _unpark(self, place: _Place) -> None:
        if not place.idle:
            return
        place.idle = False
        for held in ("", *place.resident):
            kinds = self._idle[held]
            del kinds[place.kind][place.worker.name]
            if not kinds[place.kind]:
                del kinds[place.kind]
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
