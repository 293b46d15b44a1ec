"""Results over HTTP, from sealed columns made by hand: in row order and as finished, whole and in parts."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from motet.protocol.columns import CellError, Column
from motet.results import Block
from scheduler.api import results as route
from scheduler.store import sealing
from scheduler.store.results import read_columns
from tests.integration.api_house import TWO, House, answers_of, house

__all__ = ["house"]

ALL = {**TWO, "tone": {"kind": "classify", "model": "tones"}, "roll": {"kind": "function", "model": "dice"}}
TEXTS = [f"text {i}" for i in range(3000)]


def numbers(blocks: list[Block]) -> list[int]:
    return [b.number for b in blocks]


def test_every_kind_of_column_comes_back_as_it_was_sealed(house: House) -> None:
    job = house.submit(TEXTS[:7], ALL)["id"]
    house.answer(job, 0, failing={3: CellError("too_long", "17 tokens")})
    (block,), end = house.results(job)
    told = end.pop("job")
    assert end == {"end": True, "next": 1, "state": "succeeded", "complete": True}
    assert told == house.job(job)
    rows = list(block)
    assert [r.index for r in rows] == list(range(7))
    assert [str(r["topic"]) for r in rows if r.ok] == [
        "business",
        "sport",
        "business",
        "business",
        "sport",
        "business",
    ]
    assert rows[2]["topic"].score == pytest.approx(2 / 7)
    assert rows[2]["tone"].labels == ("glad", "sad")
    assert rows[0]["tone"].value == []
    assert rows[6]["vector"].vector == [6.0, 0.5]
    assert rows[5]["roll"].value == {"row": 5}
    assert rows[3].errors == {name: CellError("too_long", "17 tokens") for name in ALL}


def test_all_arrays_survive_the_way_through_postgres(house: House) -> None:
    import struct

    columns = [
        Column(
            kind="spans",
            status=b"\x10\x00\x02",
            arrays={
                "offsets": struct.pack("<4i", 0, 2, 3, 3),
                "starts": struct.pack("<3i", 0, 5, 70_000),
                "ends": struct.pack("<3i", 4, 9, 70_001),
                "codes": struct.pack("<3h", 0, 1, -1),
                "scores": struct.pack("<3f", 0.5, 1.0, 1e-30),
            },
            errors={2: CellError("skipped", "why")},
        ),
        Column(
            kind="label",
            status=b"\0\0",
            arrays={
                "codes": struct.pack("<2h", 1, 0),
                "scores": struct.pack("<2f", 0.75, 0.5),
                "all": struct.pack("<4f", 0.25, 0.75, 0.5, 0.5),
            },
        ),
        Column(kind="number", status=b"\0\0", arrays={"numbers": struct.pack("<2d", -1.5, 1e300)}),
        Column(kind="vector", status=b"\0", arrays={"vectors": b"\1\2\3\4"}, dim=2, dtype="fp16"),
        Column(kind="labels", status=b"\0", arrays={"offsets": bytes(8), "codes": b"", "scores": b""}),
        answers_of("json", 3, {}),
    ]
    with house.database.transaction() as connection:
        ids = [sealing.store_column(connection, house.tenants["default"], c, None) for c in columns]
        found = read_columns(connection, ids)
    for stored, column in zip(ids, columns, strict=True):
        back = found[stored]
        back.check()
        assert (back.kind, back.status, back.errors, back.dim, back.dtype) == (
            column.kind,
            column.status,
            column.errors,
            column.dim,
            column.dtype,
        )
        assert {k: v for k, v in back.arrays.items() if v} == {k: v for k, v in column.arrays.items() if v}


def test_row_order_waits_for_the_next_block_and_done_order_does_not(house: House) -> None:
    job = house.submit(TEXTS)["id"]
    house.answer(job, 2)
    blocks, end = house.results(job)
    assert (numbers(blocks), end["next"], end["complete"]) == ([], 0, False)
    blocks, end = house.results(job, order="done")
    assert (numbers(blocks), blocks[0].done, end["next"]) == ([2], 1, 1)
    house.answer(job, 0)
    blocks, end = house.results(job)
    assert (numbers(blocks), end["next"]) == ([0], 1)
    assert blocks[0].first_row == 0
    house.answer(job, 1)
    blocks, end = house.results(job, after=1)
    assert (numbers(blocks), end["next"], end["state"], end["complete"]) == ([1, 2], 3, "succeeded", True)
    blocks, end = house.results(job, order="done", after=1)
    assert (numbers(blocks), end["next"], end["complete"]) == ([0, 1], 3, True)
    blocks, end = house.results(job, after=3)
    assert (numbers(blocks), end["complete"]) == ([], True)
    for order in ("row", "done"):
        # As of another job: rows to come would be passed over.
        refused = house.call("GET", f"/v1/jobs/{job}/results", params={"order": order, "after": 4})
        assert refused.status_code == 422
        assert refused.json()["error"]["problems"][0]["got"] == "4"


def test_a_block_is_sent_once_the_asked_tasks_are_sealed_in_it(house: House) -> None:
    job = house.submit(TEXTS[:10], {**TWO, "roll": {"kind": "function", "model": "dice"}})["id"]
    # Only the first pass comes back.
    house.sql("UPDATE block_pass SET state = 'waiting' WHERE pass_number = 1")
    house.answer(job, 0)
    # A move that no job makes: the trigger that holds them is passed over.
    house.sql(
        "SET LOCAL session_replication_role = replica; UPDATE job SET state = 'running', finished = NULL"
    )
    house.sql("UPDATE block SET done_number = NULL")
    assert house.results(job)[0] == []
    (block,), end = house.results(job, tasks="vector,topic")
    assert set(block.answers) == {"topic", "vector"}
    assert block.done is None
    assert end["complete"], "of these tasks nothing will follow"


def test_an_ended_job_shows_what_it_has_and_passes_over_what_it_has_not(house: House) -> None:
    job = house.submit(TEXTS)["id"]
    house.answer(job, 2)
    house.answer(job, 0)
    house.call("POST", f"/v1/jobs/{job}/cancel")
    blocks, end = house.results(job)
    assert (numbers(blocks), end["state"], end["complete"]) == ([0, 2], "cancelled", True)


def test_a_job_that_loads_shows_reused_blocks_but_is_not_complete(house: House) -> None:
    first = house.submit(TEXTS[:5])["id"]
    house.answer(first, 0)
    second = house.open()["id"]
    house.put(second, 0, TEXTS[:5], first_row=0)
    blocks, end = house.results(second)
    assert (numbers(blocks), end["state"], end["complete"]) == ([0], "loading", False)


def test_an_answer_holds_about_eight_megabytes_and_says_where_to_go_on(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "ANSWER_BYTES", 30_000)
    monkeypatch.setattr(route, "_BATCH_BYTES", 15_000)
    job = house.submit([f"text {i}" for i in range(6000)])["id"]
    for block in range(6):
        house.answer(job, block)
    seen, after = [], 0
    for _ in range(10):
        blocks, end = house.results(job, after=after)
        assert len(blocks) <= 3
        seen += numbers(blocks)
        after = end["next"]
        if end["complete"]:
            break
    assert seen == list(range(6))


@pytest.mark.alone
def test_a_reader_waits_for_the_next_block_and_is_woken(house: House) -> None:
    job = house.submit(TEXTS[:2])["id"]
    timer = threading.Timer(0.3, house.answer, (job, 0))
    timer.start()
    start = time.monotonic()
    blocks, end = house.results(job, wait_s=20)
    took = time.monotonic() - start
    timer.join()
    assert (numbers(blocks), end["complete"]) == ([0], True)
    assert 0.2 < took < 0.95
    unfinished = house.submit(["new"])["id"]
    start = time.monotonic()
    assert house.results(unfinished, wait_s=0.3)[0] == []
    assert time.monotonic() - start > 0.25


def lines(house: House, job: str, **params: Any) -> list[dict[str, Any]]:
    answer = house.call(
        "GET", f"/v1/jobs/{job}/results", params=params, headers={"Accept": "application/x-ndjson"}
    )
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_lines_are_for_people_with_curl(house: House) -> None:
    tasks = {**ALL, "topic": {**TWO["topic"], "scores": True}, "plain": TWO["topic"]}
    job = house.submit(TEXTS[:4], tasks)["id"]
    assert lines(house, job) == []
    house.answer(job, 0, failing={1: CellError("too_long", "17 tokens")})
    rows = lines(house, job, tasks="plain,tone,vector,roll")
    assert rows[2] == {
        "row": 2,
        "plain": "business",
        "tone": ["glad", "sad"],
        "vector": [2.0, 0.5],
        "roll": {"row": 2},
        "errors": {},
    }
    assert rows[1]["plain"] is None
    assert rows[1]["errors"]["tone"] == {"error": "too_long", "message": "17 tokens"}
    assert [r["row"] for r in rows] == [0, 1, 2, 3]


def test_cells_without_an_answer_are_listed_by_row_and_page(house: House) -> None:
    job = house.submit(TEXTS[:2500], TWO)["id"]
    for block in range(3):
        house.answer(job, block, failing={i: CellError("too_long", f"row {i}") for i in (0, 7, 300)})
    every = house.call("GET", f"/v1/jobs/{job}/errors").json()
    assert [e["row"] for e in every["errors"]] == sorted(
        [r + b for b in (0, 1024, 2048) for r in (0, 7, 300)] * 2
    )
    assert every["errors"][0] == {"row": 0, "task": "topic", "error": "too_long", "message": "row 0"}
    assert every["next"] is None
    seen, after = [], None
    for _ in range(20):
        page = house.call(
            "GET",
            f"/v1/jobs/{job}/errors",
            params={"limit": 3, **({} if after is None else {"after": after})},
        ).json()
        seen += page["errors"]
        after = page["next"]
        if after is None:
            break
    assert seen == every["errors"]


def test_the_views_show_what_the_api_shows(house: House) -> None:
    job = house.submit(TEXTS[:4], ALL)["id"]
    house.answer(job, 0, failing={1: CellError("too_long", "17 tokens")})
    found = house.sql("SELECT row, status, value FROM results WHERE task = 'topic' ORDER BY row")
    assert [(r, s) for r, s, _ in found] == [(0, "ok"), (1, "error"), (2, "ok"), (3, "ok")]
    assert found[0].value["label"] == "business"
    assert found[1].value == {"error": "too_long", "message": "17 tokens"}
    merged = house.sql("SELECT cells FROM merged WHERE row = 2")
    assert merged[0].cells["roll"]["value"] == {"row": 2}
