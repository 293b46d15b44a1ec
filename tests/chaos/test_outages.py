"""Outages of servers and of the scheduler's own processes, in a whole cluster of real ones: work goes on by itself.

Each test breaks one thing in the middle of a job, measures when another job passes all the way again, and demands each
cell of the first one once. Times are printed (``pytest -s``); limits hold on a busy machine, so they are three times
what docs/guarantees.md promises.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
import psycopg
import pytest
import redis

from motet import Client
from motet.errors import MotetError
from motet.job import Job
from motet.local.children import Child, marked
from motet.local.places import SocketDir, free_port
from motet.protocol.redis_url import redis_py_url
from motet.protocol.transport import OUTCOMES
from motet.tasks import Function
from tests.chaos.house import House
from tests.chaos.oracle import expected
from tests.chaos.recovery import Watcher

Found = TypeVar("Found")
#: Limits are for two quiet cores.
SLACK = 3.0


def until(what: Callable[[], Found], within_s: float, words: str) -> Found:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"{words}: not within {within_s:.0f} s"
        time.sleep(0.02)
    return found


class Proxy:
    """A line to Redis that can go dead: what is connected stays connected, and hears nothing any more."""

    def __init__(self) -> None:
        self.port = free_port()
        self.target = ""
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._holes: set[socket.socket] = set()
        self._door = socket.create_server(("127.0.0.1", self.port))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def black_hole(self) -> int:
        """From now on nothing passes over the lines that there are. How many there are."""
        self._holes.update(end for pair in self._pairs for end in pair)
        return len(self._holes) // 2

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        for pair in self._pairs:
            for end in pair:
                end.close()
        self._door.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            other = {a: b for pair in self._pairs for a, b in (pair, pair[::-1])}
            live = [end for end in other if end not in self._holes]
            for end in select.select([self._door, *live], [], [], 0.05)[0]:
                if end is self._door:
                    self._pairs.append((end.accept()[0], self._connect()))
                elif not self._pass_on(end, other[end]):
                    self._pairs = [pair for pair in self._pairs if end not in pair]

    def _connect(self) -> socket.socket:
        line = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            line.connect(self.target)
        return line

    def _pass_on(self, end: socket.socket, other: socket.socket) -> bool:
        try:
            if some := end.recv(1 << 16):
                other.sendall(some)
                return True
        except OSError:
            pass
        end.close()
        other.close()
        return False


#: The workers' clocks are wrong, one's by an hour ahead and the next one's by an hour behind: nothing may depend on them.
CLOCKS = """
import os, time
if "MOTET_RUN" in os.environ and "MOTET_DATABASE_URL" not in os.environ:
    true_ns = time.time_ns
    time.time_ns = lambda: true_ns() + (1 if os.getpid() % 2 else -1) * 3600 * 10**9
    time.time = lambda: time.time_ns() / 1e9
