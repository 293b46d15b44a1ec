"""Statements find their rows by an index, each index serves a statement, and updates of a running job stay HOT.

Every statement of a job's life is explained as it is executed, beside thousands of jobs that have ended.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event, text

from motet.states import State
from scheduler.store import (
    activity,
    batches,
    demand,
    doors,
    endings,
    explain,
    files,
    folds,
    jobs,
    keeping,
    leases,
    metrics,
    pressure,
    results,
    webhooks,
)
from scheduler.store.manifests import Manifests
from scheduler.store.registry import tenant_named
from tests.integration.landing import land
from tests.integration.test_protocol import TASKS, House, texts
from tests.integration.test_protocol import house as plain_house  # noqa: F401 - a fixture

#: Jobs that have ended, each of five blocks, two passes and two tasks.
_ENDED = """
INSERT INTO job (id, tenant_id, state, fields, n_tasks, request_digest, closed, finished)
  SELECT gen_random_uuid(), t.id, 'succeeded', '{text}', 2, 'x', now(), clock_timestamp() - make_interval(hours => i)
    FROM generate_series(1, 1500) i, tenant t WHERE t.name = 'default';
INSERT INTO part SELECT id, 0, 'x', 1, 0 FROM job;
INSERT INTO outbox (tenant_id, kind, job_id, body, handed) SELECT tenant_id, 'job_ended', id, '{}', now() FROM job;
INSERT INTO webhook (id, tenant_id, url, kinds, secret)
  SELECT 'wh_' || i, t.id, 'https://example.com', '{job_ended}', 'x' FROM generate_series(1, 9) i, tenant t
   WHERE t.name = 'default';
INSERT INTO delivery (webhook_id, event_id, state, happened, until)
  SELECT w.id, o.id, 'delivered', now(), now() FROM webhook w, outbox o;
INSERT INTO pass (job_id, number, kind, model_id, numerics, max_tokens, input)
  SELECT j.id, n, 'm', m.id, 'fast', 0, '' FROM job j, generate_series(0, 1) n, model m WHERE m.name = 'trunk';
INSERT INTO task (job_id, number, name, pass_number, model_id, kind, spec, digest)
  SELECT job_id, number, number, number, model_id, 'classify', '{}', 'x' FROM pass;
INSERT INTO block (job_id, number, first_row, n_rows, n_work, bytes, row_order, lengths, payload, passes_open, done_number)
  SELECT id, b, b, 1, 1, 1, 'x', 'x', 'x', 0, b + 1 FROM job, generate_series(0, 4) b;
INSERT INTO block_pass (job_id, pass_number, block_number, state, todo, n, cursor, done)
  SELECT b.job_id, p.number, b.number, 'sealed', 1, 1, 1, 1 FROM block b JOIN pass p ON p.job_id = b.job_id;
INSERT INTO ask SELECT job_id, sha256(number::text::bytea), 'x', number, 0, 1 FROM block;
INSERT INTO sealed_column (tenant_id, key, kind, n_rows, n_ok, n_error, n_skipped)
  SELECT t.id, sha256(i::text::bytea), 'label', 1, 1, 0, 0 FROM generate_series(1, 15000) i, tenant t
   WHERE t.name = 'default';
INSERT INTO block_column
  SELECT job_id, block_number, pass_number, row_number() OVER () FROM block_pass;
INSERT INTO subtask (job_id, pass_number, state, blocks, los, his, sizes, todo, n_rows, bytes, closed, worker)
  SELECT job_id, pass_number, 'done', ARRAY[block_number], '{0}', '{1}', '{1}', 1, 1, 1, clock_timestamp(), 'w1'
    FROM block_pass;
INSERT INTO piece (job_id, pass_number, block_number, lo, hi, bytes)
  SELECT job_id, pass_number, block_number, 0, 1, 1 FROM block_pass;
INSERT INTO fold SELECT id, sha256(i::text::bytea), 'x', clock_timestamp() + make_interval(hours => i)
  FROM job, generate_series(1, 10) i;
INSERT INTO cells SELECT job_id, pass_number, block_number, 0, 0, 1, 'x' FROM block_pass;
INSERT INTO spent SELECT job_id, block_number, pass_number, 1, 0, 1, 1 FROM block_pass;
INSERT INTO medium (tenant_id, key, media_type, bytes, payload, refs, claimed)
  SELECT t.id, sha256(i::text::bytea), 'image/png', 1, 'x', 1, NULL FROM generate_series(1, 15000) i, tenant t
   WHERE t.name = 'default';
