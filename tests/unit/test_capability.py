"""Whether a worker can run a pass: one function says it, and all that places, explains, forecasts or gives up asks it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.messages.explanation import Why
from motet.protocol.manifest import Manifest
from motet.protocol.wire import PROTOCOL, Beat
from scheduler.explaining.case import Case
from scheduler.explaining.explain import explain
from scheduler.facts import Facts
from scheduler.policy.capability import LASTING, why_not, workers
from scheduler.policy.cost import Rates
from scheduler.policy.fairness import BULK, INTERACTIVE, NORMAL
from scheduler.policy.functions import artefacts_mb
from scheduler.policy.lifecycle import Hopes
from scheduler.policy.liveness import GRACE_S
from scheduler.policy.place import Placer
from scheduler.policy.placing.records import Demand, Refusal, WorkerState
from scheduler.simulation.forecast import ClusterNow, forecast
from scheduler.store.explain import Standing
from tests.unit.test_explain import entry, held, standing_of

MODELS = (
    Manifest(name="small", version="1", engine="encoder", answers="vector", parameters=10**8, trunk="s"),
    Manifest(
        name="halved", version="1", engine="encoder", answers="vector", parameters=10**9, formats=("bf16",)
    ),
    Manifest(name="speaker", version="1", engine="causal", answers="text", parameters=10**9, trunk="l"),
)
HEADS = (10, 11)
JOBS = tuple(str(UUID(int=i + 1)) for i in range(4))


def demand(job: str, model: int, **more: Any) -> Demand:
    known: dict[str, Any] = {
        "job": job,
        "pass_number": 0,
        "tenant": "t",
        "weight": 1.0,
        "priority": NORMAL,
        "age": 1,
        "model_ids": frozenset({model}),
        "model": MODELS[model],
        "rows_waiting": 1000,
        "bytes_waiting": 100_000,
    }
    return Demand(**(known | more))


NAMES = ("a", "b", "c")
ENGINES = (("encoder",), ("causal",), ("encoder", "causal"), ())
beats = st.fixed_dictionaries(
    {},
    optional={
        name: st.builds(
            Beat,
            worker=st.just(name),
            boot=st.sampled_from(["1", "2"]),
            seq=st.just(1),
            protocol=st.sampled_from([PROTOCOL, PROTOCOL, PROTOCOL, PROTOCOL - 1, PROTOCOL + 1]),
            state=st.sampled_from(["ready", "ready", "ready", "draining", "starting"]),
            device_kind=st.sampled_from(["cpu", "cuda"]),
            engines=st.sampled_from(ENGINES),
            memory_mb=st.sampled_from([0, 500, 3000, 6000, 20_000]),
            gpus=st.sampled_from([1, 2]),
            spreads=st.sampled_from([(), ("causal",)]),
            formats=st.sampled_from([(), ("bf16",)]),
        )
        for name in NAMES
    },
)
refusals = st.lists(
    st.builds(
        Refusal,
        st.sampled_from([*range(len(MODELS)), *HEADS]),
        st.sampled_from(NAMES),
        st.sampled_from(["1", "2"]),
        st.just("torn"),
    ),
    max_size=4,
)
names = st.sets(st.sampled_from(NAMES), max_size=1).map(frozenset)
demands = st.lists(
    st.builds(
        lambda i, model, head, priority, numerics, beside_mb: demand(
            JOBS[i],
            model,
            pass_number=i,
            model_ids=frozenset({model, head}),
            priority=priority,
            numerics=numerics,
            beside_mb=beside_mb,
        ),
        st.integers(0, len(JOBS) - 1),
        st.integers(0, len(MODELS) - 1),
        st.sampled_from(HEADS),
        st.sampled_from([NORMAL, BULK, INTERACTIVE]),
        st.sampled_from(["fast", "exact"]),
        st.sampled_from([0, 0, 1500]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda d: d.id,
)


def worker(**more: Any) -> WorkerState:
    known: dict[str, Any] = {
        "name": "w",
        "boot": "1",
        "device_kind": "cuda",
        "device_name": "GPU",
        "engines": ("encoder",),
        "memory_mb": 10_000,
    }
    return WorkerState(**(known | more))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, None),
        ({"engines": ("causal",)}, "no_engine"),
        ({"memory_mb": 100}, "too_small"),
        ({"memory_mb": 0}, None),
        ({"memory_mb": 900, "gpus": 2}, "too_small"),
        ({"memory_mb": 900, "gpus": 2, "spreads": ("encoder",)}, None),
        ({"refused": frozenset({7})}, "refused"),
        ({"refused": frozenset({8})}, None),
        ({"barred": "drained"}, "drained"),
        # What it can never run comes before what it does not run now.
        ({"barred": "drained", "memory_mb": 100}, "too_small"),
        ({"barred": "starting", "engines": ()}, "starting"),
        ({"barred": "incompatible", "engines": ()}, "incompatible"),
    ],
)
def test_each_reason_in_its_order(more: dict[str, Any], expected: Why | None) -> None:
    assert why_not(worker(**more), demand(JOBS[0], 0, model_ids=frozenset({0, 7}))) == expected


def test_the_artefacts_of_a_function_are_part_of_what_its_pass_needs() -> None:
    data = {"a.json": 100 << 20, "b.safetensors": 100 << 20, "c.parquet": 100 << 20}
    artefact = Manifest(name="films", version="1", engine="artefact", answers="artefact", sizes=data)
    assert artefact.memory_mb() == 800
    again = replace(artefact, version="2")
    assert artefacts_mb([artefact, again, MODELS[0]]) == 800, "equal content is read once"
    room = worker(memory_mb=MODELS[0].memory_mb("fp32") + 800)
    assert why_not(room, demand(JOBS[0], 0, beside_mb=800)) is None
    assert why_not(room, demand(JOBS[0], 0, beside_mb=801)) == "too_small"


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_worker_of_an_older_protocol_is_given_nothing_whatever_the_pass_asks(protocol: int) -> None:
    """It would pass over parameters, artefacts, a least score, a row's labels or a second text, and answer all the same."""
    beat = Beat(worker="old", boot="1", seq=1, protocol=protocol, device_kind="cpu", engines=("encoder",))
    placer = Placer(Rates(), subtask_s=2.0, ahead_s=0.5, depth=3)
    placer.want(demand(JOBS[0], 0))
    [old] = workers({"old": beat}, (), 1.0)
    assert why_not(old, demand(JOBS[0], 0)) == "incompatible"
    [mine] = workers({"new": replace(beat, worker="new", protocol=PROTOCOL)}, (), 1.0)
    assert why_not(mine, demand(JOBS[0], 0)) is None
    placer.worker(mine, 0.0)
    placer.tend(0.0)
    assert next(iter(placer.place(0.0))).worker.name == "new"


