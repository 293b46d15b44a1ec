"""``GET /metrics``: what it says is what SQL says, whoever is away, and never a word of a user's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families
from sqlalchemy import make_url, text

from motet.local.valkey import ValkeyUrls
from motet.protocol.settings import Settings
from motet.protocol.transport import RedisTransport, RedisWorkerTransport
from motet.protocol.wire import PROTOCOL, Assignment, Beat, Outcome, Usage
from scheduler.aggregator import Aggregator
from scheduler.api.auth import ALLOWED
from scheduler.api.metrics import FAMILIES
from scheduler.dispatcher import Dispatcher
from scheduler.store import metrics as store
from tests.integration.api_house import TWO, House, a_house, answers_of, house

__all__ = ["house"]

CANARY = "canary-7f3a"
#: Sample name and sorted labels -> value.
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(house: House, token: str = "read") -> Samples:
    answer = house.call("GET", "/metrics", token=token)
    assert answer.status_code == 200, answer.text
    return samples(answer.text)


def samples(page: str, openmetrics: bool = False) -> Samples:
    families = openmetrics_families(page) if openmetrics else text_families(page)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


@dataclass
class Works:
    """An API with Redis, the live dispatcher and aggregator, and one worker in the test's hands."""

    house: House
    transport: RedisTransport
    dispatcher: Dispatcher
    aggregator: Aggregator
    worker: RedisWorkerTransport
    beat: Beat
    now: float = 0.0
    answered: set[tuple[int, int]] = field(default_factory=set)

    def tick(self) -> list[Assignment]:
        """The worker beats, the dispatcher steps once; what it has sent."""
        self.now += 1.0
        self.beat = replace(self.beat, seq=self.beat.seq + 1)
        self.worker.beat(self.beat)
        self.dispatcher.step(self.now)
        keys = sorted(self.transport.queued(self.beat.worker) - self.answered)
        return [Assignment.decode(raw) for key in keys if (raw := self.worker.fetch(*key))]

    def answer(self, a: Assignment) -> None:
        n = len(a.texts)
        outcome = Outcome(
            subtask=a.subtask,
            attempt=a.attempt,
            nonce=a.nonce,
            worker=self.beat.worker,
            boot=self.beat.boot,
            verdict="done",
            columns={t.name: answers_of(t.manifest.answers, n, {}) for t in a.tasks},
            usage=Usage(tokens=4 * n, computed_tokens=5 * n, busy_s=0.25, micro_batches=1),
        )
        self.worker.report(a.subtask, a.attempt, outcome.encode())
        self.answered.add(a.key)

    def one(self, statement: str) -> Any:
        return self.house.sql(statement)[0]


@pytest.fixture
def works(database_url: str, redis_urls: ValkeyUrls, redis_url: str, tmp_path: Path) -> Iterator[Works]:
    transport = RedisTransport(redis_url)
    worker = RedisWorkerTransport(redis_urls.worker, "gpu-1")
    settings = Settings(leader_lease_s=30.0, reclaim_s=0.0)
    beat = Beat(
        worker="gpu-1",
        boot="b",
        seq=0,
        host="host-1",
        device_kind="cuda",
        device_name="NVIDIA H200",
        memory_mb=1000,
        memory_used_mb=250,
        utilisation=0.75,
        backlog_s=3.5,
        engines=("encoder",),
        rows_done=42,
    )
    # A beat that the test does not renew is no silence here.
    with a_house(database_url, tmp_path, redis_url=redis_url, dead_s=600.0, block_rows=128) as house:
        yield Works(
            house,
            transport,
            Dispatcher(house.database, transport, settings),
            Aggregator(house.database, transport, settings),
            worker,
            beat,
        )
    transport.close()
    worker.close()


