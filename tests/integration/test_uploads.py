"""Uploads whose rows are run while others come: the live dispatcher and aggregator over a real Postgres, step by step."""

from __future__ import annotations

from uuid import UUID

import pytest

from motet.errors import Conflict
from motet.tasks import Classify
from scheduler.store import endings
from scheduler.store.pressure import unfinished_rows
from scheduler.store.registry import tenant_named
from tests.integration.landing import close, land, land_more
from tests.integration.test_protocol import (
    TASKS,
    House,
    assert_accounted_for,
    expected,
    texts,
)
from tests.integration.test_protocol import house as plain_house  # noqa: F401 - a fixture

ROWS = texts(120)
#: The second task reads the first one's answer.
CHAIN = {"size": Classify("length"), "then": Classify("length", input="{text}/{size}")}


@pytest.fixture
def house(plain_house: House) -> House:  # noqa: F811
    return plain_house


def begin(house: House, rows: list[str] = ROWS[:60], tasks: dict[str, Classify] = TASKS) -> UUID:
    return land(house.database, rows, tasks, block_rows=20, close=False)


def more(house: House, job: UUID, rows: list[str], *, number: int = 1, first_row: int = 60) -> None:
    land_more(house.database, job, rows, number=number, first_row=first_row, block_rows=20)


def drain(house: House) -> None:
    """Until nobody has anything to do."""
    while house.work() or house.sql("SELECT 1 FROM pass WHERE rows_waiting > 0"):
        pass


def test_rows_are_answered_as_they_land_and_only_a_closed_upload_succeeds(house: House) -> None:
    job = begin(house)
    drain(house)
    early = house.job(job)
    assert (early.state, early.blocks_done, early.n_blocks, early.cells_ok) == ("loading", 3, 3, 120)
    assert (early.started is not None, early.closed) == (True, None)
    assert house.labels(job) == expected(ROWS[:60])
    more(house, job, ROWS[60:])
    assert house.work(), "the first part is done, and the second one is not kept for the close"
    close(house.database, job, parts=2, rows=120)
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(ROWS)
    assert_accounted_for(house, job, 120)
    ended = house.job(job)
    assert ended.started < ended.closed <= ended.finished


def test_an_upload_that_was_answered_faster_than_it_came_has_ended_when_it_is_closed(house: House) -> None:
    job = begin(house)
    drain(house)
    close(house.database, job, parts=1, rows=60)
    close(house.database, job, parts=1, rows=60)
    assert house.job(job).state == "succeeded"
    assert house.sql("SELECT count(*) AS n FROM outbox")[0].n == 1
    assert_accounted_for(house, job, 60)


def test_rows_that_read_the_answers_of_others_follow_them_while_the_upload_goes_on(house: House) -> None:
    job = begin(house, tasks=CHAIN)
    drain(house)
    assert (house.job(job).state, house.job(job).cells_ok) == ("loading", 120)
    more(house, job, ROWS[60:])
    close(house.database, job, parts=2, rows=120)
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 120)


def test_equal_blocks_of_a_later_part_show_what_the_first_part_was_answered(house: House) -> None:
    job = begin(house)
    drain(house)
    asked = house.job(job).subtasks
    more(house, job, ROWS[:60])
    j = house.job(job)
    assert (j.cells_ok, j.cells_reused, j.blocks_done) == (240, 120, 6)
    close(house.database, job, parts=2, rows=120)
    assert (house.job(job).state, house.job(job).subtasks) == ("succeeded", asked)
    assert house.labels(job) == expected(ROWS[:60] * 2)
    assert_accounted_for(house, job, 120)


def test_equal_blocks_that_land_while_the_first_ones_run_are_answered_by_themselves(house: House) -> None:
    job = begin(house)
    house.tick()
    more(house, job, ROWS[:60])
    close(house.database, job, parts=2, rows=120)
    assert house.finish(job).state == "succeeded"
    assert house.job(job).cells_reused == 0
    assert house.labels(job) == expected(ROWS[:60] * 2)
    assert_accounted_for(house, job, 120)


def test_cancelling_an_upload_takes_back_what_runs_of_it_and_keeps_what_is_done(house: House) -> None:
    job = begin(house)
    house.work()
    more(house, job, ROWS[60:])
    house.tick()
    late = [(hand, hand.outcome(a)) for hand in house.hands for a in hand.take_all()]
    assert late
    with house.database.transaction() as connection:
        endings.cancel_job(connection, tenant_named(connection, "default"), job)
    before = house.job(job)
    assert (before.state, before.cells_ok > 0, before.closed) == ("cancelled", True, None)
    house.tick()
    house.tick()
    assert any(hand.dropped for hand in house.hands), "workers are told to drop it"
    for hand, outcome in late:
        hand.report(outcome)
    house.aggregate()
    assert house.job(job) == before
    assert before.cells_ok + before.cells_error + before.cells_skipped == 240
    with pytest.raises(Conflict, match="cancelled on request"):
        more(house, job, ROWS[:5], number=2, first_row=120)
    with pytest.raises(Conflict, match="cannot be closed"):
        close(house.database, job, parts=2, rows=120)


def test_an_abandoned_upload_fails_and_what_was_answered_of_it_can_be_read(house: House) -> None:
    job = begin(house)
    drain(house)
    house.sql("UPDATE job SET touched = touched - interval '2 h' WHERE id = :job", job=job)
    house.now += 10
    house.tick()
    j = house.job(job)
    assert (j.state, j.cells_ok) == ("failed", 120)
    assert "abandoned" in j.reason
    assert house.labels(job) == expected(ROWS[:60])


def test_a_worker_that_dies_early_costs_an_upload_nothing(house: House) -> None:
    job = begin(house)
    house.tick()
    assert house.hands[0].take_all() or house.hands[1].take_all()
    for hand in house.hands:
        hand.die()
    drain(house)
    more(house, job, ROWS[60:])
    close(house.database, job, parts=2, rows=120)
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(ROWS)
    assert_accounted_for(house, job, 120)


def test_rows_of_an_upload_count_as_loading_at_the_door(house: House) -> None:
    job = begin(house)
    with house.database.transaction() as connection:
        assert unfinished_rows(connection) == (0, 60)
    close(house.database, job, parts=1, rows=60)
    with house.database.transaction() as connection:
        assert unfinished_rows(connection) == (60, 0)
