"""The door over real servers that are overloaded on purpose: who is refused, why, for how long, and who still passes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import redis

from motet import Classify, Client
from motet.errors import Overloaded, SetupError
from motet.local.valkey import Valkey
from motet.messages.cluster import ClusterPressure
from motet.protocol.redis_url import redis_py_url
from motet.protocol.settings import Settings
from motet.protocol.transport import OUTCOMES, Lag, MemoryTransport, TransportLost
from scheduler.api.door import Door
from scheduler.store.database import Database
from tests.integration.api_house import CLASSIFY, House, a_house
from tests.messages import holds

TASKS = {"topic": Classify("topics")}


def cluster(house: House) -> dict[str, Any]:
    answer = house.call("GET", "/v1/cluster", token="read")
    holds(ClusterPressure, answer.json())
    return answer.json()


def once(house: House, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The cluster as soon as this holds; what the door knows is up to a second old."""
    until = time.monotonic() + 10
    while not holds(found := cluster(house)):
        assert time.monotonic() < until, found
        time.sleep(0.05)
    return found


def refusing(house: House, *reasons: str) -> dict[str, Any]:
    """The cluster as soon as it refuses for these reasons alone."""
    return once(house, lambda found: [r["reason"] for r in found["refused"]] == list(reasons))


def submit(house: House, **options: Any) -> Any:
    return house.call("POST", "/v1/jobs", json={"tasks": CLASSIFY, "rows": ["a"], **options})


def said(answer: Any) -> str:
    """What a refusal says, seen to be one."""
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "overloaded"), answer.text
    assert 1 <= int(answer.headers["Retry-After"]) <= 30
    return str(answer.json()["error"]["message"])


# -- rows that wait


