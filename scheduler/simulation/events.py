"""The virtual clock: an event heap, devices that load and run, and messages that take time or get lost."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from random import Random
from typing import Protocol

from motet.protocol.residency import Resident, evictions
from scheduler.policy.cost import Workload
from scheduler.policy.fairness import INTERACTIVE
from scheduler.simulation.cluster import Begun, Model, Scenario, SimulatedDevice, SimulatedJob, UncarvedRows

#: Bulk is interrupted at the end of its micro-batch while somebody waits interactively, and where it is dropped.
MICRO_BATCH_S = 0.05
#: Idle devices are looked after so often.
TICK_S = 0.25
#: A device hears so often what nobody wants of it any more.
BEAT_S = 1.0
#: So long without an event, while jobs wait, means that nothing will ever happen.
_STUCK_S = 10_000.0


@dataclass(slots=True, eq=False)
class Subtask:
    """Rows of a job: (block, lo, hi) of its order."""

    id: int
    job: SimulatedJob
    ranges: tuple[tuple[int, int, int], ...]
    rows: int
    bytes: int
    work: Workload
    done: bool = False
    #: Its live leases.
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Attempt:
    """One lease of a sub-task."""

    id: int
    subtask: Subtask
    device: str
    #: Its lease has ended: no outcome of it is wanted.
    dropped: bool = False
    #: An outcome of it was heard.
    heard: bool = False


@dataclass(frozen=True, slots=True)
class DeviceSpan:
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

    def joined(self, device: SimulatedDevice, now: float) -> None: ...

    def died(self, device: SimulatedDevice, now: float) -> None: ...

    def arrived(self, job: SimulatedJob, rows: UncarvedRows, now: float) -> None: ...

    def begun(self, begun: Begun, now: float) -> Subtask:
        """What was under way at the beginning, as a sub-task; asked only where a scenario has any."""
        ...

    def ended(self, attempt: Attempt, now: float, busy_s: float | None, load_s: float) -> None:
        """An attempt has ended that nobody had dropped. ``busy_s``: None where it was lost."""
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

    device: SimulatedDevice
    #: Model -> when it was used last.
    loaded: dict[str, float]
    queue: list[Attempt] = field(default_factory=list)
    #: Its messages come in the order in which they were sent.
    reached_s: float = 0.0
    running: Attempt | None = None
    began_s: float = 0.0
    #: Of the time since then it was interrupted for so long.
    held_up_s: float = 0.0
    ends_s: float = 0.0
    load_s: float = 0.0
    #: Counts changes of `ends_s`: an older end is void.
    version: int = 0
    alive: bool = True


@dataclass(frozen=True, slots=True)
class _Report:
    """What a device says of an attempt that has ended there."""

    attempt: Attempt
    began_s: float
    ended_s: float
    busy_s: float
    load_s: float


@dataclass(slots=True)
class RunOutcome:
    """What a simulated run came to."""

    #: When the last device was done with the last row.
    makespan_s: float = 0.0
    loads: int = 0
    #: Distinct (device, model) that were loaded.
    pairs: set[tuple[str, str]] = field(default_factory=set)
    load_s: float = 0.0
    #: Device-seconds of work whose result counted, and of work whose result was not wanted any more.
    busy_s: float = 0.0
    wasted_s: float = 0.0
    subtasks: int = 0
    attempts: int = 0
    recalled: int = 0
    cloned: int = 0
    lost: int = 0
    #: Model -> seconds of its work as it turned out, on a device of speed 1, without what was wasted.
    work_s: dict[str, float] = field(default_factory=dict)
    #: Device -> most memory that models held there.
    peak_mb: dict[str, int] = field(default_factory=dict)
    #: Job -> rows done; when its first row was begun, its last row was under way, its last row was done.
    rows: dict[str, int] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    backlogged_s: dict[str, float] = field(default_factory=dict)
    ended_s: dict[str, float] = field(default_factory=dict)
    spans: list[DeviceSpan] = field(default_factory=list)


class Simulation:
    """One run of a scenario under a policy. Everything follows from the seed."""

    def __init__(self, scenario: Scenario, policy: Policy, seed: int = 0, *, spans: bool = True) -> None:
        self.scenario, self.policy = scenario, policy
        self._rng = Random(seed)
        self._spans = spans
        self._events: list[tuple[float, int, str, object]] = []
        self._ids, self._attempt_ids = count(), count()
        self._machines = {d.name: _Machine(d, dict.fromkeys(d.resident, 0.0)) for d in scenario.devices}
        #: Rows that are not done, and rows that were never sent, by job.
        self._left = {job.name: job.rows for job in scenario.jobs}
        self._unsent = dict(self._left)
        #: Jobs that have arrived and are not done.
        self._waiting: set[str] = set()
        self._woken_at = inf
        #: Something happened that nobody has decided upon.
        self._changed = False
        self.outcome = RunOutcome()

    def run(self, until: Collection[str] = (), most_attempts: float = inf) -> RunOutcome:
        """Until every row of every job is done, or of those named, or so much was sent.

        Raises RuntimeError where that will never be.
        """
        self.policy.begin(self.scenario)
        for device in self.scenario.devices:
            self.policy.joined(device, 0.0)
            if device.dies_s < inf:
                self._at(device.dies_s, "die", device)
        for job in self.scenario.jobs:
            self._at(job.at_s, "arrive", job)
        for begun in self.scenario.begun:
            self._left[begun.job] += 1
            self._at(0.0, "resume", begun)
        self._at(TICK_S, "tick", None)
        now = last_s = 0.0
        while self._left:
            if self.outcome.attempts >= most_attempts or (until and not any(n in self._left for n in until)):
                break
            now, _, what, about = heappop(self._events)
            if what not in ("tick", "wake") or not self._waiting:
                last_s = now
            elif now - last_s > _STUCK_S:
                waiting = ", ".join(sorted(self._waiting))
                raise RuntimeError(
                    f"nothing has happened since {last_s:.0f} s, and these jobs wait: {waiting}"
                )
            getattr(self, f"_{what}")(about, now)
            if self._changed and (not self._events or self._events[0][0] > now):
                # All that happens at one moment is known before anything is decided.
                self._changed = False
                self._decide(now)
        if not self._left:
            self._stop(now)
        return self.outcome

    def _stop(self, now: float) -> None:
        """What devices still do, or have done and not told, when all is over."""
        for machine in self._machines.values():
            if machine.running is not None and now > machine.began_s:
                self._spend(_ended(machine, machine.running, now), wasted=True)
        for _, _, what, about in self._events:
            if what == "hear" and isinstance(about, _Report) and not about.attempt.heard:
                about.attempt.heard = True
                self._spend(about, wasted=True)

    # -- events

    def _arrive(self, job: SimulatedJob, now: float) -> None:
        self._waiting.add(job.name)
        self.policy.arrived(job, UncarvedRows(job), now)
        self._changed = True

    def _resume(self, begun: Begun, now: float) -> None:
        """What was under way at the beginning goes on."""
        attempt = Attempt(next(self._attempt_ids), self.policy.begun(begun, now), begun.device)
        attempt.subtask.attempts.append(attempt)
        self.policy.sent(attempt)
        machine = self._machines[begun.device]
        machine.queue.append(attempt)
        self._next(machine, now)

    def _die(self, device: SimulatedDevice, now: float) -> None:
        machine = self._machines[device.name]
        machine.alive = False
        machine.version += 1
        held = machine.queue
        if machine.running is not None:
            held = [machine.running, *held]
            self._spend(_ended(machine, machine.running, now), wasted=True)
        machine.queue, machine.running = [], None
        self.policy.died(device, now)
        for attempt in held:
            self._at(now + self.scenario.lease_s, "expire", attempt)
        self._changed = True

    def _expire(self, attempt: Attempt, now: float) -> None:
        """Its lease has run out, and nobody has heard of it."""
        if attempt.dropped:
            return
        attempt.dropped = True
        attempt.subtask.attempts.remove(attempt)
        self.outcome.lost += 1
        self.policy.ended(attempt, now, None, 0.0)
        self._changed = True

    def _reach(self, attempt: Attempt, now: float) -> None:
        """A message has reached its worker."""
        machine = self._machines[attempt.device]
        if not machine.alive:
            self._at(now + self.scenario.lease_s, "expire", attempt)
            return
        if attempt.subtask.job.priority != INTERACTIVE:
            machine.queue.append(attempt)
        elif machine.running is None:
            machine.queue.insert(0, attempt)
        else:
            self._interrupt(machine, attempt, now)
        self._next(machine, now)

    def _finish(self, about: tuple[_Machine, int], now: float) -> None:
        machine, version = about
        if version != machine.version or machine.running is None:
            return
        attempt, machine.running = machine.running, None
        self._say(_ended(machine, attempt, now), now)
        self._next(machine, now)

    def _say(self, report: _Report, now: float) -> None:
        """A device tells of an attempt that has ended there."""
        self._at(now + self._trip_s() / 2, "hear", report)
        if self._unkind(self.scenario.doubled):
            self._at(now + self._trip_s(), "hear", report)

    def _hear(self, report: _Report, now: float) -> None:
        """An outcome has reached the aggregator, and the dispatcher knows of it. The first of a sub-task counts."""
        attempt, subtask, outcome = report.attempt, report.attempt.subtask, self.outcome
        if attempt.heard:
            return
        attempt.heard = True
        if attempt.dropped:
            self._spend(report, wasted=True)
            return
        attempt.dropped = subtask.done = True
        for other in subtask.attempts:
            if other is not attempt:
                self._drop(other, now)
        subtask.attempts.clear()
        outcome.subtasks += 1
        outcome.makespan_s = max(outcome.makespan_s, report.ended_s)
        self._spend(report, wasted=False)
        job = subtask.job.name
        outcome.rows[job] = outcome.rows.get(job, 0) + subtask.rows
        self._left[job] -= subtask.rows
        self.policy.ended(attempt, now, report.busy_s, report.load_s)
        if self._left[job] <= 0:
            del self._left[job]
            self._waiting.discard(job)
            outcome.ended_s[job] = now
        self._changed = True

    def _tick(self, _: None, now: float) -> None:
        for word in self.policy.tick(now):
            if isinstance(word, Attempt):
                self.outcome.recalled += 1
                word.subtask.attempts.remove(word)
                self._drop(word, now)
            else:
                self._send(*word, now)
        self._changed = True
        self._at(now + TICK_S, "tick", None)

    def _wake(self, _: None, now: float) -> None:
        if now >= self._woken_at:
            self._woken_at = inf
        self._changed = True

    def _forget(self, attempt: Attempt, now: float) -> None:
        """A device has heard that nobody wants this: it does not begin it, or stops at the end of a micro-batch."""
        machine = self._machines[attempt.device]
        if attempt in machine.queue:
            machine.queue.remove(attempt)
        elif machine.running is attempt:
            stops_s = max(now, machine.began_s) + self._rng.random() * MICRO_BATCH_S
            if stops_s < machine.ends_s:
                self._end_at(machine, stops_s)

    # -- what follows from them

    def _decide(self, now: float) -> None:
        for subtask, device in self.policy.decide(now):
            self._send(subtask, device, now)
        due = self.policy.next_due()
        if now < due < self._woken_at:
            self._woken_at = due
            self._at(due, "wake", None)

    def _send(self, subtask: Subtask, device: str, now: float) -> None:
        attempt = Attempt(next(self._attempt_ids), subtask, device)
        self.outcome.attempts += 1
        self.outcome.cloned += bool(subtask.attempts)
        if not subtask.attempts:
            self._unsent[subtask.job.name] -= subtask.rows
            if self._unsent[subtask.job.name] <= 0:
                self.outcome.backlogged_s.setdefault(subtask.job.name, now)
        subtask.attempts.append(attempt)
        self.policy.sent(attempt)
        if self._unkind(self.scenario.lost):
            self._at(now + self.scenario.lease_s, "expire", attempt)
            return
        machine = self._machines[device]
        machine.reached_s = max(machine.reached_s, now + self._trip_s() / 2)
        self._at(machine.reached_s, "reach", attempt)

    def _drop(self, attempt: Attempt, now: float) -> None:
        """Nobody wants it any more. Its device hears of it with its next beat."""
        attempt.dropped = True
        self._at(now + self._rng.random() * BEAT_S, "forget", attempt)

    def _next(self, machine: _Machine, now: float) -> None:
        if machine.running is not None or not machine.queue:
            return
        attempt = machine.queue.pop(0)
        model = self.scenario.model(attempt.subtask.job.model, machine.device)
        machine.load_s = self._load(machine, model, now)
        machine.running, machine.began_s, machine.held_up_s = attempt, now + machine.load_s, 0.0
        self.outcome.first_s.setdefault(attempt.subtask.job.name, machine.began_s)
        self._end_at(machine, machine.began_s + self._run_s(attempt, model, machine.device))

    def _end_at(self, machine: _Machine, when: float) -> None:
        machine.ends_s = when
        machine.version += 1
        self._at(when, "finish", (machine, machine.version))

    def _interrupt(self, machine: _Machine, attempt: Attempt, now: float) -> None:
        """Interactive rows run at the next boundary of micro-batches, and hold up what runs."""
        model = self.scenario.model(attempt.subtask.job.model, machine.device)
        starts_s = max(now, machine.began_s) + self._rng.random() * MICRO_BATCH_S
        load_s = self._load(machine, model, now)
        run_s = self._run_s(attempt, model, machine.device)
        machine.held_up_s += load_s + run_s
        self._end_at(machine, machine.ends_s + load_s + run_s)
        self.outcome.first_s.setdefault(attempt.subtask.job.name, starts_s + load_s)
        ends_s = starts_s + load_s + run_s
        self._at(ends_s, "say", _Report(attempt, ends_s - run_s, ends_s, run_s, load_s))

    def _load(self, machine: _Machine, model: Model, now: float) -> float:
        """Make a model resident. The seconds that takes."""
        resident = model.name in machine.loaded
        machine.loaded[model.name] = now
        if resident:
            return 0.0
        models, outcome, device = self.scenario.models, self.outcome, machine.device
        others = [Resident(name, models[name].memory_mb, used) for name, used in machine.loaded.items()]
        for victim in evictions(others[:-1], model.memory_mb, device.memory_mb, ()) or ():
            del machine.loaded[victim]
        held_mb = sum(models[name].memory_mb for name in machine.loaded)
        outcome.peak_mb[device.name] = max(outcome.peak_mb.get(device.name, 0), held_mb)
        sigma = self.scenario.load_noise
        seconds = model.load_s * self._rng.lognormvariate(-(sigma**2) / 2, sigma)
        outcome.loads += 1
        outcome.load_s += seconds
        outcome.pairs.add((device.name, model.name))
        if self._spans:
            outcome.spans.append(DeviceSpan(device.name, now, now + seconds, "", model.name, True))
        return seconds

    def _run_s(self, attempt: Attempt, model: Model, device: SimulatedDevice) -> float:
        sigma = self.scenario.noise
        seconds = model.seconds(attempt.subtask.work) / device.true_speed
        seconds *= self._rng.lognormvariate(-(sigma**2) / 2, sigma) if sigma else 1.0
        return seconds * (8 if self._unkind(self.scenario.stragglers) else 1)

    def _spend(self, report: _Report, *, wasted: bool) -> None:
        """A device was busy with this."""
        attempt, outcome = report.attempt, self.outcome
        job = attempt.subtask.job
        if wasted:
            outcome.wasted_s += report.busy_s
        else:
            speed = self._machines[attempt.device].device.true_speed
            outcome.busy_s += report.busy_s
            outcome.work_s[job.model] = outcome.work_s.get(job.model, 0.0) + report.busy_s * speed
        if self._spans and report.busy_s > 0:
            outcome.spans.append(
                DeviceSpan(attempt.device, report.began_s, report.ended_s, job.name, job.model, False, wasted)
            )

    def _unkind(self, share: float) -> bool:
        return share > 0 and self._rng.random() < share

    def _trip_s(self) -> float:
        mean = self.scenario.trip_s
        return self._rng.expovariate(1 / mean) if mean else 0.0

    def _at(self, when: float, what: str, about: object) -> None:
        heappush(self._events, (when, next(self._ids), what, about))


def _ended(machine: _Machine, attempt: Attempt, now: float) -> _Report:
    """What a machine has to say of what it ran until now."""
    busy_s = max(0.0, now - machine.began_s - machine.held_up_s)
    return _Report(attempt, min(machine.began_s, now), now, busy_s, machine.load_s)
