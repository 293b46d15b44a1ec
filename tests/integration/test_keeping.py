"""Retention from the front: answered rows of an open job go after their time, and nobody who reads it is deceived."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

import httpx
import pytest

from motet import Classify, Client, Embed, Gone
from motet.protocol.columns import CellError
from scheduler.store import endings, keeping
from tests.integration.api_house import TWO, House, problems
from tests.integration.api_house import client as client
from tests.integration.api_house import house as house
from tests.integration.test_api_asks import answering, ask

TASKS = {"topic": Classify("topics"), "vector": Embed("tiny")}
_TABLES = ("block", "block_pass", "block_column", "ask", "subtask")


def opened(house: House, rows: int = 6) -> str:
    """An open job of so many answered rows, each a block of its own."""
    job = str(house.open(TWO, open=True, name="risk", keep_s=3600)["id"])
    with answering(house, job):
        for n in range(rows):
            assert ask(house, job, [f"row {n}"], key=f"key {n}").status_code == 200
    return job


def age(house: House, job: str, *blocks: int, hours: int = 2) -> None:
    """As if these had been answered so long ago."""
    house.sql(
        "UPDATE block SET done_at = clock_timestamp() - make_interval(hours => :hours) WHERE job_id = :job AND number = ANY(:blocks)",
        job=job,
        blocks=list(blocks),
        hours=hours,
    )


def forget(house: House, job: str) -> keeping.Forgotten:
    with house.database.transaction() as connection:
        return keeping.forget_front(connection, UUID(job))


def counted(house: House, job: str) -> tuple[int, int]:
    (c,) = house.sql(
        "SELECT cells_ok + cells_error + cells_skipped AS n, n_rows * n_tasks AS all FROM job WHERE id = :job",
        job=job,
    )
    return c.n, c.all


def test_answered_rows_go_from_the_front_and_stay_counted(house: House) -> None:
    job = opened(house)
    assert house.job(job)["keep_s"] == 3600
    age(house, job, 0, 1, 2, 4)
    with house.database.transaction() as connection:
        assert keeping.due_fronts(connection) == [UUID(job)]
    # Block 4 is old enough, and stands behind one that is not.
    assert forget(house, job) == keeping.Forgotten(blocks=3, more=False)
    assert forget(house, job).blocks == 0
    told = house.job(job)
    assert (told["first_row"], told["rows"]) == (3, 6)
    assert counted(house, job) == (12, 12)
    left = {table: house.sql(f"SELECT * FROM {table} WHERE job_id = :job", job=job) for table in _TABLES}
    assert len(left["block"]) == len(left["ask"]) == 3
    assert len(left["block_column"]) == 6
    assert house.sql("SELECT count(*) AS n FROM sealed_column")[0].n == 6
    (past,) = house.sql(
        "SELECT past_ok, past_error, past_skipped, past_done, first_block FROM job WHERE id = :job", job=job
    )
    assert tuple(past) == (6, 0, 0, 3, 3)
    # A key lives as long as its block: repeated later it is a new row.
    with answering(house, job, after=6):
        assert ask(house, job, ["row 5"], key="key 5").json()["rows"][0]["row"] == 5
        assert ask(house, job, ["row 0"], key="key 0").json()["rows"][0]["row"] == 6
    house.call("POST", f"/v1/jobs/{job}/close", json={})
    assert house.job(job)["state"] == "succeeded"
    age(house, job, *range(3, 7))
    assert forget(house, job).blocks == 0, "a job that was closed keeps its rows for its retention"
    with house.database.transaction() as connection:
        assert endings.delete_job(connection, UUID(job))
    assert not house.sql("SELECT 1 FROM sealed_column")


def test_what_is_not_answered_or_leased_stays(house: House) -> None:
    job = str(house.open(TWO, open=True, keep_s=60)["id"])
    for n in range(3):
        ask(house, job, [f"row {n}"], key=f"key {n}", within_s=0.2)
        if n == 1:
            house.answer(job, 1)
    house.answer(job, 2, {0: CellError("too_long", "it is")})
    age(house, job, 0, 1, 2)
    house.sql(
        "INSERT INTO subtask (job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes)"
        " VALUES (:job, 0, '{1}', '{0}', '{1}', '{1}', 1, 1, 1)",
        job=job,
    )
    assert forget(house, job).blocks == 0, "a sub-task is open there"
    house.sql("UPDATE subtask SET state = 'lost', closed = clock_timestamp()")
    assert forget(house, job).blocks == 2
    assert [b.number for b in house.sql("SELECT number FROM block WHERE job_id = :job", job=job)] == [0]
    assert not house.sql("SELECT 1 FROM subtask"), "closed sub-tasks go with their rows"
    # Before the first row from which on all are kept stands one that is not answered yet.
    assert house.job(job)["first_row"] == 3
    house.answer(job, 0)
    assert [b.first_row for b in house.results(job, order="done", after=2)[0]] == [0]
    with house.database.transaction() as connection:
        endings.cancel_job(connection, house.tenants["default"], UUID(job))
    cells = house.job(job)["cells"]
    assert {k: cells[k] for k in ("total", "ok", "error", "skipped")} == {
        "total": 6,
        "ok": 4,
        "error": 2,
        "skipped": 0,
    }


def test_a_job_that_ends_counts_what_is_gone(house: House) -> None:
    job = opened(house, 3)
    ask(house, job, ["nobody answers"], within_s=0.05)
    age(house, job, 0, 1)
    forget(house, job)
    assert house.call("POST", f"/v1/jobs/{job}/cancel").status_code < 300
    cells = house.job(job)["cells"]
    assert (cells["total"], cells["ok"], cells["skipped"]) == (8, 6, 2)


def get(house: House, job: str, lines: bool = False, **params: Any) -> httpx.Response:
    headers = {"Accept": "application/x-ndjson"} if lines else {}
    return house.call("GET", f"/v1/jobs/{job}/results", params=params, headers=headers)


@pytest.mark.parametrize("order", ["row", "done"])
def test_a_reader_behind_the_front_is_told(house: House, order: str) -> None:
    job = opened(house)
    age(house, job, 0, 1, 2, 3)
    forget(house, job)
    refused = get(house, job, order=order, after=2)
    assert refused.status_code == 410
    told = refused.json()["error"]
    assert (told["type"], told["first_row"]) == ("gone", 4)
    assert "from row 4 on" in told["message"]
    assert "skip_gone=true" in told["message"]
    for asked in ({"after": 2, "skip_gone": True}, {"after": 4}, {}):
        blocks, end = house.results(job, order=order, **asked)
        assert [b.first_row for b in blocks] == [4, 5]
        assert end["first_row"] == 4
        assert not house.results(job, order=order, after=end["next"])[0]
    lines = get(house, job, lines=True, order=order)
    assert lines.headers["Motet-First-Row"] == "4"
    assert [line[:9] for line in lines.text.splitlines()] == ['{"row": 4', '{"row": 5']
    errors = house.call("GET", f"/v1/jobs/{job}/errors")
    assert errors.json() == {"errors": [], "next": None, "first_row": 4}
    assert house.call("GET", f"/v1/jobs/{job}/errors", params={"after": 1}).status_code == 410
    # All is gone: the stream begins where it goes on.
    age(house, job, 4, 5)
    forget(house, job)
    blocks, end = house.results(job, order=order)
    assert (blocks, end["next"], end["first_row"]) == ([], 6, 6)
    assert house.job(job)["cells"]["ok"] == 12


def test_a_stream_whose_next_rows_go_away_ends_in_words(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = opened(house, 4)
    from scheduler.api import results

    monkeypatch.setattr(results, "_BATCH_BYTES", 1)
    read = results.read_columns
    reads = 0

    def slowly(connection: Any, ids: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 2:
            age(house, job, 0, 1, 2)
            forget(house, job)
        return read(connection, ids)

    monkeypatch.setattr(results, "read_columns", slowly)
    blocks, end = house.results(job, order="done")
    assert [b.first_row for b in blocks] == [0]
    assert (end["next"], end["complete"]) == (1, False)
    assert get(house, job, order="done", after=end["next"]).status_code == 410


def test_the_client_tells_where_a_feed_begins(
    house: House, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    feed = client.open(TASKS, name="risk", keep_days=0.5)
    with answering(house, feed.job.id):
        cursors = []
        for n in range(4):
            feed.ask(f"row {n}")
    rows = feed.rows()
    cursors = [next(rows).cursor for _ in range(4)]
    age(house, feed.job.id, 0, 1, hours=13)
    forget(house, feed.job.id)
    with pytest.raises(Gone, match="from row 2 on") as gone:
        next(feed.rows(after=cursors[0] or 0))
    assert gone.value.first_row == 2
    assert next(feed.rows(after=cursors[0] or 0, skip_gone=True)).index == 2
    with pytest.raises(Gone):
        # In the middle of the first block, which the server takes for the beginning.
        next(feed.rows(after=1))
    assert next(feed.rows(after=cursors[1] or 0)).index == 2
    with caplog.at_level(logging.WARNING):
        assert next(feed.rows()).index == 2
    assert "before row 2" in caplog.text
    feed.close()
    assert [row.index for row in feed.job.results()] == [2, 3]
    assert feed.job.refresh().record["first_row"] == 2


@pytest.mark.parametrize("keep_s", [0, -1, 59, "long", 10**12])
def test_nobody_keeps_rows_for_no_time(house: House, keep_s: Any) -> None:
    answer = house.call("POST", "/v1/jobs", json={"tasks": TWO, "open": True, "keep_s": keep_s})
    assert answer.status_code == 422
    assert [p["field"] for p in problems(answer)] == ["keep_s"]


def test_only_an_open_job_keeps_rows_for_a_time(house: House) -> None:
    answer = house.call("POST", "/v1/jobs", json={"tasks": TWO, "keep_s": 3600})
    assert answer.status_code == 422
    (problem,) = problems(answer)
    assert (problem["field"], problem["remedy"]) == ("keep_s", "say retention_days of any other")
    assert house.job(house.open(TWO)["id"])["keep_s"] is None
    assert house.job(house.open(TWO, open=True)["id"])["keep_s"] == 7 * 86_400