INSERT INTO file (id, tenant_id, purpose, filename, bytes, sha256, expires)
  SELECT 'file-' || i, t.id, 'batch', 'f', 1, md5(i::text), clock_timestamp() + make_interval(hours => i)
    FROM generate_series(1, 3000) i, tenant t WHERE t.name = 'default';
INSERT INTO batch (id, tenant_id, endpoint, input_file, input_sha256, "window", state, request_digest, created, expires, ended)
  SELECT 'batch_' || i, t.id, '/e', 'file-' || i, md5(i::text), '24h', 'completed', 'x',
         clock_timestamp() - make_interval(hours => i), clock_timestamp(), clock_timestamp()
    FROM generate_series(1, 3000) i, tenant t WHERE t.name = 'default';
INSERT INTO door SELECT j.tenant_id, '/e' || row_number() OVER (), m.id, j.id, clock_timestamp()
  FROM job j, model m WHERE m.name = 'trunk';
"""
#: The test's own, of a hand that needs no index.
_DUE = "UPDATE piece SET not_before = '-infinity'"
#: A statement may read all of these: they are small, or it asks for all of them.
SMALL = {
    "leader",
    "tenant",
    "token",
    "model",
    "alias",
    "alias_step",
    "refusal",
    "rate",
    "pace",
    "load_time",
} | {
    "drained",
    "door",
    "blob",
    "lease",
    "webhook",
    "deliverer",
}
#: Indexes of few rows of a large table; a statement may read such an index from end to end.
OF_FEW = {
    "batch_unfinished",
    "job_unfinished",
    "medium_unused",
    "sealed_column_unshown",
    "subtask_open",
    "outbox_new",
    "delivery_due",
}
#: Indexes that the sweeper reads from end to end, twice a minute, until it has found enough.
SWEPT = {"job_ended", "job_folding", "outbox_pkey"}
#: Indexes that no statement names, and what uses them.
BEHIND_THE_SCENES = {
    "task_by_model": "the foreign key to a model that is deleted",
    "pass_by_model": "the foreign key to a model that is deleted",
    "alias_by_model": "the foreign key to a model that is deleted",
    "alias_step_by_model": "the foreign key to a model that is deleted",
    "delivery_by_event": "the foreign key to an event that is deleted",
    "ask_by_block": "deleting blocks, where a job has more asks than the few here",
    "batch_by_input": "the sweep of blobs",
    "file_by_blob": "the sweep of blobs",
    "batch_by_job": "the foreign key to a job that is deleted",
    "door_by_model": "the foreign key to a model that is deleted",
}


@pytest.fixture
def house(plain_house: House) -> House:  # noqa: F811
    plain_house.sql("SELECT 1")
    with plain_house.database.transaction() as connection:
        tenant_named(connection, "default")
    for statement in _ENDED.split(";\n"):
        if statement.strip():
            plain_house.sql(statement)
    return plain_house


def analyze(house: House) -> None:
    with house.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


class Plans:
    """How Postgres finds the rows of every statement that a database executes."""

    def __init__(self, house: House) -> None:
        self.engine = house.database.engine
        #: Statement -> its plan.
        self.plans: dict[str, Any] = {}
        self._asking = False

    def __enter__(self) -> Plans:
        event.listen(self.engine, "before_cursor_execute", self._explain)
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(self.engine, "before_cursor_execute", self._explain)

    def _explain(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, _: Any, many: bool
    ) -> None:
        verb = statement.split(None, 1)[0]
        if (
            verb not in ("SELECT", "WITH", "INSERT", "UPDATE", "DELETE")
            or statement in self.plans
            or statement == _DUE
        ):
            return
        with connection.connection.driver_connection.cursor() as beside:
            beside.execute(f"EXPLAIN (FORMAT JSON) {statement}", parameters[0] if many else parameters)
            [(found,)] = beside.fetchall()
        self.plans[statement] = found[0]["Plan"]

    def nodes(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for statement, plan in self.plans.items():
            left = [plan]
            while left:
                node = left.pop()
                yield statement, node
                left += node.get("Plans", ())


def live(house: House) -> tuple[UUID, UUID]:
    """A job of many blocks and another that is small, both running, and figures as autovacuum keeps them."""
    large = land(house.database, texts(1000), TASKS, block_rows=10)
    small = land(house.database, texts(40), TASKS, block_rows=10)
    analyze(house)
    return large, small


def play(house: House, job: UUID, other: UUID) -> None:
    """All that is asked of the store in the life of a job."""
    for _ in range(3):
        house.work()
    house.tick()
    [hand, silent] = house.hands
    for a in hand.take_all():
        hand.report(hand.outcome(a, verdict="failed", columns={}, error=("engine", "no")))
    silent.take_all()
    silent.die()
    house.expire_leases()
    for _ in range(3):
        house.work()
    with house.database.transaction() as connection:
        tenant = tenant_named(connection, "default")
        demand.demand(connection, 0.0, Manifests())
        jobs.job_entry(connection, tenant, job)
        newest = jobs.job_entries(connection, tenant, limit=10)
        jobs.job_entries(connection, tenant, limit=10, after=newest[-1].id, state=State.SUCCEEDED)
        jobs.job_version(connection, tenant, job)
        shown = results.shown(connection, tenant, job)
        results.ready_blocks(connection, shown, "row", 0)
        results.ready_blocks(connection, shown, "done", 0)
        results.unanswered(connection, job, after=-1, limit=10)
        metrics.figures(connection, None)
        pressure.unfinished_rows(connection)
        endings.overdue(connection, 3600.0)
        endings.due_for_deletion(connection, 0.0)
        endings.due_for_deletion(connection, 30.0)
        endings.sweep_columns(connection)
        endings.sweep_events(connection)
        folds.sweep(connection)
        webhooks.may_deliver(connection, "me", 5.0, None)
        webhooks.next_deliveries(connection, 4)
        webhooks.delivered(connection, "wh_1", 1)
        webhooks.not_delivered(connection, "wh_1", 1, "no", again_s=5.0, rest_s=5.0)
        webhooks.give_up(connection)
        webhooks.replay(connection, tenant, "wh_1", since_s=60.0)
        webhooks.webhooks(connection, tenant)
        webhooks.pending_events(connection)
        webhooks.webhooks_seen(connection)
    for look in (
        lambda c: activity.activity(c, tenant, job, timeline=20),
        lambda c: explain.standing(c, tenant, job),
    ):
        with house.database.transaction() as connection:
            look(connection)
    with house.database.transaction() as connection:
        activity.subtasks(connection, tenant, job, after=0, limit=20)
        endings.cancel_job(connection, tenant, other)
        endings.remove_job(connection, tenant, other)
    for _ in range(100):
        house.due()
        if not house.work() and house.job(job).state != State.RUNNING:
            break
    with house.database.transaction() as connection:
        results.ready_blocks(connection, results.shown(connection, tenant, job), "row", 0)
    house.sql("ALTER TABLE job DISABLE TRIGGER USER")
    house.sql("UPDATE job SET state = 'open', finished = NULL, keep_s = 60 WHERE id = :job", job=job)
    house.sql("UPDATE block SET done_at = done_at - interval '1 h' WHERE job_id = :job", job=job)
    with house.database.transaction() as connection:
        assert keeping.due_fronts(connection) == [job]
        assert keeping.forget_front(connection, job).more
        endings.delete_slice(connection, job)


def play_doors(house: House, job: UUID) -> None:
    """All that OpenAI's doors ask of the store."""
    with house.database.transaction() as connection:
        tenant = tenant_named(connection, "default")
        made = files.add_file(
            connection,
            file="file-new",
            tenant=tenant,
            purpose="batch",
            filename="f",
            size=1,
            sha256="ab" * 32,
            expires_s=60.0,
        )
        files.find_file(connection, tenant, made.id)
        for order, after in (("desc", "file-7"), ("asc", "file-7"), ("desc", None), ("asc", None)):
            files.list_files(connection, tenant, purpose=None, after=after, limit=10, order=order)  # type: ignore[arg-type]
        files.expire_files(connection)
        asked = batches.NewBatch(
            endpoint="/e",
            input_file=made.id,
            input_sha256=made.sha256,
            window="24h",
            window_s=60.0,
            notes=None,
            priority="normal",
            output_expires_s=None,
            request_digest=b"x" * 32,
        )
        for key in (None, "k", "k"):
            batches.add_batch(connection, tenant, asked, key=key, again_s=60.0)
        batches.list_batches(connection, tenant, after=None, limit=10)
        batches.list_batches(connection, tenant, after="batch_7", limit=10)
        owned = batches.take_batch(connection, "me", 60.0)
        assert owned is not None
        owned.keep(connection, 60.0)
        owned.checked(connection, 1, {}, beside=False)
        owned.has_job(connection, job)
        owned.started(connection)
        batches.answered_blocks(connection, job, 0, 4)
        batches.done_blocks(connection, job, {1}, 4)
        other = batches.take_batch(connection, "me", 60.0)
        assert other is not None
        other.leave(connection, 0.0)
        batches.cancel_batch(connection, tenant, other.batch.id)
        last = batches.take_batch(connection, "me", 60.0)
        assert last is not None
        last.end(connection, "cancelled")
        files.delete_file(connection, tenant, made.id)
        doors.lock_doors(connection, tenant)
        (model,) = house.sql("SELECT id FROM model WHERE name = 'trunk'")
        doors.put_door(connection, tenant, "/new", model.id, job, most=1500)
        doors.find_door(connection, tenant, "/new", model.id)
        doors.used_door(connection, job)
        doors.shut_idle_doors(connection, 3600.0)


