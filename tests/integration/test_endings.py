"""Jobs move between their states as motet/states.py says, and each end is told by exactly one event."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, exc, text

from motet.states import ENDED, LIVE, MOVES, State
from scheduler.store import endings
from scheduler.store.database import Database
from scheduler.store.registry import tenant_named
from tests.integration.landing import land
from tests.integration.test_protocol import TASKS, House, texts
from tests.integration.test_protocol import house as plain_house  # noqa: F401 - a fixture

_MAKE = text("""
    INSERT INTO job (id, tenant_id, state, fields, n_tasks, request_digest, closed)
    VALUES (:id, :tenant, :state, '{}', 1, 'x', now())""")
_MOVE = text("UPDATE job SET state = :state WHERE id = :id")


def test_a_job_makes_the_moves_of_the_table_and_no_other(database_url: str) -> None:
    database = Database(database_url)
    made: set[tuple[State, State]] = set()
    told: list[bool] = []
    for before, after in product(State, State):
        at = {"id": uuid4(), "state": before}
        with database.transaction() as connection:
            connection.execute(_MAKE, {**at, "tenant": tenant_named(connection, "default")})
        try:
            with database.transaction() as connection:
                connection.execute(_MOVE, {**at, "state": after})
            made.add((before, after))
        except exc.IntegrityError as refused:
            told.append(str(refused.orig).startswith(f"a job that is {before} never becomes {after}\n"))
    database.close()
    assert all(told)
    staying = {(state, state) for state in State}
    assert made - staying == {(before, after) for before, following in MOVES.items() for after in following}


def test_states_are_live_or_ended_and_only_running_jobs_succeed() -> None:
    assert set(LIVE) | ENDED == set(State) == set(MOVES)
    assert not set(LIVE) & ENDED
    assert [state for state, following in MOVES.items() if State.SUCCEEDED in following] == [State.RUNNING]
    assert all({State.FAILED, State.CANCELLED} <= MOVES[state] for state in LIVE)


@pytest.fixture
def house(plain_house: House) -> House:  # noqa: F811
    return plain_house


def events(house: House, job: UUID) -> list[Any]:
    return house.sql("SELECT * FROM outbox WHERE job_id = :job", job=job)


def _by_its_last_row(house: House) -> UUID:
    job = land(house.database, texts(60), TASKS, block_rows=16)
    assert events(house, job) == []
    house.finish(job)
    return job


def _by_reuse_alone(house: House) -> UUID:
    _by_its_last_row(house)
    return land(house.database, texts(60), TASKS, block_rows=16)


def _before_it_was_closed(house: House) -> UUID:
    job = land(house.database, texts(20), TASKS, close=False)
    _cancel(house, job)
    return job


def _while_it_runs(house: House) -> UUID:
    job = land(house.database, texts(200), TASKS, block_rows=16)
    house.tick()
    _cancel(house, job)
    for hand in house.hands:
        for a in hand.take_all():
            hand.report(hand.outcome(a))
    house.aggregate()
    return job


def _by_its_deadline(house: House) -> UUID:
    job = land(house.database, texts(20), TASKS)
    house.sql("UPDATE job SET deadline = clock_timestamp() - interval '1 s' WHERE id = :job", job=job)
    house.now += 10
    house.tick()
    return job


def _by_rows_given_up(house: House) -> UUID:
    job = land(house.database, texts(2), TASKS)
    for _ in range(12):
        house.tick()
        for hand in house.hands:
            for a in hand.take_all():
                hand.report(hand.outcome(a, verdict="failed", columns={}, error=("engine", "no")))
        house.aggregate()
        house.due()
    return job


def _by_removal(house: House) -> UUID:
    job = land(house.database, texts(20), TASKS)
    with house.database.transaction() as connection:
        endings.remove_job(connection, tenant_named(connection, "default"), job)
    return job


def _by_removal_slice_by_slice(house: House) -> UUID:
    job = land(house.database, texts(endings.SLICE_BLOCKS + 2), TASKS, block_rows=1)
    with house.database.transaction() as connection:
        endings.remove_job(connection, tenant_named(connection, "default"), job)
    return job


def _cancel(house: House, job: UUID) -> None:
    with house.database.transaction() as connection:
        endings.cancel_job(connection, tenant_named(connection, "default"), job)


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        (_by_its_last_row, State.SUCCEEDED),
        (_by_reuse_alone, State.SUCCEEDED),
        (_before_it_was_closed, State.CANCELLED),
        (_while_it_runs, State.CANCELLED),
        (_by_its_deadline, State.FAILED),
        (_by_rows_given_up, State.SUCCEEDED),
        (_by_removal, State.CANCELLED),
        (_by_removal_slice_by_slice, State.CANCELLED),
    ],
)
def test_an_end_is_told_once(
    house: House,
    ending: Callable[[House], UUID],
    state: State,
) -> None:
    job = ending(house)
    [event] = events(house, job)
    assert event.kind == "job_ended"
    assert event.handed is None
    told = event.body
    assert told["state"] == state
    assert told["cells_ok"] + told["cells_error"] + told["cells_skipped"] == told["n_rows"] * told["n_tasks"]
    assert set(told) == {"state", "n_rows", "n_tasks", "cells_ok", "cells_error", "cells_skipped"}
    found = house.sql("SELECT * FROM job JOIN outbox ON job_id = job.id WHERE job_id = :job", job=job)
    assert all(getattr(row, name) == value for row in found for name, value in told.items())
    with house.database.transaction() as connection:
        assert not endings.end_job(connection, job, State.CANCELLED, "again")
        endings.succeed(connection, [job])
    assert len(events(house, job)) == 1


@pytest.mark.parametrize("end", [endings.end_job, endings.succeed])
def test_an_end_that_is_rolled_back_is_not_told(house: House, end: Any) -> None:
    job = land(house.database, texts(5), TASKS)
    if end is endings.succeed:
        house.sql(
            "UPDATE job SET blocks_done = n_blocks, cells_ok = n_rows * n_tasks WHERE id = :job", job=job
        )

    def ended_and_told(connection: Connection) -> tuple[bool, int]:
        state = connection.execute(text("SELECT state FROM job WHERE id = :job"), {"job": job}).scalar_one()
        told = connection.execute(text("SELECT count(*) FROM outbox")).scalar_one()
        return state in ENDED, told

    with house.database.engine.connect() as connection:
        end(connection, *((job, State.FAILED, "why") if end is endings.end_job else ([job],)))
        assert ended_and_told(connection) == (True, 1)
        connection.rollback()
    with house.database.transaction() as connection:
        assert ended_and_told(connection) == (False, 0)


def test_old_events_are_swept_and_no_others(house: House) -> None:
    for state in (State.FAILED, State.CANCELLED):
        with house.database.transaction() as connection:
            endings.end_job(connection, land(house.database, texts(5), TASKS), state, "why")
    house.sql("UPDATE outbox SET created = created - interval '8 days' WHERE body ->> 'state' = 'failed'")
    with house.database.transaction() as connection:
        assert endings.sweep_events(connection) == 1
        assert endings.sweep_events(connection) == 0
    assert [event.body["state"] for event in house.sql("SELECT body FROM outbox")] == ["cancelled"]
