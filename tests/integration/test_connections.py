"""A connection that Postgres has cut is replaced before it is used again, and one that was used just now is not asked."""

from __future__ import annotations

import select
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from scheduler.store import database as module
from scheduler.store.database import Database, StoreUnavailable, together


def backend(database: Database) -> int:
    with database.transaction() as connection:
        return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())


def cut(database_url: str, pid: int) -> None:
    other = Database(database_url)
    with other.transaction() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:pid, 1000)"), {"pid": pid})
    other.close()


def test_a_connection_that_was_cut_while_it_rested_is_replaced(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH_S", 0.0)
    database = Database(database_url, pool=1)
    first = backend(database)
    cut(database_url, first)
    assert backend(database) != first
    database.close()


def test_in_a_burst_nobody_asks_whether_the_connection_lives(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(database_url, pool=1)
    first = backend(database)
    asked: list[object] = []
    monkeypatch.setattr(database.engine.dialect, "do_ping", lambda connection: asked.append(connection))
    assert [backend(database) for _ in range(3)] == [first] * 3
    assert asked == []
    database.close()


def test_a_statement_with_arrays_is_planned_for_all_parameters_at_once(database_url: str) -> None:
    database = Database(database_url, pool=1)
    jobs = text("SELECT id FROM job WHERE id = ANY(CAST(:ids AS uuid[]))")
    with database.transaction() as connection:
        for n in range(12):
            connection.execute(jobs, {"ids": [UUID(int=i) for i in range(n)]})
        planned = connection.execute(
            text("SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement LIKE :it"),
            {"it": "SELECT id FROM job WHERE id = ANY%"},
        ).all()
    database.close()
    assert planned
    assert all(generic > 0 and custom == 0 for generic, custom in planned)


@pytest.mark.parametrize("listed", [False, True])
def test_who_freezes_after_a_pipeline_does_not_keep_its_locks(database_url: str, listed: bool) -> None:
    database = Database(database_url, pool=1)
    brief = text("SELECT set_config('idle_in_transaction_session_timeout', '200ms', true)")

    def freeze() -> None:
        with database.transaction() as connection:
            if listed:
                connection.execute(brief)
                connection.execute(text("UPDATE job SET version = :n WHERE false"), [{"n": 1}, {"n": 2}])
            else:
                together(connection, (brief, {}), (text("SELECT 1"), {}))
            # Until Postgres says that it is over.
            driver: Any = connection.connection.driver_connection
            assert select.select([driver], [], [], 10.0)[0]
            connection.execute(text("SELECT 1"))

    with pytest.raises(StoreUnavailable):
        freeze()
    database.close()