def test_a_format_that_the_device_is_fast_at_halves_what_a_model_needs_where_the_pass_may_run_in_it() -> None:
    half, whole = (MODELS[1].memory_mb(one) for one in ("bf16", "fp32"))
    assert half < whole
    small = worker(memory_mb=half, formats=("bf16",))
    assert why_not(small, demand(JOBS[0], 1)) is None
    assert why_not(small, demand(JOBS[0], 1, numerics="exact")) == "too_small"
    assert why_not(replace(small, formats=()), demand(JOBS[0], 1)) == "too_small"


@settings(max_examples=300, deadline=None)
@given(beats, beats, refusals, names, demands)
def test_nothing_is_placed_that_the_worker_cannot_run(
    first: dict[str, Beat],
    then: dict[str, Beat],
    refused: list[Refusal],
    drained: frozenset[str],
    waits: list[Demand],
) -> None:
    """Also at a process that takes the place of another, whose leases are in flight still."""
    # A process stays what it is: another device, or other engines, are those of another one.
    then = {
        name: replace(first[name], state=beat.state)
        if name in first and first[name].boot == beat.boot
        else beat
        for name, beat in then.items()
    }
    placer = Placer(Rates(), subtask_s=2.0, ahead_s=0.5, depth=3)
    for one in waits:
        placer.want(one)
    for now, heard in enumerate((first, then)):
        able = [w for w in workers(heard, refused, 0.5, drained=drained) if w.barred is None]
        for name in placer.workers() - {w.name for w in able}:
            placer.gone(name)
        for one in able:
            placer.worker(one, now)
        placer.tend(now)
        for key, p in enumerate(placer.place(now)):
            assert why_not(p.worker, p.demand) is None
            placer.opened(p, (now, key), now, rows=1, size=100, seconds=0.01)
            if key > 200:
                break


@settings(max_examples=200, deadline=None)
@given(
    beats, refusals, names, names, st.lists(demands, min_size=1, max_size=1).map(lambda found: found[0][0])
)
def test_what_is_explained_is_what_is_decided(
    heard: dict[str, Beat],
    refused: list[Refusal],
    drained: frozenset[str],
    suspects: frozenset[str],
    mine: Demand,
) -> None:
    known = workers(heard, refused, 0.5, drained=drained, suspects=suspects)
    [told] = explain(_case(heard, refused, drained, suspects, mine)).passes
    said = {name: cannot.why for cannot in told.cannot for name in cannot.names}
    assert said == {w.name: why for w in known if (why := why_not(w, mine)) is not None}
    able = [w for w in known if why_not(w, mine) is None]
    assert (told.work_s is None) == (not able)
    assert told.resident + told.loads + sum(c.workers for c in told.can_load) == len(able)
    sure = forecast(
        mine.job,
        ClusterNow(
            workers=known, rates=Rates(), demand=[mine], started=[], subtask_s=2.0, ahead_s=0.5, depth=3
        ),
    )
    assert (sure is None) == (not able)


def _case(
    heard: dict[str, Beat],
    refused: list[Refusal],
    drained: frozenset[str],
    suspects: frozenset[str],
    mine: Demand,
) -> Case:
    facts = Facts(
        held=[held(JOBS[3], name, exclusive=True) for name in suspects],
        demand=[mine],
        refusals=refused,
        rates=Rates(),
        drained=drained,
    )
    return Case(
        standing=Standing(job=entry(id=UUID(mine.job)), passes=(standing_of(mine),), left_s=None),
        facts=facts,
        owners={},
        beats=heard,
        memory_share=0.5,
        lane_share=0.3,
        leads=False,
        throttle=1.0,
        subtask_s=2.0,
        ahead_s=0.5,
        depth=3,
        now=datetime.now(UTC),
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(beats, st.sampled_from([1.0, 60.0, GRACE_S])), min_size=1, max_size=6),
    refusals,
    demands,
)
def test_a_job_is_given_up_only_where_every_known_worker_can_never_run_a_pass_of_it(
    story: list[tuple[dict[str, Beat], float]], refused: list[Refusal], waits: list[Demand]
) -> None:
    hopes, now = Hopes(), 0.0
    for heard, passed in story:
        known = workers(heard, refused, 0.5)
        for job in hopes.hopeless(waits, known, refused, now):
            assert any(all(why_not(w, d) in LASTING for w in known) for d in waits if d.job == str(job))
        now += passed
