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
    assert {"job", "block", "subtask", "lease", "rate", "pace", "results", "merged", "column_cells"} <= there
    downgrade(empty_url)
    assert things(empty_url) == set()
    upgrade(empty_url)
    assert things(empty_url) == there


def test_a_database_with_jobs_in_it_goes_up_and_down_a_version_and_keeps_them(empty_url: str) -> None:
    upgrade(empty_url, "0001")
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO tenant (name) VALUES ('default')"))
        connection.execute(
            text(
                "INSERT INTO job (id, tenant_id, fields, n_tasks, request_digest)"
                " SELECT gen_random_uuid(), id, '{text}', 1, 'x' FROM tenant"
            )
        )
    for go in (upgrade, lambda url: downgrade(url, "0001"), upgrade):
        go(empty_url)
        with engine.connect() as connection:
            kept = connection.execute(
                text("SELECT count(*) FROM job JOIN tenant t ON t.id = tenant_id AND t.name = 'default'")
            )
            assert kept.scalar_one() == 1
    with engine.connect() as connection:
        assert connection.execute(text("SELECT retention_days FROM job")).scalar_one() is None
    engine.dispose()


def test_rates_that_say_too_little_are_dropped_and_live_leases_stay(empty_url: str) -> None:
    upgrade(empty_url, "0002")
    engine = create_engine(empty_url)
    old_rate = text(
        "INSERT INTO rate (trunk, device, numerics, seconds_per_token, bytes_per_token, observations)"
        " VALUES ('t', 'NVIDIA L4', 'fast', 1e-6, 4, 100)"
    )
    with engine.begin() as connection:
        connection.execute(old_rate)
        connection.execute(
            text(
                "INSERT INTO tenant (name) VALUES ('default');"
                "INSERT INTO model (name, version, digest, trunk, manifest) VALUES ('m', '1', 'd', 't', '{}');"
                "INSERT INTO job (id, tenant_id, fields, n_tasks, request_digest)"
                " SELECT gen_random_uuid(), id, '{text}', 1, 'x' FROM tenant WHERE name = 'default';"
                "INSERT INTO pass (job_id, number, kind, model_id, numerics, max_tokens, input)"
                " SELECT job.id, 0, 'm', model.id, 'fast', 0, '{text}' FROM job, model;"
                "INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes)"
                " SELECT id, 0, '{0}', '{0}', '{1}', '{4}', 1, 1, 4 FROM job;"
                "INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, predicted_s, until)"
                " SELECT id, 1, 'w', 'b', 'n', 1, now() FROM subtask"
            )
        )
    for go in (upgrade, lambda url: downgrade(url, "0002"), upgrade):
        go(empty_url)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM rate")).scalar_one() == 0
            assert connection.execute(text("SELECT count(*) FROM lease")).scalar_one() == 1
    with engine.connect() as connection:
        assert connection.execute(text("SELECT clone, device_kind FROM lease")).one() == (False, "")
    downgrade(empty_url, "0002")
    with engine.begin() as connection:
        connection.execute(old_rate)
    engine.dispose()


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
