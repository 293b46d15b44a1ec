"""Operating a cluster: drain and resume, workers of another version, deadlines, and what is kept how long.

The protocol is driven step by step as in test_protocol; the API is the real one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from motet import Classify, Client
from motet.cli import main
from motet.errors import InvalidJob, NotFound, SetupError, Unauthorized
from motet.protocol.settings import Settings
from motet.protocol.transport import MemoryTransport, RedisWorkerTransport
from motet.protocol.wire import PROTOCOL, Beat, Control
from scheduler import sweeper
from scheduler.api import blobs
from scheduler.dispatcher import Dispatcher
from scheduler.store import blobs as blob_rows
from scheduler.store import drains, endings, registry
from scheduler.store.database import Database
from scheduler.store.endings import end_job
from scheduler.store.leadership import NotLeading
from tests.integration import api_house
from tests.integration.landing import land
from tests.integration.test_protocol import (
    HEAD,
    TASKS,
    TRUNK,
    Hand,
    House,
    assert_accounted_for,
    expected,
    house,
    texts,
)

__all__ = ["house"]


@dataclass
class Obedient(Hand):
    """A worker that also drains when it is told to, as the real one does."""

    drains: bool = False
    #: Fields of its beat that are otherwise.
    says: dict[str, Any] = field(default_factory=dict)
    heard: Control | None = None

    def beat(self) -> None:
        self.seq += 1
        beat = Beat(
            worker=self.name,
            boot=self.boot,
            seq=self.seq,
            state="draining" if self.drains else "ready",
            engines=("encoder",),
            device_name="hand",
            held=tuple(self.holding),
        )
        control = self.transport.worker(self.name).beat(replace(beat, **self.says))
        if control is not None:
            self.heard = control
            self.drains = control.drain
            for key in control.drop:
                self.dropped.add(key)
                self.holding.pop(key, None)

    def die(self) -> None:
        super().die()
        self.drains, self.heard = False, None

    @property
    def has(self) -> bool:
        """Something was sent to it, taken or not."""
        return bool(self.holding or self.transport.queues.get(self.name))


@pytest.fixture
def crew(house: House) -> list[Obedient]:
    """The two workers of the house."""
    found = [Obedient(house.transport, "h1-cpu0"), Obedient(house.transport, "h1-cpu1")]
    house.hands[:] = found
    return found


def drain(house: House, *workers: str) -> None:
    with house.database.transaction() as connection:
        drains.drain(connection, dict.fromkeys(workers, "h1"), "token-id")


def resume(house: House, *workers: str) -> None:
    with house.database.transaction() as connection:
        drains.resume(connection, list(workers))


# -- drain


def test_a_drained_worker_finishes_what_it_holds_and_gets_no_more_until_it_is_resumed(
    house: House, crew: list[Obedient]
) -> None:
    first, second = crew
    rows = texts(1600)
    job = land(house.database, rows, TASKS, block_rows=64)
    house.tick()
    held = first.take_all()
    assert held
    drain(house, first.name)
    house.tick()
    house.tick()
    assert (first.drains, second.drains) == (True, False)
    assert not house.transport.queues.get(first.name)
    for a in held:
        first.report(first.outcome(a))
    house.aggregate()
    assert house.sql("SELECT count(*) AS n FROM subtask WHERE worker = 'h1-cpu0' AND state = 'done'")[
        0
    ].n == len(held), "what it held counts"
    for _ in range(3):
        for a in second.take_all():
            second.report(second.outcome(a))
        house.aggregate()
        house.tick()
        assert not first.has
    assert house.job(job).state == "running"
    resume(house, first.name)
    house.tick()
    house.tick()
    house.tick()
    assert not first.drains
    assert first.has
    assert house.finish(job).state == "succeeded"
    assert house.job(job).attempts_lost == 0
    assert_accounted_for(house, job, 1600)


def test_a_job_waits_while_every_worker_is_drained(house: House, crew: list[Obedient]) -> None:
    drain(house, *(hand.name for hand in crew))
    job = land(house.database, texts(20), TASKS)
    for _ in range(10):
        house.work()
    assert (house.job(job).state, house.job(job).cells_ok) == ("running", 0)
    resume(house, crew[0].name)
    assert house.finish(job).state == "succeeded"


def test_a_drained_worker_that_restarts_stays_drained_though_redis_forgot_its_word(
    house: House, crew: list[Obedient]
) -> None:
    first, _ = crew
    drain(house, first.name)
    house.tick()
    house.tick()
    assert first.drains
    first.die()
    house.transport.controls.clear()
    land(house.database, texts(400), TASKS, block_rows=64)
    house.tick()
    assert not first.has, "it says that it is ready, and gets nothing all the same"
    house.tick()
    assert first.drains


def test_a_worker_that_was_resumed_while_it_slept_is_told_so(house: House, crew: list[Obedient]) -> None:
    first, _ = crew
    drain(house, first.name)
    house.tick()
    house.tick()
    house.hands.remove(first)
    for _ in range(8):
        house.tick()
    resume(house, first.name)
    house.tick()
    house.transport.controls.pop(first.name)
    house.hands.append(first)
    house.tick()
    house.tick()
    assert not first.drains


def test_what_a_drained_worker_has_not_taken_yet_goes_to_others_at_once_and_is_not_run_twice(
    house: House, crew: list[Obedient]
) -> None:
    first, _ = crew
    rows = texts(60)
    job = land(house.database, rows, TASKS, block_rows=8)
    house.tick()
    left = house.transport.queued(first.name)
    assert left
    drain(house, first.name)
    house.tick()
    house.tick()
    house.tick()
    open_ = house.sql("SELECT subtask_id AS id FROM lease WHERE worker = 'h1-cpu0'")
    assert open_ == [], "no lease had to run out for it"
    assert house.sql("SELECT max(deaths) AS n FROM piece")[0].n in (None, 0), "nobody is blamed"
    house.hands.remove(first)
    assert house.finish(job).state == "succeeded"
    house.hands.append(first)
    house.tick()
    resume(house, first.name)
    house.tick()
    first.beat()
    assert not first.drains
    assert left <= first.dropped, "its queue still holds them: it is told to leave them alone"
    assert_accounted_for(house, job, 60)


def test_a_new_leader_keeps_to_the_drains(house: House, crew: list[Obedient]) -> None:
    first, _ = crew
    drain(house, first.name)
    house.tick()
    house.dispatcher.stop()
    house.dispatcher = Dispatcher(house.database, house.transport, house.dispatcher.settings)
    land(house.database, texts(400), TASKS, block_rows=64)
    house.tick()
    house.tick()
    assert first.drains
    assert not first.has


# -- another version


def test_a_worker_of_another_major_gets_no_work_is_seen_and_the_job_waits(
    house: House, crew: list[Obedient], caplog: pytest.LogCaptureFixture
) -> None:
    for hand in crew:
        hand.says = {"protocol": PROTOCOL + 1, "version": "9.0"}
    job = land(house.database, texts(50), TASKS)
    with caplog.at_level(logging.WARNING, "scheduler.dispatcher"):
        for _ in range(8):
            assert house.tick() == 0
    told = [r for r in caplog.records if r.getMessage().startswith("incompatible worker")]
    assert [(r.worker, r.protocol, r.version, r.ours) for r in told] == [  # type: ignore[attr-defined]
        ("h1-cpu0", PROTOCOL + 1, "9.0", PROTOCOL),
        ("h1-cpu1", PROTOCOL + 1, "9.0", PROTOCOL),
    ], "once each"
    assert house.job(job).state == "running"
    crew[0].die()
    crew[0].says = {"version": "1.7"}
    assert house.finish(job).state == "succeeded"
    assert not crew[1].has
    assert_accounted_for(house, job, 50)


def test_an_outcome_of_another_major_is_buried_and_its_rows_are_done_by_others(
    house: House, crew: list[Obedient], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = land(house.database, texts(20), TASKS)
    house.tick()
    for hand in crew:
        for a in hand.take_all():
            with monkeypatch.context() as other:
                other.setattr("motet.protocol.wire.PROTOCOL", PROTOCOL + 1)
                raw = hand.outcome(a).encode()
            house.transport.worker(hand.name).report(a.subtask, a.attempt, raw)
            hand.holding.clear()
    house.aggregate()
    assert house.transport.buried
    house.expire_leases()
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


# -- deadlines


def test_a_job_past_its_deadline_fails_with_the_reason_and_keeps_what_is_done(
    house: House, crew: list[Obedient]
) -> None:
    rows = texts(200)
    job = land(house.database, rows, TASKS, block_rows=32)
    in_time = land(house.database, texts(5), {"size": Classify("length")}, tenant="another")
    house.sql("UPDATE job SET deadline = clock_timestamp() + interval '1 hour'")
    while not house.job(job).blocks_done:
        house.work()
    house.sql("UPDATE job SET deadline = '2026-01-02 03:04:05Z' WHERE id = :job", job=job)
    house.now += 10
    house.tick()
    j = house.job(job)
    assert (j.state, j.reason) == (
        "failed",
        "its deadline passed: 2026-01-02T03:04:05Z; what was done by then can be read",
    )
    assert j.cells_ok >= 64
    assert j.cells_ok + j.cells_skipped == 400
    assert len(house.labels(job)) * 2 == j.cells_ok
    assert house.finish(in_time).state == "succeeded"


def test_an_upload_past_its_deadline_fails_too(house: House, crew: list[Obedient]) -> None:
    job = land(house.database, texts(5), TASKS, close=False)
    house.sql("UPDATE job SET deadline = clock_timestamp() - interval '1 s'")
    house.tick()
    assert house.job(job).state == "failed"


# -- retention


TABLES = (
    "job",
    "part",
    "pass",
    "task",
    "block",
    "block_pass",
    "piece",
    "subtask",
    "lease",
    "cells",
    "sealed_column",
    "block_column",
)


def counts(house: House | api_house.House, *tables: str) -> dict[str, int]:
    """Rows of these tables, or of all that jobs fill."""
    return {t: house.sql(f"SELECT count(*) AS n FROM {t}")[0].n for t in tables or TABLES}


def every_table(house: House) -> dict[str, int]:
    names = house.sql(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )
    return counts(house, *(n.relname for n in names))


def aged(house: House, job: UUID, days: float) -> None:
    """As if the job had ended so long ago."""
    house.sql(
        "UPDATE job SET finished = clock_timestamp() - make_interval(secs => :s) WHERE id = :job",
        s=days * 86_400,
        job=job,
    )


def kept(house: House, retention_days: float) -> None:
    """From now on the cluster keeps jobs so long."""
    house.dispatcher.settings = replace(house.dispatcher.settings, retention_days=retention_days)


def sweep(house: House, rounds: int = 1) -> None:
    house.now += 100
    for _ in range(rounds):
        house.tick()


def left(house: House) -> set[UUID]:
    return {row.id for row in house.sql("SELECT id FROM job")}


def test_jobs_are_kept_for_ever_unless_somebody_says_otherwise(house: House, crew: list[Obedient]) -> None:
    job = land(house.database, texts(5), TASKS)
    house.finish(job)
    aged(house, job, 10_000)
    sweep(house, 3)
    assert left(house) == {job}


def test_the_cluster_deletes_old_jobs_and_a_job_may_only_go_sooner(
    house: House, crew: list[Obedient]
) -> None:
    old, young, sooner, later, running = (
        land(house.database, texts(5 + i), TASKS, tenant=f"t{i}") for i in range(5)
    )
    for job in (old, young, sooner, later):
        house.finish(job)
    for job, ended, own in ((old, 8, None), (young, 6, None), (sooner, 2, 1.0), (later, 8, 1000.0)):
        aged(house, job, ended)
        house.sql("UPDATE job SET retention_days = :own WHERE id = :job", own=own, job=job)
    with house.database.transaction() as connection:
        # A move that no job makes: the trigger that holds them is passed over.
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        reopen = text(
            "UPDATE job SET state = 'running', finished = NULL, created = '2020-01-01' WHERE id = :job"
        )
        connection.execute(reopen, {"job": running})
    kept(house, 7)
    sweep(house, 3)
    assert left(house) == {young, running}


def test_a_jobs_own_retention_counts_where_the_cluster_keeps_all(house: House, crew: list[Obedient]) -> None:
    mine, other = (land(house.database, texts(5 + i), TASKS) for i in range(2))
    for job in (mine, other):
        house.finish(job)
        aged(house, job, 2)
    house.sql("UPDATE job SET retention_days = 1.5 WHERE id = :job", job=mine)
    sweep(house, 2)
    assert left(house) == {other}


def test_after_a_hundred_jobs_are_deleted_nothing_of_them_is_left(house: House, crew: list[Obedient]) -> None:
    house.tick()
    with house.database.transaction() as connection:
        registry.tenant_named(connection, "default")
    before = every_table(house)
    jobs = []
    for i in range(100):
        # Half of them show each other's columns; some fail, some are cancelled under way.
        rows = texts(8) if i % 2 else [f"{i} {t}" for t in texts(8)]
        jobs.append(
            land(house.database, rows, TASKS if i % 3 else {"size": Classify("length")}, block_rows=4)
        )
    for job in jobs[::10]:
        house.tick()
        with house.database.transaction() as connection:
            end_job(connection, job, "cancelled", "asked")
    for job in jobs:
        house.finish(job)
    assert counts(house, "job", "sealed_column")["job"] == 100
    house.sql("UPDATE job SET finished = finished - interval '2 days'")
    # Events outlive their jobs, for a while of their own.
    assert counts(house, "outbox") == {"outbox": 100}
    house.sql("UPDATE outbox SET created = created - interval '8 days'")
    kept(house, 1)
    sweep(house, 12)
    assert left(house) == set()
    after = every_table(house)
    # What was learned of speed is no job's.
    assert {**after, "rate": 0} == {**before, "rate": 0}
    assert after["sealed_column"] == 0


def test_a_large_job_goes_in_slices_while_others_run_and_shared_columns_stay(
    house: House, crew: list[Obedient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "SLICE_BLOCKS", 4)
    rows = texts(120)
    large = land(house.database, rows, TASKS, block_rows=10)
    house.finish(large)
    shares = land(house.database, rows[:50], TASKS, block_rows=10)
    assert house.job(shares).cells_reused == 100
    aged(house, large, 2)
    kept(house, 1)
    other = land(house.database, [f"other {t}" for t in rows], TASKS, block_rows=10, tenant="another")
    house.now += 100
    sizes = []
    while large in left(house):
        house.work()
        sizes.append(house.sql("SELECT count(*) AS n FROM block WHERE job_id = :job", job=large)[0].n)
        bad = house.sql(
            "SELECT count(*) AS n FROM sealed_column c"
            " WHERE c.refs <> (SELECT count(*) FROM block_column b WHERE b.column_id = c.id)"
        )
        assert bad[0].n == 0, "between two slices every column knows who shows it"
    assert sizes == [8, 4, 0, 0]
    assert house.job(other).cells_ok > 0, "others were served meanwhile"
    assert house.labels(shares) == expected(rows[:50])
    assert house.finish(other).state == "succeeded"
    assert_accounted_for_one(house, shares, 50)


def assert_accounted_for_one(house: House, job: UUID, rows: int) -> None:
    [counted] = house.sql("SELECT count(*) AS n FROM results WHERE job_id = :job", job=job)
    assert counted.n == rows * house.job(job).n_tasks


def test_only_the_leader_sweeps(house: House, crew: list[Obedient]) -> None:
    job = land(house.database, texts(5), TASKS)
    house.finish(job)
    aged(house, job, 2)
    kept(house, 1)
    epoch = house.dispatcher.epoch
    assert epoch is not None
    house.sql("UPDATE leader SET epoch = epoch + 1")
    with pytest.raises(NotLeading):
        sweeper.sweep(house.database, epoch, 1.0)
    assert left(house) == {job}


def test_a_column_that_nothing_shows_is_swept_and_one_that_is_shown_is_not(
    house: House, crew: list[Obedient]
) -> None:
    job = land(house.database, texts(5), {"size": Classify("length")})
    house.finish(job)
    house.sql(
        "INSERT INTO sealed_column (tenant_id, refs, kind, n_rows, n_ok, n_error, n_skipped)"
        " SELECT tenant_id, 0, kind, 0, 0, 0, 0 FROM sealed_column"
    )
    # As if somebody had counted wrongly.
    house.sql("UPDATE sealed_column SET refs = 0")
    sweep(house)
    assert house.labels(job) == expected(texts(5))


def test_workers_that_are_long_gone_are_forgotten_and_those_that_beat_are_not(
    house: House, crew: list[Obedient]
) -> None:
    first, _ = crew
    model = house.sql("SELECT id FROM model LIMIT 1")[0].id
    for worker in (first.name, "long gone", "gone lately"):
        drain(house, worker)
        house.sql("INSERT INTO refusal VALUES (:m, :w, 'boot', 'why')", m=model, w=worker)
    old = "clock_timestamp() - interval '31 days'"
    for name in (first.name, "long gone"):
        house.sql(f"UPDATE drained SET since = {old}, seen = {old} WHERE worker = :w", w=name)
        house.sql(f"UPDATE refusal SET at = {old} WHERE worker = :w", w=name)
    sweep(house)
    assert {r.worker for r in house.sql("SELECT worker FROM drained")} == {first.name, "gone lately"}
    assert {r.worker for r in house.sql("SELECT worker FROM refusal")} == {first.name, "gone lately"}


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "1e9", "a month"])
def test_a_retention_that_is_none_stops_the_process_before_it_deletes_anything(days: str) -> None:
    with pytest.raises(SetupError, match="MOTET_RETENTION_DAYS"):
        Settings.from_env({"MOTET_RETENTION_DAYS": days})


# -- over HTTP


@pytest.fixture
def server(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[api_house.House]:
    with api_house.a_house(database_url, tmp_path, redis_url=redis_url) as found:
        yield found


@contextmanager
def beating(redis_url: str, **beats: Any) -> Iterator[dict[str, RedisWorkerTransport]]:
    """Workers of these names whose newest beat stands in Redis."""
    lines = {
        name.replace("_", "-"): RedisWorkerTransport(redis_url, name.replace("_", "-")) for name in beats
    }
    try:
        for name, more in beats.items():
            said = {"boot": "b", "seq": 1, "host": "machine-1.example", **more}
            lines[name.replace("_", "-")].beat(Beat(worker=name.replace("_", "-"), **said))
        yield lines
    finally:
        for line in lines.values():
            line.close()


def states(server: api_house.House) -> dict[str, str]:
    return {w["worker"]: w["state"] for w in server.call("GET", "/v1/workers").json()["workers"]}


def test_a_worker_is_drained_and_resumed_over_http(server: api_house.House, redis_url: str) -> None:
    with beating(redis_url, m1_gpu0={}, m2_gpu0={"host": "machine-2"}) as lines:
        for _ in range(2):
            answer = server.call("POST", "/v1/workers/m1-gpu0/drain", token="admin")
            (worker,) = answer.json()["workers"]
            assert (answer.status_code, worker["worker"], worker["state"]) == (200, "m1-gpu0", "draining")
            assert worker["drained"]["by"] == "admin"
        (row,) = server.sql("SELECT worker, host FROM drained")
        assert row == ("m1-gpu0", "machine-1.example")
        beat = Beat(worker="m1-gpu0", boot="b", seq=2, state="draining", held=((7, 1),))
        lines["m1-gpu0"].beat(beat)
        assert states(server) == {"m1-gpu0": "draining", "m2-gpu0": "ready"}
        lines["m1-gpu0"].beat(replace(beat, seq=3, held=()))
        assert states(server)["m1-gpu0"] == "drained"
        answer = server.call("POST", "/v1/workers/m1-gpu0/resume", token="admin").json()
        assert answer["workers"][0]["drained"] is None
        lines["m1-gpu0"].beat(replace(beat, seq=4, held=(), state="ready"))
        assert states(server)["m1-gpu0"] == "ready"


def test_a_drained_worker_with_a_lease_that_it_does_not_know_of_yet_is_not_yet_drained(
    server: api_house.House, redis_url: str
) -> None:
    job = server.submit(["a"])["id"]
    server.sql(
        "WITH s AS (INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes)"
        " VALUES (:job, 0, '{0}', '{0}', '{1}', '{1}', 1, 1, 1) RETURNING id)"
        " INSERT INTO lease SELECT id, 1, 'm1-gpu0', 'b', 'n', '', 1, now(), now() + interval '1 min' FROM s",
        job=job,
    )
    with beating(redis_url, m1_gpu0={"state": "draining"}):
        server.call("POST", "/v1/workers/m1-gpu0/drain", token="admin")
        assert states(server) == {"m1-gpu0": "draining"}
        server.sql("DELETE FROM lease")
        assert states(server) == {"m1-gpu0": "drained"}


@pytest.mark.parametrize("host", ["machine-1.example", "machine-1", "rack"])
def test_a_hosts_name_stands_for_all_of_its_workers(
    server: api_house.House, redis_url: str, host: str
) -> None:
    others = {"host": "machine-10"}
    with beating(
        redis_url, rack_gpu0={}, rack_gpu1_2={}, rack_cpu0={}, rack_2_cpu0=others, machine_cpu0=others
    ):
        mine = ["rack-cpu0", "rack-gpu0", "rack-gpu1-2"]
        answer = server.call("POST", f"/v1/workers/{host}/drain", token="admin").json()
        assert [w["worker"] for w in answer["workers"]] == mine
        # One of them has gone for good by now, and is resumed with its host all the same.
        server.sql("INSERT INTO drained (worker, host) VALUES ('rack-gpu9', 'machine-1.example')")
        assert states(server)["rack-gpu9"] == "gone"
        answer = server.call("POST", f"/v1/workers/{host}/resume", token="admin").json()
        assert [w["worker"] for w in answer["workers"]] == [*mine, "rack-gpu9"]
        assert server.sql("SELECT count(*) FROM drained") == [(0,)]


def test_nobody_drains_what_was_never_seen(server: api_house.House, redis_url: str) -> None:
    for what in ("drain", "resume"):
        answer = server.call("POST", f"/v1/workers/nobody/{what}", token="admin")
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")
        assert "motet workers" in answer.json()["error"]["message"]
    server.sql("INSERT INTO drained (worker) VALUES ('off-cpu0')")
    assert server.call("POST", "/v1/workers/off-cpu0/drain", token="admin").status_code == 200
    assert server.call("POST", "/v1/workers/off-cpu0/resume", token="admin").status_code == 200
    assert server.call("POST", "/v1/workers/off-cpu0/resume", token="admin").status_code == 404


def test_a_worker_of_another_major_and_an_odd_beat_are_shown(server: api_house.House, redis_url: str) -> None:
    with beating(
        redis_url,
        old_cpu0={"protocol": PROTOCOL + 1, "version": "9.1"},
        odd_cpu0={"utilisation": float("nan"), "state": "dancing"},
    ):
        found = {w["worker"]: w for w in server.call("GET", "/v1/workers").json()["workers"]}
    old = found["old-cpu0"]
    assert (old["state"], old["protocol"], old["version"]) == ("incompatible", PROTOCOL + 1, "9.1")
    assert (found["odd-cpu0"]["state"], found["odd-cpu0"]["utilisation"]) == ("dancing", 0.0)


# -- the client and the command line


@pytest.fixture
def shell(
    server: api_house.House,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """Runs `motet` in this process as the user of the server, or as an administrator."""
    monkeypatch.setenv("MOTET_HOME", str(tmp_path))
    monkeypatch.setenv("MOTET_URL", server.url)

    def run(*args: str, token: str = "user") -> tuple[int, str, str]:
        monkeypatch.setenv("MOTET_TOKEN", server.tokens[token])
        with pytest.raises(SystemExit) as ended:
            main(args)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return run


def test_drain_waits_until_nothing_is_held(server: api_house.House, redis_url: str, shell: Any) -> None:
    with beating(redis_url, m1_cpu0={"held": ((1, 1),), "backlog_s": 2.5}) as lines:
        code, _, err = shell("drain", "m1-cpu0", "--wait", "--timeout", "0.01", token="admin")
        assert code == 1
        assert "m1-cpu0 (draining, 1 sub-task)" in err
        assert "go on draining" in err

        def let_go() -> None:
            lines["m1-cpu0"].beat(Beat(worker="m1-cpu0", boot="b", seq=2, host="m1", state="draining"))

        later = threading.Timer(0.3, let_go)
        later.start()
        code, out, _ = shell("drain", "m1", "--wait", "--json", token="admin")
        later.join()
        assert (code, [w["state"] for w in json.loads(out)]) == (0, ["drained"])
        assert "drained" in shell("workers")[1]
        assert shell("resume", "m1", token="admin")[0] == 0
        assert server.sql("SELECT count(*) FROM drained") == [(0,)]


def test_only_an_administrator_drains(server: api_house.House, redis_url: str, shell: Any) -> None:
    with beating(redis_url, m1_cpu0={}):
        code, _, err = shell("drain", "m1-cpu0")
        assert code == 1
        assert "scope" in err
        with Client(server.url, server.tokens["user"]) as client, pytest.raises(Unauthorized):
            client.resume("m1-cpu0")
        with Client(server.url, server.tokens["admin"]) as client:
            assert [w.state for w in client.drain("m1-cpu0")] == ["draining"]
            assert client.resume("m1-cpu0")[0].drained is None
            with pytest.raises(NotFound):
                client.drain("nobody")


def test_the_workers_are_listed_with_their_versions_where_they_differ(
    server: api_house.House, redis_url: str, shell: Any
) -> None:
    with beating(redis_url, a_cpu0={"version": "1.0"}) as _:
        assert "protocol" not in shell("workers")[1]
        with beating(redis_url, b_cpu0={"version": "2.0", "protocol": PROTOCOL + 1}):
            out = shell("workers")[1]
    assert "incompatible" in out
    assert f"2.0 (protocol {PROTOCOL + 1})" in out


TOPIC = {"topic": Classify("topics")}


def test_a_deadline_and_a_retention_are_set_with_the_submission(server: api_house.House) -> None:
    with Client(server.url, server.tokens["user"]) as client:
        job = client.submit(["a"], TOPIC, deadline_s=3600, retention_days=30)
        assert job.record["retention_days"] == 30
        ((left_s, days),) = server.sql(
            "SELECT extract(epoch FROM deadline - created), retention_days FROM job WHERE id = :job",
            job=job.id,
        )
        assert (round(left_s), days) == (3600, 30)
        assert job.record["deadline"] > job.record["created"]
        plain = client.submit(["b"], TOPIC)
        assert (plain.record["deadline"], plain.record["retention_days"]) == (None, None)
        for option in ("deadline_s", "retention_days"):
            for wrong in (0, -1, 1e12, "2h", True, float("nan"), float("inf")):
                with pytest.raises(InvalidJob, match=option):
                    client.submit(["a"], TOPIC, **{option: wrong})


def test_the_command_line_takes_a_deadline_in_words(
    server: api_house.House, shell: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    task = ("--task", "topic=classify:topics")
    submit = ("submit", str(tmp_path / "a.txt"), *task)
    code, out, _ = shell(*submit, "--deadline", "2h", "--retention-days", "1.5", "--json")
    job = json.loads(out)
    assert (code, job["retention_days"]) == (0, 1.5)
    ((left_s,),) = server.sql("SELECT round(extract(epoch FROM deadline - created)) FROM job")
    assert left_s == 7200
    for wrong in ("2", "h", "-1h", "0s", "2 h", "soon", "1e3s"):
        code, _, err = shell(*submit, "--deadline", wrong)
        assert (code, "such as 90s, 15m, 2h or 30d" in err) == (2, True), wrong
    assert shell(*submit, "--retention-days", "0")[0] == 2


def test_rm_removes_what_is_named_and_what_has_ended_long_ago(server: api_house.House, shell: Any) -> None:
    old, young, running = (server.submit([text])["id"] for text in ("a", "b", "c"))
    for job in (old, young):
        server.answer(job, 0)
    server.sql("UPDATE job SET finished = now() - interval '31 days' WHERE id = :job", job=old)
    code, _, err = shell("rm", "--finished", "--older-than", "30d")
    assert (code, "this removes 1 job; say --yes" in err) == (2, True)
    code, out, _ = shell("rm", "--finished", "--older-than", "30d", "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"removed": [old]})
    assert shell("rm", "--finished", "--yes")[1] == "1 removed\n"
    assert shell("rm", "--finished", "--yes", "--json")[1] == '{"removed": []}\n'
    assert {str(row.id) for row in server.sql("SELECT id FROM job")} == {running}
    assert shell("rm", running, running[:8])[0] == 0, "named twice, removed once"
    assert server.sql("SELECT count(*) FROM job") == [(0,)]
    for wrong in ((), ("--older-than", "1d"), (running, "--finished"), (running, "--older-than", "1d")):
        assert shell("rm", *wrong)[0] == 2
    assert shell("rm", running)[0] == 1


def test_rm_asks_on_a_terminal(server: api_house.House, shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = server.submit(["a", "b"])["id"]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def say_no(prompt: str) -> str:
        asked.append(prompt)
        return "n"

    monkeypatch.setattr("click.termui.visible_prompt_func", say_no)
    code, out, err = shell("rm", job)
    assert code == 130
    assert "remove 1 job with 2 rows and all results (1 still running)" in out + err + "".join(asked)
    assert server.sql("SELECT count(*) FROM job") == [(1,)]
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "y")
    assert shell("rm", job)[0] == 0
    assert server.sql("SELECT count(*) FROM job") == [(0,)]


# -- removing a large job


def test_a_large_job_is_gone_from_sight_at_once_and_its_storage_follows(
    server: api_house.House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "SLICE_BLOCKS", 2)
    rows = [f"text {i}" for i in range(2 * 1024 + 500)]
    job = server.open(key="mine")["id"]
    for number, lo in enumerate(range(0, len(rows), 1024)):
        server.put(job, number, rows[lo : lo + 1024])
    server.close(job, 3, len(rows))
    server.answer(job, 0)
    assert server.call("DELETE", f"/v1/jobs/{job}").status_code == 204
    for path in ("", "/results", "/errors", "/activity"):
        assert server.call("GET", f"/v1/jobs/{job}{path}").status_code == 404, path
    assert server.call("DELETE", f"/v1/jobs/{job}").status_code == 404
    assert server.call("GET", "/v1/jobs").json()["jobs"] == []
    assert server.sql("SELECT count(*) FROM results WHERE job_id = :job", job=job) == [(0,)]
    assert server.open(key="mine")["id"] != job, "its key is free again"
    assert server.sql("SELECT count(*) FROM block WHERE job_id = :job", job=job) == [(3,)]
    database = Database(server.settings.database_url, pool=1)
    dispatcher = Dispatcher(database, MemoryTransport(), Settings(leader_lease_s=30.0))
    for now in range(4):
        dispatcher.step(float(now))
    database.close()
    assert server.sql("SELECT count(*) FROM job WHERE id = :job", job=job) == [(0,)]
    assert counts(server, "block", "sealed_column", "block_column", "subtask") == dict.fromkeys(
        ("block", "sealed_column", "block_column", "subtask"), 0
    )


# -- blobs


def put(server: api_house.House, raw: bytes) -> str:
    sha = hashlib.sha256(raw).hexdigest()
    assert server.call("PUT", f"/v1/blobs/{sha}", token="admin", content=raw).status_code == 201
    return sha


def file_of(server: api_house.House, sha: str) -> Path:
    return Path(server.settings.blob_dir, sha[:2], sha[2:4], sha)


def age_blobs(server: api_house.House) -> None:
    server.sql("UPDATE blob SET created = created - interval '2 days'")


def resources(server: api_house.House) -> Any:
    from scheduler.api.resources import Resources

    return Resources.of(server.settings)


def test_a_blob_goes_when_no_model_names_it_and_nobody_asked_for_it_for_a_day(
    server: api_house.House,
) -> None:
    named, hidden, asked_for, unnamed = (put(server, raw) for raw in (b"1", b"2", b"3", b"4"))
    with server.database.transaction() as connection:
        registry.add_model(connection, replace(TRUNK, name="one", files={"a": named}))
        registry.add_model(connection, replace(HEAD, name="two", files={"a": hidden}))
    server.sql("UPDATE model SET manifest = manifest || '{\"removed\": true}' WHERE name = 'two'")
    age_blobs(server)
    young = put(server, b"5")
    again = put(server, b"4 again")
    age_blobs_of(server, again)
    assert put(server, b"4 again") == again
    assert server.call("HEAD", f"/v1/blobs/{asked_for}", token="admin").status_code == 200
    orphan = hashlib.sha256(b"6").hexdigest()
    file_of(server, orphan).parent.mkdir(parents=True)
    file_of(server, orphan).write_bytes(b"6")
    use = resources(server)
    try:
        assert blobs.sweep(use) == 1
        assert server.call("GET", f"/v1/blobs/{unnamed}", token="admin").status_code == 404
        kept_now = {named, hidden, asked_for, young, again, orphan}
        assert {row.sha256 for row in server.sql("SELECT sha256 FROM blob")} == kept_now
        assert all(file_of(server, sha).is_file() for sha in kept_now)
        age_blobs(server)
        assert blobs.sweep(use) == 4
        assert {row.sha256 for row in server.sql("SELECT sha256 FROM blob")} == {named, hidden}
        files = {p.name for p in Path(server.settings.blob_dir).rglob("*") if p.is_file()}
        assert files == {named, hidden}
    finally:
        use.close()


def test_a_blob_that_a_new_manifest_names_is_not_swept_before_the_model_is_there(
    server: api_house.House,
) -> None:
    named, unnamed = put(server, b"1"), put(server, b"22")
    age_blobs(server)
    use = resources(server)
    try:
        with server.database.transaction() as connection:
            assert registry.blob_sizes(connection, {named, "0" * 64}) == {named: 1}
        assert blobs.sweep(use) == 1
        assert file_of(server, named).is_file()
        assert not file_of(server, unnamed).exists()
    finally:
        use.close()


def age_blobs_of(server: api_house.House, sha: str) -> None:
    server.sql("UPDATE blob SET created = created - interval '2 days' WHERE sha256 = :sha", sha=sha)


def test_a_file_that_is_stored_again_while_it_is_swept_is_asked_for_once_more_and_never_lost(
    server: api_house.House,
) -> None:
    raw = b"weights"
    sha = put(server, raw)
    age_blobs(server)
    before = file_of(server, sha).stat().st_ino
    answers: list[Any] = []

    def store() -> None:
        answers.append(server.call("PUT", f"/v1/blobs/{sha}", token="admin", content=raw))

    sender = threading.Thread(target=store)
    with server.database.transaction() as connection:
        assert blob_rows.take_unnamed_blobs(connection, 3600, 10) == [sha]
        sender.start()
        until = time.monotonic() + 20
        while file_of(server, sha).stat().st_ino == before:
            assert time.monotonic() < until, "the new file did not come"
            time.sleep(0.005)
        assert not answers, "it waits for the sweep"
        file_of(server, sha).unlink()
    sender.join(20)
    (answer,) = answers
    assert (answer.status_code, "send it again" in answer.json()["error"]["message"]) == (503, True)
    put(server, raw)
    assert file_of(server, sha).read_bytes() == raw
    assert server.sql("SELECT count(*) FROM blob") == [(1,)]
