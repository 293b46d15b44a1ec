"""Feeds of the real client against the real API: many threads, one open job, each row answered once for its key."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal
from typing import Any

import msgpack
import pytest

from motet import AsyncClient, Classify, Client, Conflict, Embed, Feed, InvalidJob, JobFailed, Late, NotFound
from motet.protocol.envelope import packed_plain
from motet.results import read_frames
from scheduler.blocks import decode_block
from tests.integration.api_house import House, problems
from tests.integration.api_house import client as client
from tests.integration.api_house import house as house
from tests.integration.test_api_asks import answering

TASKS = {"topic": Classify("topics"), "vector": Embed("tiny")}


@pytest.fixture
def feed(client: Client) -> Feed:
    return client.open(TASKS, name="risk")


def test_threads_ask_one_open_job_and_follow_it(house: House, client: Client, feed: Feed) -> None:
    with feed, answering(house, feed.job.id), ThreadPoolExecutor(32) as threads:
        rows = list(threads.map(lambda n: feed.ask(f"row {n}", key=f"k{n}"), range(100)))
        again = list(threads.map(lambda n: feed.ask(f"row {n}", key=f"k{n}").index, range(100)))
    assert sorted(row.index for row in rows) == list(range(100))
    assert again == [row.index for row in rows]
    assert all(len(row["vector"].vector or ()) == 2 for row in rows)
    (counted,) = house.sql("SELECT n_rows, n_blocks FROM job WHERE id = :job", job=feed.job.id)
    assert counted.n_rows == 100
    assert counted.n_blocks < 100
    assert feed.close().wait(timeout=20).state == "succeeded"
    followed = list(client.feed(feed.job.id).rows())
    assert [row.index for row in followed] == list(range(100))
    for row in followed[::7]:
        assert next(iter(feed.rows(after=row.cursor or 0)), None) is None or (
            next(iter(feed.rows(after=row.cursor or 0))).index == row.index + 1
        )


def test_errors_come_as_types(house: House, client: Client, feed: Feed) -> None:
    with answering(house, feed.job.id):
        feed.ask("a", key="same")
        with pytest.raises(Conflict):
            feed.ask("b", key="same")
        with pytest.raises(InvalidJob, match=r"rows\.text"):
            feed.ask({"other": 1})
    with pytest.raises(Late) as late:
        feed.ask("nobody answers this", within_s=0.2, key="late")
    assert late.value.stored
    with answering(house, feed.job.id, after=1):
        assert feed.ask("nobody answers this", key="late").index == late.value.row == 1
    with pytest.raises(Conflict, match="a job risk with other tasks"):
        client.open({"topic": TASKS["topic"]}, name="risk")
    feed.job.cancel()
    with pytest.raises(Conflict, match="cancelled"):
        feed.ask("c")
    with pytest.raises(Conflict, match="take another name"):
        client.open(TASKS, name="risk")
    with pytest.raises(JobFailed):
        list(feed.rows())
    feed.job.delete()
    with pytest.raises(NotFound):
        feed.ask("d")


def test_a_name_that_no_header_can_hold_opens_and_attaches(client: Client) -> None:
    first = client.open(TASKS, name="风险")
    assert client.open(TASKS, name="风险").job.id == client.feed("风险").job.id == first.job.id


def test_asyncio_asks_the_real_api(house: House, feed: Feed) -> None:
    async def work() -> tuple[list[int], list[int]]:
        async with (
            AsyncClient(house.url, house.tokens["user"]) as client,
            client.open(TASKS, name="risk") as here,
        ):
            rows = await asyncio.gather(*(here.ask(f"row {n}") for n in range(20)))
            followed: list[int] = []
            async for row in here.rows():
                followed.append(row.index)
                if len(followed) == 20:
                    await here.close()
            return sorted(row.index for row in rows), followed

    with answering(house, feed.job.id):
        assert asyncio.run(work()) == (list(range(20)), list(range(20)))


# -- the form of columns, in which values keep their types


def ask_columns(house: House, job: str, **body: Any) -> Any:
    return house.call(
        "POST",
        f"/v1/jobs/{job}/ask",
        content=packed_plain(body),
        headers={"Content-Type": "application/msgpack", "Accept": "application/msgpack"},
    )


def test_values_of_a_row_keep_types_that_json_has_not(house: House, client: Client) -> None:
    tasks = {"topic": Classify("topics", input="{text} {due} {sum}")}
    row = {"text": "a", "due": date(2026, 11, 30), "sum": Decimal("7.50")}
    with client.open(tasks, name="typed") as feed, answering(house, feed.job.id):
        assert feed.ask(row, key="k").index == feed.ask(row, key="k").index == 0
        with pytest.raises(Conflict):
            feed.ask(row | {"sum": 7.5}, key="k")
        (block,) = house.sql("SELECT payload FROM block WHERE job_id = :job", job=feed.job.id)
        stored = decode_block(block.payload)
        assert {name: list(stored.values[name]) for name in row} == {
            name: [value] for name, value in row.items()
        }


def test_the_same_row_in_json_and_in_columns_is_the_same_ask(house: House, feed: Feed) -> None:
    job = feed.job.id
    with answering(house, job):
        first = house.call("POST", f"/v1/jobs/{job}/ask", json={"rows": ["a"], "key": "k"}).json()
        (frame,) = read_frames(ask_columns(house, job, columns={"text": ["a"]}, keys=["k"]).content)
        (other,) = read_frames(ask_columns(house, job, columns={"text": ["b"]}, keys=["k"]).content)
    assert first["rows"][0]["row"] == frame["first_row"] == 0
    assert other["error"]["type"] == "conflict"


def test_a_bad_row_among_columns_is_refused_alone(house: House, feed: Feed) -> None:
    with answering(house, feed.job.id):
        answer = ask_columns(house, feed.job.id, columns={"text": ["a", b"raw", "c"]}, keys=["1", "2", "3"])
    good, bad, also = read_frames(answer.content)
    assert sorted((good["first_row"], also["first_row"])) == [0, 1]
    assert bad["error"]["type"] == "invalid_job"
    assert bad["error"]["problems"][0]["field"] == "rows.text"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "rows"),
        ({"columns": {"text": []}}, "rows"),
        ({"columns": {"text": ["a"] * 65}}, "rows"),
        ({"columns": {"text": ["a", "b"]}, "keys": ["1"]}, "keys"),
        ({"columns": {"text": ["a", "b"]}, "keys": ["1", "1"]}, "keys"),
        ({"columns": {"text": ["a"]}, "keys": [7]}, "keys"),
        ({"columns": {"text": ["a"]}, "within_s": 0}, "within_s"),
        ({"columns": {"text": ["a"]}, "unheard": 1}, "unheard"),
    ],
)
def test_what_no_ask_in_columns_is_is_refused_by_name(
    house: House, feed: Feed, body: Any, field: str
) -> None:
    answer = ask_columns(house, feed.job.id, **body)
    assert field in [p["field"] for p in problems(answer)]
    assert house.job(feed.job.id)["rows"] == 0


@pytest.mark.parametrize("raw", [b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb("text")])
def test_bytes_that_are_no_ask_are_refused(house: House, feed: Feed, raw: bytes) -> None:
    answer = house.call(
        "POST", f"/v1/jobs/{feed.job.id}/ask", content=raw, headers={"Content-Type": "application/msgpack"}
    )
    assert problems(answer)


def test_late_says_whether_the_rows_were_stored(house: House, feed: Feed) -> None:
    answer = house.call("POST", f"/v1/jobs/{feed.job.id}/ask", json={"rows": ["a"], "within_s": 0.2})
    assert answer.status_code == 504
    assert (answer.json()["error"]["stored"], answer.json()["error"]["row"]) == (True, 0)


def test_rows_are_told_as_they_are_answered_and_slow_ones_hold_up_no_others(
    house: House, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motet.feed.REQUESTS", 1)

    def landed(blocks: int) -> None:
        while house.sql("SELECT n_blocks FROM job WHERE id = :job", job=feed.job.id)[0].n_blocks < blocks:
            time.sleep(0.01)

    with feed:
        first = feed.put("first")
        landed(1)
        rows = [feed.put(f"row {n}") for n in range(17)]
        house.answer(feed.job.id, 0)
        assert first.result(10).index == 0
        # One request of 17 rows is two blocks, which land in any order, and only the larger one is answered.
        landed(3)
        large, small = house.sql(
            "SELECT number, first_row FROM block WHERE job_id = :job AND number > 0 ORDER BY n_rows DESC",
            job=feed.job.id,
        )
        house.answer(feed.job.id, large.number)
        first_row = large.first_row
        assert [row.result(10).index for row in rows[:16]] == list(range(first_row, first_row + 16))
        assert not rows[16].done()
        # Most of the one request that may be under way is answered: the next goes out beside it.
        later = feed.put("later")
        landed(4)
        house.answer(feed.job.id, 3)
        assert later.result(10).index == 18
        assert not rows[16].done()
        house.answer(feed.job.id, small.number)
        assert rows[16].result(10).index == small.first_row
