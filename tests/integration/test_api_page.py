"""What happens in a job, as JSON and as a page: over real HTTP and Postgres, with the live dispatcher and aggregator."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import text

from motet import job as handles
from motet.client import Client
from motet.local.valkey import ValkeyUrls
from motet.messages.activity import JobActivity, SubtaskPage
from motet.protocol.columns import CellError
from motet.protocol.settings import Settings
from motet.protocol.transport import MemoryTransport, RedisWorkerTransport
from motet.protocol.wire import Beat
from scheduler.aggregator import Aggregator
from scheduler.dispatcher import Dispatcher
from scheduler.store import activity
from scheduler.store.database import Database
from tests.integration import test_protocol as protocol
from tests.integration.api_house import CLASSIFY, TWO, House, a_house, house
from tests.integration.landing import land, register
from tests.messages import holds

__all__ = ["house"]

EVIL = "<script>alert(1)</script>"


@dataclass
class Works:
    """An API, and a cluster over the same Postgres that runs when it is told to."""

    api: House
    cluster: protocol.House

    def land(self, rows: int = 300) -> UUID:
        return land(self.cluster.database, protocol.texts(rows), protocol.TASKS, block_rows=64)

    def look(self, job: object, **params: Any) -> dict[str, Any]:
        answer = self.api.call("GET", f"/v1/jobs/{job}/activity", params=params)
        assert answer.status_code == 200, answer.text
        holds(JobActivity, answer.json())
        return answer.json()  # type: ignore[no-any-return]


@pytest.fixture
def works(database_url: str, tmp_path: Path) -> Iterator[Works]:
    database, transport = Database(database_url), MemoryTransport()
    settings = Settings(subtask_s=0.25, depth=3, leader_lease_s=30.0, reclaim_s=0.0)
    with a_house(database_url, tmp_path) as api:
        register(database, protocol.TRUNK, protocol.HEAD)
        hands = [protocol.Hand(transport, "w1"), protocol.Hand(transport, "w2")]
        dispatcher, aggregator = (kind(database, transport, settings) for kind in (Dispatcher, Aggregator))
        yield Works(api, protocol.House(database, transport, dispatcher, aggregator, hands))
    database.close()


# -- activity


def test_a_running_job_shows_what_each_pass_and_device_does(works: Works) -> None:
    job = works.land()
    before = works.look(job)
    assert before["passes"][0]["rows"] == {"total": 300, "waiting": 300, "open": 0, "done": 0}
    assert (before["devices"], before["timeline"], before["throughput"]) == ([], [], [])
    works.cluster.work()
    works.cluster.tick()
    seen = works.look(job)
    [p] = seen["passes"]
    assert (p["number"], p["kind"], p["tasks"]) == (0, "encoder trunk", ["size", "again"])
    assert p["rows"]["open"] > 0 < p["rows"]["done"]
    assert p["rows"]["waiting"] + p["rows"]["open"] + p["rows"]["done"] == p["rows"]["total"] == 300
    assert p["blocks"] == {"total": 5, "sealed": seen["job"]["blocks"]["done"], "waiting": 0}
    states = [s["state"] for s in seen["timeline"]]
    assert p["subtasks"] == {s: states.count(s) for s in ("open", "done", "lost", "failed")}
    # The hands read one token a row, for two tasks at once.
    assert p["tokens"] == p["rows"]["done"] == seen["job"]["usage"]["tokens"]
    assert p["unfused_tokens"] == 2 * p["tokens"]
    assert [d["worker"] for d in seen["devices"]] == ["w1", "w2"]
    assert sum(d["subtasks"] for d in seen["devices"]) == states.count("done")
    assert sum(d["open"] for d in seen["devices"]) == states.count("open")
    assert sum(d["rows"] for d in seen["devices"]) == p["rows"]["done"]
    assert {d["device_name"] for d in seen["devices"]} == {"hand"}, "as their leases say"
    assert {d["state"] for d in seen["devices"]} == {"silent"}, "this API has no Redis to hear them by"
    assert 0 < seen["now_s"] < 300


def test_sub_tasks_stand_in_time_and_their_tokens_are_spread_over_it(works: Works) -> None:
    job = works.land()
    assert works.cluster.finish(job).state == "succeeded"
    works.cluster.sql(
        "UPDATE job SET created = created - interval '100 s', started = started - interval '100 s' WHERE id = :job",
        job=job,
    )
    # One that took three quarters of the job's life.
    works.cluster.sql(
        "UPDATE subtask SET created = created - interval '99 s', busy_s = 75, tokens = 7500"
        " WHERE id = (SELECT min(id) FROM subtask WHERE job_id = :job)",
        job=job,
    )
    seen = works.look(job)
    for s in seen["timeline"]:
        assert s["carved_s"] <= s["start_s"] <= s["end_s"] <= seen["now_s"]
        assert s["worker"] in ("w1", "w2")
    first = seen["timeline"][0]
    assert first["end_s"] - first["start_s"] == pytest.approx(75, abs=0.01)
    buckets = seen["throughput"]
    assert len(buckets) == 60
    assert buckets[-1]["at_s"] == pytest.approx(seen["now_s"], abs=0.01)
    width = seen["now_s"] / 60
    assert sum(b["tokens_s"] for b in buckets) * width == pytest.approx(7500 + 300 - first["rows"], rel=0.01)
    assert sum(b["rows_s"] for b in buckets) * width == pytest.approx(300, rel=0.05)
    under_way = [
        b["tokens_s"] for b in buckets if first["start_s"] + width < b["at_s"] < first["end_s"] - width
    ]
    assert len(under_way) > 40
    assert all(t == pytest.approx(100, rel=0.01) for t in under_way), "evenly, not in a spike at its end"


def test_a_sub_task_that_was_lost_is_shown_and_its_rows_wait_again(works: Works) -> None:
    job = works.land(200)
    works.cluster.tick()
    lost = works.cluster.hands[0].take_all()
    assert lost
    works.cluster.hands[0].die()
    works.cluster.tick()
    seen = works.look(job)
    assert seen["passes"][0]["subtasks"]["lost"] == len(lost) == seen["job"]["usage"]["attempts_lost"]
    gone = [s for s in seen["timeline"] if s["state"] == "lost"]
    assert {(s["subtask"], s["worker"]) for s in gone} == {
        (a.subtask, works.cluster.hands[0].name) for a in lost
    }
    assert all(s["start_s"] == s["carved_s"] <= s["end_s"] for s in gone)
    rows = seen["passes"][0]["rows"]
    assert rows["waiting"] + rows["open"] + rows["done"] == 200
    page = works.api.call("GET", f"/jobs/{job}").text
    assert "lost: its rows were run again" in page


def test_the_timeline_is_bounded_and_keeps_the_oldest_that_is_open(works: Works) -> None:
    job = works.land()
    works.cluster.tick()
    straggler = works.cluster.hands[0].take_all()[0]
    for _ in range(40):
        works.cluster.tick()
        for a in works.cluster.hands[1].take_all():
            # Its clone lags as well.
            if a.subtask != straggler.subtask:
                works.cluster.hands[1].report(works.cluster.hands[1].outcome(a))
        works.cluster.aggregate()
    everything = works.look(job, timeline=2000)["timeline"]
    assert len(everything) > 5
    few = works.look(job, timeline=3)["timeline"]
    assert len(few) == 3
    assert straggler.subtask in {s["subtask"] for s in few}
    assert [s["subtask"] for s in few] == sorted(s["subtask"] for s in few), "oldest first"
    assert works.look(job, timeline=0)["timeline"] == []
    assert works.look(job, timeline=3)["left_out"] == {
        "timeline": len(everything) - 3,
        "devices": 0,
        "errors": 0,
    }
    assert works.look(job, timeline=2000)["left_out"]["timeline"] == 0
    for wrong in (-1, 2001, "many"):
        answer = works.api.call("GET", f"/v1/jobs/{job}/activity?timeline={wrong}")
        assert answer.status_code == 422, answer.text


def test_errors_are_told_by_task_and_class_and_in_bounds(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = house.submit([f"text {i}" for i in range(1500)], TWO)["id"]
    failing = {i: CellError("too_long", f"{i} tokens") for i in (7, 9)} | {3: CellError("engine", "x" * 900)}
    house.answer(job, 1, failing=failing)
    house.answer(job, 0, failing={5: CellError("too_long", "5 tokens")})
    errors = house.call("GET", f"/v1/jobs/{job}/activity").json()["errors"]
    assert [(e["task"], e["error"], e["count"], e["first_row"]) for e in errors] == [
        ("topic", "too_long", 3, 5),
        ("vector", "too_long", 3, 5),
        ("topic", "engine", 1, 1027),
        ("vector", "engine", 1, 1027),
    ]
    assert errors[0]["message"] == "5 tokens"
    assert len(errors[2]["message"]) == 500
    monkeypatch.setattr("scheduler.store.activity.LOOKED_INTO", 2)
    errors = house.call("GET", f"/v1/jobs/{job}/activity").json()["errors"]
    assert sum(e["count"] for e in errors) == 8, "none is left out"
    monkeypatch.setattr("scheduler.store.activity.MAX_ERRORS", 3)
    told = house.call("GET", f"/v1/jobs/{job}/activity").json()
    assert (told["errors"], told["left_out"]["errors"]) == (errors[:3], 1)
    assert "and those of 1 more kind of error" in house.call("GET", f"/jobs/{job}").text
    assert {(e["task"], e["error"], e["count"]) for e in errors} == {
        (task, error, n) for task in TWO for error, n in (("too_long", 1), ("not_looked_into", 3))
    }


def test_a_job_that_ended_has_a_last_moment_and_nothing_waits(works: Works) -> None:
    job = works.land()
    works.cluster.work()
    works.api.call("POST", f"/v1/jobs/{job}/cancel")
    seen, again = works.look(job), works.look(job)
    assert seen["job"]["state"] == "cancelled"
    assert seen["now_s"] == again["now_s"]
    rows = seen["passes"][0]["rows"]
    assert (rows["waiting"], rows["open"]) == (0, 0)
    assert rows["done"] < 300


def test_devices_that_beat_say_their_state_and_the_others_are_gone(
    works: Works, database_url: str, tmp_path: Path, redis_url: str, redis_urls: ValkeyUrls
) -> None:
    job = works.land()
    works.cluster.work()
    beat = Beat(worker="w1", boot="b", seq=1, device_name="NVIDIA H200", utilisation=0.98, backlog_s=2.5)
    side = RedisWorkerTransport(redis_urls.worker, "w1")
    side.beat(beat)
    side.close()
    with a_house(database_url, tmp_path / "second", redis_url=redis_url, dead_s=0.2) as api:
        works.api = api
        w1, w2 = works.look(job)["devices"]
        assert (w1["state"], w1["device_name"], w1["utilisation"], w1["backlog_s"]) == (
            "ready",
            "NVIDIA H200",
            0.98,
            2.5,
        )
        assert (w2["state"], w2["utilisation"], w2["backlog_s"]) == ("gone", None, None)
        while works.look(job)["devices"][0]["state"] == "ready":
            time.sleep(0.02)
        assert works.look(job)["devices"][0]["state"] == "silent", "its beat is the same as before"


def test_sub_tasks_are_told_page_by_page_and_none_is_left_out(works: Works) -> None:
    job = works.land()
    works.cluster.finish(job)
    everything = works.look(job, timeline=2000)["timeline"]
    assert len(everything) > 3
    found, after = [], 0
    while after is not None:
        answer = works.api.call("GET", f"/v1/jobs/{job}/subtasks?limit=2&after={after}")
        page = answer.json()
        holds(SubtaskPage, page)
        assert 0 < len(page["subtasks"]) <= 2
        found += page["subtasks"]
        after = page["next"]
    assert found == everything
    assert works.api.call("GET", f"/v1/jobs/{job}/subtasks", token="stranger").status_code == 404
    for wrong in ("limit=0", "limit=2001", "after=-1", "after=x"):
        assert works.api.call("GET", f"/v1/jobs/{job}/subtasks?{wrong}").status_code == 422


def test_devices_and_errors_beyond_those_told_are_counted(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "MAX_DEVICES", 1)
    job = works.land()
    works.cluster.finish(job)
    seen = works.look(job)
    assert (len(seen["devices"]), seen["left_out"]["devices"]) == (1, 1)
    assert "1 more device" in works.api.call("GET", f"/jobs/{job}").text


def test_the_client_has_it_too(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "_PAGE", 2)
    job = works.land()
    with Client(works.api.url, works.api.tokens["read"]) as client:
        handle = client.job(str(job))
        works.cluster.finish(job)
        assert handle.activity(timeline=None)["timeline"] == works.look(job, timeline=2000)["timeline"]
        seen = handle.activity(timeline=2)
        assert len(seen["timeline"]) == 2
        assert seen["job"]["state"] == "succeeded"
        assert handle.record["state"] == "succeeded", "the handle knows it from the same answer"


def test_another_tenant_sees_nothing(works: Works) -> None:
    job = works.land()
    for path in (
        f"/v1/jobs/{job}/activity",
        f"/jobs/{job}",
        f"/jobs/{job}/queue",
        "/v1/jobs/none/activity",
        "/jobs/none",
    ):
        assert works.api.call("GET", path, token="stranger").status_code == 404
    assert str(job) not in works.api.call("GET", "/jobs", token="stranger").text


# -- pages


def basic(token: str) -> httpx.BasicAuth:
    token_id, _, secret = token.partition(".")
    return httpx.BasicAuth(token_id, secret)


def test_a_browser_signs_in_with_the_two_halves_of_a_token(house: House) -> None:
    job = house.submit(["a"])["id"]
    for path in ("/jobs", f"/jobs/{job}", f"/jobs/{job}/queue"):
        asked = house.call("GET", path, token=None)
        assert asked.status_code == 401
        assert asked.headers["WWW-Authenticate"].startswith('Basic realm="motet"')
        assert "Sign in" in asked.text
        for token in ("user", "read", "admin"):
            assert house.call("GET", path, token=None, auth=basic(house.tokens[token])).status_code == 200
            assert house.call("GET", path, token=token).status_code == 200, "Bearer does as well"
        assert house.call("GET", path, token=None, auth=basic(house.tokens["worker"])).status_code == 403
        token_id, _, secret = house.tokens["user"].partition(".")
        wrong = [httpx.BasicAuth(token_id, "x"), httpx.BasicAuth(secret, token_id), httpx.BasicAuth("", "")]
        for auth in (*wrong, basic(house.tokens["user"] + ".x")):
            assert house.call("GET", path, token=None, auth=auth).status_code == 401
        for header in ("Basic", "Basic !!", "Basic w6k=", "Basic /w==", f"Basic {house.tokens['user']}"):
            answer = house.call("GET", path, token=None, headers={"Authorization": header})
            assert answer.status_code == 401, header


def test_every_answer_of_a_page_forbids_what_a_page_has_no_use_for(house: House) -> None:
    job = house.submit(["a"])["id"]
    for path, status in (
        ("/jobs", 200),
        (f"/jobs/{job}", 200),
        (f"/jobs/{job}/queue", 200),
        (f"/jobs/{job}/queue?by=none", 422),
        (f"/jobs/{job}/queue?by=%3Cscript%3Ealert(1)", 422),
        ("/jobs/none", 404),
        ("/jobs/none/queue", 404),
        ("/jobs?state=lost", 422),
        ("/jobs?limit=0", 422),
        ("/jobs?after=%3Cscript%3E", 422),
    ):
        answer = house.call("GET", path)
        assert answer.status_code == status, path
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "<script>alert" not in answer.text
    for method in ("POST", "PUT", "DELETE"):
        assert house.call(method, "/jobs", token="admin").status_code == 405


def test_what_a_user_wrote_is_text_on_the_page(house: House) -> None:
    tasks = {"topic": CLASSIFY["topic"]}
    job = house.submit(["a", "b", "c"], tasks, name=f"tickets {EVIL}")["id"]
    house.answer(job, 0, failing={1: CellError(EVIL, f"said {EVIL}")})
    for path in ("/jobs", f"/jobs/{job}"):
        page = house.call("GET", path).text
        assert EVIL not in page
        assert "tickets &lt;script&gt;alert(1)&lt;/script&gt;" in page
    page = house.call("GET", f"/jobs/{job}").text
    assert page.count("&lt;script&gt;") >= 4, (
        "its name in title and heading, the class and the message of its error"
    )
    assert ">partial</span>" in page


def test_a_page_renews_itself_until_the_job_has_ended(works: Works) -> None:
    job = works.land()
    assert 'http-equiv="refresh"' in works.api.call("GET", f"/jobs/{job}").text
    assert 'http-equiv="refresh"' in works.api.call("GET", "/jobs").text
    works.cluster.finish(job)
    page = works.api.call("GET", f"/jobs/{job}").text
    assert "http-equiv" not in page
    assert "<script" not in page
    assert "600 ok" in page
    assert "2.0 × fewer" in page
    assert "http-equiv" not in works.api.call("GET", "/jobs").text


def test_the_queue_sorts_the_newest_rows_by_an_answer_and_grows(works: Works) -> None:
    job = works.land(rows=200)
    with works.cluster.database.transaction() as connection:
        # As the heads have that are registered: their trunk's. Their answers are no vectors for that.
        connection.execute(text("UPDATE model SET manifest = jsonb_set(manifest, '{dim}', '4')"))
    empty = works.api.call("GET", f"/jobs/{job}/queue?by=size.score").text
    assert "No row is answered yet." in empty
    works.cluster.finish(job)
    page = works.api.call("GET", f"/jobs/{job}/queue").text
    assert "the newest answered rows" in page
    shown = [int(row) for row in re.findall(r'<th scope="row" class="num">(\d+)</th>', page)]
    assert shown == list(range(199, 99, -1)), "a hundred of them, the newest first"
    sorted_page = works.api.call("GET", f"/jobs/{job}/queue?by=size.score").text
    assert "sorted by size.score, of the newest 200 answered rows" in sorted_page
    scores = [float(s) for s in re.findall(r'</th>\s*<td class="num">([\d.]+)</td>', sorted_page)]
    assert len(scores) == 100
    assert scores == sorted(scores, reverse=True)
    by_label = works.api.call("GET", f"/jobs/{job}/queue?by=size").text
    names = re.findall(r'</th>\s*<td class="num">(\w+)</td>', by_label)
    assert len(names) == 100
    assert names == sorted(names), "of a label its name"
    refused = works.api.call("GET", f"/jobs/{job}/queue?by=text")
    assert refused.status_code == 422
    assert "an answer of this job, or a part of one: size, again" in refused.text


def test_the_list_is_read_page_by_page_and_by_state(house: House) -> None:
    made = [house.submit([f"row of job {i}"], name=f"number {i}")["id"] for i in range(5)]
    house.answer(made[0], 0)
    found, path = [], "/jobs?limit=2"
    while path:
        page = house.call("GET", path).text
        found += re.findall(r'href="/jobs/([0-9a-f-]{36})"', page)
        older = re.search(r'href="([^"]*after=[^"]*)" rel="next"', page)
        path = older[1].replace("&amp;", "&") if older else ""
    assert found == made[::-1]
    ended = house.call("GET", "/jobs?state=succeeded").text
    assert "number 0" in ended
    assert "number 1" not in ended
