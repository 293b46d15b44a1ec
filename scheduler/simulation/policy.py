"""The dispatcher's policy on the virtual clock: the same `Placer`, `carve` and `Rates`, with a store that is a list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from scheduler.policy.carve import MAX_ROWS, Carved, Frontier, OpenBlock, Piece, Range, carve
from scheduler.policy.cost import Rates, Workload
from scheduler.policy.place import Placer
from scheduler.policy.placing.entries import Flight
from scheduler.policy.placing.rebalancing import TEND_S, Clone
from scheduler.policy.placing.records import Demand, Placement, UnderWay, WorkerState
from scheduler.simulation.cluster import (
    BYTES_PER_TOKEN,
    Begun,
    Scenario,
    SimulatedDevice,
    SimulatedJob,
    UncarvedRows,
)
from scheduler.simulation.events import Attempt, Subtask


@dataclass(slots=True, eq=False)
class _Pass:
    """A job's only pass, and where it stands."""

    job: SimulatedJob
    rows: UncarvedRows
    frontier: Frontier
    waiting_rows: int
    waiting_bytes: int
    age: int


@dataclass
class Motet:
    """How motet decides, driven by a `Simulation`."""

    subtask_s: float = 2.0
    ahead_s: float = 0.5
    depth: int = 3
    #: Mechanisms that can be turned off, for ablations.
    recall: bool = True
    clone: bool = True
    pace: bool = True
    learn: bool = True
    rates: Rates = field(default_factory=Rates)

    def begin(self, scenario: Scenario) -> None:
        self.placer = Placer(self.rates, subtask_s=self.subtask_s, ahead_s=self.ahead_s, depth=self.depth)
        self._scenario = scenario
        self._passes: dict[str, _Pass] = {}
        self._manifests = {name: model.manifest() for name, model in scenario.models.items()}
        self._devices: dict[str, SimulatedDevice] = {}
        #: Live leases: attempt -> it, and sub-task -> its attempts.
        self._attempts: dict[int, Attempt] = {}
        self._leases: dict[int, set[int]] = {}
        #: Decided, and not yet on its way.
        self._deciding: Flight | None = None
        self._ids, self._pieces, self._ages = count(), count(), count()
        self._tended_s = 0.0
        self._numbers = {name: number for number, name in enumerate(scenario.models)}
        for name in scenario.models:
            for kind, device in {d.kind: d for d in scenario.devices}.items():
                model = scenario.model(name, device)
                # The registry's guess: wrong by a factor until the first outcomes are in.
                key = (name, kind, "fast")
                if key not in self.rates.learned:
                    prior = self.rates.of(key, device_kind="cpu", parameters=0)
                    self.rates.learned[key] = type(prior).prior(
                        model.token_s / device.speed * scenario.prior_off
                    )
                self.rates.loads.setdefault((self._manifests[name].digest, kind), model.load_s)

    def joined(self, device: SimulatedDevice, now: float) -> None:
        self._devices[device.name] = device
        worker = WorkerState(
            name=device.name,
            boot="1",
            device_kind="cuda",
            device_name=device.kind,
            engines=("encoder",),
            memory_mb=device.memory_mb,
            resident=tuple(self._manifests[model].digest for model in device.resident),
            refused=frozenset(self._numbers[model] for model in device.refuses),
        )
        self.placer.worker(worker, now)

    def died(self, device: SimulatedDevice, now: float) -> None:
        self.placer.gone(device.name)

    def arrived(self, job: SimulatedJob, rows: UncarvedRows, now: float) -> None:
        n_rows, size = rows.total()
        self._passes[job.name] = _Pass(job, rows, Frontier(), n_rows, size, next(self._ages))
        self._want(self._passes[job.name])

    def begun(self, begun: Begun, now: float) -> Subtask:
        pass_, tokens = self._passes[begun.job], begun.tokens
        size, work = round(BYTES_PER_TOKEN * tokens), Workload(1, tokens, 0)
        model = self._scenario.model(pass_.job.model, self._devices[begun.device])
        seconds = model.seconds(work) / self._devices[begun.device].speed
        under_way = UnderWay(key="new", rows=1, bytes=size, seconds=seconds, age_s=0.0)
        self._deciding = self.placer.adopt(self._demand(pass_), begun.device, under_way, now)
        return Subtask(next(self._ids), pass_.job, (), 1, size, work)

    def ended(self, attempt: Attempt, now: float, busy_s: float | None, load_s: float) -> None:
        if self._attempts.pop(attempt.id, None) is None:
            return
        subtask = attempt.subtask
        leases = self._leases[subtask.id]
        leases.discard(attempt.id)
        flight = self.placer.flight(attempt.id)
        clone = flight is not None and flight.clone
        self.placer.closed(attempt.id, now, busy_s)
        if subtask.done:
            # The first outcome closes the sub-task: its other lease is void.
            for other in leases:
                self.placer.closed(other, now, None)
                self._attempts.pop(other).dropped = True
            leases.clear()
        if not leases:
            del self._leases[subtask.id]
            if not subtask.done:
                self._put_back(subtask)
        if busy_s and self.learn and not clone:
            self._learn(attempt, busy_s, load_s)

    def decide(self, now: float) -> Iterator[tuple[Subtask, str]]:
        for placement in self.placer.place(now):
            subtask = self._carve(placement)
            if subtask is None:
                self.placer.nothing(placement, now)
                continue
            seconds = placement.price.of(subtask.rows, subtask.bytes)
            self._deciding = self.placer.opened(
                placement, "new", now, rows=subtask.rows, size=subtask.bytes, seconds=seconds
            )
            yield subtask, placement.worker.name

    def sent(self, attempt: Attempt) -> None:
        if self._deciding is not None:
            self.placer.keyed(self._deciding, attempt.id)
            self._deciding = None
        self._attempts[attempt.id] = attempt
        self._leases.setdefault(attempt.subtask.id, set()).add(attempt.id)

    def tick(self, now: float) -> Iterator[tuple[Subtask, str] | Attempt]:
        if now - self._tended_s >= TEND_S:
            self._tended_s = now
            self.placer.tend(now)
        for word in self.placer.late(now):
            attempt = self._attempts[word.flight.key]  # type: ignore[index]
            if isinstance(word, Clone):
                if self.clone:
                    self._deciding = self.placer.cloned(word, "new", now)
                    yield attempt.subtask, word.worker.name
            elif self.recall:
                yield attempt
                self.ended(attempt, now, None, 0.0)

    def next_due(self) -> float:
        return self.placer.next_due()

    # -- the store

    def _carve(self, placement: Placement) -> Subtask | None:
        pass_ = self._passes[placement.demand.job]
        self._refill(pass_)
        carved = carve(
            pass_.frontier, placement.budget_s, placement.price, cap_s=self.subtask_s, least=placement.least
        )
        if carved is None:
            return None
        if carved.leftover is not None:
            pass_.frontier.pieces.append(Piece(next(self._pieces), carved.leftover, 1))
        subtask = self._subtask(pass_, carved)
        pass_.waiting_rows -= subtask.rows
        pass_.waiting_bytes -= subtask.bytes
        return subtask

    def _refill(self, pass_: _Pass) -> None:
        """Bring as many blocks to the frontier as one sub-task can take rows of."""
        rows = pass_.rows
        while (
            len(pass_.frontier.blocks) * rows.block_rows < MAX_ROWS + rows.block_rows
            and rows.block < rows.blocks
        ):
            number = rows.block
            rows.block += 1
            pass_.frontier.blocks.append(OpenBlock(number, 0, rows.rows_of(number), 1, rows.cumulative))

    def _subtask(self, pass_: _Pass, carved: Carved) -> Subtask:
        works = [pass_.rows.work(r.lo, r.hi) for r in carved.ranges]
        work = (
            works[0]
            if len(works) == 1
            else Workload(
                sum(w.rows for w in works), sum(w.tokens for w in works), sum(w.squares for w in works)
            )
        )
        ranges = tuple((r.block, r.lo, r.hi) for r in carved.ranges)
        # Not what carve says: the bytes of part of a piece are a guess, and guesses do not add up.
        cumulative = pass_.rows.cumulative
        size = sum(cumulative[r.hi] - cumulative[r.lo] for r in carved.ranges)
        return Subtask(next(self._ids), pass_.job, ranges, carved.rows, size, work)

    def _put_back(self, subtask: Subtask) -> None:
        pass_ = self._passes[subtask.job.name]
        cumulative = pass_.rows.cumulative
        for block, lo, hi in subtask.ranges:
            r = Range(block, lo, hi, cumulative[hi] - cumulative[lo])
            pass_.frontier.pieces.append(Piece(next(self._pieces), r, 1))
        pass_.waiting_rows += subtask.rows
        pass_.waiting_bytes += subtask.bytes
        self._want(pass_)

    def _want(self, pass_: _Pass) -> None:
        self.placer.want(self._demand(pass_))

    def _demand(self, pass_: _Pass) -> Demand:
        job = pass_.job
        return Demand(
            job=job.name,
            pass_number=0,
            tenant=job.tenant,
            weight=job.weight,
            priority=job.priority,
            age=pass_.age,
            model_ids=frozenset({self._numbers[job.model]}),
            model=self._manifests[job.model],
            rows_waiting=pass_.waiting_rows,
            bytes_waiting=pass_.waiting_bytes,
            bytes_per_token=float(BYTES_PER_TOKEN),
            deadline=job.deadline_s,
        )

    def _learn(self, attempt: Attempt, busy_s: float, load_s: float) -> None:
        device, subtask = self._devices[attempt.device], attempt.subtask
        model = subtask.job.model
        if load_s:
            self.rates.loaded((self._manifests[model].digest, device.kind), load_s)
        key = (model, device.kind, "fast")
        self.rates.observe(key, device.name, self.rates.learned[key], subtask.work, busy_s, subtask.bytes)
        if not self.pace:
            self.rates.paces.clear()
