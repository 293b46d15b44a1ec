"""Reading along over HTTP: a real API and a real Redis, and a worker that says what the test lets it say."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from motet import AsyncClient, Client, Conflict, Generate, InvalidJob
from motet.cli.feeds import ask as command
from motet.local.valkey import ValkeyUrls
from motet.protocol.transport import RedisWorkerTransport
from motet.protocol.transport.connection import RedisConnection
from motet.protocol.wire import Said, encode_said
from motet.row_stream import read_events
from motet.text_deltas import TextDelta
from scheduler.store import dropping
from tests.integration.api_house import SPEAKER, House, a_house
from tests.integration.landing import register
from tests.integration.test_api_asks import answering, ask

REPLY = Generate("speaker", prompt="Answer.", max_tokens=8)
#: What the house answers to the first row of a block.
ANSWER = "row 0"


@pytest.fixture
def house(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[House]:
    with a_house(database_url, tmp_path, redis_url=redis_url) as house:
        register(house.database, SPEAKER)
        yield house


@pytest.fixture
def job(house: House) -> str:
    tasks = {"reply": REPLY.to_json()}
    return str(house.open(tasks, open=True, name="letters", priority="interactive")["id"])


@pytest.fixture
def worker(redis_urls: ValkeyUrls) -> Iterator[RedisWorkerTransport]:
    """With the rights of a worker, and no others."""
    transport = RedisWorkerTransport(redis_urls.worker, "w")
    yield transport
    transport.close()


class Speaker:
    """The worker that writes one row's answer."""

    def __init__(self, house: House, transport: RedisWorkerTransport, job: str, row: int = 0) -> None:
        self._house, self._transport, self._job, self._row = house, transport, job, row

    def says(
        self, text: str, begins: int = 0, attempt: tuple[int, int] = (7, 1), task: str = "reply"
    ) -> None:
        [(api,)] = self._house.sql(
            "SELECT say FROM block WHERE job_id = :job AND first_row = :row", job=self._job, row=self._row
        )
        said = Said(job=self._job, row=self._row, task=task, attempt=attempt, begins=begins, text=text)
        self._transport.say([(api, encode_said([said]))])


@contextmanager
def reading(house: House, job: str, row: Any = "hello", **more: Any) -> Iterator[Iterator[tuple[str, Any]]]:
    """The events of an ask."""
    with httpx.stream(
        "POST",
        f"{house.url}/v1/jobs/{job}/ask",
        headers={"Authorization": f"Bearer {house.tokens['user']}", "Accept": "text/event-stream"},
        json={"rows": [row], **more},
        timeout=20,
    ) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield iter(read_events(answer.iter_lines()))


def cells(house: House, job: str) -> dict[str, int]:
    return dict(house.job(job)["cells"])


def until(condition: Any, within_s: float = 5.0) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within_s, "never"
        time.sleep(0.01)
    return time.monotonic() - began


def test_text_is_told_as_it_is_written_and_the_row_comes_last(
    house: House, job: str, worker: RedisWorkerTransport
) -> None:
    with reading(house, job) as events:
        assert next(events) == ("landed", {"row": 0})
        speaker = Speaker(house, worker, job)
        speaker.says("Dear")
        assert next(events) == ("delta", {"task": "reply", "from": 0, "text": "Dear"})
        # A part is told twice, a part is lost: what comes behind the gap is not told.
        speaker.says("Dear Sir", 0)
        speaker.says("never", 99)
        assert next(events) == ("delta", {"task": "reply", "from": 4, "text": " Sir"})
        # Another worker begins anew; the old one is heard no more.
        speaker.says("Dear", attempt=(8, 1))
        speaker.says("!!", 8, attempt=(7, 1))
        assert next(events) == ("reset", {"task": "reply"})
        assert next(events) == ("delta", {"task": "reply", "from": 0, "text": "Dear"})
        house.answer(job, 0)
        name, row = next(events)
        assert (name, row["reply"]["text"]) == ("row", ANSWER)
        assert list(events) == []
    assert cells(house, job)["ok"] == 1


def test_the_client_puts_the_text_together_whoever_writes_it(
    house: House, job: str, worker: RedisWorkerTransport
) -> None:
    with Client(house.url, house.tokens["user"]) as client:
        feed = client.feed("letters")
        with feed.stream("hello", task="reply") as deltas:
            said: list[TextDelta] = []
            with ThreadPoolExecutor(1) as threads:
                reads = threads.submit(lambda: said.extend(deltas))
                until(lambda: deltas.index == 0)
                speaker = Speaker(house, worker, job)
                speaker.says("ro")
                until(lambda: said)
                speaker.says("r", attempt=(8, 1))
                speaker.says("ow", 1, attempt=(8, 1))
                until(lambda: len(said) == 2)
                house.answer(job, 0)
                reads.result(10)
        assert said == [TextDelta("reply", "ro"), TextDelta("reply", "w"), TextDelta("reply", " 0")]
        assert deltas.row is not None
        assert str(deltas.row["reply"]) == ANSWER
        with pytest.raises(InvalidJob, match="task"):
            feed.stream("hello", task="unheard")
        house.call("POST", f"/v1/jobs/{job}/close", json={})
        with pytest.raises(Conflict):
            list(feed.stream("another", within_s=5))