"""


class Proxied(House):
    """The chaos house, with all of its processes behind a proxy of Redis, and with workers whose clocks are wrong."""

    proxy: Proxy
    first = CLOCKS

    def _env(self, **settings: str) -> dict[str, str]:
        if "REDIS_URL" in settings:
            settings["REDIS_URL"] = self._through_proxy(settings["REDIS_URL"])
        return super()._env(**settings)

    def _child(self, name: str, command: list[str], env: Any, *more: Any, **kw: Any) -> Any:
        url = env.get("MOTET_REDIS_URL", "")
        return super()._child(
            name, command, {**env, "MOTET_REDIS_URL": self._through_proxy(url)}, *more, **kw
        )

    def _through_proxy(self, url: str) -> str:
        if not url.startswith("redis+socket"):
            return url
        who, _, path = redis_py_url(url).removeprefix("unix://").partition("@")
        self.proxy.target = path.partition("?")[0]
        return f"redis://{who}@127.0.0.1:{self.proxy.port}/0"


@dataclass
class Ground:
    """A running house, and a client of it."""

    house: House
    client: Client
    #: In front of its Redis.
    proxy: Proxy | None = None

    def begin(self, rows: int = 500, task: str = "weigh") -> tuple[Job, list[str]]:
        """A job that is under way: some of its cells are there, and many are not."""
        texts = [f"row {i} of {time.monotonic_ns()}" for i in range(rows)]
        job = self.client.submit(texts, {task: Function(task)}, reuse=False, progress=False)
        until(lambda: self.cells(job) > 0, 30 * SLACK, "some cells")
        assert self.cells(job) < rows, "it must still be under way"
        return job, texts

    def cells(self, job: Job) -> int:
        return int(self.house.sql("SELECT cells_ok FROM job WHERE id = %s", job.id)[0][0])

    def probe(self, what: str, since: float, limit_s: float) -> None:
        """Another job goes all the way; the time since the fault is noted, and must be within the limit."""
        texts = [f"probe {time.monotonic_ns()} {i}" for i in range(3)]
        job = self.client.submit(
            texts, {"digest": Function("digest")}, priority="interactive", reuse=False, progress=False
        )
        job.wait(timeout=limit_s * SLACK + 30)
        took_s = time.monotonic() - since
        print(f"\n{what}: work goes on after {took_s:.1f} s (promised: {limit_s} s)")
        assert took_s <= limit_s * SLACK, what

    def assert_whole(self, job: Job, texts: list[str], task: str = "weigh") -> None:
        """Each cell once, and right; the counters true; nothing left lying about."""
        job.wait(timeout=120)
        assert job.state == "succeeded"
        answers = [(row.index, row[task].value) for row in job.results()]
        assert answers == [(i, expected(task, text)[1]) for i, text in enumerate(texts)]
        [(ok, error, skipped)] = self.house.sql(
            "SELECT cells_ok, cells_error, cells_skipped FROM job WHERE id = %s", job.id
        )
        assert (ok, error, skipped) == (len(texts), 0, 0)
        for table in ("lease", "piece"):
            of_job = (
                "subtask_id IN (SELECT id FROM subtask WHERE job_id = %s)"
                if table == "lease"
                else "job_id = %s"
            )
            assert self.house.sql(f"SELECT count(*) FROM {table} WHERE {of_job}", job.id) == [(0,)]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    # So late that an entry which its reader left is only inherited in time, never reclaimed; and sub-tasks so short
    # that what is measured is how long work was held up, and not how long it takes to do it again.
    house = Proxied(
        tmp_path_factory.mktemp("outages") / "data",
        settings={"MOTET_RECLAIM_S": "600", "MOTET_SUBTASK_S": "0.5"},
    )
    house.proxy = Proxy()
    try:
        with house, Client(house.url, house.tokens["user"], timeout=120) as client:
            yield Ground(house, client, house.proxy)
    finally:
        house.proxy.close()


def test_clocks_of_workers_that_are_wrong_by_an_hour_change_nothing(ground: Ground) -> None:
    job, texts = ground.begin(200)
    ground.probe("with wrong clocks", time.monotonic(), 5.0)
    ground.assert_whole(job, texts)
    told = [json.loads(line)["at"] for line in ground.house._log("workers").read_text().splitlines()[-20:]]
    assert any(abs(datetime.fromisoformat(at).timestamp() - time.time()) > 3000 for at in told), (
        "they are wrong"
    )


# -- the scheduler's processes


def test_what_dead_aggregators_had_read_is_inherited_by_the_next(ground: Ground) -> None:
    house = ground.house
    job, texts = ground.begin()
    with psycopg.connect(house.database_url) as line:
        # Nobody can record an outcome of it now, so what they have read they hold.
        line.execute("SELECT 1 FROM job WHERE id = %s FOR UPDATE", [job.id])
        with house.redis() as r:
            until(lambda: r.xpending(OUTCOMES, "aggregators")["pending"], 20, "an outcome that was read")
        before = set(house.named("aggregate").values())
        house.kill(*before)
    until(lambda: not set(house.named("aggregate").values()) & before, 10, "the dead are seen")
    until(lambda: len(house.named("aggregate")) == 2, 30, "new aggregators")
    # Each touches its pulse at its first round, which is when it has started.
    until(lambda: house._pulse("aggregate").exists() and house._pulse("aggregate-2").exists(), 60, "both up")
    began = time.monotonic()
    ground.probe("all aggregators killed", began, 2.0)
    ground.assert_whole(job, texts)
    with house.redis() as r:
        until(lambda: not r.xlen(OUTCOMES), 10, "the stream is settled")
        until(lambda: len(_consumers(r)) <= 2, 10, "two consumers")
        assert all(one["pending"] == 0 for one in _consumers(r))


def _consumers(r: redis.Redis) -> Any:
    return r.xinfo_consumers(OUTCOMES, "aggregators")


def test_when_the_leader_is_killed_another_leads_at_once(ground: Ground) -> None:
    house = ground.house
    job, texts = ground.begin()
    name = until(house.leader, 10, "a leader") or ""
    [(epoch,)] = house.sql("SELECT epoch FROM leader")
    house.kill(house.pids[name])
    began = time.monotonic()
    until(
        lambda: house.sql("SELECT epoch FROM leader WHERE until > now()")[0][0] > epoch,
        3.5 * SLACK,
        "another epoch",
    )
    ground.probe("leader killed", began, 6.5)
    ground.assert_whole(job, texts)


def test_a_leader_that_is_stopped_in_a_transaction_writes_nothing_when_it_goes_on(ground: Ground) -> None:
    house = ground.house
    name = until(house.leader, 10, "a leader") or ""
    victim = house.pids[name]
    [(epoch,)] = house.sql("SELECT epoch FROM leader")
    texts = [f"row {i} of {time.monotonic_ns()}" for i in range(50)]
    waits = """SELECT count(*) FROM pg_stat_activity
                WHERE wait_event_type = 'Lock' AND query LIKE '%%WITH k AS MATERIALIZED%%'"""
    with psycopg.connect(house.database_url) as line:
        line.execute("LOCK TABLE lease IN EXCLUSIVE MODE")
        job = ground.client.submit(texts, {"weigh": Function("weigh")}, reuse=False, progress=False)
        # It has passed the fence, opened sub-tasks, and now waits to lease them.
        until(lambda: house.sql(waits) == [(1,)], 20, "a leader in a transaction")
        house.kill(victim, sign=signal.SIGSTOP)
        began = time.monotonic()
    try:
        until(
            lambda: house.sql("SELECT epoch FROM leader WHERE epoch > %s AND until > now()", epoch),
            6.5 * SLACK,
            "another epoch",
        )
        print(f"\nleader stopped in a transaction: another led after {time.monotonic() - began:.1f} s")
        ground.probe("leader stopped", began, 6.5)
        newer = house.sql("SELECT min(id) FROM subtask WHERE job_id = %s", job.id)
    finally:
        house.kill(victim, sign=signal.SIGCONT)
    ground.assert_whole(job, texts)
    assert house.sql("SELECT min(id) FROM subtask WHERE job_id = %s", job.id) == newer, (
        "nothing came from before"
    )
    assert victim in house.pids.values(), "it stands by, and did not die of it"


def test_one_that_stands_still_is_killed_and_started_again(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = ground.house
    monkeypatch.setattr("motet.local.cluster.SILENT_S", 3.0)
    for name in ("api", "dispatch", "aggregate"):
        before = house.pids[name]
        house.kill(before, sign=signal.SIGSTOP)
        until(lambda name=name, before=before: house.pids.get(name, before) != before, 30, f"another {name}")
    ground.probe("API, dispatcher and aggregator stopped for good", time.monotonic(), 6.5)


# -- workers


@pytest.fixture
def watcher(ground: Ground) -> Iterator[Watcher]:
    """Knows when everything that was under way at a fault is recorded, and something that was leased after it."""
    watching = Watcher(ground.house)
    watching.start()
    yield watching
    watching.stop()


def _healed(watcher: Watcher, fault: Callable[[], object], what: str, limit_s: float) -> float:
    """Do it, and return the seconds until work goes on: all that was under way, too."""
    wound = watcher.wound(what, frozen=False)
    assert wound.under_way, "something must be under way"
    fault()
    wound.closed.wait(limit_s * SLACK + 5)
    assert wound.healed_s is not None, f"{what}: work does not go on"
    print(f"\n{what}: its rows are recorded after {wound.healed_s:.1f} s (promised: {limit_s} s)")
    assert wound.healed_s <= limit_s * SLACK, what
    return wound.healed_s


def _busy(house: House, job: Job) -> tuple[str, int]:
    """Name and process of a worker that holds rows of a job."""

    def found() -> tuple[str, int] | None:
        held = house.sql(
            "SELECT DISTINCT l.worker FROM lease l JOIN subtask s ON s.id = l.subtask_id WHERE s.job_id = %s",
            job.id,
        )
        pids = house.worker_pids()
        return next(((name, pids[name]) for (name,) in held if name in pids), None)

    return until(found, 20 * SLACK, "a worker that holds something")


def test_what_a_killed_worker_held_is_recorded_soon(ground: Ground, watcher: Watcher) -> None:
    house = ground.house
    job, texts = ground.begin(6000)
    took = []
    for _ in range(5):
        _, pid = _busy(house, job)
        took.append(_healed(watcher, lambda pid=pid: house.kill(pid), "worker killed", 6.0))  # type: ignore[misc]
    assert statistics.median(took) <= 3.0 * SLACK
    ground.assert_whole(job, texts)


def test_what_a_stopped_worker_held_is_recorded_and_its_late_words_change_nothing(
    ground: Ground, watcher: Watcher
) -> None:
    house = ground.house
    job, texts = ground.begin(3000)
    _, pid = _busy(house, job)
    try:
        _healed(watcher, lambda: house.kill(pid, sign=signal.SIGSTOP), "worker stopped", 15.0)
    finally:
        house.kill(pid, sign=signal.SIGCONT)
    ground.assert_whole(job, texts)


def test_what_a_host_held_that_is_gone_is_recorded_elsewhere(ground: Ground, watcher: Watcher) -> None:
    """A second launcher, killed with all its workers: nobody starts them again, and nobody tells of their death."""
    house = ground.house
    env = house._env(URL=house.url, CACHE_DIR=str(house.data / "cache"))
    env |= {
        "MOTET_TOKEN": house.tokens["worker"],
        "MOTET_REDIS_URL": house._through_proxy(house.valkey.urls.worker),  # type: ignore[attr-defined]
    }
    command = house.command("workers", "--cpus", "1", "--name", "elsewhere")
    with (house.data / "logs" / "elsewhere.log").open("wb") as log:
        launcher = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        job, texts = ground.begin(4000)

        def holds() -> bool:
            held = house.sql("SELECT 1 FROM lease WHERE worker = 'elsewhere-cpu0' LIMIT 1")
            return bool(held) and "elsewhere-cpu0" in house.worker_pids()

        until(holds, 60 * SLACK, "the other host works too")
        whole = psutil.Process(launcher.pid)
        gone = [launcher.pid, *(child.pid for child in whole.children(recursive=True))]
        assert len(gone) >= 3, "launcher, fork server, worker"
        _healed(watcher, lambda: house.kill(*gone), "host gone", 15.0)
    finally:
        launcher.kill()
        launcher.wait()
    ground.assert_whole(job, texts)


@pytest.mark.parametrize(
    ("word", "error"), [("#kill", "poison"), ("#hog", "out_of_memory"), ("#hang", "poison")]
)
def test_a_row_that_ends_its_process_is_the_only_one_that_is_an_error(
    ground: Ground, word: str, error: str
) -> None:
    """Beside 63 rows of its own job, and 64 of another tenant."""
    house = ground.house
    log = house._log("workers")
    ground.begin(60)[0].wait(timeout=60 * SLACK)  # so that its speed is known
    before = log.read_text().count('"event": "worker died"')
    texts = [f"row {i} of {time.monotonic_ns()}" for i in range(64)]
    texts[37] += f" {word}"
    [other_token] = house.tenants(1)
    with Client(house.url, other_token, timeout=120) as other:
        began = time.monotonic()
        jobs = [
            client.submit(rows, {"weigh": Function("weigh")}, reuse=False, progress=False)
            for client, rows in ((ground.client, texts), (other, [f"{text} too" for text in texts[:37]]))
        ]
        for job in jobs:
            job.wait(check=False, timeout=80 * SLACK)
        [mine, others] = [{row.index: row["weigh"] for row in job.results(check=False)} for job in jobs]
    print(f"\n{word}: both jobs ended after {time.monotonic() - began:.1f} s")
    assert {i: cell.error.error for i, cell in mine.items() if cell.error} == {37: error}
    assert all(cell.value == expected("weigh", texts[i])[1] for i, cell in mine.items() if i != 37)
    assert len(mine) == 64
    assert [cell.value for _, cell in sorted(others.items())] == [
        expected("weigh", f"{text} too")[1] for text in texts[:37]
    ]
    deaths = log.read_text().count('"event": "worker died"') - before
    print(f"{word}: {deaths} processes ended")
    assert deaths <= (0 if word == "#hog" else 2 * math.log2(64) + 3)


# -- the API


def test_an_upload_goes_on_at_the_part_at_which_the_api_was_killed(ground: Ground) -> None:
    house = ground.house
    name = f"upload {time.monotonic_ns()}"
    texts = [f"row {i} of {name}" for i in range(5000)]
    killed = []

    def rows() -> Iterator[str]:
        for i, text in enumerate(texts):
            # The first two parts are on their way, and a third one is being cut.
            if i == 2500:
                killed.append(house.pids["api"])
                house.kill(*killed)
            yield text

    began = time.monotonic()
    job = ground.client.submit(
        rows(), {"digest": Function("digest")}, name=name, reuse=False, progress=False, key=name
    )
    print(f"\nAPI killed during an upload: 202 after {time.monotonic() - began:.1f} s")
    assert killed
    assert house.sql("SELECT count(*), max(n_rows) FROM job WHERE name = %s", name) == [(1, 5000)]
    blocks = house.sql("SELECT first_row, n_rows FROM block WHERE job_id = %s ORDER BY number", job.id)
    assert [first for first, _ in blocks] == [sum(n for _, n in blocks[:i]) for i in range(len(blocks))]
    assert sum(n for _, n in blocks) == 5000
    ground.assert_whole(job, texts, "digest")


# -- Redis


def test_redis_killed_and_started_empty(ground: Ground) -> None:
    job, texts = ground.begin()
    ground.house.kill(ground.house.pids["valkey"])
    ground.probe("Redis killed", time.monotonic(), 10.0)
    ground.assert_whole(job, texts)


def test_redis_emptied(ground: Ground) -> None:
    job, texts = ground.begin()
    with ground.house.redis() as r:
        r.flushall()
    ground.probe("Redis emptied", time.monotonic(), 10.0)
    ground.assert_whole(job, texts)


def test_redis_full_and_then_not(ground: Ground) -> None:
    job, texts = ground.begin()
    with ground.house.redis() as r:
        before = r.config_get("maxmemory")["maxmemory"]
        r.config_set("maxmemory", "1mb")
        try:
            with pytest.raises(redis.OutOfMemoryError):
                r.set("motet:filler", "x")
            time.sleep(10)  # longer than a silent worker is believed alive, and a lease lasts
        finally:
            r.config_set("maxmemory", str(before))
    ground.probe("Redis full for 10 s", time.monotonic(), 10.0)
    ground.assert_whole(job, texts)


def test_redis_frozen(ground: Ground) -> None:
    job, texts = ground.begin()
    ground.house.kill(ground.house.pids["valkey"], sign=signal.SIGSTOP)
    time.sleep(12)
    ground.house.kill(ground.house.pids["valkey"], sign=signal.SIGCONT)
    ground.probe("Redis frozen for 12 s", time.monotonic(), 10.0)
    ground.assert_whole(job, texts)


def test_all_lines_to_redis_go_dead(ground: Ground) -> None:
    job, texts = ground.begin()
    assert ground.proxy
    assert ground.proxy.black_hole() >= 6
    ground.probe("lines to Redis dead", time.monotonic(), 15.0)
    ground.assert_whole(job, texts)


# -- Postgres


def test_postgres_dies_twenty_times_while_jobs_come_in(ground: Ground) -> None:
    house = ground.house
    accepted: list[tuple[Job, list[str]]] = []
    stopping = threading.Event()

    def submit() -> None:
        while not stopping.is_set():
            texts = [f"{time.monotonic_ns()} {i}" for i in range(40)]
            with contextlib.suppress(MotetError):
                accepted.append(
                    (
                        ground.client.submit(
                            texts, {"digest": Function("digest")}, reuse=False, progress=False
                        ),
                        texts,
                    )
                )

    writer = threading.Thread(target=submit)
    writer.start()
    [server] = [one for one in house._watched if one.service.name == "postgres"]
    for _ in range(20):
        pid = until(lambda: house.pids.get("postgres"), 30, "Postgres") or 0
        house.kill(pid, sign=signal.SIGQUIT)
        until(lambda pid=pid: house.pids.get("postgres", pid) != pid, 30, "Postgres again")
        server.deaths = 0  # the pauses of the supervisor are another test's
        # In the middle of writes: clients come back at their own pace, and a busy machine has none to spare.
        count, began = len(accepted), time.monotonic()
        while len(accepted) == count and time.monotonic() - began < 4:
            time.sleep(0.02)
    began = time.monotonic()
    stopping.set()
    ground.probe("Postgres died for the 20th time", began, 6.0)
    writer.join(60)
    assert len(accepted) >= 10
    for job, texts in accepted:
        ground.assert_whole(job, texts, "digest")
    print(f"\n{len(accepted)} jobs were accepted meanwhile, and all of them are whole")


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root may mount a small disk")
def test_a_full_disk_refuses_and_keeps_what_it_accepted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    disk = data / "postgres"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m,mode=755", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("mount is not permitted here")
    try:
        with (
            House(data, workers=1, settings={"MOTET_MIN_FREE_MB": "0"}) as house,
            Client(house.url, house.tokens["user"], timeout=120) as client,
        ):
            ground = Ground(house, client)
            job, texts = ground.begin(400)
            filler = disk / "filler"
            with filler.open("wb") as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            status, after = until(lambda: _refused(house), 60, "a submission is refused") or (0, None)
            assert status == 503
            assert int(after or 0) > 0
            filler.unlink()
            ground.probe("disk of Postgres full, then freed", time.monotonic(), 6.0)
            ground.assert_whole(job, texts)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
        _remove_sockets(data)


def _refused(house: House) -> tuple[int, str | None] | None:
    """Status and Retry-After of a submission that is not taken."""
    import http.client

    body = json.dumps(
        {"tasks": {"digest": {"kind": "function", "model": "digest"}}, "rows": ["x" * 200_000] * 20}
    )
    port = int(house.url.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(
        "POST",
        "/v1/jobs",
        body,
        {"Authorization": f"Bearer {house.tokens['user']}", "Content-Type": "application/json"},
    )
    answer = connection.getresponse()
    answer.read()
    return (answer.status, answer.headers["Retry-After"]) if answer.status >= 500 else None


# -- cancel


def test_a_delete_frees_the_devices_and_leaves_nothing(ground: Ground) -> None:
    job, _ = ground.begin(2000)
    job.delete()
    began = time.monotonic()
    until(
        lambda: not any(beat.held for beat in ground.house.living().values()),
        2 * SLACK,
        "the devices are free",
    )
    print(f"\ndeleted: the devices are free after {time.monotonic() - began:.1f} s (promised: 2 s)")
    time.sleep(1.0)
    for table in ("job WHERE id", "subtask WHERE job_id", "piece WHERE job_id", "cells WHERE job_id"):
        assert ground.house.sql(f"SELECT count(*) FROM {table} = %s", job.id) == [(0,)], table


def test_a_cancel_freezes_the_counts_and_frees_the_devices(ground: Ground) -> None:
    job, _ = ground.begin(2000)
    job.cancel()
    began = time.monotonic()
    [(frozen,)] = ground.house.sql(
        "SELECT ROW(cells_ok, cells_error, cells_skipped) FROM job WHERE id = %s", job.id
    )
    until(
        lambda: not any(beat.held for beat in ground.house.living().values()),
        2 * SLACK,
        "the devices are free",
    )
    print(f"\ncancelled: the devices are free after {time.monotonic() - began:.1f} s (promised: 2 s)")
    time.sleep(1.0)
    assert ground.house.sql(
        "SELECT ROW(cells_ok, cells_error, cells_skipped) FROM job WHERE id = %s", job.id
    ) == [(frozen,)]
    assert ground.house.sql(
        "SELECT count(*) FROM lease l JOIN subtask s ON s.id = l.subtask_id WHERE s.job_id = %s", job.id
    ) == [(0,)]


# -- an orderly end


def test_sigterm_to_everything_at_once_ends_all_of_it_in_order_and_the_job_goes_on(ground: Ground) -> None:
    house = ground.house
    job, texts = ground.begin(3000)
    watched = [one for one in house._watched if isinstance(one.service, Child)]
    servers = [one for one in house._watched if not isinstance(one.service, Child)]
    grace_s = max(one.grace_s for one in watched)
    for one in house._watched:
        one.restart_at = math.inf  # whoever ends stays down
    began = time.monotonic()
    for one in watched:
        house.kill(one.service.pid or 0, sign=signal.SIGTERM)
    until(lambda: not any(one.service.alive for one in watched), grace_s, "they end")
    print(f"\nSIGTERM to everything: all ended after {time.monotonic() - began:.1f} s")
    assert {one.service.name: one.service.exit_code for one in watched} == {  # type: ignore[attr-defined]
        one.service.name: 0 for one in watched
    }
    for one in servers:
        house.kill(one.service.pid or 0, sign=signal.SIGTERM)
    until(lambda: not any(one.service.alive for one in servers), grace_s, "the servers end")
    assert not house.worker_pids(), "no worker outlives its launcher"
    for one in house._watched:
        one.restart_at = 0.0
    began = time.monotonic()
    until(lambda: all(one.service.alive for one in house._watched), 60, "all of it is started again")
    ground.probe("started again after SIGTERM", began, 15.0)
    ground.assert_whole(job, texts)


# -- `motet up` itself

UP = """
import sys
from pathlib import Path
from tests.chaos.house import House
data = Path(sys.argv[1])
House(data).run_forever((data / "ready").touch)
"""


def test_a_job_outlives_motet_up_however_that_ends(tmp_path: Path) -> None:
    data = tmp_path / "data"
    texts = [f"row {i}" for i in range(6000)]
    job_id = ""
    try:
        for end in ("kill -9", "Ctrl-C", "SIGTERM to everything", ""):
            began = time.monotonic()
            (data / "ready").unlink(missing_ok=True)
            process = subprocess.Popen([sys.executable, "-c", UP, str(data)], cwd=Path(__file__).parents[2])
            until((data / "ready").exists, 90, "ready")
            told = json.loads((data / "client.json").read_text())
            print(f"\nup in {time.monotonic() - began:.1f} s")
            with Client(told["url"], told["token"], timeout=60) as client:
                if not job_id:
                    job_id = client.submit(texts, {"weigh": Function("weigh")}, progress=False).id
                job = client.job(job_id)
                if not end:
                    job.wait(timeout=120)
                    assert [row["weigh"].value for row in job.results()] == [
                        expected("weigh", t)[1] for t in texts
                    ]
                    print(f"ended {time.monotonic() - began:.1f} s after the last start")
                else:
                    done = job.progress.ok
                    until(lambda job=job, done=done: job.progress.ok > done, 60, "the job goes on")  # type: ignore[misc]
                    assert job.state == "running"
            family = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
            assert len(family) >= 8
            match end:
                case "kill -9":
                    process.kill()
                case "SIGTERM to everything":
                    for pid in (process.pid, *family):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGTERM)
                case _:
                    process.send_signal(signal.SIGINT)
            process.wait(60)
            until(
                lambda family=family: not marked(str(data)) and not any(map(psutil.pid_exists, family)),
                10,
                f"nothing runs after {end or 'the end'}",
            )
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        _remove_sockets(data)


def _remove_sockets(data: Path) -> None:
    for link in data.glob("*/run"):
        SocketDir(link.parent).remove()
