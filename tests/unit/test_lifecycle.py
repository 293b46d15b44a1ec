"""What becomes of rows that were not answered."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from motet.protocol.manifest import Manifest
from motet.protocol.wire import PROTOCOL, Beat
from scheduler.policy.capability import workers
from scheduler.policy.carve import Range
from scheduler.policy.lifecycle import (
    MAX_DEATHS_UNSEEN,
    MAX_TRIES,
    GivenUp,
    Hopes,
    Return,
    failed,
    lost,
    runs,
)
from scheduler.policy.liveness import GRACE_S, Roster
from scheduler.policy.placing.records import Demand, Refusal

RANGES = (Range(0, 10, 20, 100), Range(1, 0, 4, 40))


def covered(returns: list[Return]) -> list[tuple[int, int]]:
    return sorted((r.range.block, i) for r in returns for i in range(r.range.lo, r.range.hi))


ALL = sorted((r.block, i) for r in RANGES for i in range(r.lo, r.hi))


def test_rows_of_a_silent_worker_return_blameless() -> None:
    returns, given_up = lost(RANGES, tries=1, deaths=0, exclusive=False, suspects=(), died=False)
    assert returns == [Return(RANGES[0], tries=1), Return(RANGES[1], tries=1)]
    assert not given_up


def test_only_rows_of_the_running_micro_batch_are_suspected_of_a_death() -> None:
    returns, given_up = lost(RANGES, tries=0, deaths=0, exclusive=False, suspects=(2, 3, 5), died=True)
    suspected = [r for r in returns if r.exclusive]
    assert [(r.range.block, r.range.lo, r.range.hi) for r in suspected] == [(0, 12, 16)]
    assert covered(returns) == ALL
    assert not given_up


def test_a_suspect_piece_that_kills_again_splits_in_half() -> None:
    returns, _ = lost((Range(0, 0, 9, 90),), tries=0, deaths=0, exclusive=True, suspects=(1,), died=True)
    assert [(r.range.lo, r.range.hi, r.exclusive) for r in returns] == [(0, 4, True), (4, 9, True)]


def test_a_single_row_is_poison_after_two_deaths_alone_and_not_after_one() -> None:
    row = (Range(0, 3, 4, 9),)
    returns, given_up = lost(row, tries=0, deaths=0, exclusive=True, suspects=(0,), died=True)
    assert (returns[0].deaths, given_up) == (1, [])
    returns, given_up = lost(row, tries=0, deaths=1, exclusive=True, suspects=(0,), died=True)
    assert returns == []
    assert [(g.block, g.position, g.error) for g in given_up] == [(0, 3, "poison")]


def test_an_exclusive_piece_whose_worker_was_killed_before_it_began_is_not_blamed() -> None:
    returns, _ = lost((Range(0, 0, 8, 80),), tries=0, deaths=0, exclusive=True, suspects=(), died=True)
    assert returns == [Return(Range(0, 0, 8, 80), exclusive=True)]


def test_a_failed_attempt_returns_later_and_later_and_then_becomes_errors() -> None:
    first, _ = failed(RANGES, tries=0, deaths=0, exclusive=False, error="engine", blameless=False)
    third, _ = failed(RANGES, tries=2, deaths=0, exclusive=False, error="engine", blameless=False)
    assert first[0].after_s < third[0].after_s
    returns, given_up = failed(
        RANGES, tries=MAX_TRIES - 1, deaths=0, exclusive=False, error="engine", blameless=False
    )
    assert returns == []
    assert sorted((g.block, g.position) for g in given_up) == ALL


def test_a_failure_of_the_transport_costs_no_try() -> None:
    returns, given_up = failed(
        RANGES, tries=4, deaths=0, exclusive=False, error="missing_payload", blameless=True
    )
    assert [r.tries for r in returns] == [4, 4]
    assert not given_up


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=4),
    st.sets(st.integers(0, 60)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1),
)
def test_no_row_is_lost_or_doubled_by_a_death(
    spans: list[tuple[int, int]], suspects: set[int], exclusive: bool, died: bool, deaths: int
) -> None:
    ranges = tuple(Range(b, lo, lo + n, n * 7) for b, (lo, n) in enumerate(spans))
    inside = tuple(s for s in suspects if s < sum(map(len, ranges)))
    returns, given_up = lost(ranges, tries=0, deaths=deaths, exclusive=exclusive, suspects=inside, died=died)
    rows = covered(returns) + [(g.block, g.position) for g in given_up]
    assert sorted(rows) == sorted((r.block, i) for r in ranges for i in range(r.lo, r.hi))
    assert all(isinstance(g, GivenUp) and exclusive and died and inside for g in given_up)


def test_rows_whose_workers_die_before_they_run_are_given_up_in_the_end() -> None:
    deaths, given_up = 0, []
    while not given_up:
        returns, given_up = lost(RANGES, tries=0, deaths=deaths, exclusive=False, suspects=(), died=True)
        deaths += 1
        assert all(r.deaths == deaths and not r.exclusive for r in returns)
    assert deaths == MAX_DEATHS_UNSEEN
    assert {g.error for g in given_up} == {"worker_died"}


@given(st.sets(st.integers(0, 50)))
def test_runs_cover_exactly_the_positions(positions: set[int]) -> None:
    found = runs(positions)
    assert {i for lo, hi in found for i in range(lo, hi)} == positions
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


JOB = UUID(int=7)
MODEL = Manifest(
    name="tiny", version="1", engine="encoder", answers="vector", trunk="t", parameters=100_000_000
)
PASS = Demand(
    job=str(JOB),
    pass_number=0,
    tenant="me",
    weight=1.0,
    priority=1,
    age=1,
    model_ids=frozenset({7}),
    model=MODEL,
    rows_waiting=10,
    bytes_waiting=1000,
)
REFUSED = Refusal(7, "refuses", "b", "weights are torn")
FAILS = {JOB: "no worker can load tiny@1: weights are torn"}


class Leader:
    """Looks every five seconds at the workers that beat, as the dispatcher does."""

    def __init__(self) -> None:
        self.roster, self.hopes, self.now = Roster(), Hopes(), 0.0

    def looks(
        self,
        *beats: Beat,
        for_s: float = 0.0,
        refusals: Sequence[Refusal] = (REFUSED,),
        waits: Sequence[Demand] = (PASS,),
    ) -> dict[UUID, str]:
        """Look on for so long at the same workers; what is hopeless at the end of it, or before."""
        end = self.now + for_s
        while True:
            known = self.roster.see({b.worker: b for b in beats}, self.now)
            found = self.hopes.hopeless(waits, workers(known, refusals, 0.5), refusals, self.now)
            self.now += 5.0
            if found or self.now > end:
                return found


def worker(name: str, *, boot: str = "b", engines: tuple[str, ...] = ("encoder",), **more: object) -> Beat:
    return Beat(worker=name, boot=boot, seq=1, engines=engines, **more)  # type: ignore[arg-type]


def test_a_job_that_every_worker_refuses_fails_after_the_grace_and_not_before() -> None:
    leader = Leader()
    assert not leader.looks(worker("refuses"), for_s=GRACE_S - 1)
    assert leader.looks(worker("refuses")) == FAILS


def test_a_job_outlives_a_restart_of_the_only_worker_that_can_run_it() -> None:
    leader = Leader()
    assert not leader.looks(worker("refuses"), worker("able"), for_s=3 * GRACE_S)
    starts = worker("able", boot="second", engines=(), state="starting")
    assert not leader.looks(worker("refuses"), starts, for_s=10)
    assert not leader.looks(worker("refuses"), for_s=GRACE_S), "its beats pause until it has started"
    assert not leader.looks(worker("refuses"), worker("able", boot="second"), for_s=3 * GRACE_S)


def test_a_job_that_came_while_the_only_able_worker_started_waits_for_it() -> None:
    leader = Leader()
    starts = worker("able", engines=(), state="starting")
    assert not leader.looks(worker("refuses"), starts, for_s=GRACE_S - 10)
    assert not leader.looks(worker("refuses"), worker("able"), for_s=2 * GRACE_S)


def test_what_an_earlier_process_of_a_worker_refused_counts_no_more() -> None:
    leader = Leader()
    starts = worker("refuses", boot="second", engines=(), state="starting")
    assert not leader.looks(worker("refuses"), for_s=GRACE_S - 10)
    assert not leader.looks(starts, for_s=2 * GRACE_S)


def test_a_worker_that_went_for_good_is_hoped_for_no_longer_than_it_is_known() -> None:
    leader = Leader()
    assert not leader.looks(worker("refuses"), worker("able"))
    assert leader.looks(worker("refuses"), for_s=2 * GRACE_S) == FAILS
    assert leader.now > GRACE_S + 10


def test_a_worker_with_too_little_memory_is_no_hope_and_one_with_enough_is() -> None:
    need_mb = 2 * MODEL.memory_mb("fp32")
    small, large = worker("other", memory_mb=need_mb - 2), worker("other", memory_mb=need_mb)
    assert Leader().looks(worker("refuses"), small, for_s=GRACE_S) == FAILS
    assert not Leader().looks(worker("refuses"), large, for_s=3 * GRACE_S)


def test_a_worker_without_the_engine_or_of_another_protocol_is_no_hope() -> None:
    others = worker("other", engines=("spacy-ner",)), worker("newer", protocol=PROTOCOL + 1)
    assert Leader().looks(worker("refuses"), *others, for_s=GRACE_S) == FAILS


def test_a_job_that_nobody_has_tried_waits_for_a_worker() -> None:
    assert not Leader().looks(for_s=3 * GRACE_S)
    assert not Leader().looks(worker("other", engines=("spacy-ner",)), for_s=3 * GRACE_S)
    assert not Leader().looks(worker("small", memory_mb=10), for_s=3 * GRACE_S)


def test_a_pass_whose_tries_are_put_off_now_and_then_is_hopeless_all_the_same() -> None:
    leader = Leader()
    for _ in range(int(GRACE_S / 10)):
        assert not leader.looks(worker("refuses"))
        assert not leader.looks(worker("refuses"), waits=())
    assert leader.looks(worker("refuses")) == FAILS


def test_no_job_fails_because_the_leader_could_not_look() -> None:
    leader = Leader()
    assert not leader.looks(worker("refuses"))
    leader.now += 10 * GRACE_S
    assert not leader.looks(worker("refuses"), for_s=GRACE_S - 1)
    assert leader.looks(worker("refuses")) == FAILS
