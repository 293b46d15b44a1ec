"""Asks over HTTP: many callers, one open job, each answered in its own round trip, once for each key."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
import pytest

from motet.errors import Overloaded
from motet.results import Block, frames_in, read_frames
from scheduler.api.ask_meter import AskMeter
from scheduler.store.ask_spans import SPAN_S
from scheduler.store.database import StoreUnavailable
from tests.integration.api_house import CLASSIFY, TWO, House, running
from tests.integration.api_house import house as house


@contextmanager
def answering(house: House, job: str, *, after: int = 0) -> Iterator[None]:
    """A hand that answers every block as soon as it has landed, from block ``after`` on."""
    stop = threading.Event()

    def work() -> None:
        number = after
        while not stop.is_set():
            there = house.sql("SELECT 1 FROM block WHERE job_id = :job AND number = :n", job=job, n=number)
            if there:
                house.answer(job, number)
                number += 1
            else:
                time.sleep(0.005)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


def ask(house: House, job: str, rows: Any, *, token: str = "user", **more: Any) -> httpx.Response:
    return house.call("POST", f"/v1/jobs/{job}/ask", token=token, json={"rows": rows, **more})


@pytest.fixture
def feed(house: House) -> str:
    record = house.open(TWO, open=True, name="risk", priority="interactive")
    assert record["state"] == "open"
    return str(record["id"])


def test_a_row_is_answered_in_one_round_trip(house: House, feed: str) -> None:
    with answering(house, feed):
        answer = ask(house, feed, ["hello"])
        assert answer.status_code == 200, answer.text
        (row,) = answer.json()["rows"]
        assert row["row"] == 0
        assert row["topic"] == "business"
        assert row["errors"] == {}
        again = ask(house, feed, [{"text": "next"}, "and next"])
        assert [r["row"] for r in again.json()["rows"]] == [1, 2]


def test_rows_of_a_caller_that_hung_up_take_nobodys_place(house: House, feed: str) -> None:
    with ThreadPoolExecutor(2) as callers:
        under_way = []
        for n in range(2):
            under_way.append(callers.submit(ask, house, feed, [f"row {n}"]))
            while house.job(feed)["rows"] <= n:
                time.sleep(0.01)
        # As much is under way as may be: this one waits, and its caller gives up without a word.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{house.url}/v1/jobs/{feed}/ask",
                headers={"Authorization": f"Bearer {house.tokens['user']}"},
                json={"rows": ["nobody waits for it"], "within_s": 600},
                timeout=1.0,
            )
        time.sleep(0.5)
        with answering(house, feed):
            assert [one.result(20).status_code for one in under_way] == [200, 200]
            assert ask(house, feed, ["next"]).json()["rows"][0]["row"] == 2
    assert house.job(feed)["rows"] == 3


def test_many_callers_share_blocks_and_each_has_its_own_row(house: House, feed: str) -> None:
    with ThreadPoolExecutor(16) as callers, answering(house, feed):
        answers = list(callers.map(lambda n: ask(house, feed, [f"caller {n}"], key=f"k{n}"), range(48)))
        rows = [answer.json()["rows"][0]["row"] for answer in answers]
        assert sorted(rows) == list(range(48))
        again = [ask(house, feed, [f"caller {n}"], key=f"k{n}").json()["rows"][0]["row"] for n in range(48)]
    assert again == rows
    (counted,) = house.sql(
        "SELECT n_rows, n_blocks, (SELECT count(*) FROM ask WHERE job_id = job.id) AS asks FROM job WHERE id = :job",
        job=feed,
    )
    assert counted.n_rows == counted.asks == 48
    assert counted.n_blocks < 48


def test_a_key_stands_for_its_rows_for_ever(house: House, feed: str) -> None:
    with answering(house, feed):
        first = ask(house, feed, ["a"], key="same").json()
        assert ask(house, feed, ["a"], key="same").json() == first
        other = ask(house, feed, ["b"], key="same")
    assert other.status_code == 409
    assert other.json()["error"]["type"] == "conflict"
    assert house.job(feed)["rows"] == 1


def test_the_same_key_at_the_same_moment_lands_once(house: House, feed: str) -> None:
    with ThreadPoolExecutor(8) as callers, answering(house, feed):
        answers = list(callers.map(lambda _: ask(house, feed, ["a"], key="same").json(), range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert house.job(feed)["rows"] == 1


def test_two_api_processes_give_one_answer_for_a_key(house: House, feed: str) -> None:
    """Each gathers by itself; a key is checked under the job's lock."""

    def ask_at(url: str, n: int) -> Any:
        answer = house.line.post(
            f"{url}/v1/jobs/{feed}/ask",
            headers={"Authorization": f"Bearer {house.tokens['user']}"},
            json={"rows": [f"caller {n}"], "key": f"k{n}"},
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["rows"][0]

    with running(house.settings) as second, ThreadPoolExecutor(16) as callers, answering(house, feed):
        here = [callers.submit(ask_at, house.url, n) for n in range(24)]
        there = [callers.submit(ask_at, second, n) for n in range(24)]
        rows = [one.result(20) for one in here]
        assert [one.result(20) for one in there] == rows
    assert sorted(row["row"] for row in rows) == list(range(24))
    assert house.job(feed)["rows"] == 24


def test_a_bad_row_refuses_its_ask_alone(house: House, feed: str) -> None:
    with answering(house, feed):
        found = ask(house, feed, ["good", {"wrong": 1}, "also good"], keys=["a", "b", "c"])
        assert found.status_code == 200, found.text
        good, bad, also = found.json()["rows"]
        assert sorted((good["row"], also["row"])) == [0, 1]
        assert bad["error"]["type"] == "invalid_job"
        assert "rows.text" in bad["error"]["message"]
        alone = ask(house, feed, [{"wrong": 1}])
    assert alone.status_code == 422
    assert house.job(feed)["rows"] == 2


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"rows": []}, "rows"),
        ({"rows": ["x"] * 65}, "rows"),
        ({"rows": "x"}, "rows"),
        ({}, "rows"),
        ({"rows": ["x"], "within_s": 0}, "within_s"),
        ({"rows": ["x"], "within_s": -1}, "within_s"),
        ({"rows": ["x"], "key": "k" * 10_000}, "key"),
        ({"rows": ["x"], "key": ""}, "key"),
        ({"rows": ["x", "y"], "keys": ["k"]}, "keys"),
        ({"rows": ["x", "y"], "keys": ["k", "k"]}, "keys"),
        ({"rows": ["x"], "keys": ["k"], "key": "j"}, "key"),
        ({"rows": ["x"], "unheard": 1}, "unheard"),
    ],
)
def test_what_no_ask_is_is_refused_by_name(house: House, feed: str, body: Any, field: str) -> None:
    answer = house.call("POST", f"/v1/jobs/{feed}/ask", json=body)
    assert answer.status_code == 422, answer.text
    assert field in [p["field"] for p in answer.json()["error"]["problems"]], answer.text
    assert house.job(feed)["rows"] == 0