def test_the_figures_are_those_of_sql_from_the_first_row_to_the_last(works: Works) -> None:
    house = works.house
    empty = scrape(house)
    assert value(empty, "motet_jobs", state="running") == 0
    assert value(empty, "motet_leader_lease_remaining_seconds") == 0
    loading = house.open(TWO)["id"]
    job = house.submit(["word " * 4 + str(i) for i in range(300)], TWO)["id"]

    waiting = scrape(house)
    assert value(waiting, "motet_jobs", state="loading") == 1
    assert value(waiting, "motet_jobs", state="running") == 1
    assert value(waiting, "motet_rows") == value(waiting, "motet_rows_landed_total") == 300
    assert value(waiting, "motet_cells", state="waiting") == 600
    assert value(waiting, "motet_rows_waiting") == works.one("SELECT sum(rows_waiting) FROM pass")[0] == 300

    sent = works.tick()
    under_way = scrape(house)
    assert value(under_way, "motet_leases") == works.one("SELECT count(*) FROM lease")[0] == len(sent) > 0
    assert value(under_way, "motet_subtasks_open") == len(sent)
    assert value(under_way, "motet_rows_waiting") == 300 - sum(len(a.texts) for a in sent)
    assert value(under_way, "motet_leader_epoch") == works.one("SELECT epoch FROM leader")[0] > 0
    assert 0 < value(under_way, "motet_leader_lease_remaining_seconds") <= 30
    (age,) = works.one("SELECT extract(epoch FROM clock_timestamp() - min(leased)) FROM lease")
    assert 0 < value(under_way, "motet_oldest_lease_seconds") <= age

    for a in sent:
        works.answer(a)
    reported = scrape(house)
    assert value(reported, "motet_outcomes_waiting") == len(sent)
    assert value(reported, "motet_outcomes_oldest_seconds") > 0
    while works.aggregator.step(block_s=0.0):
        pass
    for _ in range(50):
        for a in works.tick():
            works.answer(a)
        while works.aggregator.step(block_s=0.0):
            pass
        if house.job(job)["state"] == "succeeded":
            break

    done = scrape(house)
    row = works.one(f"SELECT * FROM job WHERE id = '{job}'")
    assert row.state == "succeeded"
    assert value(done, "motet_jobs_finished_total", state="succeeded") == 1
    assert value(done, "motet_jobs", state="running") == 0
    assert value(done, "motet_cells_recorded_total", state="ok") == row.cells_ok == 600
    assert value(done, "motet_subtasks_closed_total", state="reported") == row.subtasks
    assert value(done, "motet_tokens_total") == row.tokens == 1200
    assert value(done, "motet_computed_tokens_total") == row.computed_tokens
    assert value(done, "motet_busy_seconds_total") == pytest.approx(row.busy_s)
    assert value(done, "motet_outcomes_waiting") == value(done, "motet_outcomes_oldest_seconds") == 0
    assert value(done, "motet_leases") == value(done, "motet_oldest_lease_seconds") == 0
    (speed,) = works.one(
        "SELECT max(1 / (coefficients[3] + coefficients[2] / tokens_per_row + coefficients[4] * tokens_per_row))"
        " FROM rate WHERE device = 'NVIDIA H200'"
    )
    on = {"worker": "gpu-1", "device": "NVIDIA H200"}
    assert value(done, "motet_device_tokens_per_second", **on) == pytest.approx(speed)
    (size,) = works.one("SELECT pg_database_size(current_database())")
    assert value(done, "motet_database_bytes") == pytest.approx(size, rel=0.1)

    house.call("POST", f"/v1/jobs/{loading}/cancel")
    scrape(house)
    house.call("DELETE", f"/v1/jobs/{job}")
    house.call("DELETE", f"/v1/jobs/{loading}")
    gone = scrape(house)
    assert works.one("SELECT count(*) FROM job")[0] == 0
    for name, labels in done:
        if name.endswith("_total") and not name.startswith("process"):
            assert gone[name, labels] >= done[name, labels], f"{name} is a counter: it does not shrink"
    assert value(gone, "motet_jobs_finished_total", state="cancelled") == 1


def test_a_worker_is_shown_as_it_beats(works: Works) -> None:
    works.worker.beat(works.beat)
    found = scrape(works.house)
    on = {"worker": "gpu-1", "device": "NVIDIA H200"}
    assert value(found, "motet_worker_info", **on, host="host-1", kind="cuda", state="ready") == 1
    assert value(found, "motet_worker_rows_done_total", worker="gpu-1") == 42
    assert value(found, "motet_worker_attempts_held", worker="gpu-1") == 0
    assert value(found, "motet_backlog_seconds", worker="gpu-1") == 3.5
    assert value(found, "motet_device_utilisation_ratio", **on) == 0.75
    assert value(found, "motet_device_memory_bytes", **on) == 1000 * 2**20
    assert value(found, "motet_device_memory_used_bytes", **on) == 250 * 2**20
    works.worker.beat(replace(works.beat, protocol=PROTOCOL + 1))
    found = scrape(works.house)
    assert value(found, "motet_worker_info", **on, host="host-1", kind="cuda", state="incompatible") == 1