def test_a_reader_that_hangs_up_gives_the_row_up(house: House, job: str) -> None:
    with reading(house, job, key="k", drop_late=True) as events:
        next(events)
    took_s = until(lambda: cells(house, job)["skipped"] == 1)
    assert took_s < 1.0
    assert house.sql("SELECT count(*) FROM ask WHERE job_id = :job", job=job) == [(0,)]
    # Its key is free for a new row.
    with answering(house, job, after=1):
        assert ask(house, job, ["hello"], key="k").json()["rows"][0]["row"] == 1
    assert cells(house, job) == {"total": 2, "ok": 1, "error": 0, "skipped": 1, "reused": 0}


def test_a_reader_that_hangs_up_without_saying_so_leaves_the_row(house: House, job: str) -> None:
    with reading(house, job, key="k") as events:
        next(events)
    time.sleep(0.3)
    assert cells(house, job)["skipped"] == 0
    house.answer(job, 0)
    assert ask(house, job, ["hello"], key="k").json()["rows"][0]["reply"]["text"] == ANSWER


def test_an_ask_that_hangs_up_gives_its_rows_up_too(house: House, job: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{house.url}/v1/jobs/{job}/ask",
            headers={"Authorization": f"Bearer {house.tokens['user']}"},
            json={"rows": ["a", "b"], "drop_late": True},
            timeout=0.3,
        )
    assert until(lambda: cells(house, job)["skipped"] == 2) < 1.0


def test_who_waits_for_a_row_that_another_gave_up_has_it_all_the_same(house: House, job: str) -> None:
    """Two callers of one key at two processes: one goes away, and the other one is answered."""
    with reading(house, job, key="k", drop_late=True) as events:
        next(events)
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(ask, house, job, ["hello"], key="k")
            time.sleep(0.2)
            with house.database.transaction() as connection:
                # As the other process does it.
                [(id_,)] = house.sql("SELECT id FROM job WHERE name = 'letters'")
                dropping.abandon(connection, id_, [0])
            with answering(house, job, after=1):
                assert other.result(10).json()["rows"][0]["row"] == 1


def test_what_is_late_is_given_up_where_it_was_asked_so(house: House, job: str) -> None:
    late = ask(house, job, ["hello"], within_s=0.3, drop_late=True)
    assert late.status_code == 503, late.text
    assert late.json()["error"]["stored"] is False
    until(lambda: cells(house, job)["skipped"] == 1)
    with reading(house, job, within_s=0.3, drop_late=True) as events:
        assert next(events)[0] == "landed"
        name, data = next(events)
        assert (name, data["error"]["type"]) == ("error", "late")


def test_what_is_refused_is_refused_before_any_event(house: House, job: str) -> None:
    for body in (
        {"rows": ["a", "b"]},
        {"rows": [{"wrong": 1}]},
        {"rows": []},
        {"rows": ["a"], "drop_late": "yes"},
        {"rows": ["a"], "keys": ["a", "b"]},
    ):
        answer = house.call("POST", f"/v1/jobs/{job}/ask", json=body, headers={"Accept": "text/event-stream"})
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["problems"]
    assert house.job(job)["rows"] == 0


def test_without_redis_the_row_comes_all_the_same(database_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path) as house:
        register(house.database, SPEAKER)
        tasks = {"reply": REPLY.to_json()}
        job = str(house.open(tasks, open=True, name="letters", priority="interactive")["id"])
        with reading(house, job) as events:
            next(events)
            threading.Thread(target=house.answer, args=(job, 0)).start()
            assert [name for name, _ in events] == ["row"]


def test_nothing_that_is_said_is_kept(
    house: House, job: str, worker: RedisWorkerTransport, redis_url: str
) -> None:
    canary = "canary-said-4b1d"
    with reading(house, job) as events:
        next(events)
        Speaker(house, worker, job).says(canary)
        assert json.dumps(next(events)).count(canary) == 1
    line = RedisConnection(redis_url)
    for key in line.client.scan_iter(count=1000):
        assert canary.encode() not in (line.client.dump(key) or b"") + bytes(key)
    line.close()


def test_the_command_prints_text_as_it_is_written(
    house: House, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTET_URL", house.url)
    monkeypatch.setenv("MOTET_TOKEN", house.tokens["user"])
    with answering(house, job):
        done = CliRunner().invoke(command, ["letters", "hello", "--stream", "reply"])
    assert (done.exit_code, done.stdout) == (0, f"{ANSWER}\n")
    assert CliRunner().invoke(command, ["letters", "-", "--stream", "reply"]).exit_code == 2


def test_asyncio_reads_along_and_gives_up(house: House, job: str) -> None:
    async def play() -> None:
        async with AsyncClient(house.url, house.tokens["user"]) as client, client.feed("letters") as feed:
            with answering(house, job):
                deltas = [delta async for delta in feed.stream("hello", task="reply")]
            assert "".join(map(str, deltas)) == ANSWER
            waits = asyncio.ensure_future(anext(feed.stream("nobody answers")))
            await asyncio.to_thread(until, lambda: house.job(job)["rows"] == 2)
            waits.cancel()
            await asyncio.to_thread(until, lambda: cells(house, job)["skipped"] == 1, 2.0)

    asyncio.run(play())
