"""Why a job waits and when it is done: over real HTTP, Postgres and Redis, with the live dispatcher and aggregator."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import redis

from motet.client import Client
from motet.local.valkey import ValkeyUrls
from motet.messages.explanation import Explanation
from motet.protocol.redis_url import redis_py_url
from motet.protocol.transport import RedisTransport, RedisWorkerTransport, queue_name
from motet.protocol.wire import Assignment, Beat, Outcome, Usage
from scheduler import aggregator, leading
from scheduler.aggregator import Aggregator
from scheduler.dispatcher import Dispatcher
from scheduler.store.database import Database
from scheduler.store.listening import Listener
from tests.integration import test_protocol as protocol
from tests.integration.api_house import House, a_house
from tests.integration.landing import land, register
from tests.messages import holds

#: Seconds that the workers here take for a row.
ROW_S = 0.004
HUGE = replace(protocol.TRUNK, name="huge", trunk="h", parameters=10**11)


@dataclass
class Works:
    """An API, a dispatcher that steps when it is told to, and workers that beat when they are told to."""

    api: House
    urls: ValkeyUrls
    dispatcher: Dispatcher
    lines: dict[str, RedisWorkerTransport] = field(default_factory=dict)
    seq: int = 0

    def beat(self, name: str, **more: Any) -> None:
        self.seq += 1
        line = self.lines.setdefault(name, RedisWorkerTransport(self.urls.worker, name))
        line.beat(beat_of(name, self.seq, **more))

    def land(self, rows: int = 300, **more: Any) -> UUID:
        return land(self.api.database, protocol.texts(rows), protocol.TASKS, block_rows=64, **more)

    def explain(self, job: object, token: str = "user") -> Explanation:
        answer = self.api.call("GET", f"/v1/jobs/{job}/explain", token=token)
        assert answer.status_code == 200, answer.text
        holds(Explanation, answer.json())
        return Explanation.of(answer.json())


def beat_of(name: str, seq: int, **more: Any) -> Beat:
    known = {"boot": "b", "engines": ("encoder",), "device_name": "hand", "memory_mb": 4000}
    return Beat(**{"worker": name, "seq": seq, **known, **more})


@pytest.fixture
def works(database_url: str, redis_url: str, redis_urls: ValkeyUrls, tmp_path: Path) -> Iterator[Works]:
    with a_house(database_url, tmp_path, redis_url=redis_url, subtask_s=0.5, tick_s=0.1) as api:
        register(api.database, protocol.TRUNK, protocol.HEAD)
        found = Works(api, redis_urls, Dispatcher(api.database, RedisTransport(redis_url), api.settings))
        found.dispatcher.step(0.0)
        yield found
        for line in found.lines.values():
            line.close()


def test_a_job_without_any_worker_says_what_is_missing(works: Works) -> None:
    job = works.land()
    told = works.explain(job)
    assert told.says == "It waits for a worker: none is alive. Start one with `motet worker`."
    assert told.eta is None
    assert (told.passes[0].rows.waiting, told.passes[0].tasks) == (300, ("size", "again"))


def test_a_model_too_large_for_every_worker_names_both_sizes(works: Works) -> None:
    register(works.api.database, HUGE)
    works.beat("w1")
    job = works.api.submit(["a", "b"], {"vector": {"kind": "embed", "model": "huge"}})["id"]
    told = works.explain(job)
    assert told.says.startswith("It waits for a worker with more memory: huge@1 needs ")
    assert "and the largest of 1 worker has 3,680 MB for models" in told.says
    assert told.passes[0].cannot[0].why == "too_small"


def test_a_worker_that_could_not_load_the_model_tells_why_in_its_own_words(works: Works) -> None:
    works.api.sql(
        "INSERT INTO refusal (model_id, worker, boot, why) SELECT id, 'w1', 'b', 'weights are torn' FROM model"
        " WHERE name = 'length'"
    )
    works.beat("w1")
    job = works.land()
    told = works.explain(job)
    assert told.notes[-1] == "w1 cannot run trunk@1: weights are torn."
    works.beat("w2")
    told = works.explain(job)
    assert told.says.startswith("It waits for a worker to load trunk@1, about ")
    assert told.eta is not None
    assert told.passes[0].can_load[0].workers == 1


def test_a_drained_worker_can_be_resumed(works: Works) -> None:
    works.beat("w1")
    assert works.api.call("POST", "/v1/workers/w1/drain", token="admin").status_code == 200
    told = works.explain(works.land())
    assert told.passes[0].cannot[0].why == "drained"
    assert told.eta is None


def test_a_plan_counts_on_workers_alone_that_can_run_the_model(works: Works) -> None:
    register(works.api.database, HUGE)
    rate = (
        "INSERT INTO rate (trunk, device, numerics, coefficients, covariance, bytes_per_token, tokens_per_row,"
        " observations) SELECT manifest->>'trunk', 'hand', 'fast', '{0,0,0.01,0}', '{0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}',"
        " 4, 64, 9 FROM model WHERE name = 'trunk'"
    )
    works.api.sql(rate)
    asked = {"tasks": {"vector": {"kind": "embed", "model": "trunk"}}, "rows": ["a word"] * 100}

    def plan(**more: Any) -> dict[str, Any]:
        return works.api.call("POST", "/v1/plan", json={**asked, **more}).json()  # type: ignore[no-any-return]

    works.beat("able")
    alone = plan()
    assert alone["seconds"] > 0
    works.beat("of another engine", engines=("spacy-ner",))
    works.beat("small", memory_mb=10)
    works.beat("drained")
    assert works.api.call("POST", "/v1/workers/drained/drain", token="admin").status_code == 200
    works.beat("refuses")
    works.api.sql(
        "INSERT INTO refusal (model_id, worker, boot, why) SELECT id, 'refuses', 'b', 'torn' FROM model"
        " WHERE name = 'trunk'"
    )
    beside = plan()
    assert (beside["seconds"], beside["passes"]) == (alone["seconds"], alone["passes"])
    assert beside["devices"] == 4
    # A pass that no worker can run takes no time that could be told.
    both = plan(tasks={**asked["tasks"], "large": {"kind": "embed", "model": "huge"}})  # type: ignore[dict-item]
    assert [p["seconds"] is None for p in both["passes"]] == [False, True]
    assert both["seconds"] is None


def test_a_job_waits_behind_an_interactive_one_its_own_tenants_and_another_tenants(works: Works) -> None:
    works.land(2000, tenant="other")
    works.beat("w1")
    works.beat("w2")
    # The workers have as much as they may before the others come.
    while works.dispatcher.step(1.0):
        pass
    works.land(1, priority=0)
    own = works.land(100)
    works.api.sql("UPDATE job SET name = 'nightly' WHERE id = :id", id=own)
    works.api.sql("UPDATE job SET name = 'their secret' WHERE tenant_id = :t", t=works.api.tenants["other"])
    job = works.land(50)
    told = works.explain(job)
    assert told.says.startswith("It waits behind 2 jobs of yours and 1 job of another tenant (")
    by_class = {b.priority: b for b in told.beside}
    assert by_class["interactive"].own_jobs == 1
    assert [r.name for r in by_class["normal"].own] == ["nightly"]
    assert (by_class["normal"].other_tenants, by_class["normal"].other_jobs) == (1, 1)
    assert by_class["normal"].other_s > by_class["normal"].own_s > 0
    raw = works.api.call("GET", f"/v1/jobs/{job}/explain").text
    theirs = [str(row.id) for row in works.api.sql("SELECT id FROM job WHERE name = 'their secret'")]
    assert not any(word in raw for word in ("their secret", *theirs))
    assert told.eta is not None
    assert not told.eta.measured, "nobody has answered a row yet"
    assert works.api.call("GET", f"/v1/jobs/{job}/explain", token="stranger").status_code == 404


def test_what_came_back_is_told_with_its_time(works: Works) -> None:
    works.beat("w1")
    job = works.land(10)
    works.api.sql("UPDATE block_pass SET cursor = n WHERE job_id = :job", job=job)
    works.api.sql(
        "INSERT INTO piece (job_id, pass_number, block_number, lo, hi, bytes, tries, not_before)"
        " VALUES (:job, 0, 0, 0, 10, 100, 2, clock_timestamp() + interval '9 s')",
        job=job,
    )
    told = works.explain(job)
    assert told.says.startswith("It waits to try 10 rows again, in ")
    assert told.retries is not None
    assert (told.retries.rows, told.retries.tries) == (10, 2)
    assert told.eta is not None
    assert 8 < told.eta.p50_s < 15


def test_an_upload_that_goes_on_and_a_job_that_has_ended(works: Works) -> None:
    works.beat("w1")
    job = works.api.open()["id"]
    works.api.put(job, 0, [f"text {i}" for i in range(50)])
    told = works.explain(job)
    assert told.says.startswith("It waits for a worker to load tiny@1")
    assert "; what has arrived is done in" in told.says
    assert told.eta is not None
    assert not told.eta.complete
    works.api.call("POST", f"/v1/jobs/{job}/cancel")
    told = works.explain(job)
    assert (told.state, told.eta) == ("cancelled", None)
    assert told.says.startswith("It has ended: cancelled")


# -- and it is true


class Slow:
    """A worker that takes its time for each row, on a thread."""

    def __init__(self, name: str, urls: ValkeyUrls) -> None:
        self.name, self.urls = name, urls
        self.line = RedisWorkerTransport(urls.worker, name)
        self.queue = redis.Redis.from_url(redis_py_url(urls.scheduler))
        self.held: list[tuple[int, int]] = []
        self.resident: tuple[str, ...] = ()

    def beat(self, stopping: threading.Event) -> None:
        seq = 0
        while not stopping.wait(0.1):
            seq += 1
            self.line.beat(beat_of(self.name, seq, held=tuple(self.held), resident=self.resident))

    def work(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            taken = self.queue.brpop([queue_name(self.name)], timeout=0.2)
            if taken:
                subtask, attempt = json.loads(taken[1])["headers"]["motet"]
                self.held.append((subtask, attempt))
                self.answer((subtask, attempt))
                self.held.remove((subtask, attempt))

    def answer(self, key: tuple[int, int]) -> None:
        raw = self.line.fetch(*key)
        if raw is None:
            return
        a = Assignment.decode(raw)
        self.resident = (a.model.digest,)
        busy_s = ROW_S * len(a.texts)
        time.sleep(busy_s)
        tokens = sum(map(len, a.texts))
        outcome = Outcome(
            subtask=a.subtask,
            attempt=a.attempt,
            nonce=a.nonce,
            worker=self.name,
            boot="b",
            verdict="done",
            columns={t.name: protocol.column(list(a.texts)) for t in a.tasks},
            usage=Usage(tokens=tokens, computed_tokens=tokens, text_bytes=tokens, busy_s=busy_s),
        )
        self.line.report(*key, outcome.encode())


@contextmanager
def a_cluster(works: Works) -> Iterator[None]:
    """A dispatcher, an aggregator and two slow workers, each on threads of their own."""
    settings, stopping = works.api.settings, threading.Event()
    own = Database(settings.database_url, pool=4)
    works.dispatcher.stop()
    leader = Dispatcher(own, RedisTransport(settings.redis_url), settings)
    merger = Aggregator(own, RedisTransport(settings.redis_url), settings)
    crew = [Slow(name, works.urls) for name in ("w1", "w2")]
    threads = [
        threading.Thread(target=target, args=arguments)
        for target, *arguments in (
            (leading.run, leader, Listener(own), stopping),
            (aggregator.run, merger, stopping),
            *((one.beat, stopping) for one in crew),
            *((one.work, stopping) for one in crew),
        )
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        own.close()


@pytest.mark.alone
def test_a_running_job_ends_about_when_it_was_said_to(works: Works) -> None:
    with a_cluster(works), Client(works.api.url, works.api.tokens["user"], timeout=20) as client:
        # What this teaches of the workers is known to the next one.
        client.job(str(works.land(600))).wait(timeout=60)
        job = client.job(str(works.land(2500)))
        found: list[tuple[float, Explanation]] = []
        began = time.monotonic()
        for _ in range(3):
            time.sleep(0.5)
            found.append((time.monotonic(), job.explain()))
        job.wait(timeout=60)
        ended = time.monotonic()
    assert ended - began > 4, "long enough to be told about"
    for at, told in found:
        assert told.says.startswith("It runs on 2 workers; done in ")
        assert told.share is not None
        assert told.share.subtasks == told.share.all > 0
        assert told.eta is not None
        assert told.eta.measured
        assert (ended - at) / 1.5 < told.eta.p50_s < 1.5 * (ended - at), str(told)
