"""Feeds against a small API over a real socket: rows asked by many threads, answered once for each key."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pytest

from motet import (
    AsyncClient,
    Classify,
    Client,
    Conflict,
    Embed,
    Feed,
    InvalidJob,
    JobFailed,
    Late,
    NotFound,
    Overloaded,
    Row,
    Unreachable,
)
from motet.feed import REQUESTS
from tests.unit.fake_api import TOKEN, FakeApi, serving
from tests.unit.test_client_jobs import connected

TASKS = {"topic": Classify("news-topics"), "vector": Embed("all-MiniLM-L6-v2")}


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with serving() as fake:
        yield fake


@pytest.fixture
def client(api: FakeApi) -> Iterator[Client]:
    with connected(api) as line:
        yield line


@pytest.fixture
def feed(client: Client) -> Iterator[Feed]:
    with client.open(TASKS, name="risk") as opened:
        yield opened


def senders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "motet-feed" and t.is_alive()]


# -- opening


def test_a_row_is_asked_and_answered(api: FakeApi, feed: Feed) -> None:
    row = feed.ask({"text": "hello", "id": "7"})
    assert (row.index, str(row["topic"]), row["vector"].vector) == (0, "sport", [0.0, 0.5])
    assert row.cursor is None
    assert str(feed.ask("and more")["topic"]) == "tech"
    assert (feed.name, feed.state, feed.job.rows) == ("risk", "open", 2)
    opening = api.jobs["job-1"].opening
    assert (opening["open"], opening["name"], opening["priority"]) == (True, "risk", "interactive")
    assert api.jobs["job-1"].columns[0] == {"text": ["hello"]}


def test_a_conflict_of_another_kind_is_told_in_its_own_words(api: FakeApi, client: Client) -> None:
    api.fail_once("POST", "/v1/jobs", 409)
    with pytest.raises(Conflict) as refused:
        client.open(TASKS, name="risk")
    assert "other tasks or options" not in str(refused.value)


def test_leaving_leaves_the_job_open_and_its_name_finds_it_again(api: FakeApi, client: Client) -> None:
    with client.open(TASKS, name="risk") as first:
        first.ask("a")
    assert not senders()
    assert first.state == "open"
    with client.open(TASKS, name="risk") as again:
        assert again.job.id == first.job.id
        assert again.ask("b").index == 1
    assert client.feed("risk").job.id == client.feed(first.job.id).job.id == first.job.id
    assert client.feed("risk").ask("c").index == 2
    with pytest.raises(Conflict, match="a job risk with other tasks"):
        client.open({"topic": TASKS["topic"]}, name="risk")
    with pytest.raises(NotFound, match="no open job is called fraud"):
        client.feed("fraud")
    with pytest.raises(InvalidJob, match="name"):
        client.open(TASKS, name="")


def test_a_name_may_be_any_text(client: Client) -> None:
    named = client.open(TASKS, name="风险 " * 40)
    assert client.open(TASKS, name="风险 " * 40).job.id == named.job.id


def test_closing_ends_it_and_what_is_closed_is_not_opened_again(client: Client, feed: Feed) -> None:
    feed.ask("a")
    assert feed.close().state == "succeeded"
    with pytest.raises(Conflict, match="is succeeded"):
        feed.ask("b")
    with pytest.raises(Conflict, match="take another name"):
        client.open(TASKS, name="risk")


def test_a_number_of_numpy_is_a_time(feed: Feed) -> None:
    assert feed.ask("a", within_s=numpy.float32(5)).index == 0
    assert feed.ask("b", within_s=numpy.int64(5)).index == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"within_s": "3"}, "within_s: got 3; expected seconds"),
        ({"within_s": None}, "within_s: got None; expected seconds"),
        ({"within_s": True}, "within_s: got True; expected seconds"),
        ({"within_s": float("nan")}, "within_s: got nan; expected seconds"),
        ({"key": 4711}, "key: got a value of type int; expected text"),
        ({"key": b"k"}, "key: got a value of type bytes; expected text"),
    ],
)
def test_options_of_an_ask_that_are_none_are_named(feed: Feed, options: dict[str, Any], words: str) -> None:
    for ask in (feed.ask, feed.put, feed.stream):
        with pytest.raises(InvalidJob, match=words):
            ask("a row", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": 7}, "name: got a value of type int"),
        ({"name": "a\ud800"}, "name: got a lone surrogate"),
        ({"name": "a", "keep_days": "7"}, "keep_days: got 7; expected a finite number"),
        ({"name": "a", "keep_days": float("nan")}, "keep_days: got nan"),
        ({"name": "a", "keep_days": 0.0001}, "keep_days: got 0.0001; expected days, 0.0007"),
    ],
)
def test_options_of_an_open_job_are_named_as_they_were_given(
    client: Client, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidJob, match=words):
        client.open(TASKS, **options)


# -- sharing requests


def test_threads_share_requests_and_each_has_its_own_row(api: FakeApi, feed: Feed) -> None:
    api.ask_s = 0.05
    with ThreadPoolExecutor(64) as threads:
        rows = list(threads.map(lambda n: feed.ask(f"row {n}", key=f"k{n}"), range(64)))
    assert sorted(row.index for row in rows) == list(range(64))
    job = api.jobs["job-1"]
    texts = [texts["text"][0] for texts in job.columns]
    assert [texts[row.index] for row in rows] == [f"row {n}" for n in range(64)]
    assert api.most_asking <= REQUESTS
    assert len(api.asks) < 20
    time.sleep(0.05)
    assert not senders()


def test_a_lone_row_waits_for_no_company(api: FakeApi, feed: Feed) -> None:
    for n in range(3):
        feed.ask(f"row {n}")
    assert api.asks == [1, 1, 1]


def test_a_request_has_64_rows_and_what_a_proxy_takes_in_bytes(api: FakeApi, feed: Feed) -> None:
    api.ask_s = 0.05
    [answer.result(10) for answer in [feed.put(f"row {n}") for n in range(300)]]
    assert max(api.asks) == 64
    api.asks.clear()
    long = [feed.put("x" * 200_000) for _ in range(REQUESTS + 6)]
    [answer.result(10) for answer in long]
    assert max(api.asks) <= 3


def test_a_proxy_that_takes_no_such_body_gets_smaller_ones(api: FakeApi, feed: Feed) -> None:
    api.ask_s = 0.05
    answers = [feed.put(f"row {n}") for n in range(REQUESTS)]
    time.sleep(0.02)
    api.fail_once("POST", "/ask", 413)
    answers += [feed.put(f"row {n}") for n in range(10)]
    done = [answer.exception(10) for answer in answers]
    # The four first ones are alone in their requests: one of them cannot be made smaller.
    assert len([error for error in done if error is not None]) <= 1


def test_putting_gives_a_future_that_can_be_taken_back_while_it_waits(api: FakeApi, feed: Feed) -> None:
    api.ask_s = 0.1
    first = [feed.put(f"row {n}") for n in range(REQUESTS)]
    taken_back = feed.put("not this one")
    assert taken_back.cancel()
    assert {answer.result(5).index for answer in first} == set(range(REQUESTS))
    feed.ask("and on")
    assert ["not this one"] not in [texts["text"] for texts in api.jobs["job-1"].columns]


def test_leaving_waits_for_what_was_put(client: Client) -> None:
    with client.open(TASKS, name="risk") as feed:
        answers = [feed.put(f"row {n}") for n in range(20)]
    assert all(answer.done() for answer in answers)


# -- keys


def test_a_key_finds_its_row_and_no_other(feed: Feed) -> None:
    first = feed.ask("a", key="ticket-81")
    assert feed.ask("a", key="ticket-81").index == first.index
    with pytest.raises(Conflict):
        feed.ask("b", key="ticket-81")
    assert feed.job.refresh().rows == 1


def test_the_same_key_from_many_threads_is_one_row(api: FakeApi, feed: Feed) -> None:
    api.ask_s = 0.02
    with ThreadPoolExecutor(16) as threads:
        rows = list(threads.map(lambda _: feed.ask("a", key="same").index, range(16)))
    assert set(rows) == {0}


@pytest.mark.parametrize("how", ["lost", "unheard", "torn", 503, 502, 429])
def test_a_row_keeps_its_key_over_retries(api: FakeApi, feed: Feed, how: int | str) -> None:
    api.fail_once("POST", "/ask", how, times=2)
    assert feed.ask("a").index == 0
    assert feed.job.refresh().rows == 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"within_s": 0}, "within_s"),
        ({"within_s": -1}, "within_s"),
        ({"within_s": float("nan")}, "within_s"),
        ({"within_s": 4000}, "within_s"),
        ({"key": ""}, "key"),
        ({"key": "k" * 10_000}, "key"),
        ({"key": "a\0"}, "key"),
        ({"key": "\ud800"}, "key"),
    ],
)
def test_what_no_ask_may_have_is_refused_before_it_is_sent(
    api: FakeApi, feed: Feed, options: Any, field: str
) -> None:
    with pytest.raises(InvalidJob) as refused:
        feed.ask("a", **options)
    assert [p.field for p in refused.value.problems] == [field]
    assert api.asks == []


# -- values


@pytest.mark.parametrize(
    ("row", "field"),
    [({"other": 1}, "rows.text"), (7, "rows"), ("a\0b", "rows.text"), ({"text": float("nan")}, "rows.text")],
)
def test_a_bad_row_is_found_before_it_is_sent(api: FakeApi, feed: Feed, row: Any, field: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        feed.ask(row)
    assert [(p.field, p.row) for p in refused.value.problems] == [(field, None)]
    assert api.asks == []


def test_a_row_that_the_server_refuses_is_refused_alone(api: FakeApi, feed: Feed) -> None:
    problem = {"field": "rows.text", "row": 0, "got": "a list", "expected": "text", "remedy": "mend it"}
    api.refuse = lambda row: (
        {"type": "invalid_job", "message": "rows.text: …", "problems": [problem]}
        if row["text"] == "bad"
        else None
    )
    api.ask_s = 0.05
    answers = [feed.put(text) for text in [*"abcd", "bad", *"ef"]]
    errors = [answer.exception(5) for answer in answers]
    assert [type(error) for error in errors].count(InvalidJob) == 1
    assert isinstance(errors[4], InvalidJob)
    assert feed.job.refresh().rows == 6


def test_values_keep_types_that_json_has_not(api: FakeApi, client: Client) -> None:
    with client.open({"topic": Classify("news-topics", input="{text} {due} {sum}")}, name="typed") as feed:
        feed.ask({"text": "a", "due": date(2026, 11, 30), "sum": Decimal("7.50")})
    [columns] = api.jobs["job-1"].columns
    assert columns["text"] == ["a"]
    # As extension types of msgpack, which the API's tests read.
    assert all(isinstance(columns[name][0], object) and columns[name][0] != "" for name in ("due", "sum"))


def test_with_errors_a_bad_row_is_sent_as_a_mark(api: FakeApi, client: Client) -> None:
    with client.open(TASKS, name="risk", bad_rows="error") as feed:
        assert feed.ask({"other": 1}).index == 0
    assert api.jobs["job-1"].columns == [{"text": [None]}]


# -- time


def test_late_says_what_became_of_the_row(api: FakeApi, feed: Feed) -> None:
    api.refuse = lambda row: {"type": "late", "message": "not answered in time", "row": 17, "stored": True}
    with pytest.raises(Late) as late:
        feed.ask("a", within_s=1)
    assert (late.value.stored, late.value.row) == (True, 17)


def test_a_row_that_could_not_be_sent_in_time_is_late_and_not_stored(api: FakeApi, feed: Feed) -> None:
    api.ask_s = 1.6
    held = [feed.put(f"row {n}") for n in range(REQUESTS)]
    with pytest.raises(Late) as late:
        feed.ask("a", within_s=0.05)
    assert not late.value.stored
    assert all(answer.result(5) for answer in held)
    assert feed.job.refresh().rows == REQUESTS


def test_a_refused_row_comes_back_while_it_has_time(api: FakeApi, feed: Feed) -> None:
    left = [1]

    def refuse(row: dict[str, Any]) -> dict[str, Any] | None:
        if left[0]:
            left[0] -= 1
            return {"type": "overloaded", "message": "4096 rows wait to land in this job"}
        return None

    api.refuse = refuse
    assert feed.ask("a", within_s=10).index == 0
    left[0] = 1
    with pytest.raises(Overloaded):
        feed.ask("b", within_s=0.5)


def test_a_refused_row_says_when_to_come_back_and_is_not_sent_before(api: FakeApi, feed: Feed) -> None:
    api.refuse = lambda row: {"type": "overloaded", "message": "4,096 rows wait", "retry_after_s": 7}
    began = time.monotonic()
    with pytest.raises(Overloaded) as refused:
        feed.ask("a", within_s=5)
    assert refused.value.retry_after_s == 7
    assert time.monotonic() - began < 1
    assert len(api.asks) == 1


def test_a_server_that_is_away_is_unreachable_after_the_callers_time(api: FakeApi, feed: Feed) -> None:
    api.fault = lambda method, path: "lost" if path.endswith("/ask") else None
    started = time.monotonic()
    with pytest.raises(Unreachable):
        feed.ask("a", within_s=0.3)
    assert time.monotonic() - started < 2


# -- following


def test_every_row_can_be_followed_and_taken_up_behind_any_of_them(client: Client, feed: Feed) -> None:
    for n in range(7):
        feed.ask(f"row {n}")
    feed.close()
    rows = list(feed.rows())
    assert [row.index for row in rows] == list(range(7))
    for seen, row in enumerate(rows, 1):
        assert [r.index for r in feed.rows(after=row.cursor)] == list(range(seen, 7))


def test_rows_come_as_they_are_done_until_the_job_ends(feed: Feed) -> None:
    seen: list[int] = []
    follower = threading.Thread(target=lambda: seen.extend(row.index for row in feed.rows()))
    follower.start()
    for n in range(5):
        feed.ask(f"row {n}")
    feed.close()
    follower.join(5)
    assert seen == list(range(5))


def test_rows_within_a_block_have_cursors_of_their_own(api: FakeApi, client: Client) -> None:
    job = client.submit([f"row {n}" for n in range(5)], TASKS)
    ended = client.feed(job.id)
    rows = list(ended.rows())
    for seen, row in enumerate(rows, 1):
        assert [r.index for r in ended.rows(after=row.cursor)] == list(range(seen, 5))


def test_following_a_cancelled_job_ends_with_its_failure(feed: Feed) -> None:
    feed.ask("a")
    feed.job.cancel()
    rows = feed.rows()
    assert next(rows).index == 0
    with pytest.raises(JobFailed, match="cancelled"):
        next(rows)


@pytest.mark.parametrize("after", [-1, "17", None, True, 1.5, 2**31 * 10_000, 3])
def test_a_cursor_that_is_none_is_refused(feed: Feed, after: Any) -> None:
    """The last one lies within a block of one row, whose row it would pass over."""
    feed.ask("a")
    feed.close()
    with pytest.raises(InvalidJob, match="after"):
        list(feed.rows(after))


# -- processes


def _ask_in_child(feed: Feed, text: str, said: Any) -> None:
    said.put(feed.ask(text).index)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_feed_goes_into_other_processes(feed: Feed, how: str) -> None:
    feed.ask("here")
    context = multiprocessing.get_context(how)
    said = context.Queue()
    child = context.Process(target=_ask_in_child, args=(feed, "there", said))
    child.start()
    assert said.get(timeout=30) == 1
    child.join(10)
    assert feed.ask("here again").index == 2


def test_a_pickled_feed_is_of_the_same_job(feed: Feed) -> None:
    assert pickle.loads(pickle.dumps(feed)).job.id == feed.job.id


def test_a_child_is_free_of_what_its_parent_has_under_way(api: FakeApi, feed: Feed) -> None:
    api.ask_s = 0.3
    held = [feed.put(f"row {n}") for n in range(REQUESTS + 5)]
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    child = context.Process(target=_ask_in_child, args=(feed, "there", said))
    child.start()
    assert said.get(timeout=30) >= 0
    child.join(10)
    assert len({answer.result(10).index for answer in held}) == REQUESTS + 5


_WAITS = """
import sys
from motet import Classify, Client