@pytest.fixture
def plans(house: House) -> Plans:
    large, small = live(house)
    with Plans(house) as found:
        play_doors(house, large)
        play(house, large, small)
        assert house.sql("SELECT count(*) AS n FROM job WHERE state = 'running'")[0].n == 0
    return found


def test_every_statement_finds_its_rows_by_an_index_and_every_index_serves(
    house: House, plans: Plans
) -> None:
    first: dict[str, str] = {}
    constraints = set()
    for row in house.sql("""
        SELECT c.relname, a.attname, i.indisprimary OR i.indisunique AS holds FROM pg_index i
          JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = 1
         WHERE c.relnamespace = 'public'::regnamespace"""):
        first[row.relname] = row.attname
        if row.holds:
            constraints.add(row.relname)
    used = defaultdict(set)
    slow = set()
    for statement, node in plans.nodes():
        table, index = node.get("Relation Name"), node.get("Index Name")
        if node["Node Type"] == "Seq Scan" and table not in SMALL:
            slow.add(f"reads all of {table}: {statement}")
        if index is None or index not in first:
            continue
        used[index].add(statement)
        condition = re.sub(r"\(\w+\.", "(", node.get("Index Cond", ""))
        if (
            index not in OF_FEW | SWEPT
            and not index.startswith(tuple(SMALL))
            and f"({first[index]} " not in condition
        ):
            slow.add(f"reads all of {index} for {condition or 'nothing'}: {statement}")
    assert not slow, "\n\n".join(sorted(slow))
    assert first.keys() - used.keys() - constraints == BEHIND_THE_SCENES.keys()


