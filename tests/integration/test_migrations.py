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
    assert {
        "job",
        "block",
        "subtask",
        "lease",
        "rate",
        "pace",
        "spent",
        "alias",
        "alias_step",
        "fit",
        "results",
        "merged",
        "column_cells",
        "outbox",
        "job_moves",
    } <= there
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


def test_going_down_fails_the_jobs_that_only_language_models_or_dependence_could_end(empty_url: str) -> None:
    upgrade(empty_url)
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO tenant (name) VALUES ('default');"
                "INSERT INTO model (name, version, digest, trunk, manifest) VALUES ('m', '1', 'd', 't', '{}'),"
                " ('llm', '1', 'e', '', '{\"answers\": \"text\"}');"
                "INSERT INTO job (id, tenant_id, name, state, fields, n_tasks, n_rows, request_digest, closed)"
                " SELECT gen_random_uuid(), t.id, m, 'running', '{text}', 1, 7, 'x', now()"
                " FROM tenant t, unnest('{plain,waits,prompts}'::text[]) m WHERE t.name = 'default';"
                "INSERT INTO pass (job_id, number, kind, model_id, numerics, max_tokens, input, needs, rows_waiting)"
                " SELECT job.id, 0, 'm', model.id, 'fast', 0, '{text}',"
                " CASE WHEN job.name = 'waits' THEN '{1}'::int2[] ELSE '{}' END, 7 FROM job"
                " JOIN model ON model.name = CASE WHEN job.name = 'prompts' THEN 'llm' ELSE 'm' END;"
                "INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes)"
                " SELECT id, 0, '{0}', '{0}', '{7}', '{4}', 1, 7, 4 FROM job"
            )
        )
    downgrade(empty_url, "0003")
    with engine.connect() as connection:
        found = connection.execute(
            text(
                "SELECT j.name, j.state, j.cells_skipped, p.rows_waiting, s.state AS subtask FROM job j"
                " JOIN pass p ON p.job_id = j.id JOIN subtask s ON s.job_id = j.id ORDER BY j.name"
            )
        ).all()
    assert [tuple(row) for row in found] == [
        ("plain", "running", 0, 7, "open"),
        ("prompts", "failed", 7, 0, "lost"),
        ("waits", "failed", 7, 0, "lost"),
    ]
    upgrade(empty_url)
    engine.dispose()


def test_going_down_forgets_aliases_and_keeps_the_models_that_they_meant(empty_url: str) -> None:
    upgrade(empty_url, "0004")
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO model (name, version, digest, trunk, manifest) VALUES ('m', '1', 'd', 't', '{}')"
            )
        )
    for _ in range(2):
        upgrade(empty_url, "0005")
        with engine.begin() as connection:
            assert connection.execute(text("SELECT count(*) FROM alias")).scalar_one() == 0
            connection.execute(
                text(
                    "INSERT INTO alias_step (name, alias, what, version, model_id)"
                    " SELECT name, 'prod', 'promoted', version, id FROM model;"
                    "INSERT INTO alias SELECT name, alias, model_id, id FROM alias_step"
                )
            )
        downgrade(empty_url, "0004")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM model")).scalar_one() == 1
    upgrade(empty_url)
    engine.dispose()