with Client(sys.argv[1], sys.argv[2]) as client, client.open({"topic": Classify("news-topics")}, name="risk") as feed:
    waiting = [feed.put(f"row {n}") for n in range(100)]
    print("asked", flush=True)
    feed.ask("the last")
"""


def test_ctrl_c_ends_a_program_that_waits_for_answers_at_once(api: FakeApi) -> None:
    api.ask_s = 4
    running = subprocess.Popen(
        [sys.executable, "-c", _WAITS, api.url, TOKEN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "asked\n"
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, said = running.communicate(timeout=30)
    assert time.monotonic() - started < 2
    assert said.rstrip().endswith("KeyboardInterrupt")


def test_an_interrupted_caller_takes_its_row_back(api: FakeApi, client: Client) -> None:
    api.ask_s = 0.2
    waiting: list[Future[Row]] = []

    def work() -> None:
        with client.open(TASKS, name="risk") as feed:
            waiting.extend(feed.put(f"row {n}") for n in range(REQUESTS + 3))
            time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert [answer.cancelled() for answer in waiting[REQUESTS:]] == [True] * 3
    assert all(answer.result(5) for answer in waiting[:REQUESTS])
    time.sleep(0.1)
    assert not senders()
    assert len(api.jobs["job-1"].blocks) == REQUESTS


# -- asyncio


def test_asyncio_asks_and_follows_over_the_same_core(api: FakeApi) -> None:
    api.ask_s = 0.02

    async def work() -> tuple[list[int], list[int], str]:
        async with AsyncClient(api.url, TOKEN) as client, client.open(TASKS, name="risk") as feed:
            rows = await asyncio.gather(*(feed.ask(f"row {n}") for n in range(30)))
            with pytest.raises(InvalidJob):
                await feed.ask({"other": 1})
            followed: list[int] = []
            async for row in feed.rows():
                followed.append(row.index)
                if len(followed) == 30:
                    await feed.close()
            async with client.feed(feed.job.id) as again:
                return [row.index for row in rows], followed, await again.state()

    asked, followed, state = asyncio.run(work())
    assert sorted(asked) == followed == list(range(30))
    assert state == "succeeded"
    assert len(api.asks) < 20


def test_a_cancelled_ask_that_waits_is_not_sent(api: FakeApi) -> None:
    api.ask_s = 0.1

    async def work() -> None:
        async with AsyncClient(api.url, TOKEN) as client, client.open(TASKS, name="risk") as feed:
            held = [asyncio.ensure_future(feed.ask(f"row {n}")) for n in range(REQUESTS + 1)]
            await asyncio.sleep(0.02)
            held[-1].cancel()
            await asyncio.gather(*held, return_exceptions=True)
            assert held[-1].cancelled()

    asyncio.run(work())
    assert len(api.jobs["job-1"].blocks) == REQUESTS


def test_asyncio_is_late_in_its_own_time(api: FakeApi) -> None:
    api.ask_s = 1.5

    async def work() -> None:
        async with AsyncClient(api.url, TOKEN) as client, client.open(TASKS, name="risk") as feed:
            held = [asyncio.ensure_future(feed.ask(f"row {n}")) for n in range(REQUESTS)]
            await asyncio.sleep(0.02)
            with pytest.raises(Late):
                await feed.ask("late", within_s=0.01)
            await asyncio.gather(*held)

    asyncio.run(work())


def test_ctrl_c_while_following_leaves_no_thread_that_a_program_waits_for(api: FakeApi) -> None:
    program = (
        _WAITS.partition("with Client")[0].replace("Client", "AsyncClient")
        + """
import asyncio

async def work():
    async with AsyncClient(sys.argv[1], sys.argv[2]) as client:
        async with client.open({"topic": Classify("news-topics")}, name="risk") as feed:
            print("asked", flush=True)
            async for row in feed.rows():
                pass

asyncio.run(work())
"""
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program, api.url, TOKEN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "asked\n"
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, said = running.communicate(timeout=40)
    assert time.monotonic() - started < 3
    assert "KeyboardInterrupt" in said
