"""When a job will be done: the dispatcher's own policy, run forward on the virtual clock from what is so now. Pure.

Time is told in units of ``zoom`` seconds, so that a run has few sub-tasks however much work there is; devices that
are alike are taken together, so that it has few devices. A run is then a matter of milliseconds, and ten of them,
each with noise and with rates as wrong as little-known ones are, tell how sure the answer is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, sqrt
from random import Random

from scheduler.policy.capability import on_first_mb, why_not
from scheduler.policy.cost import Rate, Rates
from scheduler.policy.fairness import BULK
from scheduler.policy.placing.records import Demand, DeviceKind, PassId, WorkerState
from scheduler.simulation.cluster import (
    BYTES_PER_TOKEN,
    Begun,
    Model,
    Scenario,
    SimulatedDevice,
    SimulatedJob,
)
from scheduler.simulation.events import Simulation
from scheduler.simulation.policy import Motet

SEEDS = 10
#: Devices of a run at most, about, and sub-tasks at most until the job has ended: more cost more than they tell.
_DEVICES, _SUBTASKS = 12, 150
#: Other jobs of a tenant, and other tenants, that are told apart in each class.
_RIVALS = 5
#: Of sub-tasks on one device; and of a rate that was learned from n outcomes: the first is always there.
_NOISE, _DOUBT, _DOUBT_OF_A_GUESS = 0.3, 0.05, 1.0
#: A simulated token takes so long on the fastest kind, and this many make a row.
_TOKEN_S, _ROW_TOKENS = 1e-3, 100
_TRIP_S = 0.05
#: Memory that is not known is enough.
_BOUNDLESS_MB = 1 << 40
#: What workers do for jobs that nothing waits of.
_BUSY = "busy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A sub-task that a worker has, and the seconds that it still takes there, loading included."""

    worker: str
    of: PassId
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNow:
    """What there is now."""

    workers: Sequence[WorkerState]
    rates: Rates
    #: All passes of which something waits or is under way; deadlines count from now.
    demand: Sequence[Demand]
    #: Earlier ones first, of one worker.
    started: Sequence[Started]
    subtask_s: float
    ahead_s: float
    depth: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Seconds from now until a job is done: half of all times it is sooner, nine of ten times."""

    p50_s: float
    p90_s: float
    #: False: nothing was learned yet of its models on these devices, so this is a guess.
    measured: bool


def forecast(job: str, cluster: ClusterNow) -> Forecast | None:
    """When all of this job's demand will be done; None where some of it never will."""
    world = _World(cluster, job)
    if not world.mine or any(id_ not in world.pools for id_ in world.mine):
        return None
    zoom = max(1.0, world.work_s / (cluster.subtask_s * _SUBTASKS), world.longest_s / _SUBTASKS)
    found: list[float] = []
    for seed in range(SEEDS):
        while (end_s := world.run(seed, zoom)) is None:
            # Others' work that comes before it makes more sub-tasks than its own.
            zoom *= 3
            if zoom > 1e9:
                return None
        found.append(end_s)
    found.sort()
    return Forecast(
        p50_s=(found[(SEEDS - 1) // 2] + found[SEEDS // 2]) / 2,
        p90_s=found[ceil(0.9 * SEEDS) - 1],
        measured=world.measured,
    )


@dataclass(frozen=True, slots=True)
class _Pool:
    """Passes that one loaded model answers, and that the same workers can run."""

    name: str
    demand: Demand
    memory_mb: int
    #: Kind of device -> seconds for what takes the fastest kind one second, seconds to load, what that was learned from.
    slowness: Mapping[DeviceKind, float]
    load_s: Mapping[DeviceKind, float]
    observations: Mapping[DeviceKind, int]
    fastest: DeviceKind


@dataclass(frozen=True, slots=True)
class _Rivals:
    """Those who share what one tenant is owed."""

    tenant: str
    weight: float


class _World:
    """The cluster as numbers that every run begins with."""

    def __init__(self, cluster: ClusterNow, job: str) -> None:
        self._cluster = cluster
        self._job = job
        self.mine = {d.id for d in cluster.demand if d.job == job}
        self._tenant = next((d.tenant for d in cluster.demand if d.job == job), "")
        self._refusing = {model for w in cluster.workers for model in w.refused}
        #: Pass -> its pool, of those that some worker can run.
        self.pools: dict[PassId, _Pool] = {}
        self._all_pools: dict[str, _Pool] = {}
        able: dict[str, frozenset[str]] = {}
        for demand in cluster.demand:
            name = self._pool_name(demand)
            if name not in able:
                able[name] = frozenset(w.name for w in cluster.workers if why_not(w, demand) is None)
                if able[name]:
                    self._all_pools[name] = self._pool(name, demand, able[name])
            if able[name]:
                self.pools[demand.id] = self._all_pools[name]
        self._able = able
        self._known = {d.id: d for d in cluster.demand if d.id in self.pools}
        self._chunks = list(self._together())
        self._device_of = {w.name: i for i, chunk in enumerate(self._chunks) for w in chunk}
        self._works = {id_: self._work_s(d) for id_, d in self._known.items()}
        self._job_of: dict[PassId, str] = {}
        self._rivals = self._together_by_share()
        #: Of its own work, on devices as large as those that workers were put together to.
        self.work_s = sum(self._works.get(id_, 0.0) for id_ in self.mine) / max(
            map(len, self._chunks), default=1
        )
        self.longest_s = max((s.left_s for s in cluster.started), default=0.0)
        self.measured = all(
            any(self.pools[id_].observations.values()) for id_ in self.mine & self.pools.keys()
        )

    def run(self, seed: int, zoom: float) -> float | None:
        """Seconds until the job ends in one run; None where that takes more sub-tasks than it may."""
        c, dice = self._cluster, Random(seed)
        devices = [self._device(i, chunk) for i, chunk in enumerate(self._chunks)]
        measured, learned = self._costs(zoom, dice, devices)
        begun = [self._begun(s, zoom) for s in c.started if s.worker in self._device_of]
        scenario = Scenario(
            devices=tuple(devices),
            models={
                name: Model(name=name, token_s=_TOKEN_S, memory_mb=p.memory_mb)
                for name, p in self._all_pools.items()
            }
            | {_BUSY: Model(name=_BUSY, token_s=_TOKEN_S, memory_mb=64)},
            jobs=tuple(self._jobs(zoom, {b.job for b in begun})),
            measured=measured,
            begun=tuple(begun),
            # What one simulated sub-task stands for are ``zoom`` real ones, whose noise cancels out.
            noise=_NOISE / sqrt(zoom),
            trip_s=_TRIP_S / zoom,
        )
        policy = Motet(
            subtask_s=c.subtask_s,
            ahead_s=c.ahead_s,
            depth=c.depth,
            rates=Rates(learned, {d.name: (1 / d.speed, 1) for d in devices}),
        )
        mine = [self._name(id_) for id_ in self.mine]
        simulation = Simulation(scenario, policy, seed, spans=False)
        try:
            ended = simulation.run(until=mine, most_attempts=2 * _SUBTASKS).ended_s
        except RuntimeError:
            return None
        known = {job.name for job in scenario.jobs}
        if any(name in known and name not in ended for name in mine):
            return None
        return zoom * max((ended[name] for name in mine if name in known), default=0.0)

    # -- pools and devices

    def _pool_name(self, demand: Demand) -> str:
        refused = sorted(demand.model_ids & self._refusing)
        return f"{demand.model.digest} {demand.numerics} {demand.rate_key} {refused or ''}"

    def _pool(self, name: str, demand: Demand, able: frozenset[str]) -> _Pool:
        """Costs are compared by a sub-task of rows like those of its first pass."""
        of_it = replace(demand, rows_waiting=256, bytes_waiting=256 * _row_bytes(demand))
        kinds = {w.kind: w for w in self._cluster.workers if w.name in able}
        rates = {kind: demand.rate(self._cluster.rates, kind) for kind in kinds}
        seconds = {
            kind: max(1e-9, _seconds(rate, of_it, self._cluster.subtask_s)) for kind, rate in rates.items()
        }
        fastest = min(seconds, key=lambda kind: seconds[kind])
        return _Pool(
            name=name,
            demand=demand,
            memory_mb=max(65, *(on_first_mb(w, demand.model, demand.numerics) for w in kinds.values())),
            slowness={kind: s / seconds[fastest] for kind, s in seconds.items()},
            load_s={kind: demand.load_s(self._cluster.rates, kind) for kind in kinds},
            observations={kind: rate.observations for kind, rate in rates.items()},
            fastest=fastest,
        )

    def _work_s(self, demand: Demand) -> float:
        """Seconds of what waits of a pass on the fastest kind."""
        rate = demand.rate(self._cluster.rates, self.pools[demand.id].fastest)
        return _seconds(rate, demand, self._cluster.subtask_s)

    def _together(self) -> Iterator[list[WorkerState]]:
        """Workers, a few together where there are many: of one kind, that can run the same, and hold alike."""
        size = ceil(len(self._cluster.workers) / _DEVICES)
        alike: dict[tuple[DeviceKind, int, frozenset[str]], list[WorkerState]] = {}
        for w in self._cluster.workers:
            alike.setdefault((w.kind, w.memory_mb // w.gpus, self._refuses(w)), []).append(w)
        for group in alike.values():
            group.sort(key=lambda w: w.resident)
            for lo in range(0, len(group), size):
                yield group[lo : lo + size]

    def _refuses(self, worker: WorkerState) -> frozenset[str]:
        return frozenset(name for name in self._all_pools if worker.name not in self._able[name])

    def _device(self, number: int, chunk: Sequence[WorkerState]) -> SimulatedDevice:
        """Some workers as one: a pace of its own, and a kind that is as fast as all of them."""
        first = chunk[0]
        speed = sum(1 / self._cluster.rates.pace(w.name) for w in chunk) / len(chunk)
        held = set(first.resident) | {
            self.pools[s.of].demand.model.digest
            for s in self._cluster.started
            if s.of in self.pools and self._device_of.get(s.worker) == number
        }
        refuses = self._refuses(first)
        return SimulatedDevice(
            name=str(number),
            kind=_kind_name(first.kind, len(chunk)),
            speed=speed,
            true_speed=speed,
            memory_mb=first.memory_mb // first.gpus or _BOUNDLESS_MB,
            resident=(
                *(
                    n
                    for n, p in self._all_pools.items()
                    if p.demand.model.digest in held and n not in refuses
                ),
                _BUSY,
            ),
            refuses=refuses,
        )

    def _costs(
        self, zoom: float, dice: Random, devices: Sequence[SimulatedDevice]
    ) -> tuple[dict[tuple[str, str], Model], dict[tuple[str, str, str], Rate]]:
        """What each model costs on each kind of device in this run, and the same as the policy believes it."""
        measured: dict[tuple[str, str], Model] = {}
        sizes = {(chunk[0].kind, len(chunk)) for chunk in self._chunks}
        for pool in self._all_pools.values():
            for kind, slowness in sorted(pool.slowness.items()):
                sigma = _DOUBT + _DOUBT_OF_A_GUESS / (1 + pool.observations[kind])
                off = exp(dice.gauss(0.0, sigma))
                for n in sorted(n for k, n in sizes if k == kind):
                    measured[pool.name, _kind_name(kind, n)] = Model(
                        name=pool.name,
                        token_s=_TOKEN_S * slowness * off / n,
                        load_s=pool.load_s[kind] / zoom,
                        memory_mb=pool.memory_mb,
                    )
        for kind, n in sorted(sizes):
            measured[_BUSY, _kind_name(kind, n)] = Model(
                name=_BUSY, token_s=_TOKEN_S / n, memory_mb=64, load_s=0.0
            )
        learned = {
            (name, device.kind, "fast"): _certain(
                measured[name, device.kind].token_s if (name, device.kind) in measured else _TOKEN_S
            )
            for name in (*self._all_pools, _BUSY)
            for device in devices
        }
        return measured, learned

    # -- jobs

    def _name(self, id_: PassId) -> str:
        return f"{id_[0]} {id_[1]}"

    def _jobs(self, zoom: float, begun: set[str]) -> Iterator[SimulatedJob]:
        for name, (rivals, together) in self._rivals.items():
            tokens = sum(self._works[d.id] for d in together) / zoom / _TOKEN_S
            if tokens <= 0 and name not in begun:
                continue
            rows = max(1, round(tokens / _ROW_TOKENS)) if tokens > 0 else 0
            one = together[0]
            yield SimulatedJob(
                name=name,
                model=self.pools[one.id].name,
                rows=rows,
                recorded=(max(1.0, tokens / max(1, rows)),),
                tenant=rivals.tenant,
                weight=rivals.weight,
                priority=one.priority,
                deadline_s=None if one.deadline is None or len(together) > 1 else one.deadline / zoom,
            )
        if _BUSY in begun:
            yield SimulatedJob(name=_BUSY, model=_BUSY, rows=0, tenant=_BUSY, priority=BULK)

    def _together_by_share(self) -> dict[str, tuple[_Rivals, list[Demand]]]:
        """Simulated job -> whose share it has, and the passes that it stands for, oldest first.

        The largest rivals are told apart. The others share what all of them together are owed: they are so many
        that their least turns would be more than a run has.
        """
        found: dict[str, tuple[_Rivals, list[Demand]]] = {}
        for class_ in {d.priority for d in self._known.values()}:
            of_it = sorted((d for d in self._known.values() if d.priority == class_), key=lambda d: d.age)
            own = _largest((d for d in of_it if d.tenant == self._tenant), self._works, lambda d: d.job)
            own.sort(key=lambda group: group[0].job != self._job)
            others = _largest((d for d in of_it if d.tenant != self._tenant), self._works, lambda d: d.tenant)
            weight = own[0][0].weight / len(own) if own else 0.0
            # Among many its own turns are so few that those of others of its tenant must not be told in whole ones.
            n_own = _RIVALS + 1 if len(own) <= 3 * _RIVALS else 1
            own, own_rest = own[:n_own], own[n_own:]
            others, others_rest = others[:_RIVALS], others[_RIVALS:]
            for group in own:
                self._add(found, _Rivals("own", weight * len(own)), group, apart=True)
            for i, group in enumerate(others):
                self._add(found, _Rivals(f"tenant {i}", group[0].weight), group)
            for group in own_rest:
                self._add(found, _Rivals("own rest", weight * len(own_rest)), group)
            for group in others_rest:
                self._add(found, _Rivals("tenants", sum(g[0].weight for g in others_rest)), group)
        return found

    def _add(
        self,
        found: dict[str, tuple[_Rivals, list[Demand]]],
        rivals: _Rivals,
        group: Sequence[Demand],
        *,
        apart: bool = False,
    ) -> None:
        for demand in group:
            together = f"{rivals.tenant} {demand.priority} {self.pools[demand.id].name}"
            name = self._name(demand.id) if apart else together
            found.setdefault(name, (rivals, []))[1].append(demand)
            self._job_of[demand.id] = name

    def _begun(self, started: Started, zoom: float) -> Begun:
        number = self._device_of[started.worker]
        demand = self._known.get(started.of)
        slowness = 1.0
        if demand is not None:
            slowness = self.pools[demand.id].slowness.get(self._chunks[number][0].kind, 1.0)
        # Workers taken together do what each of them has one after the other, each time as fast as all.
        seconds = started.left_s / self._cluster.rates.pace(started.worker) / zoom
        return Begun(
            device=str(number),
            job=_BUSY if demand is None else self._job_of[demand.id],
            tokens=max(1.0, seconds / (_TOKEN_S * slowness)),
        )


def _largest(
    passes: Iterable[Demand], works: Mapping[PassId, float], key: Callable[[Demand], str]
) -> list[list[Demand]]:
    """Passes by a key of theirs, those with most work first."""
    groups: dict[str, list[Demand]] = {}
    for demand in passes:
        groups.setdefault(key(demand), []).append(demand)
    return sorted(groups.values(), key=lambda group: -sum(works[d.id] for d in group))


def _kind_name(kind: DeviceKind, together: int) -> str:
    return f"{kind[0]} {kind[1]} {together}"


def _row_bytes(demand: Demand) -> int:
    return max(1, demand.bytes_waiting // demand.rows_waiting) if demand.rows_waiting else 256


def _seconds(rate: Rate, demand: Demand, subtask_s: float) -> float:
    """Of all that waits of a pass on a device of usual pace, in sub-tasks as long as these."""
    price = rate.price(1.0, demand.bytes_per_token)
    seconds = price.of(demand.rows_waiting, demand.bytes_waiting)
    return seconds + price.start_s * seconds / subtask_s


def _certain(token_s: float) -> Rate:
    """A rate that the policy takes for granted: nothing that it sees changes it."""
    return Rate((0.0, 0.0, token_s, 0.0), (0.0,) * 16, float(BYTES_PER_TOKEN), float(_ROW_TOKENS), 1000)