def test_of_a_silent_worker_nothing_is_said_that_may_have_changed(
    database_url: str, redis_urls: ValkeyUrls, redis_url: str, tmp_path: Path
) -> None:
    worker = RedisWorkerTransport(redis_urls.worker, "gpu-1")
    worker.beat(Beat(worker="gpu-1", boot="b", seq=1, utilisation=1.0))
    worker.close()
    with a_house(database_url, tmp_path, redis_url=redis_url, dead_s=0.0) as house:
        found = scrape(house)
    states = [dict(labels)["state"] for name, labels in found if name == "motet_worker_info"]
    assert states == ["silent"]
    assert not [name for name, _ in found if name.startswith(("motet_device_", "motet_backlog"))]


def test_a_strange_worker_spoils_no_scrape(works: Works) -> None:
    odd = Beat(
        worker="gpu-1",
        boot="b",
        seq=1,
        device_name='"\\\n' + "\N{SNOWMAN}" * 500,
        state="asleep",  # type: ignore[arg-type]
        utilisation=float("nan"),
    )
    works.worker.beat(odd)
    found = scrape(works.house)
    (info,) = [dict(labels) for name, labels in found if name == "motet_worker_info"]
    assert len(info["device"]) == 100
    assert info["state"] == "unknown"


def test_both_forms_say_the_same_and_every_family_of_the_table(works: Works) -> None:
    works.house.submit(["a"])
    works.tick()
    plain = works.house.call("GET", "/metrics", token="admin")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    asked = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
    modern = works.house.call("GET", "/metrics", token="admin", headers={"Accept": asked})
    assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    first, second = samples(plain.text), samples(modern.text, openmetrics=True)
    assert {name for name, _ in first} == {name for name, _ in second}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name, _ in first if name.startswith("motet_")}
    # It waits for an outcome to learn a speed from.
    assert shown == set(FAMILIES) - {"motet_device_tokens_per_second"}
    for name, labels in first:
        family = FAMILIES.get(re.sub("_(bucket|sum|count)$", "", name))
        if family is not None:
            assert {label for label, _ in labels} - {"le"} == set(family.labels), name
    helps = dict(re.findall(r"# HELP (motet_\w+) (.*)", plain.text))
    assert helps == {name: FAMILIES[name].words for name in helps}
    assert {name for name, _ in first if name.startswith("process_")} >= {"process_resident_memory_bytes"}


@pytest.mark.parametrize(
    "accept",
    ["", "*/*", "application/openmetrics-text;version=nonsense", "\xff", "text/plain;version=99.9.9"],
)
def test_any_accept_gets_an_answer(house: House, accept: str) -> None:
    answer = house.call("GET", "/metrics", token="read", headers={"Accept": accept.encode("latin-1")})
    assert answer.status_code == 200
    assert samples(answer.text, openmetrics="openmetrics" in answer.headers["content-type"])


def test_no_word_of_a_user_and_no_id_is_in_it(house: House) -> None:
    scrape(house)
    job = house.submit([f"{CANARY} text"], {CANARY: {"kind": "classify", "model": "topics"}}, name=CANARY)[
        "id"
    ]
    house.answer(job, 0)
    house.call("GET", f"/v1/jobs/{CANARY}")
    house.call("GET", f"/{CANARY}?q={CANARY}")
    house.call(CANARY, "/v1/jobs")
    house.call(CANARY.upper(), f"/{CANARY}", headers={"X-Canary": CANARY})
    house.call("POST", "/v1/tokens", token="admin", json={"name": CANARY, "scope": "user", "tenant": CANARY})
    page = house.call("GET", "/metrics", token="read").text
    assert CANARY not in page.lower()
    assert job not in page
    assert not any(str(tenant) in page for tenant in house.tenants.values())
    found = samples(page)
    routes = {dict(labels)["route"] for name, labels in found if name == "motet_http_requests_total"}
    assert routes <= {path for _, path in ALLOWED} | {"-"}
    methods = {dict(labels)["method"] for name, labels in found if name == "motet_http_requests_total"}
    assert methods == {"GET", "POST", "PUT", "other"}


def test_requests_are_counted_by_route_and_answer(house: House) -> None:
    job = house.submit(["a"])["id"]
    for _ in range(3):
        house.job(job)
    house.call("GET", "/v1/jobs/none")
    found = scrape(house)
    at = {"method": "GET", "route": "/v1/jobs/{job}"}
    assert value(found, "motet_http_requests_total", **at, status="200") == 3
    assert value(found, "motet_http_requests_total", **at, status="404") == 1
    assert value(found, "motet_http_request_duration_seconds_count", **at) == 4
    assert value(found, "motet_http_request_duration_seconds_bucket", **at, le="+Inf") == 4
    assert value(found, "motet_http_request_duration_seconds_sum", **at) > 0