def test_going_down_forgets_training_runs_and_fails_those_that_have_not_ended(empty_url: str) -> None:
    upgrade(empty_url, "0005")
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO tenant (name) VALUES ('default');"
                "INSERT INTO model (name, version, digest, trunk, manifest) VALUES ('m', '1', 'd', 't', '{}')"
            )
        )
    upgrade(empty_url, "0006")
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO job (id, tenant_id, name, kind, state, fields, n_tasks, n_rows, cells_ok, request_digest)"
                " SELECT gen_random_uuid(), t.id, k.name, k.kind, k.state, '{text}', 1, 2,"
                " CASE k.state WHEN 'succeeded' THEN 2 ELSE 0 END, 'x'"
                " FROM tenant t, (VALUES ('ended', 'train', 'succeeded'), ('loads', 'train', 'loading'),"
                " ('plain', 'infer', 'running'), ('runs', 'train', 'running')) k (name, kind, state)"
                " WHERE t.name = 'default';"
                "INSERT INTO pass (job_id, number, kind, model_id, numerics, max_tokens, input, rows_waiting)"
                " SELECT job.id, 0, 'm', model.id, 'fast', 0, '{text}', 1 FROM job, model;"
                "INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes)"
                " SELECT id, 0, '{0}', '{0}', '{1}', '{4}', 1, 1, 4 FROM job WHERE state = 'running';"
                "INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, predicted_s, until)"
                " SELECT id, 1, 'w', 'b', 'n', 1, now() FROM subtask;"
                "INSERT INTO fit (job_id, row_index, reports, files)"
                " SELECT id, 0, '{\"heads 0001\": {\"epoch\": 1}}', '{abc}' FROM job WHERE kind = 'train'"
            )
        )
    downgrade(empty_url, "0005")
    assert "fit" not in things(empty_url)
    with engine.connect() as connection:
        found = connection.execute(
            text(
                "SELECT j.name, j.state, j.cells_ok, j.cells_skipped, p.rows_waiting, s.state, l.attempt FROM job j"
                " JOIN pass p ON p.job_id = j.id LEFT JOIN subtask s ON s.job_id = j.id"
                " LEFT JOIN lease l ON l.subtask_id = s.id ORDER BY j.name"
            )
        ).all()
        why = connection.execute(text("SELECT reason FROM job WHERE name = 'runs'")).scalar_one()
    assert [tuple(row) for row in found] == [
        ("ended", "succeeded", 2, 0, 1, None, None),
        ("loads", "failed", 0, 2, 0, None, None),
        ("plain", "running", 0, 0, 1, "open", 1),
        ("runs", "failed", 0, 2, 0, "lost", None),
    ]
    assert why == "motet was taken back to a version that cannot run it"
    upgrade(empty_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM fit")).scalar_one() == 0
    engine.dispose()


def test_going_down_fails_unfinished_jobs_whose_bad_fields_an_older_version_would_take_for_texts(
    empty_url: str,
) -> None:
    upgrade(empty_url)
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO tenant (name) VALUES ('default');"
                "INSERT INTO job (id, tenant_id, name, state, fields, n_tasks, n_rows, cells_ok, request_digest, closed)"
                " SELECT gen_random_uuid(), t.id, k.name, k.state, '{text}', 1, 2,"
                " CASE k.state WHEN 'succeeded' THEN 2 ELSE 0 END, 'x', now()"
                " FROM tenant t, (VALUES ('ended', 'succeeded'), ('partly', 'running'), ('plain', 'running'))"
                " k (name, state) WHERE t.name = 'default';"
                "INSERT INTO block (job_id, number, first_row, n_rows, n_work, bytes, row_order, lengths, payload,"
                " passes_open, bad_fields) SELECT id, 0, 0, 2, 2, 4, 'x', 'x', 'x', 1,"
                " CASE name WHEN 'plain' THEN '{}' ELSE '{\"text\": [[\"bad_row\", \"null\", [1]]]}' END::jsonb FROM job"
            )
        )
    downgrade(empty_url, "0006")
    with engine.connect() as connection:
        found = connection.execute(text("SELECT name, state, cells_skipped FROM job ORDER BY name")).all()
        columns = connection.execute(
            text("SELECT count(*) FROM information_schema.columns WHERE column_name = 'bad_fields'")
        ).scalar_one()
    assert [tuple(row) for row in found] == [
        ("ended", "succeeded", 0),
        ("partly", "failed", 2),
        ("plain", "running", 0),
    ]
    assert columns == 0
    engine.dispose()


