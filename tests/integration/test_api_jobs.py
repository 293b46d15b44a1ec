"""A job over HTTP and Postgres: opened, filled, closed, watched, ended; and what is answered already is not run."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest

from motet.protocol.columns import CellError
from tests.integration.api_house import CLASSIFY, TWO, House, a_house, house, problems, squeezed

__all__ = ["house"]

TEXTS = [f"text {i}" for i in range(1500)]


def counts(job: dict[str, Any]) -> tuple[int, int, int, int]:
    cells = job["cells"]
    return cells["ok"], cells["error"], cells["skipped"], cells["reused"]


def test_a_job_is_opened_filled_part_by_part_and_runs_when_it_is_closed(house: House) -> None:
    job = house.open(TWO, name="tickets", priority="bulk")
    assert (job["state"], job["rows"], job["name"], job["priority"]) == ("loading", 0, "tickets", "bulk")
    assert job["tasks"]["topic"]["model_ref"] == "topics@1"
    assert job["tasks"]["topic"]["labels"] == ["business", "sport"]
    assert job["passes"] == [
        {
            "kind": "encoder tiny",
            "tasks": ["topic", "vector"],
            "model": "tiny@1",
            "numerics": "fast",
            "max_tokens": 16,
            "needs": [],
        }
    ]
    first = house.put(job["id"], 0, TEXTS[:1024], first_row=0)
    assert first.json() == {
        "part": 0,
        "rows": 1024,
        "total_rows": 1024,
        "bad_rows": 0,
        "next_part": 1,
        "cells_done": 0,
    }
    second = house.put(job["id"], 1, TEXTS[1024:], first_row=1024)
    assert second.json() == {
        "part": 1,
        "rows": 476,
        "total_rows": 1500,
        "bad_rows": 0,
        "next_part": 2,
        "cells_done": 0,
    }
    closed = house.close(job["id"], 2, 1500)
    assert closed.status_code == 202
    assert closed.json()["state"] == "running"
    assert closed.json()["blocks"] == {"total": 2, "done": 0}
    assert closed.json()["cells"]["total"] == 3000
    waiting = house.sql("SELECT rows_waiting, bytes_waiting FROM pass")
    assert waiting == [(1500, sum(len(t) for t in TEXTS))]
    passes = house.sql("SELECT block_number, state, todo, n, cursor FROM block_pass ORDER BY 1")
    assert passes == [(0, "ready", 3, 1024, 0), (1, "ready", 3, 476, 0)]


def test_a_small_job_is_one_request(house: House) -> None:
    answer = house.call("POST", "/v1/jobs", json={"tasks": CLASSIFY, "rows": ["a", {"text": "b", "id": 7}]})
    assert answer.status_code == 202
    assert (answer.json()["state"], answer.json()["rows"]) == ("running", 2)


def test_json_lines_and_compressed_bodies_are_understood(house: House) -> None:
    import gzip

    job = house.open()["id"]
    lines = b'{"text": "a"}\n"b"\n\n{"text": "c", "other": [1, 2]}\n'
    parts = [
        (lines, "application/x-ndjson; charset=utf-8", None),
        (squeezed(lines), "application/x-ndjson", "zstd"),
        (squeezed(lines[:14]) + squeezed(lines[14:]), "application/x-ndjson", "zstd"),
        (gzip.compress(lines), "application/x-ndjson", "gzip"),
        (
            squeezed(msgpack.packb({"columns": {"text": ["a", "b", "c"]}, "first_row": 12})),
            "application/msgpack",
            "zstd",
        ),
    ]
    for number, (raw, kind, coding) in enumerate(parts):
        answer = house.put_raw(job, number, raw, kind, coding)
        assert answer.status_code == 200, answer.text
        assert answer.json()["rows"] == 3
    assert house.close(job, 5, 15).json()["rows"] == 15


def test_a_job_whose_blocks_are_done_has_succeeded_and_says_whether_it_is_whole(house: House) -> None:
    job = house.submit(TEXTS)["id"]
    house.answer(job, 1)
    assert house.job(job)["state"] == "running"
    assert house.job(job)["eta_s"] is not None
    house.answer(job, 0, failing={3: CellError("too_long", "17 tokens")})
    done = house.job(job)
    assert (done["state"], done["partial"], counts(done)) == ("succeeded", True, (1499, 1, 0, 0))
    assert done["finished"] >= done["started"] >= done["created"]


# -- what arrives twice


def test_the_same_key_and_body_is_the_same_job_and_another_body_is_refused(house: House) -> None:
    body = {"tasks": CLASSIFY, "rows": ["a"]}
    first = house.call("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": "k1"})
    again = house.call(
        "POST", "/v1/jobs", json=dict(reversed(body.items())), headers={"Idempotency-Key": "k1"}
    )
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    other = house.call(
        "POST", "/v1/jobs", json={"tasks": CLASSIFY, "rows": ["b"]}, headers={"Idempotency-Key": "k1"}
    )
    assert other.status_code == 409
    strange = house.call("POST", "/v1/jobs", token="stranger", json=body, headers={"Idempotency-Key": "k1"})
    assert strange.json()["id"] != first.json()["id"], "a key belongs to its tenant"
    assert house.sql("SELECT count(*) FROM job") == [(2,)]


def test_one_key_sent_many_times_at_once_opens_one_job(house: House) -> None:
    found: list[str] = []

    def send() -> None:
        found.append(house.open({**TWO}, key="at once", rows=["a", "b"])["id"])

    threads = [threading.Thread(target=send) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert house.sql("SELECT n_rows, n_parts FROM job") == [(2, 1)]


def test_a_part_sent_again_is_answered_as_before_and_stored_once(house: House) -> None:
    job = house.open()["id"]
    first = house.put(job, 0, ["a", "b"], first_row=0)
    house.put(job, 1, ["c"], first_row=2)
    assert house.put(job, 0, ["a", "b"], first_row=0).json() == first.json()
    other = house.put(job, 0, ["a", "x"], first_row=0)
    assert other.status_code == 409
    house.close(job, 2, 3)
    assert house.put(job, 1, ["c"], first_row=2).json()["total_rows"] == 3, "also after the close"
    assert house.sql("SELECT count(*), sum(n_rows) FROM block") == [(2, 3)]


def test_a_broken_upload_is_told_which_part_comes_next(house: House) -> None:
    job = house.open()["id"]
    house.put(job, 0, ["a"], first_row=0)
    for number in (2, 7):
        answer = house.put(job, number, ["z"])
        assert answer.status_code == 409
        assert answer.json()["error"]["next_part"] == 1
    shifted = house.put(job, 1, ["b"], first_row=5)
    assert (shifted.status_code, shifted.json()["error"]["next_part"]) == (409, 1)
    early = house.close(job, 2, 2)
    assert (early.status_code, early.json()["error"]["next_part"]) == (409, 1)
    assert house.put(job, 1, ["b"], first_row=1).status_code == 200
    assert house.close(job, 2, 2).status_code == 202


def test_closing_twice_is_answered_and_a_closed_job_takes_no_part(house: House) -> None:
    job = house.submit(["a", "b"])["id"]
    again = house.close(job, 1, 2)
    assert (again.status_code, again.json()["state"]) == (202, "running")
    assert house.close(job, 1, 3).status_code == 409
    assert house.put(job, 1, ["c"]).status_code == 409
    house.answer(job, 0)
    assert house.close(job, 1, 2).json()["state"] == "succeeded"


# -- what is answered already


def test_resubmitting_a_finished_job_runs_nothing(house: House) -> None:
    first = house.submit(TEXTS, TWO)["id"]
    house.answer(first, 0, failing={5: CellError("too_long", "17 tokens")})
    house.answer(first, 1)
    again = house.submit(TEXTS, {"other_name": TWO["vector"], "topic": TWO["topic"]})
    assert again["state"] == "succeeded"
    assert counts(again) == (2998, 2, 0, 3000)
    assert again["blocks"] == {"total": 2, "done": 2}
    assert house.sql("SELECT rows_waiting FROM pass WHERE job_id = :job", job=again["id"]) == [(0,)]
    assert house.sql("SELECT DISTINCT refs FROM sealed_column") == [(2,)]
    blocks, end = house.results(again["id"])
    assert end["complete"]
    assert [r["topic"].error for b in blocks for r in b if not r.ok] == [CellError("too_long", "17 tokens")]
    assert (
        blocks[1].answers["other_name"].column.arrays
        == house.results(first)[0][1].answers["vector"].column.arrays
    )


def test_an_added_task_runs_only_its_own_column(house: House) -> None:
    first = house.submit(TEXTS, CLASSIFY)["id"]
    house.answer(first, 0)
    house.answer(first, 1)
    tasks = {"vector": TWO["vector"], "topic": TWO["topic"], "tone": {"kind": "classify", "model": "tones"}}
    second = house.submit(TEXTS, tasks)
    assert counts(second) == (1500, 0, 0, 1500)
    assert house.sql("SELECT DISTINCT todo FROM block_pass WHERE state = 'ready'") == [(0b101,)]
    house.answer(second["id"], 0)
    house.answer(second["id"], 1)
    done = house.job(second["id"])
    assert (done["state"], counts(done)) == ("succeeded", (4500, 0, 0, 1500))


def test_a_cancelled_job_resumes_where_it_was(house: House) -> None:
    first = house.submit(TEXTS)["id"]
    house.answer(first, 0)
    house.call("POST", f"/v1/jobs/{first}/cancel")
    second = house.submit(TEXTS)
    assert (second["state"], counts(second)) == ("running", (1024, 0, 0, 1024))
    assert second["blocks"] == {"total": 2, "done": 1}
    assert house.sql(
        "SELECT block_number, state, n, cursor, done FROM block_pass WHERE job_id = :job ORDER BY 1",
        job=second["id"],
    ) == [(0, "sealed", 1024, 1024, 1024), (1, "ready", 476, 0, 0)]
    assert house.sql("SELECT rows_waiting FROM pass WHERE job_id = :job", job=second["id"]) == [(476,)]


def test_nothing_is_reused_across_tenants_without_leave_or_by_chance(house: House) -> None:
    first = house.submit(TEXTS[:10])["id"]
    house.answer(first, 0)
    assert house.submit(TEXTS[:10], reuse=False)["state"] == "running"
    assert house.submit(TEXTS[:9])["state"] == "running"
    dice = {"roll": {"kind": "function", "model": "dice"}}
    rolled = house.submit(TEXTS[:10], dice)["id"]
    house.answer(rolled, 0)
    assert house.submit(TEXTS[:10], dice)["state"] == "running", "dice give other answers each time"
    house.tokens["user"] = house.tokens["stranger"]
    assert house.submit(TEXTS[:10])["state"] == "running"


def test_removing_a_job_leaves_the_columns_that_others_show(house: House) -> None:
    first = house.submit(TEXTS)["id"]
    house.answer(first, 0)
    house.answer(first, 1)
    second = house.submit(TEXTS)["id"]
    assert house.call("DELETE", f"/v1/jobs/{first}").status_code == 204
    assert house.call("GET", f"/v1/jobs/{first}").status_code == 404
    assert len(house.results(second)[0]) == 2
    assert house.call("DELETE", f"/v1/jobs/{second}").status_code == 204
    assert house.sql("SELECT count(*) FROM sealed_column") == [(0,)]
    assert house.call("DELETE", f"/v1/jobs/{second}").status_code == 404


# -- rows that are none


def test_bad_rows_are_error_cells_of_every_task_and_every_cell_is_counted_once(house: House) -> None:
    job = house.open(TWO, bad_rows="error")["id"]
    landed = house.put(job, 0, ["a", 2**63, "c", "nul \0"], first_row=0)
    assert landed.json()["bad_rows"] == 2
    closed = house.close(job, 1, 4).json()
    assert counts(closed) == (0, 4, 0, 0)
    assert house.sql("SELECT n, todo FROM block_pass") == [(2, 3)]
    house.answer(job, 0)
    done = house.job(job)
    assert (done["state"], done["partial"], counts(done)) == ("succeeded", True, (4, 4, 0, 0))
    rows = [r for b in house.results(job)[0] for r in b]
    assert [r.ok for r in rows] == [True, False, True, False]
    assert rows[1]["topic"].error.error == "bad_row"
    again = house.open(TWO, bad_rows="error")["id"]
    house.put(again, 0, ["a", 2**63, "c", "nul \0"], first_row=0)
    reused = house.close(again, 1, 4).json()
    assert (reused["state"], counts(reused)) == ("succeeded", (4, 4, 0, 8)), (
        "their errors are in the column's counts"
    )


def test_a_job_of_bad_rows_alone_is_over_when_it_is_closed(house: House) -> None:
    job = house.open(TWO, bad_rows="error")["id"]
    house.put(job, 0, ["\0", 2**63], first_row=0)
    house.put(job, 1, ["", ""], bad={0: ["bad_row", "text: got null; expected text"], 1: ["bad_row", "mine"]})
    done = house.close(job, 2, 4).json()
    assert (done["state"], counts(done)) == ("succeeded", (0, 8, 0, 0))
    blocks, end = house.results(job)
    assert end["complete"]
    assert [r["vector"].error.message for b in blocks for r in b] == [
        "text: got a NUL character; expected text without NUL",
        "text: got an int beyond 64 bits; expected a number of 64 bits",
        "text: got null; expected text",
        "mine",
    ]
    listed = house.call("GET", f"/v1/jobs/{job}/errors").json()
    assert len(listed["errors"]) == 8


def test_a_refused_part_is_not_stored_and_may_be_sent_mended(house: House) -> None:
    job = house.open()["id"]
    house.put(job, 0, ["a", "b"], first_row=0)
    found = problems(house.put(job, 1, ["c", b"d", "e"], first_row=2))
    assert [(p["field"], p["row"], p["got"]) for p in found] == [("rows.text", 3, "a value of type bytes")]
    lines = house.put_raw(job, 1, b'"c"\n{"text": \n"e"', "application/x-ndjson")
    (broken,) = problems(lines)
    assert broken["row"] == 3
    assert "line 2" in broken["got"]
    assert house.job(job)["rows"] == 2
    assert house.put(job, 1, ["c", "d", "e"], first_row=2).status_code == 200


# -- watching and ending


@pytest.mark.alone
def test_a_watcher_is_woken_by_the_change_it_waits_for(house: House) -> None:
    job = house.submit(["a", "b"])
    timer = threading.Timer(0.3, house.answer, (job["id"], 0))
    timer.start()
    start = time.monotonic()
    answer = house.call("GET", f"/v1/jobs/{job['id']}", params={"wait_s": 20, "version": job["version"]})
    took = time.monotonic() - start
    timer.join()
    assert answer.json()["version"] > job["version"]
    assert 0.2 < took < 0.95, "woken by the notification, before the poll of the next second"


@pytest.mark.alone
def test_a_watcher_hears_nothing_new_in_time_and_an_ended_job_is_not_waited_for(house: House) -> None:
    job = house.submit(["a"])
    start = time.monotonic()
    answer = house.call("GET", f"/v1/jobs/{job['id']}", params={"wait_s": 0.3, "version": job["version"]})
    assert answer.json()["version"] == job["version"]
    assert 0.25 < time.monotonic() - start < 2
    ended = house.call("POST", f"/v1/jobs/{job['id']}/cancel").json()
    start = time.monotonic()
    house.call("GET", f"/v1/jobs/{job['id']}", params={"wait_s": 20, "version": ended["version"]})
    assert time.monotonic() - start < 2


@pytest.mark.alone
def test_many_watchers_hold_no_thread(house: House) -> None:
    job = house.submit(["a"])
    done: list[int] = []

    def watch() -> None:
        done.append(
            house.call(
                "GET", f"/v1/jobs/{job['id']}", params={"wait_s": 20, "version": job["version"]}
            ).status_code
        )

    watchers = [threading.Thread(target=watch) for _ in range(60)]
    for w in watchers:
        w.start()
    time.sleep(0.5)
    start = time.monotonic()
    assert house.job(job["id"])["state"] == "running"
    assert time.monotonic() - start < 1, "sixty waiting requests are more than there are threads"
    house.answer(job["id"], 0)
    for w in watchers:
        w.join(10)
    assert done == [200] * 60


def test_cancel_freezes_the_counts_and_is_harmless_afterwards(house: House) -> None:
    job = house.submit(TEXTS)["id"]
    house.answer(job, 0)
    ended = house.call("POST", f"/v1/jobs/{job}/cancel").json()
    assert (ended["state"], counts(ended)) == ("cancelled", (1024, 0, 476, 0))
    assert ended["reason"] == "cancelled on request"
    assert house.call("POST", f"/v1/jobs/{job}/cancel").json() == ended
    loading = house.open()["id"]
    house.put(loading, 0, ["a"])
    assert house.call("POST", f"/v1/jobs/{loading}/cancel").json()["cells"]["skipped"] == 1
    assert house.put(loading, 1, ["b"]).status_code == 409
    assert house.close(loading, 1, 1).status_code == 409


def test_jobs_are_listed_newest_first_page_by_page(house: House) -> None:
    opened = [house.open(name=f"job {i}")["id"] for i in range(5)]
    house.call("POST", f"/v1/jobs/{opened[0]}/cancel")
    seen, after = [], None
    for _ in range(3):
        page = house.call(
            "GET", "/v1/jobs", params={"limit": 2, **({"after": after} if after else {})}
        ).json()
        seen += [j["id"] for j in page["jobs"]]
        after = page["next"]
    assert seen == opened[::-1]
    assert after is None
    loading = house.call("GET", "/v1/jobs", params={"state": "cancelled"}).json()
    assert [j["id"] for j in loading["jobs"]] == [opened[0]]
    assert house.call("GET", "/v1/jobs", token="stranger").json() == {"jobs": [], "next": None}


# -- limits


def test_a_tenant_with_too_much_under_way_is_asked_to_come_back(database_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, max_active_jobs=1, max_rows=5, max_tasks=2) as house:
        job = house.open()["id"]
        busy = house.call("POST", "/v1/jobs", json={"tasks": CLASSIFY})
        assert busy.status_code == 429
        assert int(busy.headers["Retry-After"]) > 0
        assert house.call("POST", "/v1/jobs", token="stranger", json={"tasks": CLASSIFY}).status_code == 201
        house.put(job, 0, ["a"] * 4)
        (many,) = problems(house.put(job, 1, ["a"] * 2))
        assert "at most 5 rows" in many["expected"]
        house.sql("UPDATE tenant SET row_quota = 4 WHERE name = 'default'")
        over = house.put(job, 1, ["a"])
        assert (over.status_code, over.json()["error"]["type"]) == (429, "overloaded")
        three = dict.fromkeys("abc", CLASSIFY["topic"])
        (tasks,) = problems(house.call("POST", "/v1/jobs", json={"tasks": three}))
        assert tasks["got"] == "3 tasks"


def test_an_interactive_job_is_small(house: House) -> None:
    job = house.open(priority="interactive")["id"]
    assert house.put(job, 0, ["a"] * 256).status_code == 200
    (problem,) = problems(house.put(job, 1, ["a"]))
    assert "interactive" in problem["expected"]


def test_a_body_is_counted_on_the_wire_and_again_as_it_is_decoded(database_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, max_part_bytes=100_000) as house:
        job = house.open()["id"]
        bomb = msgpack.packb({"columns": {"text": ["x" * 200_000]}})
        for raw, coding in ((bomb, None), (squeezed(bomb), "zstd")):
            answer = house.put_raw(job, 0, raw, coding=coding)
            assert (answer.status_code, answer.json()["error"]["type"]) == (413, "too_large")
        for raw, coding in (
            (b"no frame", "zstd"),
            (squeezed(b"x" * 100)[:-2], "zstd"),
            (b"x", "br"),
            (b"x", "gzip"),
        ):
            assert house.put_raw(job, 0, raw, coding=coding).status_code == 422
        many_frames = squeezed(b"") * 5000
        assert house.put_raw(job, 0, many_frames, coding="zstd").status_code == 422


@pytest.mark.parametrize("spell", ["no such id", "0b9f3c1e-6f0c-4f0e-9b0a-2f6f0a3c8d11", "%00", "..%2f"])
def test_what_is_no_job_is_not_found(house: House, spell: str) -> None:
    for method, path in (
        ("GET", ""),
        ("POST", "/cancel"),
        ("DELETE", ""),
        ("GET", "/results"),
        ("GET", "/errors"),
    ):
        assert house.call(method, f"/v1/jobs/{spell}{path}").status_code == 404
    assert house.put(spell, 0, ["a"]).status_code == 404


def test_an_answer_is_json_with_an_id_that_the_log_knows(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "scheduler")
    answer = house.call("GET", "/v1/jobs", params={"state": "loading"})
    # The line is written when the answer has been sent, so it may come a moment later.
    until = time.monotonic() + 5
    while not (
        found := [r for r in caplog.records if vars(r).get("request") == answer.headers["X-Request-Id"]]
    ):
        assert time.monotonic() < until
        time.sleep(0.005)
    (line,) = found
    assert (line.route, line.status) == ("/v1/jobs", 200)
    assert "loading" not in json.dumps(vars(line), default=str)


def test_landing_and_removing_at_once_keeps_every_shared_column_counted(house: House) -> None:
    texts = [f"shared {i}" for i in range(30)]
    first = house.submit(texts)["id"]
    house.answer(first, 0)
    failed: list[str] = []

    def come_and_go() -> None:
        try:
            for _ in range(6):
                job = house.submit(texts)["id"]
                if house.job(job)["state"] == "running":
                    house.answer(job, 0)
                house.call("DELETE", f"/v1/jobs/{job}")
        except AssertionError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=come_and_go) for _ in range(5)]
    for t in threads:
        t.start()
    house.call("DELETE", f"/v1/jobs/{first}")
    for t in threads:
        t.join()
    assert failed == []
    assert house.sql("SELECT count(*) FROM job") == [(0,)]
    assert house.sql("SELECT count(*) FROM sealed_column") == [(0,)]


def test_a_plan_tells_tokens_of_a_title_by_titles_and_not_by_the_bodies_beside_them(house: House) -> None:
    tasks = {
        "title": {"kind": "classify", "model": "topics", "input": "{title}"},
        "both": {"kind": "classify", "model": "topics", "input": "{title} {body}"},
    }
    rows = [{"title": "A short title", "body": "word " * 40}] * 10
    asked = {"tasks": tasks, "rows": rows, "total_rows": 100}
    by_rows = house.call("POST", "/v1/plan", json=asked).json()["passes"]
    # Of the whole is said that its texts are ten times as long as those of the sample.
    by_bytes = house.call(
        "POST", "/v1/plan", json={**asked, "total_bytes": 1000 * sum(map(len, rows[0].values()))}
    ).json()["passes"]
    assert by_bytes[0]["tokens"] == by_rows[0]["tokens"]
    assert by_bytes[1]["tokens"] == 10 * by_rows[1]["tokens"]