def test_updates_of_a_running_job_are_hot(house: House) -> None:
    """Within the row's page, and no index grows: neither cursors nor counts nor the time of a lease is indexed."""
    large, _ = live(house)

    def counts() -> dict[str, tuple[int, int]]:
        house.sql("SELECT pg_stat_force_next_flush()")
        asked = "SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables"
        return {row.relname: (row.n_tup_upd, row.n_tup_hot_upd) for row in house.sql(asked)}

    before = counts()
    while house.tick():
        with house.database.transaction() as connection:
            held = [h.key for h in leases.held(connection)]
        assert house.dispatcher.epoch is not None
        leases.extend(house.database, house.dispatcher.epoch, held, 8.0)
        house.work()
    assert house.job(large).state == State.SUCCEEDED
    after = counts()
    updated, hot = (
        {table: after[table][i] - before[table][i] for table in ("pass", "block_pass", "lease", "job")}
        for i in (0, 1)
    )
    assert all(updated.values())
    # Those that change a state are not: of each job, and of each pass of a block.
    assert updated["pass"] == hot["pass"]
    assert updated["lease"] == hot["lease"]
    assert updated["job"] - hot["job"] == 2
    cold = updated["block_pass"] - hot["block_pass"] - 104
    assert 0 <= cold <= 0.05 * hot["block_pass"]