def test_jobs_under_way_go_up_to_all_states_and_only_those_of_an_unknown_state_fail_on_the_way_down(
    empty_url: str,
) -> None:
    upgrade(empty_url, "0008")
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO tenant (name) VALUES ('default');"
                "INSERT INTO model (name, version, digest, trunk, manifest) VALUES ('m', '1', 'd', 't', '{}');"
                "INSERT INTO job (id, tenant_id, name, state, fields, n_tasks, n_rows, request_digest)"
                " SELECT gen_random_uuid(), t.id, k.name, k.state, '{text}', 1, 2, 'x'"
                " FROM tenant t, (VALUES ('loads', 'loading'), ('runs', 'running'), ('waits', 'running'))"
                " k (name, state) WHERE t.name = 'default';"
                "INSERT INTO pass (job_id, number, kind, model_id, numerics, max_tokens, input, rows_waiting)"
                " SELECT job.id, 0, 'm', model.id, 'fast', 0, '{text}', 1 FROM job, model;"
                "INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes)"
                " SELECT id, 0, '{0}', '{0}', '{1}', '{4}', 1, 1, 4 FROM job WHERE state = 'running';"
                "INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, predicted_s, until)"
                " SELECT id, 1, 'w', 'b', 'n', 1, now() FROM subtask"
            )
        )
    for go in (upgrade, lambda url: downgrade(url, "0008"), upgrade):
        go(empty_url)
        with engine.connect() as connection:
            found = connection.execute(
                text(
                    "SELECT j.name, j.state, p.rows_waiting, s.state, l.attempt FROM job j"
                    " JOIN pass p ON p.job_id = j.id LEFT JOIN subtask s ON s.job_id = j.id"
                    " LEFT JOIN lease l ON l.subtask_id = s.id ORDER BY j.name"
                )
            ).all()
        assert [tuple(row) for row in found] == [
            ("loads", "loading", 1, None, None),
            ("runs", "running", 1, "open", 1),
            ("waits", "running", 1, "open", 1),
        ]
    with engine.begin() as connection:
        connection.execute(text("UPDATE job SET state = 'paused' WHERE name = 'waits'"))
    downgrade(empty_url, "0008")
    with engine.connect() as connection:
        found = connection.execute(
            text(
                "SELECT j.name, j.state, j.cells_skipped, p.rows_waiting, s.state, l.attempt FROM job j"
                " JOIN pass p ON p.job_id = j.id JOIN subtask s ON s.job_id = j.id"
                " LEFT JOIN lease l ON l.subtask_id = s.id ORDER BY j.name"
            )
        ).all()
    assert [tuple(row) for row in found] == [
        ("runs", "running", 0, 1, "open", 1),
        ("waits", "failed", 2, 0, "lost", None),
    ]
    upgrade(empty_url)
    engine.dispose()


def test_jobs_know_when_they_were_closed_and_an_older_version_takes_up_an_upload(empty_url: str) -> None:
    upgrade(empty_url, "0011")
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO tenant (name) VALUES ('default');"
                "INSERT INTO job (id, tenant_id, name, state, fields, n_tasks, n_parts, started, request_digest)"
                " SELECT gen_random_uuid(), t.id, k.name, k.state, '{text}', 1, k.parts, k.started, 'x'"
                " FROM tenant t, (VALUES ('asked', 'open', 0, now()), ('begun', 'loading', 0, NULL),"
                " ('given up', 'cancelled', 2, NULL), ('loads', 'loading', 2, NULL), ('runs', 'running', 2, now()),"
                " ('stopped', 'cancelled', 2, now())) k (name, state, parts, started) WHERE t.name = 'default'"
            )
        )
    seen = "SELECT name, started IS NOT NULL, {} FROM job ORDER BY name"
    upgrade(empty_url)
    with engine.connect() as connection:
        found = connection.execute(text(seen.format("closed IS NOT NULL"))).all()
    assert [tuple(row) for row in found] == [
        ("asked", True, False),
        ("begun", False, False),
        ("given up", False, False),
        ("loads", True, False),
        ("runs", True, True),
        ("stopped", True, True),
    ]
    downgrade(empty_url, "0011")
    with engine.connect() as connection:
        started = [name for name, yes, _ in connection.execute(text(seen.format("true"))) if yes]
    assert started == ["asked", "runs", "stopped"], "as it was: when they were closed, or opened"
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
        untold = connection.execute(
            text(
                "SELECT attname FROM pg_attribute WHERE attrelid = 'spent'::regclass AND attnum > 3"
                " AND col_description(attrelid, attnum) IS NULL"
            )
        ).scalars()
        assert set(untold) == set()
    engine.dispose()