def test_every_refusal_says_what_was_expected_and_what_to_do(house: House, feed: str) -> None:
    for body, sentence in (
        ({"rows": ["x"] * 65}, "expected a list of 1 to 64 rows; mend it"),
        ({"rows": ["x"], "key": "k" * 10_000}, "expected text of 1 to 200 characters; mend it"),
        (
            {"rows": ["x"], "within_s": 0},
            "within_s: got 0; expected seconds, more than 0 and at most 3,600; mend",
        ),
        (
            {"rows": ["x"], "within_s": -1},
            "within_s: got -1; expected seconds, more than 0 and at most 3,600; mend",
        ),
        (
            {"rows": ["x", "y"], "keys": ["k"]},
            "keys: got 1 keys; expected 2, a key for each row; add the others",
        ),
    ):
        answer = house.call("POST", f"/v1/jobs/{feed}/ask", json=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_job")
        assert sentence in answer.json()["error"]["message"]
    unknown = "0b9f3c1e-6f0c-4f0e-9b0a-2f6f0a3c8d11"
    assert f"no job {unknown}" in ask(house, unknown, ["a"]).json()["error"]["message"]
    with answering(house, feed):
        ask(house, feed, ["a"], key="k")
        other = ask(house, feed, ["b"], key="k")
    assert other.json()["error"]["message"] == "this key was used for other rows; use a new key"
    house.call("POST", f"/v1/jobs/{feed}/close", json={})
    closed = ask(house, feed, ["b"])
    assert (closed.status_code, closed.json()["error"]["type"]) == (409, "conflict")
    assert closed.json()["error"]["message"] == f"job {feed} is succeeded and takes no more rows"


def test_unknown_and_foreign_and_ordinary_jobs_take_no_asks(house: House, feed: str) -> None:
    assert ask(house, "0b9f3c1e-6f0c-4f0e-9b0a-2f6f0a3c8d11", ["a"]).status_code == 404
    assert ask(house, feed, ["a"], token="stranger").status_code == 404
    assert ask(house, feed, ["a"], token="read").status_code == 403
    ordinary = house.open(CLASSIFY)["id"]
    refused = ask(house, ordinary, ["a"])
    assert refused.status_code == 409
    assert "loading" in refused.text


def test_an_open_job_takes_no_parts_and_no_rows_of_its_own(house: House, feed: str) -> None:
    assert house.put(feed, 0, ["a"]).status_code == 409
    answer = house.call("POST", "/v1/jobs", json={"tasks": CLASSIFY, "open": True, "rows": ["a"]})
    assert answer.status_code == 422
    assert answer.json()["error"]["problems"][0]["field"] == "rows"


def test_who_does_not_wait_long_enough_finds_the_answer_by_the_key(house: House, feed: str) -> None:
    late = ask(house, feed, ["slow"], key="k", within_s=0.3)
    assert late.status_code == 504, late.text
    assert late.json()["error"]["type"] == "late"
    assert late.json()["error"]["row"] == 0
    with answering(house, feed):
        assert ask(house, feed, ["slow"], key="k").json()["rows"][0]["row"] == 0
    assert house.job(feed)["rows"] == 1


def test_an_open_job_succeeds_only_when_it_is_closed_and_all_is_answered(house: House, feed: str) -> None:
    with answering(house, feed):
        ask(house, feed, ["a"])
    assert house.job(feed)["state"] == "open"
    house.call("POST", f"/v1/jobs/{feed}/close", json={})
    record = house.job(feed)
    assert record["state"] == "succeeded"
    assert record["cells"] == {"total": 2, "ok": 2, "error": 0, "skipped": 0, "reused": 0}
    assert ask(house, feed, ["b"]).status_code == 409
    assert house.call("POST", f"/v1/jobs/{feed}/close", json={}).status_code == 202


def test_rows_under_way_are_answered_though_the_job_is_closed_meanwhile(house: House, feed: str) -> None:
    with ThreadPoolExecutor(1) as caller:
        waiting: Future[httpx.Response] = caller.submit(ask, house, feed, ["a"])
        while not house.job(feed)["rows"]:
            time.sleep(0.01)
        house.call("POST", f"/v1/jobs/{feed}/close", json={})
        assert house.job(feed)["state"] == "running"
        with answering(house, feed):
            assert waiting.result(20).json()["rows"][0]["row"] == 0
    assert house.job(feed)["state"] == "succeeded"


def test_callers_of_a_job_that_is_cancelled_are_told(house: House, feed: str) -> None:
    with ThreadPoolExecutor(1) as caller:
        waiting: Future[httpx.Response] = caller.submit(ask, house, feed, ["a"])
        while not house.job(feed)["rows"]:
            time.sleep(0.01)
        house.call("POST", f"/v1/jobs/{feed}/cancel")
        answer = waiting.result(20)
    assert answer.status_code == 409
    assert "cancelled" in answer.text
    assert house.job(feed)["cells"]["skipped"] == 2


def test_every_row_can_be_followed_as_it_is_done(house: House, feed: str) -> None:
    with answering(house, feed):
        for n in range(3):
            ask(house, feed, [f"row {n}"])
        blocks, end = house.results(feed, order="done")
        assert [row.index for block in blocks for row in block] == [0, 1, 2]
        assert not end["complete"]
        ask(house, feed, ["one more"])
        more, _ = house.results(feed, order="done", after=end["next"], wait_s=5)
    assert [row.index for block in more for row in block] == [3]


def test_clients_get_frames_in_the_order_of_their_asks(house: House, feed: str) -> None:
    with answering(house, feed):
        answer = house.call(
            "POST",
            f"/v1/jobs/{feed}/ask",
            json={"rows": ["a", {"wrong": 1}, "b"], "keys": ["1", "2", "3"]},
            headers={"Accept": "application/msgpack"},
        )
    first, bad, last = read_frames(answer.content)
    assert bad["error"]["type"] == "invalid_job"
    tasks = house.job(feed)["tasks"]
    rows = [row for frame in (first, last) for row in Block.from_wire(frame, tasks)]
    assert sorted(row.index for row in rows) == [0, 1]
    assert len(rows[0]["vector"].vector or ()) == 2


def asked_as_done(house: House, feed: str, rows: int, *, timeout_s: float = 20.0) -> Any:
    """Rows with a key each, whose frames are to come as they are answered."""
    return httpx.stream(
        "POST",
        f"{house.url}/v1/jobs/{feed}/ask",
        headers={
            "Authorization": f"Bearer {house.tokens['user']}",
            "Accept": "application/msgpack; order=done",
        },
        json={
            "rows": [f"row {n}" for n in range(rows)],
            "keys": [f"k{n}" for n in range(rows)],
            "within_s": 60,
        },
        timeout=timeout_s,
    )


def test_no_row_of_a_request_waits_for_its_slowest(house: House, feed: str) -> None:
    # Whichever of the two groups lands first.
    blocks: list[int] = []
    hand = threading.Thread(target=lambda: blocks.extend(larger_block_of(house, feed, 2)))
    hand.start()
    with asked_as_done(house, feed, 18) as answer:
        frames = frames_in(answer.iter_bytes())
        first = [next(frames) for _ in range(16)]
        hand.join(10)
        # The others were not answered before these had been read.
        house.answer(feed, blocks[1])
        last = list(frames)
    assert sorted(frame["ask"] for frame in first) == list(range(16))
    first_row = 0 if blocks[0] == 0 else 2
    assert [frame["first_row"] for frame in first] == [first_row + frame["ask"] for frame in first]
    assert sorted(frame["ask"] for frame in last) == [16, 17]


def larger_block_of(house: House, job: str, blocks: int) -> list[int]:
    """Answer the largest of so many blocks, once all have landed. Their numbers, that one's first."""
    while house.sql("SELECT n_blocks FROM job WHERE id = :job", job=job)[0].n_blocks < blocks:
        time.sleep(0.01)
    landed = house.sql("SELECT number FROM block WHERE job_id = :job ORDER BY n_rows DESC", job=job)
    house.answer(job, landed[0].number)
    return [block.number for block in landed]


def test_a_caller_that_hangs_up_half_way_leaves_nothing_that_has_not_landed(house: House, feed: str) -> None:
    # Two groups of 16 may be under way, so 8 rows wait.
    with pytest.raises(httpx.ReadTimeout), asked_as_done(house, feed, 40, timeout_s=0.5):
        pass
    time.sleep(0.3)
    with answering(house, feed):
        assert ask(house, feed, ["next"]).json()["rows"][0]["row"] == 32
    assert house.job(feed)["rows"] == 33


def test_answered_rows_of_an_open_job_are_nothing_to_the_tenants_quota(house: House, feed: str) -> None:
    house.sql("UPDATE tenant SET row_quota = 3 WHERE name = 'default'")
    with answering(house, feed):
        for n in range(3):
            assert ask(house, feed, [f"{n} a", f"{n} b"]).status_code == 200
        ordinary = house.open()["id"]
        assert house.put(ordinary, 0, ["x", "y"]).status_code == 200, "nor for other jobs"
    over = ask(house, feed, ["a", "b"])
    assert over.status_code == 429, over.text
    assert over.headers["Retry-After"] == "30"
    assert "quota is 3 rows in unfinished jobs, and 2 are; wait" in over.json()["error"]["message"]
    # One of two fits, and is not refused for the other's sake.
    rows = ask(house, feed, ["a", "b"], keys=["ka", "kb"], within_s=0.5).json()["rows"]
    assert sorted(row["error"]["type"] for row in rows) == ["late", "overloaded"]
    assert [row["error"]["retry_after_s"] for row in rows if "retry_after_s" in row["error"]] == [30]
    assert house.job(feed)["rows"] == 7


def test_opening_again_under_its_key_finds_the_same_open_job(house: House) -> None:
    first = house.open(CLASSIFY, open=True, key="risk")
    assert house.open(CLASSIFY, open=True, key="risk")["id"] == first["id"]


def test_asks_are_counted_as_requests_and_are_no_lines_in_the_log(
    house: House, feed: str, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(house, feed), caplog.at_level("INFO"):
        answer = ask(house, feed, ["a"])
        house.job(feed)
    assert answer.headers["x-request-id"]
    routes = [vars(record)["route"] for record in caplog.records if record.message == "request"]
    assert "/v1/jobs/{job}" in routes
    assert "/v1/jobs/{job}/ask" not in routes
    figures = house.call("GET", "/metrics", token="read").text
    assert [line for line in figures.splitlines() if "/v1/jobs/{job}/ask" in line and "_count" in line]


def test_strangers_ask_nothing(house: House, feed: str) -> None:
    for token in (None, "unknown.token", "no token"):
        answer = house.call("POST", f"/v1/jobs/{feed}/ask", token=token, json={"rows": ["a"]})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert house.job(feed)["rows"] == 0


def unavailable(spans: object) -> None:
    raise StoreUnavailable("Postgres is away")


def test_what_becomes_of_asks_is_counted_over_all_processes(
    house: House, feed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(house, feed):
        for n in range(3):
            ask(house, feed, [f"row {n}", "and another"])
    assert ask(house, feed, ["nobody answers"], within_s=0.05).status_code == 504
    assert ask(house, feed, [{"other": 1}]).status_code == 422
    # Two more processes of the API, as it counts itself; of one of them Postgres is away at first.
    meters = [AskMeter(house.database, lambda: {UUID(feed): 2}) for _ in range(2)]
    for meter in meters:
        with meter.ask(UUID(feed), 6):
            pass
        with pytest.raises(Overloaded), meter.ask(UUID(feed), 1):
            raise Overloaded("too many wait", 1.0)
    now = time.time()
    with monkeypatch.context() as away:
        away.setattr(meters[1], "_store", unavailable)
        asyncio.run(meters[1].tell(now + SPAN_S))
    for meter in (*meters, *meters):
        asyncio.run(meter.tell(now + SPAN_S))
    house.sql("UPDATE ask_span SET at = at - make_interval(secs => 15)")
    told = house.call("GET", f"/v1/jobs/{feed}/activity").json()["asks"]
    assert len(told["spans"]) == 120
    minute = told["minute"]
    # Less than a minute is told of what this API itself counted: it writes each span when it is over.
    assert minute["asks_s"] >= 2 / 60 - 0.01
    assert minute["rows_s"] >= 12 / 60 - 0.01
    assert minute["refused"] == 2
    assert 0 < minute["p50_s"] <= minute["p99_s"]
    assert max(s["waiting"] for s in told["spans"]) == 4
    metrics = house.call("GET", "/metrics", token="read").text
    for line in (
        'motet_asks_total{result="answered"} 3.0',
        'motet_asks_total{result="late"} 1.0',
        'motet_asks_total{result="failed"} 1.0',
        "motet_ask_duration_seconds_count 3.0",
        "motet_ask_rows_waiting 0.0",
    ):
        assert line in metrics, line
    page = house.call("GET", f"/jobs/{feed}")
    assert page.status_code == 200
    assert "Last minutes" in page.text
    why = house.call("GET", f"/v1/jobs/{feed}/explain").json()
    assert any("in the last minute" in note.lower() for note in why["notes"]), why
    # A job that goes takes its counts along.
    house.call("DELETE", f"/v1/jobs/{feed}")
    assert not house.sql("SELECT 1 FROM ask_span")
