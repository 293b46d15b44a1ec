"""Why a job waits: each reason provoked with made-up facts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from motet.messages.explanation import Explanation
from motet.protocol.manifest import Manifest
from motet.protocol.wire import PROTOCOL, Beat
from scheduler.ask_times import no_times, place
from scheduler.explaining.case import Case
from scheduler.explaining.explain import NAMES, explain
from scheduler.facts import Facts
from scheduler.policy.cost import Rate, Rates
from scheduler.policy.placing.records import Demand, Refusal
from scheduler.store.ask_spans import AskSpan
from scheduler.store.explain import Owner, PassStanding, Standing
from scheduler.store.jobs import JobEntry
from scheduler.store.leases import Held
from tests.messages import holds

MINE, OWN, THEIRS = (str(UUID(int=i)) for i in (1, 2, 3))
NOW = datetime(2026, 11, 23, 18, 33, tzinfo=UTC)
TINY = Manifest(
    name="tiny", version="1", engine="encoder", answers="vector", trunk="t", parameters=100_000_000
)
#: A row of 100 bytes takes a millisecond.
RATES = Rates(
    {("t", "GPU", "fast"): Rate((0.0, 0.0, 4e-5, 0.0), (0.0,) * 16, 4.0, 25.0, 100)},
    loads={(TINY.digest, "GPU"): 10.0},
)


def entry(state: Any = "running", **more: Any) -> JobEntry:
    empty = dict.fromkeys(JobEntry.__dataclass_fields__, 0)
    known = {"id": UUID(MINE), "name": "mine", "state": state, "reason": "", "priority": 1, "n_rows": 1000}
    return JobEntry(**{**empty, **known, "deadline": None, **more})


def demand(job: str = MINE, rows: int = 1000, tenant: str = "me", priority: int = 1, **more: Any) -> Demand:
    return Demand(
        **{
            "job": job,
            "pass_number": 0,
            "tenant": tenant,
            "weight": 1.0,
            "priority": priority,
            "age": 1,
            "model_ids": frozenset({7}),
            "model": TINY,
            "rows_waiting": rows,
            "bytes_waiting": 100 * rows,
            **more,
        }
    )


def beat(name: str = "w1", *, holds: bool = False, **more: Any) -> Beat:
    said = {"boot": "b", "seq": 1, "device_kind": "cuda", "device_name": "GPU", "memory_mb": 10_000}
    return Beat(
        **{
            "worker": name,
            **said,
            "engines": ("encoder",),
            "resident": (TINY.digest,) if holds else (),
            **more,
        }
    )


def held(job: str = MINE, worker: str = "w1", **more: Any) -> Held:
    return Held(
        **{
            "subtask": 1,
            "attempt": 1,
            "job": UUID(job),
            "pass_number": 0,
            "n_rows": 500,
            "bytes": 50_000,
            "worker": worker,
            "boot": "b",
            "predicted_s": 2.0,
            "exclusive": False,
            "clone": False,
            "age_s": 1.0,
            **more,
        }
    )


def standing_of(mine: Demand, *, left_s: float | None = None, **more: Any) -> PassStanding:
    known = {"kind": "encoder tiny", "tasks": ("topic",), "rows": 1000, "rows_open": 0, "rows_done": 0}
    later = {"rows_later": 0, "later_s": 0.0, "tries": 0}
    return PassStanding(**{"demand": mine, **known, **later, **more})


def told(
    *beats: Beat,
    mine: Demand | None = None,
    others: tuple[Demand, ...] = (),
    leases: tuple[Held, ...] = (),
    refusals: tuple[Refusal, ...] = (),
    drained: frozenset[str] = frozenset(),
    job: JobEntry | None = None,
    left_s: float | None = None,
    rates: Rates = RATES,
    **more: Any,
) -> Explanation:
    """The explanation of one job with one pass of 1,000 rows, a second of work for a GPU."""
    mine = demand() if mine is None else mine
    job = job or entry(priority=mine.priority)
    known = {
        key: more.pop(key)
        for key in list(more)
        if key.startswith(("rows", "later", "tries", "bytes", "needs"))
    }
    facts = Facts(
        held=list(leases),
        demand=[*others, *([mine] if mine.rows_waiting and job.state == "running" else [])],
        refusals=list(refusals),
        rates=rates,
        drained=drained,
    )
    case: dict[str, Any] = {
        "standing": Standing(job=job, passes=(standing_of(mine, **known),), left_s=left_s),
        "facts": facts,
        "owners": {OWN: Owner("me", 1, "nightly"), THEIRS: Owner("they", 1, "their secret")},
        "beats": {b.worker: b for b in beats},
        "memory_share": 0.5,
        "lane_share": 0.3,
        "leads": True,
        "throttle": 1.0,
        "subtask_s": 2.0,
        "ahead_s": 0.5,
        "depth": 3,
        "now": NOW,
        **more,
    }
    found = explain(Case(**case))
    record = json.loads(json.dumps(asdict(found)))
    holds(Explanation, record)
    assert Explanation.of(record) == found, "the client reads what the API says"
    return found


def test_what_waits_of_pictures_is_told_in_pixels_beside_tokens() -> None:
    eyes = replace(TINY, name="eyes", engine="image", reads="image", max_tokens=196)
    [note] = [one for one in told(beat(), mine=demand(model=eyes)).notes if "picture" in one]
    assert note == (
        "1,000 pictures wait for eyes@1: 50.2 megapixels as it sees them, which count for 196,000 tokens."
    )
    assert not any("picture" in one for one in told(beat()).notes)


def test_rows_that_wait_for_answers_are_told_and_counted_in_when_it_is_done() -> None:
    alone = told(beat(holds=True))
    waits = told(
        beat(holds=True), rows=21_000, rows_blocked=20_000, bytes_blocked=2_000_000, needs=("mood", "tone")
    )
    assert "20,000 rows of topic wait for mood, tone." in waits.notes
    assert waits.passes[0].rows.blocked == 20_000
    assert alone.eta is not None
    assert waits.eta is not None
    assert waits.eta.p50_s > 5 * alone.eta.p50_s


def test_a_job_that_could_begin_says_when_it_is_done() -> None:
    found = told(beat(holds=True))
    assert found.says.startswith("It waits for the next moment in which the dispatcher sends; done in ")
    assert found.eta is not None
    assert found.eta.p50_s == pytest.approx(1.3, abs=0.5)
    assert found.eta.p50_s <= found.eta.p90_s
    assert found.eta.p50_at.startswith("2026-11-23T18:33:0")
    assert (found.eta.measured, found.eta.complete) == (True, True)
    assert found.passes[0].resident_on == ("w1",)
    assert found.passes[0].work_s == pytest.approx(1.0)


def test_what_was_never_measured_is_called_a_guess() -> None:
    found = told(beat(holds=True), rates=Rates())
    assert found.eta is not None
    assert not found.eta.measured
    assert found.eta.p90_s > 1.5 * found.eta.p50_s
    assert "a guess" in found.notes[0]


def test_no_worker_at_all() -> None:
    found = told()
    assert found.says == "It waits for a worker: none is alive. Start one with `motet worker`."
    assert found.eta is None
    assert found.passes[0].work_s is None


def test_nobody_is_heard_while_redis_is_away() -> None:
    found = told(beats=None)
    assert found.says.startswith("It waits for Redis")
    assert found.eta is None


def test_no_dispatcher_leads() -> None:
    found = told(beat(), leads=False)
    assert found.says.startswith("It waits for a dispatcher")
    assert found.eta is None


def test_a_model_that_is_too_large_for_every_worker() -> None:
    found = told(beat(memory_mb=600), beat("w2", memory_mb=400))
    assert found.says == (
        "It waits for a worker with more memory: tiny@1 needs 483 MB,"
        " and the largest of 2 workers has 300 MB for models."
    )
    [cannot] = found.passes[0].cannot
    assert (cannot.why, cannot.workers, cannot.need_mb, cannot.have_mb) == ("too_small", 2, 483, 300)
    assert found.eta is None


def test_half_the_memory_is_enough_where_the_model_may_run_in_bf16() -> None:
    small = replace(TINY, formats=("bf16",))
    mine = demand(model=small)
    assert told(beat(memory_mb=600, formats=("bf16",)), mine=mine).eta is not None
    assert told(beat(memory_mb=600), mine=mine).eta is None


@pytest.mark.parametrize(
    ("why", "how"),
    [
        ("no_engine", {"beats": beat(engines=("spacy-ner",))}),
        ("refused", {"refusals": (Refusal(7, "w1", "b", "weights are torn"),)}),
        ("drained", {"drained": frozenset({"w1"})}),
        ("draining", {"beats": beat(state="draining")}),
        ("starting", {"beats": beat(state="starting", engines=(), memory_mb=0)}),
        ("incompatible", {"beats": beat(protocol=PROTOCOL + 1, engines=())}),
        ("exclusive", {"leases": (held(OWN, exclusive=True),)}),
    ],
)
def test_each_reason_for_which_a_worker_gets_nothing(why: str, how: dict[str, Any]) -> None:
    found = told(how.pop("beats", beat()), **how)
    [cannot] = found.passes[0].cannot
    assert (cannot.why, cannot.names) == (why, ("w1",))
    assert found.says.startswith("It waits for a worker that can run tiny@1: there are only 1 worker ")
    assert found.eta is None
    assert any(note.startswith("w1 cannot run tiny@1: ") for note in found.notes)
    if why == "refused":
        assert cannot.words == "weights are torn"


def test_a_refusal_of_an_earlier_life_of_the_worker_counts_no_more() -> None:
    found = told(beat(boot="second"), refusals=(Refusal(7, "w1", "b", "weights are torn"),))
    assert found.passes[0].cannot == ()


def test_a_model_that_somebody_could_load() -> None:
    found = told(beat(), beat("w2", device_name="other GPU"))
    assert "for a worker to load tiny@1, about " in found.says
    assert {(c.device_name, c.workers) for c in found.passes[0].can_load} == {("GPU", 1), ("other GPU", 1)}
    assert next(c.load_s for c in found.passes[0].can_load if c.device_name == "GPU") == 10.0


def test_workers_that_load_a_model_are_counted_beyond_those_named() -> None:
    names = [f"w{i:02}" for i in range(NAMES + 3)]
    found = told(*map(beat, names), leases=tuple(held(worker=name) for name in names), rows_open=500)
    assert (found.passes[0].loads, len(found.passes[0].loading)) == (NAMES + 3, NAMES)


def test_a_model_that_is_being_loaded() -> None:
    found = told(beat(), leases=(held(age_s=4.0),), rows_open=500)
    assert found.says.startswith("It waits for w1 to load tiny@1, about 6 s more; done in ")
    assert found.passes[0].loading[0].left_s == 6.0
    assert found.eta is not None
    # The rest of the load, the sub-task that waits for it, and the rows that wait for that.
    assert found.eta.p50_s == pytest.approx(6 + 2 + 1, rel=0.3)


def test_what_runs_tells_its_share() -> None:
    found = told(
        beat(holds=True),
        beat("w2", holds=True),
        leases=(held(), held(OWN, "w2", subtask=2)),
        rows_open=500,
    )
    assert found.says.startswith("It runs on 1 worker (1 of 2 sub-tasks under way); done in ")
    assert found.share is not None
    assert (found.share.subtasks, found.share.all, found.share.workers) == (1, 2, 1)


def test_own_jobs_beside_it_are_named_and_those_of_others_only_counted() -> None:
    found = told(
        beat(holds=True),
        others=(
            demand(OWN, 5000),
            demand(THEIRS, 20_000, tenant="they"),
            demand(THEIRS, 7, tenant="they", pass_number=1),
        ),
    )
    assert found.says.startswith(
        "It waits behind your own job nightly and 1 job of another tenant (25 s of work for one device); done in"
    )
    [beside] = found.beside
    assert [(r.job, r.name, r.work_s) for r in beside.own] == [(OWN, "nightly", 5.0)]
    assert (beside.other_tenants, beside.other_jobs, beside.other_s) == (1, 1, pytest.approx(20.007))
    assert "their secret" not in str(asdict(found))
    assert THEIRS not in str(asdict(found))
    assert found.eta is not None
    # Two tenants share: its second of work among its tenant's two jobs, and as much for the other tenant.
    assert 2.0 < found.eta.p50_s < 12.0


def test_an_interactive_job_waits_behind_no_bulk() -> None:
    found = told(
        beat(holds=True),
        mine=demand(rows=1, priority=0),
        others=(demand(THEIRS, 10**6, tenant="they", priority=2),),
    )
    assert "behind" not in found.says
    assert [b.priority for b in found.beside] == ["bulk"]
    assert any("at most 30% of a device from them (MOTET_LANE_SHARE)" in note for note in found.notes)
    assert found.eta is not None
    assert found.eta.p90_s < 2


def test_jobs_that_want_other_workers_are_not_beside_it() -> None:
    other = replace(TINY, engine="spacy-ner")
    found = told(
        beat(holds=True),
        beat("w2", engines=("spacy-ner",)),
        others=(demand(THEIRS, 10**6, tenant="they", model=other),),
    )
    assert found.beside == ()
    assert found.eta is not None
    assert found.eta.p90_s < 3


def test_rows_that_are_tried_again_later() -> None:
    found = told(beat(holds=True), mine=demand(rows=3), rows_later=3, later_s=2.5, tries=2, rows_done=997)
    assert found.says.startswith("It waits to try 3 rows again, in 2 s (try 3 of 5); done in ")
    assert found.eta is not None
    assert found.eta.p50_s > 2.5
    assert found.passes[0].rows.waiting == 0


@pytest.mark.parametrize(("left_s", "kept"), [(600.0, "yes"), (0.5, "no")])
def test_a_deadline_is_kept_or_not(left_s: float, kept: str) -> None:
    found = told(beat(holds=True), left_s=left_s)
    assert found.deadline is not None
    assert found.deadline.kept == kept
    assert any("deadline" in note for note in found.notes)


def test_a_deadline_of_which_nobody_can_tell() -> None:
    found = told(left_s=60.0)
    assert found.deadline is not None
    assert found.deadline.kept is None


@pytest.mark.parametrize(("throttle", "words"), [(0.0, "It waits for the cluster to recover"), (0.4, "40%")])
def test_back_pressure_is_told(throttle: float, words: str) -> None:
    found = told(beat(holds=True), throttle=throttle)
    assert words in str(found)
    assert (found.eta is None) == (throttle == 0)


def test_a_job_whose_upload_goes_on_knows_only_of_its_rows_so_far() -> None:
    found = told(beat(holds=True), job=entry("loading"))
    assert found.eta is not None
    assert not found.eta.complete
    assert "; what has arrived is done in" in found.says
    assert "upload" not in found.says, "what has arrived is run while the rest comes"


def test_a_job_that_is_faster_than_its_upload_waits_for_that() -> None:
    found = told(beat(holds=True), mine=demand(rows=0), job=entry("loading"))
    assert found.says == (
        "It waits for its upload: 1,000 rows have arrived so far, and all of them are answered."
    )


def test_a_job_beyond_those_that_are_looked_at_says_so() -> None:
    found = told(beat(holds=True), mine=demand(rows=0), others=(demand(THEIRS, tenant="they"),))
    assert not any("looked at" in note for note in found.notes)
    facts = Facts(
        held=[],
        demand=[demand(THEIRS, tenant="they")],
        refusals=[],
        rates=RATES,
        drained=frozenset(),
    )
    assert any("its turn comes after them" in note for note in told(beat(holds=True), facts=facts).notes)


def test_all_rows_are_answered_and_merged() -> None:
    found = told(beat(holds=True), mine=demand(rows=0), rows_done=1000)
    assert found.says == "All its rows are answered, and the last of them are being merged."


def test_what_has_ended_says_how() -> None:
    found = told(job=entry("failed", reason="its deadline passed", cells_error=2))
    assert str(found) == "It has ended: failed: its deadline passed.\n2 cells of it are errors."
    assert (found.eta, found.passes) == (None, ())


def test_an_open_job_says_how_its_asks_fare_and_what_it_no_longer_keeps() -> None:
    times = no_times()
    times[place(0.027)] = 98
    times[place(0.4)] = 2
    asks = AskSpan(at=0, answered=100, late=3, refused=12, waiting=1, times=times)
    job = entry("open", first_row=1234)
    standing = Standing(job=job, passes=(standing_of(demand(rows=0)),), left_s=None, asks=asks)
    found = told(beat(), job=job, standing=standing)
    assert (
        found.says
        == "It is open: all rows that have come are answered, and it takes more until it is closed."
    )
    assert found.notes[0].startswith("In the last minute 100 asks of it were answered, half of them in 2")
    assert found.notes[0].endswith(
        "3 came too late for their callers; 12 were refused, since too many waited; 1 row waits to be stored."
    )
    assert found.notes[1] == "Its rows before 1,234 were deleted, having been kept long enough."
    quiet = Standing(job=job, passes=(standing_of(demand(rows=0)),), left_s=None, asks=AskSpan(at=0))
    assert "none of its asks was answered" in told(beat(), job=job, standing=quiet).notes[0]
