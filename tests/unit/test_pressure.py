"""The policy of overload: what is slowed down, what is refused, for which reason, and what still passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.protocol.transport import Lag
from scheduler.policy.pressure import (
    OUTCOMES,
    REDIS_MEMORY,
    Overload,
    PressureFacts,
    overloads,
    pressures,
    throttle,
)

GIB = 1 << 30
CALM = PressureFacts(
    rows_running=0,
    rows_loading=0,
    max_waiting_rows=1000,
    lag=Lag(0, 0.0),
    memory_share=0.0,
    free_bytes=10 * GIB,
    min_free_bytes=GIB,
)
ENTRIES = st.integers(0, 5000)
SHARES = st.floats(0, 1.5)
FACTS = st.builds(
    PressureFacts,
    rows_running=st.integers(0, 3000),
    rows_loading=st.integers(0, 3000),
    max_waiting_rows=st.integers(1, 2000),
    lag=st.none() | st.builds(Lag, ENTRIES, st.floats(0, 100)),
    memory_share=st.none() | SHARES,
    free_bytes=st.none() | st.integers(0, 4 * GIB),
    min_free_bytes=st.integers(1, 2 * GIB),
)


def reasons(facts: PressureFacts, *, interactive: bool = False, uploading: bool = False) -> list[str]:
    return [o.reason for o in overloads(facts, interactive=interactive, uploading=uploading)]


def the_one(facts: PressureFacts) -> Overload:
    (found,) = overloads(facts)
    return found


# -- the dispatcher


def test_the_dispatcher_sends_all_below_the_soft_limits_and_nothing_at_a_hard_one() -> None:
    assert throttle(OUTCOMES[0], REDIS_MEMORY[0]) == 1.0
    assert throttle(OUTCOMES[1], 0.0) == 0.0
    assert throttle(0, REDIS_MEMORY[1]) == 0.0
    assert throttle(625, 0.0) == 0.5
    assert throttle(0, 0.6) == pytest.approx(0.5)
    assert throttle(625, 0.65) == pytest.approx(0.25), "the worse of both counts"


@given(ENTRIES, ENTRIES, SHARES, SHARES)
def test_more_pressure_never_sends_more(few: int, many: int, low: float, high: float) -> None:
    (few, many), (low, high) = sorted((few, many)), sorted((low, high))
    assert 0.0 <= throttle(many, high) <= throttle(few, low) <= 1.0


@given(FACTS)
def test_what_the_dispatcher_does_is_what_the_figures_say(facts: PressureFacts) -> None:
    found = pressures(facts)
    assert all(0.0 <= pressure <= 1.0 for pressure in found.values())
    if facts.lag is not None and facts.memory_share is not None:
        worse = max(found["outcomes"], found["redis_memory"])
        assert throttle(facts.lag.entries, facts.memory_share) == 1.0 - worse


# -- the door


def test_a_calm_cluster_takes_everything() -> None:
    assert reasons(CALM) == []
    assert set(pressures(CALM).values()) == {0.0}


@given(FACTS)
def test_nothing_is_refused_short_of_a_hard_limit(facts: PressureFacts) -> None:
    found = pressures(facts)
    assert all(found[overload.reason] == 1.0 for overload in overloads(facts))


@given(FACTS)
def test_whoever_may_pass_more_is_never_refused_more(facts: PressureFacts) -> None:
    for interactive in (False, True):
        assert set(reasons(facts, interactive=interactive, uploading=True)) <= set(
            reasons(facts, interactive=interactive)
        )
    assert set(reasons(facts, interactive=True)) <= set(reasons(facts))


@given(FACTS)
def test_every_refusal_says_what_to_do_and_when_to_come_back_within_a_minute(facts: PressureFacts) -> None:
    for overload in overloads(facts):
        assert overload.what
        assert overload.remedy
        assert 1 <= overload.retry_after_s <= 30


def test_too_many_rows_shut_out_jobs_that_are_not_interactive() -> None:
    full = replace(CALM, rows_running=600, rows_loading=400)
    assert reasons(full) == ["rows"]
    assert reasons(full, interactive=True) == []
    assert the_one(full).what == "1,000 rows of unfinished jobs wait, and 1,000 may"


def test_uploads_never_wait_for_one_another() -> None:
    assert reasons(replace(CALM, rows_loading=5000), uploading=True) == []
    assert reasons(replace(CALM, rows_running=1000), uploading=True) == ["rows"]


def test_a_burst_of_outcomes_is_no_jam() -> None:
    assert reasons(replace(CALM, lag=Lag(3000, 1.0))) == []
    assert reasons(replace(CALM, lag=Lag(999, 3600.0))) == [], "nobody records, but there is room"
    jam = replace(CALM, lag=Lag(1000, 17.0))
    assert reasons(jam) == reasons(jam, interactive=True) == reasons(jam, uploading=True) == ["outcomes"]
    assert the_one(jam).what == "1,000 outcomes wait to be recorded, the oldest for 17 s"


def test_a_full_redis_refuses_and_one_that_is_away_does_not() -> None:
    full = replace(CALM, memory_share=0.83)
    assert the_one(full).what == "Redis uses 83% of its memory limit, at most 70% is safe"
    away = replace(CALM, lag=None, memory_share=None)
    assert reasons(away) == []
    assert set(pressures(away)) == {"rows", "disk"}


def test_a_full_disk_comes_before_all_other_reasons() -> None:
    worst = replace(
        CALM,
        rows_running=1000,
        lag=Lag(2000, 60.0),
        memory_share=1.0,
        free_bytes=GIB // 2,
        min_free_bytes=GIB,
    )
    assert reasons(worst) == ["disk", "redis_memory", "outcomes", "rows"]
    assert reasons(replace(CALM, free_bytes=None)) == []
    assert next(overloads(worst)).what == "the disk of Postgres has 512 MB left, and 1,024 must stay free"
