"""The data model goes up from nothing, down to nothing, and up again; whoever starts first migrates."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import create_engine, text

from scheduler.migrate import downgrade, upgrade


@pytest.fixture
def empty_url(database_url: str) -> str:
    """The URL of a database without a single table."""
    downgrade(database_url)
    return database_url


def things(url: str) -> set[str]:
    """Tables, views and functions of motet in a database."""
    engine = create_engine(url)
    with engine.connect() as connection:
        names = connection.execute(
            text(
                "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"
                " UNION SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
            )
        ).scalars()
        found = set(names)
    engine.dispose()
    return found - {"alembic_version"}


def test_downgrading_leaves_nothing_and_upgrading_brings_all_back(empty_url: str) -> None:
    assert things(empty_url) == set()
    upgrade(empty_url)
    there = things(empty_url)
    assert {"job", "block", "subtask", "lease", "results", "merged", "column_cells"} <= there
    downgrade(empty_url)
    assert things(empty_url) == set()
    upgrade(empty_url)
    assert things(empty_url) == there


def test_two_processes_that_migrate_at_once_take_turns(empty_url: str) -> None:
    failures: list[BaseException] = []

    def migrate() -> None:
        try:
            upgrade(empty_url)
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            failures.append(error)

    both = [threading.Thread(target=migrate) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert failures == []
    assert "job" in things(empty_url)


def test_every_table_says_what_it_is_for(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        silent = connection.execute(
            text(
                "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"
                " AND relname <> 'alembic_version' AND obj_description(oid) IS NULL"
            )
        ).scalars()
        assert set(silent) == set()
    engine.dispose()
