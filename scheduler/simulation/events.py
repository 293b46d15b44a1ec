"""The virtual clock: an event heap, devices that load and run, and messages that take time or get lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from random import Random
from typing import Protocol

from motet.residency import Resident, evictions
from scheduler.cost import Work
from scheduler.simulation.cluster import Device, Job, Model, Rows, Scenario

#: Bulk is interrupted at the end of its micro-batch while somebody waits interactively.
MICRO_BATCH_S = 0.05
#: Rows that a device never finishes are looked for so often.
TICK_S = 0.25


@dataclass(slots=True, eq=False)
class Subtask:
    """Rows of a job: (block, lo, hi) of its order."""

    id: int
    job: Job
    ranges: tuple[tuple[int, int, int], ...]
    rows: int
    bytes: int
    work: Work
    done: bool = False
    tries: int = 0


@dataclass(slots=True, eq=False)
class Attempt:
    """One lease of a sub-task."""

    id: int
    subtask: Subtask
    device: str
    sent_s: float
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """What a device did: loaded or ran, from when to when."""

    device: str
    start_s: float
    end_s: float
    job: str
    model: str
    loads: bool
    wasted: bool = False


class Policy(Protocol):
    """What decides. `Motet` in this package is the dispatcher's; bench/ has others to compare it with."""

    def begin(self, scenario: Scenario) -> None: ...

    def joined(self, device: Device, now: float) -> None: ...

    def died(self, device: Device, now: float) -> None: ...

    def arrived(self, job: Job, rows: Rows, now: float) -> None: ...

    def ended(self, attempt: Attempt, now: float, busy_s: float | None, load_s: float) -> None:
        """An attempt has ended. ``busy_s``: None where it was lost."""
        ...

    def decide(self, now: float) -> Iterable[tuple[Subtask, str]]:
        """Sub-tasks to send, each with the name of a device."""
        ...

    def tick(self, now: float) -> Iterable[tuple[Subtask, str] | Attempt]:
        """Each quarter of a second: more to send, and attempts to drop."""
        ...

    def sent(self, attempt: Attempt) -> None:
        """What was decided is on its way."""
        ...

    def next_due(self) -> float: ...


