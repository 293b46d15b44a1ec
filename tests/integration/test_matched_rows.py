"""Rows that are events: those for which a job's condition holds, each once, in the transaction that seals their answers."""

from __future__ import annotations

import struct
from typing import Any
from uuid import UUID

import pytest

from motet.errors import Problem
from motet.protocol.columns import ERROR, CellError, Column
from motet.tasks import Classify
from scheduler.store import events
from tests.integration.landing import HEAD, land, land_more
from tests.integration.test_protocol import TASKS, House, house, label_of

__all__ = ["house"]

ROWS = ["x" * (i % 40) + str(i) for i in range(60)]
#: Two passes, of which the second reads the first.
CHAIN = {"size": Classify("length"), "again": Classify("length", input="{size}: {text}")}


def label(text: str) -> str:
    return HEAD.labels[label_of(text)]


def matched(house: House, job: UUID) -> list[tuple[int, Any]]:
    found = house.sql(
        "SELECT body FROM outbox WHERE job_id = :job AND kind = 'row_matched' ORDER BY id", job=job
    )
    return sorted((row.body["row"], row.body["answers"]) for row in found)


def test_each_row_for_which_the_condition_holds_is_one_event(house: House) -> None:
    job = land(house.database, ROWS, CHAIN, block_rows=16, notify_when="size == 'long' and again != 'short'")
    assert house.finish(job).state == "succeeded"
    wanted = []
    for i, row in enumerate(ROWS):
        size = label(row)
        again = label(f"{size}: {row}")
        if size == "long" and again != "short":
            wanted.append((i, {"size": size, "again": again}))
    assert wanted
    assert matched(house, job) == wanted
    (end,) = house.sql("SELECT body FROM outbox WHERE job_id = :job AND kind = 'job_ended'", job=job)
    assert end.body["rows_matched"] == house.job(job).rows_matched == len(wanted)


def test_answers_of_earlier_jobs_tell_as_well(house: House) -> None:
    first = land(house.database, ROWS, TASKS, block_rows=16, notify_when="size == 'long'")
    house.finish(first)
    again = land(house.database, ROWS, TASKS, block_rows=16, notify_when="size == 'long'")
    assert house.job(again).state == "succeeded", "nothing was run"
    assert matched(house, again) == matched(house, first) != []


def test_a_row_is_told_while_the_upload_goes_on(house: House) -> None:
    job = land(house.database, ["x" * 30], TASKS, notify_when="size == 'long'", close=False)
    house.work()
    assert [row for row, _ in matched(house, job)] == [0]
    land_more(house.database, job, ["x" * 30, "x"], number=1, first_row=1)
    house.work()
    assert [row for row, _ in matched(house, job)] == [0, 1]


def test_a_row_without_the_answer_is_no_event_even_where_the_condition_asks_for_another(house: House) -> None:
    rows = ["x" * 30, Problem("text", "null", "text", "mend it", 1), "y" * 30]
    job = land(house.database, rows, {"size": Classify("length")}, notify_when="size != 'short'")
    house.tick()
    for hand in house.hands:
        for a in hand.take_all():
            n = len(a.texts)
            failed = next((i for i, text in enumerate(a.texts) if text[0] == "y"), None)
            status = bytes(ERROR if i == failed else 0 for i in range(n))
            errors = {} if failed is None else {failed: CellError("too_long", "no")}
            arrays = {"codes": struct.pack(f"<{n}h", *[2] * n), "scores": struct.pack(f"<{n}f", *[0.5] * n)}
            column = Column(kind="label", status=status, arrays=arrays, errors=errors)
            hand.report(hand.outcome(a, columns={"size": column}))
    house.aggregate()
    assert house.job(job).state == "succeeded"
    assert [row for row, _ in matched(house, job)] == [0]


def test_events_of_rows_are_bounded_and_all_are_counted(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_ROWS", 5)
    job = land(house.database, ROWS, TASKS, block_rows=4, notify_when="size in ['short', 'middle', 'long']")
    house.finish(job)
    assert len(matched(house, job)) == 5
    assert house.job(job).rows_matched == 60


def test_a_job_without_a_condition_asks_nothing_more(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(events, "_matches", lambda *_: asked.append(1) or [])
    house.finish(land(house.database, ROWS, TASKS, block_rows=16))
    assert asked == []
