"""The policy on the virtual clock: whatever happens, every row is done once, and no device is idle without a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.errors import SetupError
from scheduler import dispatcher
from scheduler.policy import carve, cost, place
from scheduler.policy.fairness import BULK, INTERACTIVE, NORMAL, Account
from scheduler.simulation import policy
from scheduler.simulation.cluster import Model, Scenario, SimulatedDevice, SimulatedJob, UncarvedRows
from scheduler.simulation.events import TICK_S, Attempt, RunOutcome, Simulation
from scheduler.simulation.fair_share import gap_s, largest_s
from scheduler.simulation.policy import Motet
from scheduler.simulation.scenarios import drawn, read

SCENARIOS = sorted((Path(__file__).parents[2] / "bench" / "scenarios").glob("*.toml"))
SLOT_MB = 1000


def device(name: str, **kw: object) -> SimulatedDevice:
    return SimulatedDevice(**{"name": name, "kind": "gpu", "speed": 1.0, "true_speed": 1.0, **kw})  # type: ignore[arg-type]


def encoder(name: str = "m", **kw: object) -> Model:
    # A row of 64 tokens takes about 20 ms.
    return Model(**{"name": name, "token_s": 3e-4, "load_s": 3.0, "memory_mb": SLOT_MB, **kw})  # type: ignore[arg-type]


def world(*, devices: int = 4, jobs: tuple[SimulatedJob, ...], models: int = 1, **kw: object) -> Scenario:
    names = [f"m{i}" for i in range(models)]
    return Scenario(
        devices=tuple(device(f"d{i}", resident=tuple(names)) for i in range(devices)),
        models={name: encoder(name) for name in names},
        jobs=jobs,
        **kw,  # type: ignore[arg-type]
    )


@dataclass
class Watched(Motet):
    """The policy, and what it was told."""

    #: Outcomes that counted.
    counted: list[tuple[float, Attempt]] = field(default_factory=list)

    def ended(self, attempt: Attempt, now: float, busy_s: float | None, load_s: float) -> None:
        if busy_s is not None:
            self.counted.append((now, attempt))
        super().ended(attempt, now, busy_s, load_s)


@st.composite
def worlds(draw: st.DrawFn) -> Scenario:
    """Small clusters, of which at least one device lives, in a world as unkind as may be."""
    speeds = st.sampled_from([0.5, 1.0, 4.0])
    models = {
        f"m{i}": encoder(f"m{i}", load_s=draw(st.floats(0.5, 10))) for i in range(draw(st.integers(1, 4)))
    }
    devices = []
    for i in range(draw(st.integers(1, 5))):
        speed = draw(speeds)
        devices.append(
            device(
                f"d{i}",
                kind=f"speed {speed}",
                speed=speed,
                true_speed=speed / draw(st.sampled_from([1, 1, 4])),
                memory_mb=SLOT_MB * draw(st.integers(1, 3)),
                dies_s=draw(st.floats(0, 60)) if i and draw(st.booleans()) else float("inf"),
            )
        )
    jobs = []
    for i in range(draw(st.integers(1, 5))):
        priority = draw(st.sampled_from([INTERACTIVE, NORMAL, NORMAL, BULK]))
        jobs.append(
            SimulatedJob(
                name=f"j{i}",
                model=draw(st.sampled_from(sorted(models))),
                rows=draw(st.integers(1, 16 if priority == INTERACTIVE else 3000)),
                tokens=draw(st.floats(4, 200)),
                spread=draw(st.floats(0, 1)),
                tenant=draw(st.sampled_from("ab")),
                weight=draw(st.sampled_from([1.0, 3.0])),
                priority=priority,
                at_s=draw(st.floats(0, 30)),
            )
        )
    return Scenario(
        devices=tuple(devices),
        models=models,
        jobs=tuple(jobs),
        noise=draw(st.floats(0, 0.6)),
        stragglers=draw(st.sampled_from([0.0, 0.05])),
        lost=draw(st.sampled_from([0.0, 0.1])),
        doubled=draw(st.sampled_from([0.0, 0.2])),
        trip_s=draw(st.sampled_from([0.0, 0.05, 0.5])),
        prior_off=draw(st.floats(0.1, 10)),
    )


def test_the_dispatcher_and_the_simulation_run_the_same_policy() -> None:
    assert policy.Placer is dispatcher.Placer is place.Placer
    assert policy.carve is dispatcher.carve is carve.carve
    assert policy.Rates is dispatcher.Rates is cost.Rates
    simulated = Motet()
    Simulation(world(jobs=(SimulatedJob(name="j", model="m0", rows=10),)), simulated).run()
    assert type(simulated.placer) is place.Placer
    assert type(simulated.placer.rates) is cost.Rates


@settings(max_examples=100, deadline=None)
@given(worlds(), st.integers(0, 1000))
def test_whatever_dies_or_is_lost_every_row_is_done_once_and_no_memory_is_exceeded(
    scenario: Scenario, seed: int
) -> None:
    watched = Watched()
    outcome = Simulation(scenario, watched, seed).run()
    for job in scenario.jobs:
        own = [a.subtask for _, a in watched.counted if a.subtask.job is job]
        done = Counter((block, row) for s in own for block, lo, hi in s.ranges for row in range(lo, hi))
        blocks = UncarvedRows(job)
        assert done == Counter((b, row) for b in range(blocks.blocks) for row in range(blocks.rows_of(b)))
        assert outcome.rows[job.name] == job.rows
        assert job.at_s <= outcome.first_s[job.name] <= outcome.ended_s[job.name]
    memory_mb = {d.name: d.memory_mb for d in scenario.devices}
    assert all(held <= memory_mb[name] for name, held in outcome.peak_mb.items())
    # Every row of work was paid for once, beside what was thrown away.
    assert outcome.subtasks == len({a.subtask.id for _, a in watched.counted if a.subtask.done})
    assert outcome.makespan_s <= max(outcome.ended_s.values())
    if not (scenario.lost or any(d.dies_s < float("inf") for d in scenario.devices)):
        assert outcome.lost == 0


class Clocked(Simulation):
    """A run that looks at all that must only rise, after each event."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.motet = Motet()
        super().__init__(scenario, self.motet, seed)
        self.done: Counter[str] = Counter()
        self.clocks: dict[int, tuple[Account, float]] = {}
        self.looks = 0

    def _decide(self, now: float) -> None:
        super()._decide(now)
        self.looks += 1
        for job in self.scenario.jobs:
            done = self.outcome.rows.get(job.name, 0)
            assert self.done[job.name] <= done <= job.rows, (
                f"{job.name} had {self.done[job.name]}, has {done}"
            )
            self.done[job.name] = done
            if job.name in self.motet._passes:
                waits = self.motet._passes[job.name].waiting_rows
                assert 0 <= waits <= job.rows - done, f"{waits} rows of {job.name} wait, {done} are done"
        ledger = self.motet.placer.ledger
        root = ledger.classes[NORMAL].parent
        assert root is not None
        for account in (root, *ledger.classes.values(), *ledger.tenants.values()):
            _, before = self.clocks.get(id(account), (account, 0.0))
            assert account.clock >= before, "a virtual clock fell"
            self.clocks[id(account)] = (account, account.clock)
        assert all(account.present >= 0 for account, _ in self.clocks.values())


