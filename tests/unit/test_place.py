"""Placement: who gets work of which pass now."""

from __future__ import annotations

from motet.manifest import Manifest
from scheduler.cost import Rate, Rates
from scheduler.place import BULK, INTERACTIVE, NORMAL, Demand, Placement, Worker, place

ENCODER = Manifest(
    name="encoder", version="1", engine="encoder", answers="vector", trunk="t", parameters=1000
)
OTHER = Manifest(name="other", version="1", engine="encoder", answers="vector", trunk="u", parameters=1000)
#: One second a kilobyte.
RATES = Rates({(trunk, "box", "fast"): Rate(0.004, 4.0) for trunk in ("t", "u")})


def demand(job: str, **kw: object) -> Demand:
    facts: dict[str, object] = {
        "pass_number": 0,
        "tenant": "acme",
        "weight": 1.0,
        "priority": NORMAL,
        "age": 1,
        "model_ids": frozenset({1}),
        "model": ENCODER,
        "rows_waiting": 1000,
        "bytes_waiting": 1_000_000,
    }
    return Demand(job=job, **(facts | kw))  # type: ignore[arg-type]


def worker(name: str, **kw: object) -> Worker:
    facts: dict[str, object] = {
        "boot": "b",
        "device_kind": "cpu",
        "device_name": "box",
        "engines": ("encoder",),
        "resident": (),
        "leases": 0,
        "leased_s": 0.0,
    }
    return Worker(name=name, **(facts | kw))  # type: ignore[arg-type]


def placed(demands: list[Demand], workers: list[Worker], **kw: object) -> list[Placement]:
    refused = kw.pop("refused", {})
    return list(place(demands, workers, RATES, refused, subtask_s=2.0, depth=3))  # type: ignore[arg-type]


def test_every_idle_worker_gets_work_before_any_gets_more() -> None:
    names = [p.worker.name for p in placed([demand("j")], [worker("a"), worker("b")])]
    assert names[:2] == ["a", "b"]


def test_a_worker_is_kept_two_sub_tasks_deep_in_seconds_and_no_deeper() -> None:
    assert len(placed([demand("j")], [worker("a")])) == 2
    assert placed([demand("j")], [worker("a", leases=2, leased_s=4.0)]) == []


def test_a_sub_task_is_sized_in_seconds_of_the_device_that_asks() -> None:
    first = placed([demand("j")], [worker("a")])[0]
    assert first.budget_bytes * first.seconds_per_byte == 2.0


def test_interactive_work_goes_first_and_finds_a_slot_at_a_full_worker() -> None:
    full = worker("a", leases=3, leased_s=6.0)
    got = placed([demand("bulk", priority=BULK), demand("now", priority=INTERACTIVE, rows_waiting=1)], [full])
    assert [p.demand.job for p in got] == ["now"]


def test_a_tenant_with_less_under_way_goes_first_by_weight() -> None:
    hungry = demand("h", tenant="small", tenant_open=1, age=2)
    heavy = demand("b", tenant="big", tenant_open=4, weight=2.0, age=1)
    assert placed([heavy, hungry], [worker("a")])[0].demand.job == "h"


def test_a_model_in_memory_is_preferred_among_equal_jobs() -> None:
    cold = demand("cold", model=OTHER, model_ids=frozenset({2}), age=1)
    warm = demand("warm", age=2)
    got = placed([cold, warm], [worker("a", resident=(ENCODER.digest,))])
    assert got[0].demand.job == "warm"


def test_a_worker_is_never_given_a_model_that_it_cannot_run() -> None:
    assert placed([demand("j")], [worker("a", engines=("function",))]) == []
    assert placed([demand("j")], [worker("a")], refused={"a": frozenset({1})}) == []


def test_a_head_that_a_worker_cannot_load_keeps_its_pass_away_from_it_and_no_other_pass() -> None:
    headed = demand("headed", model_ids=frozenset({1, 7}))
    got = placed([headed, demand("plain")], [worker("a")], refused={"a": frozenset({7})})
    assert {p.demand.job for p in got} == {"plain"}


def test_nothing_is_put_beside_a_suspect() -> None:
    assert placed([demand("j")], [worker("a", exclusive=True)]) == []


def test_no_more_is_placed_than_waits() -> None:
    got = placed([demand("j", rows_waiting=1, bytes_waiting=100)], [worker("a"), worker("b")])
    assert len(got) == 1
