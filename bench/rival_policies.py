"""Four ways to place work that learn nothing, for the simulator that motet's own policy runs in.

All cut sub-tasks of one size, by what the model truly costs on a usual device, which nobody tells them in practice.
Their workers pull from Redis in a millisecond. Rows whose worker died wait again, for anybody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, cycle
from math import inf
from random import Random
from typing import Protocol

from scheduler.policy.carve import Frontier, OpenBlock, carve
from scheduler.policy.cost import Price, Workload
from scheduler.simulation.cluster import (
    BYTES_PER_TOKEN,
    Begun,
    Model,
    Scenario,
    SimulatedDevice,
    SimulatedJob,
    UncarvedRows,
)
from scheduler.simulation.events import Attempt, Subtask

SUBTASK_S = 2.0
REDIS_TRIP_S = 0.001
#: Sub-tasks under way a device, the running one included, between which two choices choose: their best of 1, 2, 3 and 6.
WINDOW = 6


class Rule(Protocol):
    """Which device a sub-task goes to; None: none now, it waits for the next that is ready."""

    def choose(self, cluster: Rival, subtask: Subtask) -> str | None: ...


@dataclass
class Rival:
    """A queue of equal sub-tasks, oldest job first, and a rule. Implements `scheduler.simulation.events.Policy`."""

    rule: Rule
    waiting: deque[Subtask] = field(default_factory=deque)
    #: Living devices, and how many sub-tasks each was given and has not ended.
    devices: dict[str, SimulatedDevice] = field(default_factory=dict)
    under_way: dict[str, int] = field(default_factory=dict)

    def begin(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._ids = count()

    def joined(self, device: SimulatedDevice, now: float) -> None:
        self.devices[device.name] = device
        self.under_way[device.name] = 0

    def died(self, device: SimulatedDevice, now: float) -> None:
        del self.devices[device.name]

    def arrived(self, job: SimulatedJob, rows: UncarvedRows, now: float) -> None:
        self.waiting += _cut(job, rows, self.scenario.models[job.model], self._ids)

    def begun(self, begun: Begun, now: float) -> Subtask:
        raise ValueError("got a sub-task that is under way; rivals are compared from the beginning")

    def ended(self, attempt: Attempt, now: float, busy_s: float | None, load_s: float) -> None:
        self.under_way[attempt.device] -= 1
        if busy_s is None:
            self.waiting.appendleft(attempt.subtask)

    def decide(self, now: float) -> Iterator[tuple[Subtask, str]]:
        while self.waiting:
            device = self.rule.choose(self, self.waiting[0])
            if device is None:
                return
            self.under_way[device] += 1
            yield self.waiting.popleft(), device

    def tick(self, now: float) -> Iterable[tuple[Subtask, str] | Attempt]:
        return ()

    def sent(self, attempt: Attempt) -> None:
        return

    def next_due(self) -> float:
        return inf


def _cut(job: SimulatedJob, rows: UncarvedRows, model: Model, ids: Iterator[int]) -> Iterator[Subtask]:
    """All of a job in sub-tasks of the same seconds on a device of speed 1."""
    ratio = BYTES_PER_TOKEN
    price = Price(model.start_s, model.row_s, model.token_s / ratio, model.square_s / ratio**2)
    blocks = [OpenBlock(n, 0, rows.rows_of(n), 1, rows.cumulative) for n in range(rows.blocks)]
    frontier = Frontier(blocks=blocks)
    while (carved := carve(frontier, SUBTASK_S, price)) is not None:
        works = [rows.work(r.lo, r.hi) for r in carved.ranges]
        work = Workload(*(sum(amounts) for amounts in zip(*map(_amounts, works), strict=True)))
        ranges = tuple((r.block, r.lo, r.hi) for r in carved.ranges)
        yield Subtask(next(ids), job, ranges, carved.rows, carved.bytes, work)


def _amounts(work: Workload) -> tuple[float, float, float]:
    return (work.rows, work.tokens, work.squares)


@dataclass
class RoundRobin:
    """Celery with a queue for each worker: each in turn when the job is submitted."""

    turns: Iterator[str] | None = None

    def choose(self, cluster: Rival, subtask: Subtask) -> str | None:
        if self.turns is None:
            self.turns = cycle(list(cluster.devices))
        return next(name for name in self.turns if name in cluster.devices)


@dataclass
class SharedQueue:
    """One first-in-first-out queue: a worker takes the next when it is done with its last, and prefetches none."""

    def choose(self, cluster: Rival, subtask: Subtask) -> str | None:
        return next((name for name in cluster.devices if cluster.under_way[name] == 0), None)


@dataclass
class TwoChoices:
    """The shorter of two random queues by count (Mitzenmacher 1996), as long as the cluster has room."""

    rng: Random
    window: int = WINDOW

    def choose(self, cluster: Rival, subtask: Subtask) -> str | None:
        names = list(cluster.devices)
        if sum(cluster.under_way[name] for name in names) >= self.window * len(names):
            return None
        return min(self.rng.sample(names, min(2, len(names))), key=cluster.under_way.__getitem__)


@dataclass
class EarliestFinish:
    """The earliest finish by the speeds that devices' kinds promise, all at submission; what they hold is not asked."""

    #: When each device will have done what it was given, by that promise.
    ends_s: dict[str, float] = field(default_factory=dict)

    def choose(self, cluster: Rival, subtask: Subtask) -> str | None:
        work_s = cluster.scenario.models[subtask.job.model].seconds(subtask.work)
        finish_s = {
            name: self.ends_s.get(name, 0.0) + work_s / device.speed
            for name, device in cluster.devices.items()
        }
        name = min(finish_s, key=finish_s.__getitem__)
        self.ends_s[name] = finish_s[name]
        return name


#: By name, made anew for each run from its seed.
RULES: Mapping[str, Callable[[int], Rule]] = {
    "Celery": lambda _: RoundRobin(),
    "FIFO": lambda _: SharedQueue(),
    "two choices": lambda seed: TwoChoices(Random(seed)),
    "blind EFT": lambda _: EarliestFinish(),
}


def rival(name: str, seed: int) -> Rival:
    return Rival(RULES[name](seed))


def pulled(scenario: Scenario) -> Scenario:
    """The same world, in which workers fetch their own work."""
    return replace(scenario, trip_s=REDIS_TRIP_S)