@settings(max_examples=30, deadline=None)
@given(worlds(), st.integers(0, 1000))
def test_rows_done_never_fall_or_exceed_those_of_the_job_and_no_clock_falls(
    scenario: Scenario, seed: int
) -> None:
    run = Clocked(scenario, seed)
    outcome = run.run()
    assert run.looks > 0
    assert outcome.rows == {job.name: job.rows for job in scenario.jobs}
    # When all is done nothing is left in the policy's mind.
    assert not run.motet.placer.wants()


@settings(max_examples=100, deadline=None)
@given(worlds(), st.integers(0, 1000))
def test_no_device_is_idle_while_rows_wait_for_a_model_that_it_holds(scenario: Scenario, seed: int) -> None:
    names = tuple(scenario.models)
    # Nothing dies and nothing is lost, so there is no reason but the policy; and all models stay.
    kind = replace(
        scenario,
        devices=tuple(
            replace(d, dies_s=float("inf"), resident=names, memory_mb=SLOT_MB * 4) for d in scenario.devices
        ),
        lost=0.0,
    )
    outcome = Simulation(kind, Motet(), seed).run()
    # An exponential delay is longer than ten times its mean once in some 20,000 times.
    most_s = TICK_S + 10 * kind.trip_s
    for one in kind.devices:
        for idle_from, idle_until in idle(outcome, one.name):
            for job in kind.jobs:
                waited_s = min(idle_until, outcome.backlogged_s[job.name]) - max(idle_from, job.at_s)
                assert waited_s <= most_s, f"{one.name} was idle for {waited_s:.2f} s while {job.name} waited"


def idle(outcome: RunOutcome, name: str) -> Iterator[tuple[float, float]]:
    """When a device did nothing. Interactive rows run within what is busy, so they are left out."""
    last = 0.0
    for span in sorted((s for s in outcome.spans if s.device == name), key=lambda s: s.start_s):
        if span.start_s > last:
            yield last, span.start_s
        last = max(last, span.end_s)
    yield last, outcome.makespan_s


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=2, max_size=4),
    st.integers(0, 1000),
)
def test_who_waits_is_never_further_behind_than_what_is_under_way(
    devices: int, weights: list[float], seed: int
) -> None:
    jobs = tuple(
        SimulatedJob(name=f"j{i}", model=f"m{i % 2}", rows=2000 * devices, tenant=f"t{i}", weight=weight)
        for i, weight in enumerate(weights)
    )
    scenario = world(devices=devices, jobs=jobs, models=2)
    motet = Motet()
    outcome = Simulation(scenario, motet, seed).run()
    under_way = devices * motet.depth
    assert gap_s(jobs, outcome) <= (1 + under_way) * largest_s(outcome)


