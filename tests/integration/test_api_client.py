"""The real client against the real API: both were written to docs/http.md, and here they meet."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import motet.upload
from motet import Classify, Client, Embed
from motet.errors import Conflict, InvalidJob, JobFailed, NotFound, Overloaded, Unauthorized
from motet.job import Job
from motet.protocol.columns import CellError
from tests.integration.api_house import House, a_house, client, house

__all__ = ["client", "house"]

TASKS = {"topic": Classify("topics"), "vector": Embed("tiny")}
TEXTS = [f"text {i}" for i in range(2500)]


def test_a_long_source_goes_in_by_parts_and_its_rows_come_back(house: House, client: Client) -> None:
    job = client.submit(TEXTS, TASKS, name="long")
    assert (job.state, job.rows, job.name) == ("running", 2500, "long")
    assert house.sql("SELECT n_rows FROM part ORDER BY number") == [(1024,), (1024,), (452,)]

    def work() -> None:
        for block in (2, 0, 1):
            house.answer(
                job.id, block, failing={5: CellError("too_long", "17 tokens")} if block == 1 else None
            )

    hand = threading.Timer(0.2, work)
    hand.start()
    rows = list(job.results())
    hand.join()
    assert [r.index for r in rows] == list(range(2500))
    assert str(rows[1]["topic"]) == "sport"
    assert rows[7]["vector"].vector == [7.0, 0.5]
    assert [r.index for r in rows if not r.ok] == [1029]
    assert [(e.row, e.task, e.error) for e in job.errors()] == [
        (1029, "topic", "too_long"),
        (1029, "vector", "too_long"),
    ]
    assert job.wait().state == "succeeded"
    assert job.partial
    assert {r.index for r in job.results(order="done", tasks=["topic"])} == set(range(2500))
    assert client.job(job.id).rows == 2500


def test_a_small_source_is_one_request_and_the_same_again_runs_nothing(house: House, client: Client) -> None:
    first = client.submit([{"text": "a", "id": "1"}, {"text": "b", "id": "2"}], TASKS)
    house.answer(first.id, 0)
    again = client.submit(["a", "b"], TASKS)
    assert again.state == "succeeded"
    assert [str(r["topic"]) for r in again.results()] == ["business", "sport"]
    assert [j.id for j in client.jobs()] == [again.id, first.id]


def test_bad_rows_are_refused_or_become_errors_as_asked(house: House, client: Client) -> None:
    rows: list[Any] = ["a", 1, {"title": "no text"}, "nul \0"]
    with pytest.raises(InvalidJob) as caught:
        client.submit(rows, TASKS)
    assert [p.row for p in caught.value.problems] == [1, 2, 3]
    job = client.submit(rows, TASKS, bad_rows="error")
    house.answer(job.id, 0)
    assert [r.ok for r in job.results()] == [True, False, False, False]
    assert {e.error for e in job.errors()} == {"bad_row"}


def test_a_bad_value_in_one_field_is_an_error_of_the_tasks_that_read_it(
    house: House, client: Client, tmp_path: Path
) -> None:
    tasks = {"of_title": Classify("topics", input="{title}"), "of_body": Classify("topics", input="{body}")}
    path = tmp_path / "rows.jsonl"
    rows = [{"title": f"t{i}", "body": math.nan if i % 3 == 1 else f"b{i}", "n": None} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidJob) as caught:
        client.submit(path, tasks)
    assert [(p.row, p.field) for p in caught.value.problems] == [(1, "rows.body"), (4, "rows.body")]
    job = client.submit(path, tasks, bad_rows="error")
    assert job.progress.error == 2
    house.answer(job.id, 0)
    found = list(job.results())
    assert all(row["of_title"].ok for row in found)
    assert [row["of_body"].ok for row in found] == [True, False, True, True, False, True]
    assert found[1]["of_body"].error == CellError("bad_row", "body: got NaN; expected a number or null")
    assert (job.refresh().state, job.progress.ok, job.progress.error) == ("succeeded", 10, 2)
    planned = client.plan(path, tasks, bad_rows="error")
    assert planned.rows == 6
    title, body = (p.tokens for p in planned.passes)
    assert title > body > 0


def test_a_broken_upload_goes_on_under_the_same_key(house: House, client: Client) -> None:
    def breaks() -> Iterator[str]:
        yield from TEXTS[:2100]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        client.submit(breaks(), TASKS, key="nightly run")
    (job,) = client.jobs()
    assert job.state == "loading"
    assert job.rows in (1024, 2048), "the part in flight may not have arrived"
    whole = client.submit(TEXTS, TASKS, key="nightly run")
    assert (whole.id, whole.state, whole.rows) == (job.id, "running", 2500)
    with pytest.raises(Conflict):
        client.submit(TEXTS, {"topic": TASKS["topic"]}, key="nightly run")


def test_rows_can_be_read_while_others_of_the_job_are_still_read_and_sent(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Job] = []
    told: list[tuple[str, int]] = []
    shown: list[str] = []
    monkeypatch.setattr(motet.upload.Bar, "show", lambda self, words, share=None: shown.append(str(words)))

    def rows() -> Iterator[str]:
        yield from TEXTS[:2100]
        (job,) = opened
        while not job.refresh().rows:
            time.sleep(0.01)
        house.answer(job.id, 0)
        told.append((job.state, next(job.results(order="done")).index))
        # In three parts more, of which the bar tells.
        yield from TEXTS[2100:] * 8

    job = client.submit(rows(), TASKS, opened=opened.append)
    assert told == [("loading", 0)]
    assert any("2,048 cells done" in words for words in shown)
    assert (job.id, job.state, job.progress.done) == (opened[0].id, "running", 2048)
    small = client.submit(["a"], TASKS, opened=opened.append)
    assert [job.id for job in opened[1:]] == [small.id]


def test_the_first_rows_of_a_slow_source_are_sent_before_its_second_part_is_read(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(motet.upload, "_SLOW_S", -1.0)
    opened: list[Job] = []
    seen: list[int] = []

    def rows() -> Iterator[str]:
        yield from TEXTS[:1025]
        seen.append(len(opened))
        yield from TEXTS[1025:]

    assert client.submit(rows(), TASKS, opened=opened.append).rows == 2500
    assert seen == [1]
    assert client.submit(["a"], TASKS).rows == 1


def test_a_bad_row_behind_rows_that_were_answered_refuses_the_job_and_leaves_nothing(
    house: House, client: Client
) -> None:
    opened: list[Job] = []
    read: list[int] = []

    def rows() -> Iterator[Any]:
        yield from TEXTS[:2100]
        while not opened[0].refresh().rows:
            time.sleep(0.01)
        house.answer(opened[0].id, 0)
        read.append(next(opened[0].results(order="done")).index)
        yield {"text": float("nan")}

    with pytest.raises(InvalidJob, match="row 2100"):
        client.submit(rows(), TASKS, opened=opened.append)
    assert read == [0]
    with pytest.raises(NotFound):
        list(opened[0].results())
    assert house.sql("SELECT count(*) FROM block") == [(0,)]
    assert house.sql("SELECT body ->> 'state' FROM outbox") == [("cancelled",)]


def test_a_plan_a_cancellation_and_errors_as_types(house: House, client: Client) -> None:
    plan = client.plan(TEXTS, TASKS)
    assert (plan.rows, [p.tasks for p in plan.passes]) == (2500, [("topic", "vector")])
    assert plan.unfused_tokens == 2 * plan.tokens > 0
    job = client.submit(TEXTS, TASKS)
    house.answer(job.id, 0)
    job.cancel()
    assert [r.index for r in job.results(check=False)] == list(range(1024))
    with pytest.raises(JobFailed):
        list(job.results())
    job.delete()
    with pytest.raises(NotFound):
        client.job(job.id)
    with pytest.raises(InvalidJob, match="did you mean topics"):
        client.submit(["a"], {"t": Classify("topcis")})
    with pytest.raises(Unauthorized):
        list(Client(house.url, "abc.def").jobs())


def test_models_tokens_and_overload(database_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, max_active_jobs=1) as house:
        admin = Client(house.url, house.tokens["admin"])
        assert {m.name for m in admin.models()} == {"tiny", "topics", "tones", "dice"}
        assert admin.model("topics").ref == "topics@1"
        token = admin.create_token("mine", "user", expires_days=1)
        assert token.token
        mine = Client(house.url, token.token, timeout=0.5)
        mine.submit(["a"], TASKS)
        with pytest.raises(Overloaded) as caught:
            mine.submit(["b"], TASKS)
        assert caught.value.retry_after > 0
        admin.revoke_token(token.id)
        with pytest.raises(Unauthorized):
            mine.models()
        assert [t.revoked is None for t in admin.tokens() if t.id == token.id] == [False]