@dataclass(slots=True, eq=False)
class _Machine:
    """A device at work."""

    device: Device
    queue: list[Attempt] = field(default_factory=list)
    running: Attempt | None = None
    began_s: float = 0.0
    ends_s: float = 0.0
    load_s: float = 0.0
    loaded: dict[str, float] = field(default_factory=dict)
    version: int = 0
    alive: bool = True
    busy_s: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What a simulated run came to."""

    makespan_s: float = 0.0
    loads: int = 0
    #: Distinct (device, model) that were loaded.
    pairs: set[tuple[str, str]] = field(default_factory=set)
    load_s: float = 0.0
    busy_s: float = 0.0
    #: Of work whose result was not wanted any more.
    wasted_s: float = 0.0
    subtasks: int = 0
    attempts: int = 0
    recalled: int = 0
    cloned: int = 0
    lost: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    ended_s: dict[str, float] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)


class Simulation:
    """One run of a scenario under a policy. Everything follows from the seed."""

    def __init__(self, scenario: Scenario, policy: Policy, seed: int = 0, *, spans: bool = True) -> None:
        self.scenario, self.policy = scenario, policy
        self._rng = Random(seed)
        self._spans = spans
        self._events: list[tuple[float, int, str, object]] = []
        self._ids, self._attempt_ids = count(), count()
        self._machines = {d.name: _Machine(d) for d in scenario.devices}
        self._left: dict[str, int] = {}
        self._woken_at = inf
        #: Something happened that nobody has decided upon.
        self._changed = False
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Until every row of every job is done. Raises RuntimeError where that will never be."""
        self.policy.begin(self.scenario)
        for device in self.scenario.devices:
            self.policy.joined(device, 0.0)
            if device.dies_s < inf:
                self._at(device.dies_s, "die", device)
        for job in self.scenario.jobs:
            self._left[job.name] = job.rows
            self._at(job.at_s, "arrive", job)
        self._at(TICK_S, "tick", None)
        quiet = 0
        while self._left and self._events:
            now, _, what, about = heappop(self._events)
            if what == "tick":
                quiet += 1
                if quiet > 40_000:
                    raise RuntimeError(
                        f"nothing happens any more at {now:.0f} s: {len(self._left)} jobs wait"
                    )
            elif what != "wake":
                quiet = 0
            getattr(self, f"_{what}")(about, now)
            if self._changed and (not self._events or self._events[0][0] > now):
                # All that happens at one moment is known before anything is decided.
                self._changed = False
                self._decide(now)
        if self._left:
            raise RuntimeError(f"{len(self._left)} jobs were never finished")
        return self.outcome

    # -- events

    def _arrive(self, job: Job, now: float) -> None:
        self.policy.arrived(job, Rows(job), now)
        self._changed = True

    def _die(self, device: Device, now: float) -> None:
        machine = self._machines[device.name]
        machine.alive = False
        machine.version += 1
        held = [*([machine.running] if machine.running else []), *machine.queue]
        machine.queue, machine.running = [], None
        self.policy.died(device, now)
        for attempt in held:
            self._at(now + self.scenario.lease_s, "expire", attempt)

    def _expire(self, attempt: Attempt, now: float) -> None:
        """Its lease has run out, and nobody has heard of it."""
        self.outcome.lost += 1
        self.policy.ended(attempt, now, None, 0.0)
        self._changed = True

    def _reach(self, attempt: Attempt, now: float) -> None:
        """A message has reached its worker."""
        machine = self._machines[attempt.device]
        if not machine.alive:
            self._at(now + self.scenario.lease_s, "expire", attempt)
            return
        if attempt.subtask.job.priority == 0:
            self._interrupt(machine, attempt, now)
            return
        machine.queue.append(attempt)
        self._next(machine, now)

    def _finish(self, about: tuple[_Machine, int], now: float) -> None:
        machine, version = about
        if version != machine.version or machine.running is None:
            return
        attempt, machine.running = machine.running, None
        self._reported(machine, attempt, now, now - machine.began_s, machine.load_s)
        self._next(machine, now)

    def _hear(self, about: tuple[Attempt, float, float], now: float) -> None:
        """An outcome has reached the aggregator, and the dispatcher knows of it."""
        attempt, busy_s, load_s = about
        subtask = attempt.subtask
        if subtask.done or attempt.dropped:
            self.outcome.wasted_s += busy_s
            if not attempt.dropped:
                self.policy.ended(attempt, now, busy_s, load_s)
            attempt.dropped = True
        else:
            subtask.done = True
            job = subtask.job.name
            self.outcome.rows[job] = self.outcome.rows.get(job, 0) + subtask.rows
            self.outcome.subtasks += 1
            self._left[job] -= subtask.rows
            attempt.dropped = True
            self.policy.ended(attempt, now, busy_s, load_s)
            if self._left[job] <= 0:
                del self._left[job]
                self.outcome.ended_s[job] = now
        self._changed = True

    def _tick(self, _: None, now: float) -> None:
        for word in self.policy.tick(now):
            if isinstance(word, Attempt):
                self._drop(word, now)
            else:
                self._send(*word, now)
        self._changed = True
        self._at(now + TICK_S, "tick", None)

    def _wake(self, _: None, now: float) -> None:
        if now >= self._woken_at:
            self._woken_at = inf
        self._changed = True

    # -- what follows from them

    def _decide(self, now: float) -> None:
        for subtask, device in self.policy.decide(now):
            self._send(subtask, device, now)
        due = self.policy.next_due()
        if now < due < self._woken_at:
            self._woken_at = due
            self._at(due, "wake", None)

    def _send(self, subtask: Subtask, device: str, now: float) -> None:
        attempt = Attempt(next(self._attempt_ids), subtask, device, now)
        subtask.tries += 1
        self.outcome.attempts += 1
        self.policy.sent(attempt)
        if self.scenario.lost and self._rng.random() < self.scenario.lost:
            self._at(now + self.scenario.lease_s, "expire", attempt)
            return
        self._at(now + self._trip_s() / 2, "reach", attempt)

    def _drop(self, attempt: Attempt, now: float) -> None:
        """Nobody wants it any more: if it has not begun where it waits, it never will."""
        attempt.dropped = True
        machine = self._machines[attempt.device]
        if attempt in machine.queue:
            machine.queue.remove(attempt)

    def _next(self, machine: _Machine, now: float) -> None:
        while machine.running is None and machine.queue:
            attempt = machine.queue.pop(0)
            if attempt.dropped or attempt.subtask.done:
                self._reported(machine, attempt, now, 0.0, 0.0)
                continue
            model = self.scenario.models[attempt.subtask.job.model]
            machine.load_s = self._load(machine, model, now)
            run_s = self._run_s(attempt, model, machine.device)
            machine.running, machine.began_s = attempt, now + machine.load_s
            machine.ends_s = machine.began_s + run_s
            self.outcome.first_s.setdefault(attempt.subtask.job.name, machine.began_s)
            machine.version += 1
            self._at(machine.ends_s, "finish", (machine, machine.version))

    def _interrupt(self, machine: _Machine, attempt: Attempt, now: float) -> None:
        """Interactive rows run at the next boundary of micro-batches, and hold up what runs."""
        model = self.scenario.models[attempt.subtask.job.model]
        load_s = self._load(machine, model, now)
        run_s = self._run_s(attempt, model, machine.device)
        wait_s = 0.0
        if machine.running is not None:
            wait_s = self._rng.random() * MICRO_BATCH_S + max(0.0, machine.began_s - now)
            machine.ends_s += run_s + load_s
            machine.began_s += run_s + load_s
            machine.version += 1
            self._at(machine.ends_s, "finish", (machine, machine.version))
        self.outcome.first_s.setdefault(attempt.subtask.job.name, now + wait_s + load_s)
        self.outcome.busy_s += run_s
        self._at(now + wait_s + load_s + run_s + self._trip_s() / 2, "hear", (attempt, run_s, load_s))

    def _load(self, machine: _Machine, model: Model, now: float) -> float:
        machine.loaded[model.name] = machine.loaded.pop(model.name, -1.0)
        if machine.loaded[model.name] >= 0:
            machine.loaded[model.name] = now
            return 0.0
        del machine.loaded[model.name]
        models = self.scenario.models
        residents = [Resident(name, models[name].memory_mb, used) for name, used in machine.loaded.items()]
        for victim in evictions(residents, model.memory_mb, machine.device.memory_mb, ()) or ():
            del machine.loaded[victim]
        machine.loaded[model.name] = now
        sigma = self.scenario.load_noise
        seconds = model.load_s * self._rng.lognormvariate(-(sigma**2) / 2, sigma)
        self.outcome.loads += 1
        self.outcome.load_s += seconds
        self.outcome.pairs.add((machine.device.name, model.name))
        if self._spans:
            self.outcome.spans.append(Span(machine.device.name, now, now + seconds, "", model.name, True))
        return seconds

    def _run_s(self, attempt: Attempt, model: Model, device: Device) -> float:
        sigma = self.scenario.noise
        seconds = model.seconds(attempt.subtask.work) / device.true_speed
        seconds *= self._rng.lognormvariate(-(sigma**2) / 2, sigma) if sigma else 1.0
        if self.scenario.stragglers and self._rng.random() < self.scenario.stragglers:
            seconds *= 8
        return seconds

    def _reported(
        self, machine: _Machine, attempt: Attempt, now: float, busy_s: float, load_s: float
    ) -> None:
        machine.busy_s += busy_s
        self.outcome.busy_s += busy_s
        self.outcome.makespan_s = (
            max(self.outcome.makespan_s, now) if not attempt.subtask.done else self.outcome.makespan_s
        )
        if self._spans and busy_s:
            wasted = attempt.subtask.done or attempt.dropped
            job = attempt.subtask.job
            self.outcome.spans.append(
                Span(machine.device.name, now - busy_s, now, job.name, job.model, False, wasted)
            )
        self._at(now + self._trip_s() / 2, "hear", (attempt, busy_s, load_s))
        if self.scenario.doubled and self._rng.random() < self.scenario.doubled:
            self._at(now + self._trip_s(), "hear", (attempt, busy_s, load_s))

    def _trip_s(self) -> float:
        mean = self.scenario.trip_s
        return self._rng.expovariate(1 / mean) if mean else 0.0

    def _at(self, when: float, what: str, about: object) -> None:
        heappush(self._events, (when, next(self._ids), what, about))