@pytest.fixture
def small(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[House]:
    """A house that takes ten rows."""
    with a_house(database_url, tmp_path, redis_url=redis_url, max_waiting_rows=10) as house:
        yield house


def test_bulk_waits_while_too_many_rows_do_and_interactive_jobs_pass(small: House) -> None:
    begun = small.open(key="begun")["id"]
    small.put(begun, 0, ["a", "b"], first_row=0)
    running = small.submit([f"text {i}" for i in range(10)])["id"]
    assert refusing(small, "rows")["pressure"]["rows"] == 1.0
    for priority in ("normal", "bulk"):
        words = said(submit(small, priority=priority))
        assert words.startswith("12 rows of unfinished jobs wait, and 10 may; wait until jobs have ended")
    assert submit(small, priority="interactive").status_code == 202
    said(small.put(begun, 1, ["c"], first_row=2))
    assert small.open(key="begun")["id"] == begun, "what was taken once is answered as before"
    assert small.close(begun, 1, 2).status_code == 202, "and to close adds no row"
    small.answer(running, 0)
    refusing(small)
    assert submit(small).status_code == 202


def test_an_upload_that_was_let_in_does_not_wait_for_other_uploads(small: House) -> None:
    first, second = small.open()["id"], small.open()["id"]
    for job in (first, second):
        assert small.put(job, 0, [f"{job} {i}" for i in range(8)], first_row=0).status_code == 200
    refusing(small, "rows")
    said(submit(small))
    for job in (first, second):
        assert small.put(job, 1, ["more"], first_row=8).status_code == 200


def test_a_refused_part_costs_its_server_nothing_and_its_line_lives_on(small: House) -> None:
    begun = small.open()["id"]
    running = small.submit([f"text {i}" for i in range(10)])["id"]
    refusing(small, "rows")
    large = ["long " * 200_000] * 16
    for _ in range(3):
        said(small.put(begun, 0, large, first_row=0))
    assert small.job(begun)["rows"] == 0
    small.answer(running, 0)
    refusing(small)
    assert small.put(begun, 0, ["a"], first_row=0).status_code == 200


def test_the_client_waits_says_so_and_goes_on_at_its_block(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        a_house(database_url, tmp_path, max_waiting_rows=1000) as house,
        Client(house.url, house.tokens["user"]) as client,
    ):

        def rows() -> Iterator[str]:
            for i in range(5000):
                if i == 2500:
                    full = house.submit([f"other {j}" for j in range(1000)])["id"]
                    refusing(house, "rows")
                    Timer(1.5, house.answer, (full, 0)).start()
                yield f"text {i}"

        began = time.monotonic()
        with caplog.at_level(logging.WARNING, "motet.upload"):
            job = client.submit(rows(), TASKS, progress=False)
        assert (job.state, job.rows) == ("running", 5000)
        assert time.monotonic() - began > 1.5
        (told,) = [r.getMessage() for r in caplog.records if r.name == "motet.upload"]
        assert told.startswith("waiting to send rows: 1,000 rows of unfinished jobs wait")
        parts = house.sql("SELECT number FROM part WHERE job_id = :job ORDER BY number", job=job.id)
        assert [n for (n,) in parts] == list(range(5)), "each part once, in order"
        assert house.sql(
            "SELECT first_row, n_rows FROM block WHERE job_id = :job ORDER BY number", job=job.id
        ) == [(lo, min(1024, 5000 - lo)) for lo in range(0, 5000, 1024)]


def test_a_client_whose_patience_ends_says_what_is_overloaded_and_what_to_do(small: House) -> None:
    small.submit([f"text {i}" for i in range(10)])
    refusing(small, "rows")
    with (
        Client(small.url, small.tokens["user"], timeout=0.5) as client,
        pytest.raises(
            Overloaded, match=r"10 rows of unfinished jobs wait.*wait until jobs have ended"
        ) as caught,
    ):
        client.submit(["a"], TASKS)
    assert caught.value.retry_after == 5.0
    assert "a longer timeout" in str(caught.value)


# -- Redis


def test_outcomes_that_nobody_records_shut_the_door_and_their_recording_opens_it(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    with (
        a_house(database_url, tmp_path, redis_url=redis_url) as house,
        redis.Redis.from_url(redis_py_url(redis_url)) as line,
    ):
        begun = house.open()["id"]
        feed = house.open(open=True, name="risk", priority="interactive")["id"]
        long_ago_ms = (int(line.time()[0]) - 60) * 1000
        pipe = line.pipeline(transaction=False)
        for i in range(625):
            pipe.xadd(OUTCOMES, {"m": b""}, id=f"{long_ago_ms}-{i + 1}")
        pipe.execute()
        once(house, lambda found: found["throttle"] == 0.5)
        assert submit(house).status_code == 202, "half way the dispatcher slows down, and the door is open"

        for i in range(375):
            pipe.xadd(OUTCOMES, {"m": b""}, id=f"{long_ago_ms}-{i + 626}")
        pipe.execute()
        assert refusing(house, "outcomes")["throttle"] == 0.0
        words = said(submit(house, priority="interactive"))
        assert words.startswith("1,000 outcomes wait to be recorded, the oldest for 6")
        assert "start another aggregator" in words
        said(house.put(begun, 0, ["a"], first_row=0))
        # What an ask is judged by is as old as for all others, and it is asked only now.
        asked = house.call("POST", f"/v1/jobs/{feed}/ask", json={"rows": ["a"], "within_s": 0.2})
        assert said(asked).startswith("1,000 outcomes wait to be recorded")
        assert house.job(feed)["rows"] == 0
        figures = house.call("GET", "/metrics", token="read").text
        assert 'motet_pressure{reason="outcomes"} 1.0' in figures
        assert 'motet_pressure{reason="rows"} 0.0' in figures

        line.xtrim(OUTCOMES, maxlen=0)
        assert refusing(house)["throttle"] == 1.0
        assert house.put(begun, 0, ["a"], first_row=0).status_code == 200
        late = house.call("POST", f"/v1/jobs/{feed}/ask", json={"rows": ["a"], "within_s": 0.2})
        assert late.status_code == 504, "it has landed, and nobody answers here"


def test_a_redis_that_is_nearly_full_shuts_the_door(database_url: str, tmp_path: Path) -> None:
    valkey = Valkey(tmp_path / "valkey", maxmemory="16mb")
    try:
        urls = valkey.start()
        with (
            a_house(database_url, tmp_path, redis_url=urls.scheduler) as house,
            redis.Redis.from_url(redis_py_url(urls.scheduler)) as line,
        ):
            assert submit(house).status_code == 202
            filled = 0
            while (told := line.info("memory"))["used_memory"] < 0.75 * told["maxmemory"]:
                line.set(f"filling {filled}", bytes(100_000))
                filled += 1
            assert refusing(house, "redis_memory")["throttle"] == 0.0
            words = said(submit(house, priority="interactive"))
            assert "of its memory limit, at most 70% is safe; wait until work under way has ended" in words
            line.unlink(*(f"filling {i}" for i in range(filled)))
            refusing(house)
            valkey.stop()
            assert "outcomes" not in once(house, lambda found: found["throttle"] is None)["pressure"]
            assert submit(house).status_code == 202, "without Redis jobs are taken"
    finally:
        valkey.stop()


# -- the disk


def test_a_disk_without_room_shuts_the_door(database_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, min_free_mb=10**9) as house:
        words = said(submit(house, priority="interactive"))
        assert words.startswith("the disk of Postgres has ")
        assert "MB left, and 1,000,000,000 must stay free; remove old jobs" in words
        assert 'motet_pressure{reason="disk"} 1.0' in house.call("GET", "/metrics", token="read").text
    with a_house(database_url, tmp_path, min_free_mb=0) as house:
        assert "disk" not in cluster(house)["pressure"]
        assert submit(house).status_code == 202


def test_limits_that_are_none_are_refused() -> None:
    for name in ("max_waiting_rows", "min_free_mb"):
        with pytest.raises(SetupError, match=f"MOTET_{name.upper()}: got -1; expected a number from"):
            Settings.from_env({f"MOTET_{name.upper()}": "-1"})


# -- what the door costs


@dataclass
class Stream(MemoryTransport):
    """A transport that counts how often it is asked, and may be away, or slow to say so."""

    asked: int = 0
    away: bool = False
    ask: Callable[[], None] = field(default=lambda: None)

    def outcome_backlog(self) -> int:
        self.asked += 1
        self.ask()
        if self.away:
            raise TransportLost
        return super().outcome_backlog()


def test_a_thousand_requests_a_second_look_once(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    stream = Stream(clock=lambda: now[0])
    database = Database(database_url, pool=1)
    door = Door(database, stream, Settings(), clock=lambda: now[0])
    for _ in range(1000):
        door.admit(interactive=False)
        now[0] += 0.0005
    assert stream.asked == 1
    worker = stream.worker("w")
    for i in range(1000):
        worker.report(i, 1, b"")
    now[0] += 30
    with caplog.at_level(logging.WARNING, "scheduler.api.door"):
        for _ in range(10):
            with pytest.raises(Overloaded, match="1,000 outcomes"):
                door.admit(interactive=False)
        assert (stream.asked, door.look().lag) == (2, Lag(1000, 30.0))
        now[0] += 1
        stream.away = True
        door.admit(interactive=False)
    assert [(r.getMessage(), r.reasons) for r in caplog.records] == [
        ("new rows are refused", ["outcomes"]),
        ("new rows are taken", []),
    ]

    def late() -> None:
        now[0] += 3

    stream.ask = late
    now[0] += 1
    door.look()
    now[0] += 14
    door.look()
    assert stream.asked == 4, "a Redis that takes long to say nothing is asked seldom"
    now[0] += 2
    door.look()
    assert stream.asked == 5
    database.close()