# -- when somebody is away


def test_without_redis_postgres_is_shown(database_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, redis_url="redis://127.0.0.1:1/0") as house:
        house.submit(["a"])
        found = scrape(house)
    assert value(found, "motet_up", service="redis") == 0
    assert value(found, "motet_up", service="postgres") == 1
    assert value(found, "motet_jobs", state="running") == 1
    assert not [
        name for name, _ in found if name.startswith(("motet_outcomes", "motet_worker", "motet_redis"))
    ]


def test_without_postgres_redis_is_shown_to_whoever_read_before(works: Works) -> None:
    house = works.house
    works.worker.beat(works.beat)
    # Known to it, but not by its right to read figures.
    assert house.call("GET", "/metrics", token="user").status_code == 403
    before = scrape(house)
    assert value(before, "motet_up", service="postgres") == 1
    house.database.close()
    url = make_url(house.database.libpq_url)
    with psycopg.connect(url.set(database="postgres").render_as_string(False), autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS false")
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [url.database]
        )
        found = scrape(house)
        assert value(found, "motet_up", service="postgres") == 0
        assert value(found, "motet_up", service="redis") == 1
        assert value(found, "motet_backlog_seconds", worker="gpu-1") == 3.5
        assert not [name for name, _ in found if name.startswith(("motet_jobs", "motet_leader"))]
        token_id, _, secret = house.tokens["read"].partition(".")
        wrong = f"{token_id}.{secret[:-1]}{'A' if secret[-1] != 'A' else 'B'}"
        assert house.call("GET", "/metrics", token=wrong).status_code == 401
        assert house.call("GET", "/metrics", token="user").status_code == 403
        assert house.call("GET", "/metrics", token="admin").status_code == 503, "never seen before"
        assert house.call("GET", "/v1/jobs", token="read").status_code == 503, "for figures only"
        admin.execute(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS true")
    assert value(scrape(house), "motet_up", service="postgres") == 1


def test_a_revoked_token_reads_nothing_even_if_it_did_before(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of one that another process revoked it is heard within two seconds.
    monkeypatch.setattr("scheduler.api.auth._FRESH_S", 0.0)
    scrape(house)
    house.sql("UPDATE token SET revoked = now() WHERE name = 'read'")
    assert house.call("GET", "/metrics", token="read").status_code == 401


# -- what it costs


_FINISHED_JOBS = """
    INSERT INTO job (id, tenant_id, state, fields, n_tasks, request_digest, created, closed, finished)
    SELECT gen_random_uuid(), t.id, 'succeeded', '{text}', 1, '', at, at, at
      FROM tenant t, generate_series(now() - interval '9 days', now() - interval '1 day', interval '40 s') at
     WHERE t.name = 'default'"""
_THEIR_PASSES = """
    INSERT INTO pass (job_id, number, kind, model_id, numerics, max_tokens, input)
    SELECT j.id, 0, 'k', (SELECT min(id) FROM model), 'fast', 0, '{text}' FROM job j"""
_THEIR_SUBTASKS = """
    INSERT INTO subtask (job_id, pass_number, state, blocks, los, his, sizes, todo, n_rows, bytes)
    SELECT j.id, 0, 'done', '{0}', '{0}', '{1}', '{1}', 1, 1, 1 FROM job j, generate_series(1, 3)"""


def test_what_is_finished_is_never_read_again(house: House) -> None:
    for statement in (_FINISHED_JOBS, _THEIR_PASSES, _THEIR_SUBTASKS):
        house.sql(statement)
    with psycopg.connect(house.database.libpq_url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
    house.submit(["a"])
    with house.database.transaction() as connection:
        found = store.figures(connection, None)
        assert [job.state for job in found.jobs] == ["running"]
        for statement in store.STATEMENTS:
            values = {"since": found.now} if ":since" in statement.text else {}
            plan = "\n".join(connection.execute(text(f"EXPLAIN {statement.text}"), values).scalars())
            assert "Seq Scan on job" not in plan, plan
            assert "Seq Scan on subtask" not in plan, plan
            assert "Seq Scan on pass" not in plan, plan