def test_four_tenants_on_four_devices_are_within_two_sub_tasks_of_their_shares() -> None:
    jobs = tuple(
        SimulatedJob(name=f"j{i}", model=f"m{i % 2}", rows=6000, tenant=f"t{i}", weight=weight)
        for i, weight in enumerate((1.0, 1.0, 2.0, 4.0))
    )
    for seed in range(5):
        outcome = Simulation(world(jobs=jobs, models=2), Motet(), seed).run()
        assert gap_s(jobs, outcome) <= 2 * largest_s(outcome)
        # Who may have four times as much is done first.
        assert min(outcome.ended_s, key=outcome.ended_s.__getitem__) == "j3"


@settings(max_examples=10, deadline=None)
@given(worlds(), st.integers(0, 1000))
def test_a_run_follows_from_its_seed(scenario: Scenario, seed: int) -> None:
    runs = [Simulation(scenario, Motet(), seed).run() for _ in range(2)]
    assert runs[0] == runs[1]


def test_another_seed_is_another_run() -> None:
    scenario = world(jobs=(SimulatedJob(name="j", model="m0", rows=2000),))
    assert len({Simulation(scenario, Motet(), seed).run().makespan_s for seed in range(5)}) == 5


def test_all_equal_devices_end_together() -> None:
    scenario = world(jobs=(SimulatedJob(name="j", model="m0", rows=20_000),), devices=8)
    outcome = Simulation(scenario, Motet(), 0).run()
    assert outcome.busy_s / (8 * outcome.makespan_s) > 0.97


def test_a_device_that_is_silently_slow_is_found_and_gets_less() -> None:
    slow = world(jobs=(SimulatedJob(name="j", model="m0", rows=20_000),), devices=8)
    slow = replace(slow, devices=(replace(slow.devices[0], true_speed=0.25), *slow.devices[1:]))
    motet = Motet()
    outcome = Simulation(slow, motet, 0).run()
    assert motet.rates.pace("d0") > 2
    assert outcome.work_s["m0"] / (7.25 * outcome.makespan_s) > 0.95


def test_a_clone_saves_a_job_from_a_straggler() -> None:
    scenario = world(jobs=(SimulatedJob(name="j", model="m0", rows=4000),), stragglers=0.03)
    with_clones, without = (
        [Simulation(scenario, Motet(clone=clone), seed).run() for seed in range(12)]
        for clone in (True, False)
    )
    assert sum(o.cloned for o in with_clones) > 0
    assert sum(o.cloned for o in without) == 0
    assert sum(o.makespan_s for o in with_clones) < sum(o.makespan_s for o in without)


def test_a_job_that_no_device_can_run_is_told_of() -> None:
    scenario = world(jobs=(SimulatedJob(name="large", model="m0", rows=10),), devices=1)
    scenario = replace(scenario, devices=(device("d0", memory_mb=SLOT_MB // 2),))
    with pytest.raises(RuntimeError, match="these jobs wait: large"):
        Simulation(scenario, Motet()).run()


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_the_scenarios_of_the_benchmark_keep_every_device_busy_for_minutes(path: Path) -> None:
    told = read(path)
    scenario = told.scenario(1)
    assert told.about
    assert scenario == told.scenario(1)
    work_s = 0.0
    for job in scenario.jobs:
        rows = UncarvedRows(job)
        work_s += (
            scenario.models[job.model].seconds(rows.work(0, rows.block_rows)) * job.rows / rows.block_rows
        )
    expected_s = float(told.spec["seconds_a_device"])
    assert expected_s >= (100 if path.stem == "chaos" else 300)
    assert work_s == pytest.approx(expected_s * sum(d.true_speed for d in scenario.devices), rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({}, r"expected at least one of each"),
        ({"nois": 0.3}, r"nois: not known"),
        ({"devices": [{"kind": "gpu", "sped": 1}]}, r"devices\[0\]: sped: not known"),
        ({"devices": [{"kind": "gpu", "speed": {"gauss": [1, 2]}}]}, r"speed: got .*expected a number"),
        ({"jobs": [{"model": "other", "rows": 1}]}, r"jobs\[0\].model: got 'other'; expected one of"),
        ({"jobs": [{"rows": 0}]}, r"rows: got 0; expected at least 1"),
        ({"jobs": [{"share": 1}]}, r"share: it needs seconds_a_device"),
        ({"devices": [{"kind": "gpu"}]}, r"devices\[0\]: .*speed"),
    ],
)
def test_a_mistake_in_a_scenario_file_is_named_with_its_place(
    spec: dict[str, object], complaint: str
) -> None:
    good = {
        "devices": [{"kind": "gpu", "speed": 1.0}],
        "models": [{"token_s": 1e-5}],
        "jobs": [{"rows": 100}],
    }
    with pytest.raises(SetupError, match=complaint):
        drawn({**good, **spec} if spec else {}, Random(0), "s.toml")


def test_a_scenario_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("noise =")
    with pytest.raises(SetupError, match=r"broken\.toml: cannot be read"):
        read(broken)
