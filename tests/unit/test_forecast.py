"""When a job will be done: the policy run ahead from made-up clusters whose answer is known by heart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from motet.protocol.manifest import Manifest
from scheduler.policy.cost import Rate, Rates
from scheduler.policy.placing.records import Demand, WorkerState
from scheduler.simulation import forecast as module
from scheduler.simulation.events import Simulation
from scheduler.simulation.forecast import ClusterNow, Started, forecast

MODELS = [
    Manifest(
        name=f"m{i}",
        version="1",
        engine="encoder",
        answers="vector",
        trunk=f"t{i}",
        files={"w": str(i)},
        parameters=25_000_000,
    )
    for i in range(3)
]
HOLDS = (MODELS[0].digest,)


def rates(*, slow: dict[str, float] | None = None, load_s: float = 10.0) -> Rates:
    """A row of 400 bytes takes a millisecond on a GPU, four on the slow kind."""
    return Rates(
        {
            (f"t{i}", kind, "fast"): Rate((0.0, 0.0, token_s, 0.0), (0.0,) * 16, 4.0, 100.0, 200)
            for i in range(len(MODELS))
            for kind, token_s in (("GPU", 1e-5), ("slow", 4e-5))
        },
        paces={name: (pace, 9) for name, pace in (slow or {}).items()},
        loads={(m.digest, "GPU"): load_s for m in MODELS},
    )


def wants(job: str = "mine", seconds: float = 10.0, model: int = 0, **more: Any) -> Demand:
    """A pass with so many seconds of work for one GPU."""
    rows = round(1000 * seconds)
    known = {"pass_number": 0, "tenant": "me", "weight": 1.0, "priority": 1, "age": 1, "model": MODELS[model]}
    return Demand(
        **{
            "job": job,
            **known,
            "model_ids": frozenset({model}),
            "rows_waiting": rows,
            "bytes_waiting": 400 * rows,
            **more,
        }
    )


def crew(n: int, kind: str = "GPU", resident: tuple[str, ...] = HOLDS, **more: Any) -> list[WorkerState]:
    return [
        WorkerState(
            name=f"{kind}{i}",
            boot="b",
            device_kind="cuda",
            device_name=kind,
            engines=("encoder",),
            memory_mb=80_000,
            resident=resident,
            **more,
        )
        for i in range(n)
    ]


def cluster(
    workers: Sequence[WorkerState],
    *demand: Demand,
    started: Sequence[Started] = (),
    known: Rates | None = None,
) -> ClusterNow:
    return ClusterNow(
        workers=workers,
        rates=rates() if known is None else known,
        demand=demand,
        started=started,
        subtask_s=2.0,
        ahead_s=0.5,
        depth=3,
    )


@pytest.mark.parametrize(
    ("workers", "demand", "expected_s"),
    [
        (crew(1), [wants(seconds=10)], 10),
        (crew(2), [wants(seconds=1000)], 500),
        (crew(1, resident=()), [wants(seconds=100)], 110),
        (crew(1, "slow"), [wants(seconds=10)], 40),
        ([*crew(3), *crew(4, "slow")], [wants(seconds=4000)], 1000),
        (crew(64), [wants(seconds=64_000)], 1000),
        (crew(1000), [wants(seconds=1e6)], 1000),
        # Beside what never ends: half of the devices, a fifth of them, and all of them.
        (crew(2), [wants(seconds=100), wants("x", 1e6, tenant="other")], 100),
        (crew(2), [wants(seconds=100, priority=2), wants("x", 1e6, tenant="other")], 250),
        (crew(2), [wants(seconds=100), wants("x", 1e6, tenant="other", weight=3.0)], 200),
        (crew(1), [wants(seconds=0.01, priority=0), wants("x", 1e6, tenant="other")], 0.1),
        # So many that not each can have a turn in one short run.
        (crew(20), [wants(seconds=100), *(wants(f"x{i}", 1e6, tenant=f"t{i}") for i in range(300))], 1505),
        (crew(20), [wants(seconds=100), *(wants(f"x{i}", 1e6) for i in range(300))], 1505),
        # Others want a model that other workers hold.
        ([*crew(2), *crew(1, "slow", (MODELS[1].digest,))], [wants(seconds=200), wants("x", 400, 1)], 100),
    ],
    ids=lambda value: str(value)[:1] and None,
)
def test_it_is_what_arithmetic_says(
    workers: list[WorkerState], demand: list[Demand], expected_s: float
) -> None:
    found = forecast("mine", cluster(workers, *demand))
    assert found is not None
    assert found.p50_s == pytest.approx(expected_s, rel=0.25, abs=0.2)
    assert found.p50_s <= found.p90_s < 1.5 * found.p50_s + 0.5
    assert found.measured


def test_a_silently_slow_worker_does_less() -> None:
    found = forecast("mine", cluster(crew(2), wants(seconds=300), known=rates(slow={"GPU1": 4.0})))
    assert found is not None
    assert found.p50_s == pytest.approx(300 / 1.25, rel=0.15)


def test_what_is_under_way_comes_first() -> None:
    others = Started(worker="GPU0", of=("unknown", 0), left_s=30.0)
    found = forecast("mine", cluster(crew(1), wants(seconds=10), started=[others]))
    assert found is not None
    assert found.p50_s == pytest.approx(40, rel=0.25)
    own = Started(worker="GPU0", of=("mine", 0), left_s=5.0)
    found = forecast("mine", cluster(crew(1), wants(seconds=0), started=[own]))
    assert found is not None
    assert found.p50_s == pytest.approx(5, rel=0.25)


def test_the_same_question_has_the_same_answer() -> None:
    asked = cluster(crew(3), wants(seconds=50), wants("x", 500, tenant="other"))
    assert forecast("mine", asked) == forecast("mine", asked)


def test_what_is_little_known_is_told_with_doubt() -> None:
    found = forecast("mine", cluster(crew(1), wants(seconds=100), known=Rates()))
    assert found is not None
    assert not found.measured
    assert found.p90_s > 2 * found.p50_s


def test_nobody_can_tell_when_nobody_can_run_it() -> None:
    assert forecast("mine", cluster([], wants())) is None
    assert forecast("mine", cluster(crew(1, refused=frozenset({0})), wants())) is None
    assert forecast("mine", cluster(crew(1), wants("other"))) is None


def test_a_worker_that_refused_the_model_is_not_counted_on() -> None:
    able, refusing = crew(1), crew(1, "slow", refused=frozenset({0}))
    found = forecast("mine", cluster([*able, *refusing], wants(seconds=100)))
    assert found is not None
    assert found.p50_s == pytest.approx(100, rel=0.15)


@pytest.mark.parametrize("rivals", [0, 3, 300])
def test_it_costs_little_however_much_work_there_is(monkeypatch: pytest.MonkeyPatch, rivals: int) -> None:
    attempts = []

    class Counted(Simulation):
        def run(self, *args: Any, **more: Any) -> Any:
            outcome = super().run(*args, **more)
            attempts.append(outcome.attempts)
            return outcome

    monkeypatch.setattr(module, "Simulation", Counted)
    others = (wants(f"x{i}", 1e7, i % 3, tenant=f"t{i}") for i in range(rivals))
    assert forecast("mine", cluster(crew(500), wants(seconds=1e7), *others)) is not None
    assert sum(attempts) < 5000, "a tenth of a millisecond each"
