"""Webhooks: events reach a real receiver, signed, at least once, and never an address that they must not."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import UUID

import pytest

from motet.cli import main
from motet.client import Client
from motet.errors import InvalidJob, NotFound
from scheduler.store.events import tell_event
from scheduler.store.webhooks import webhooks_seen
from scheduler.webhooks import posting
from scheduler.webhooks.posting import NotTaken, post
from tests.integration.api_house import CLASSIFY, House, a_house, problems, running
from tests.integration.webhook_receiver import Received, Receiver, certificate_for, receiving

#: What an administrator allows in these tests.
ALLOWED = frozenset({"127.0.0.1", "hooks.test"})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def house(database_url: str, tmp_path: Path) -> Iterator[House]:
    with a_house(database_url, tmp_path, webhook_hosts="127.0.0.1") as house:
        yield house


@pytest.fixture
def client(house: House) -> Iterator[Client]:
    with Client(house.url, house.tokens["user"]) as client:
        yield client


def end_a_job(house: House) -> str:
    job: str = house.submit(["a"])["id"]
    house.answer(job, 0)
    return job


def due(house: House) -> None:
    """All that is put off is due now."""
    house.sql("UPDATE delivery SET next_at = clock_timestamp() - interval '1 s' WHERE state = 'waiting'")
    house.sql("UPDATE webhook SET rest_until = '-infinity'")
    house.sql("SELECT CAST(pg_notify('motet_events', '') AS text)")


def settled(house: House, state: str) -> Any:
    """The one delivery, once it is in this state and no try is being recorded."""
    for _ in range(500):
        (found,) = house.sql("SELECT state, attempts FROM delivery")
        if found.state == state and (found.attempts or state == "waiting"):
            return found
        time.sleep(0.01)
    raise AssertionError(found)


def tries(house: House, n: int) -> Any:
    """The one delivery once it has failed so often, with the seconds until it is tried next."""
    for _ in range(500):
        found = house.sql(
            "SELECT state, attempts, said, CAST(extract(epoch FROM next_at - clock_timestamp()) AS float8) AS after"
            " FROM delivery"
        )
        if found and found[0].attempts == n:
            return found[0]
        time.sleep(0.01)
    raise AssertionError(found)


def told(received: Received) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(received.body)
    return found


# -- what is told


def test_the_end_of_a_job_is_told_at_once_and_proved(
    house: House, client: Client, receiver: Receiver
) -> None:
    made = client.add_webhook(receiver.url(), events=["job.ended"])
    assert made.secret is not None
    job = end_a_job(house)
    got = receiver.next()
    ((written,),) = house.sql("SELECT extract(epoch FROM created) FROM outbox")
    assert got.at - float(written) < 0.5, "woken, not by the poll of a second"
    assert (got.path, got.headers["content-type"], got.proves(made.secret)) == (
        "/hook?a=b",
        "application/json",
        True,
    )
    assert not got.proves("whsec_AAAA")
    assert told(got)["type"] == "job.ended"
    cells = {"total": 1, "ok": 1, "error": 0, "skipped": 0}
    assert told(got)["data"] == {"job": job, "state": "succeeded", "rows": 1, "cells": cells}
    settled(house, "delivered")
    (record,) = client.webhooks()
    assert (record.id, record.delivered, record.waiting, record.given_up) == (made.id, 1, 0, 0)
    assert made.secret not in json.dumps(record.to_json())


def test_a_webhook_hears_of_its_kinds_its_job_and_its_tenant_alone(house: House, receiver: Receiver) -> None:
    with (
        Client(house.url, house.tokens["user"]) as mine,
        Client(house.url, house.tokens["stranger"]) as other,
    ):
        job = house.submit(["a"])["id"]
        mine.add_webhook(receiver.url(path="/rows"), events=["row.matched"])
        mine.add_webhook(receiver.url(path="/one"), job=job)
        theirs = other.add_webhook(receiver.url(path="/theirs"))
        end_a_job(house)
        house.answer(job, 0)
        assert told(receiver.next())["data"]["job"] == job
        with pytest.raises(Empty):
            receiver.next(within_s=0.2)
        assert [one.id for one in other.webhooks()] == [theirs.id]
        with pytest.raises(NotFound):
            mine.remove_webhook(theirs.id)
        with pytest.raises(NotFound):
            other.add_webhook(receiver.url(), job=job)


def test_a_test_a_removal_and_what_is_no_webhook(house: House, client: Client, receiver: Receiver) -> None:
    made = client.add_webhook(receiver.url())
    assert made.secret is not None
    assert client.test_webhook(made.id).taken
    got = receiver.next()
    assert (told(got)["type"], got.proves(made.secret)) == ("test", True)
    receiver.answer = 500
    found = client.test_webhook(made.id)
    assert (found.taken, found.error) == (False, "status 500")
    client.remove_webhook(made.id)
    assert client.webhooks() == []
    for ask in (client.remove_webhook, client.test_webhook, client.replay_webhook):
        with pytest.raises(NotFound, match="no webhook"):
            ask(made.id)
    with pytest.raises(InvalidJob, match="events"):
        client.add_webhook(receiver.url(), events=["job.started"])  # type: ignore[list-item]


def test_a_batch_that_ended_is_told_in_its_own_words(
    house: House, client: Client, receiver: Receiver
) -> None:
    client.add_webhook(receiver.url(), events=["batch.ended"])
    job = end_a_job(house)
    with house.database.transaction() as connection:
        tell_event(
            connection,
            house.tenants["default"],
            "batch_ended",
            UUID(job),
            {"batch": "batch_1", "state": "completed"},
        )
    got = told(receiver.next())
    assert (got["type"], got["data"]) == (
        "batch.ended",
        {"job": job, "batch": "batch_1", "state": "completed"},
    )


def test_the_command_line_adds_tests_lists_replays_and_removes(
    house: House, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOTET_URL", house.url)
    monkeypatch.setenv("MOTET_TOKEN", house.tokens["user"])

    def motet(*words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["webhooks", *words])
        out, error = capsys.readouterr()
        assert ended.value.code == code, error
        return out + error

    id_, secret, *_ = motet("add", receiver.url(), "--events", "job.ended,row.matched").split()
    assert motet("test", id_).startswith("taken: status 204")
    assert receiver.next().proves(secret)
    receiver.answer = 500
    assert "not taken: status 500" in motet("test", id_, code=1)
    receiver.next()
    end_a_job(house)
    tries(house, 1)
    assert "status 500" in motet("list")
    (listed,) = json.loads(motet("list", "--json"))
    assert (listed["id"], listed["events"], listed["waiting"]) == (id_, ["job.ended", "row.matched"], 1)
    assert motet("replay", id_, "--since", "1h") == "1 event delivered again\n"
    assert "events" in motet("add", receiver.url(), "--events", "nothing", code=1)
    motet("remove", id_)
    assert "no webhooks" in motet("list")


# -- at least once


def figures(house: House) -> dict[str, float]:
    """What /metrics says of webhooks, by the rest of its name."""
    told = house.call("GET", "/metrics", token="read").text.splitlines()
    lines = [
        one.removeprefix("motet_webhook").removeprefix("_") for one in told if one.startswith("motet_webhook")
    ]
    return {name: float(value) for name, _, value in (one.rpartition(" ") for one in lines)}


def findings(house: House) -> dict[str, tuple[str, str]]:
    """What the doctor says of the server, by name."""
    told = house.call("GET", "/v1/doctor", token="admin").json()["findings"]
    return {one["name"]: (one["state"], one["what"]) for one in told if one["area"] == "server"}


def test_what_is_not_taken_is_tried_again_given_up_and_replayed(
    house: House, client: Client, receiver: Receiver
) -> None:
    made = client.add_webhook(receiver.url())
    receiver.answer = 503
    end_a_job(house)
    first = receiver.next()
    found = tries(house, 1)
    assert 3 < found.after < 7
    assert (found.state, found.said) == ("waiting", "status 503")
    due(house)
    assert receiver.next().headers["webhook-id"] == first.headers["webhook-id"]
    assert 15 < tries(house, 2).after < 25
    (record,) = client.webhooks()
    assert (record.waiting, record.failures, record.last_error) == (1, 2, "status 503")
    told = figures(house)
    assert (told["events_pending"], told["s_failing"]) == (1, 1)
    assert 0 < told["oldest_pending_seconds"] < 60
    assert told['deliveries_total{result="failed"}'] == 2
    assert findings(house)["webhooks"][0] == "ok", "it fails for a moment only"
    house.sql("UPDATE delivery SET happened = happened - interval '2 hours'")
    assert findings(house)["webhooks"] == ("warn", f"{made.id} took nothing for up to 2.0 h")
    house.sql("UPDATE delivery SET until = clock_timestamp() + interval '1 min'")
    due(house)
    receiver.next()
    settled(house, "given_up")
    (record,) = client.webhooks()
    assert (record.waiting, record.given_up, record.last_error) == (0, 1, "status 503")
    told = figures(house)
    assert (told["events_pending"], told["oldest_pending_seconds"]) == (0, 0)
    assert (told['deliveries_total{result="failed"}'], told['deliveries_total{result="given_up"}']) == (3, 1)
    receiver.answer = 200
    assert client.replay_webhook(made.id) == 1
    again = receiver.next()
    assert (again.headers["webhook-id"], again.body) == (first.headers["webhook-id"], first.body)
    settled(house, "delivered")
    assert figures(house)['deliveries_total{result="delivered"}'] == 1
    assert findings(house)["webhooks"] == ("ok", "1 webhooks, none of which fails for long")
    with house.database.transaction() as connection, connection.begin_nested() as later:
        # As it would be where no process delivers.
        connection.exec_driver_sql(
            "UPDATE delivery SET state = 'waiting', next_at = clock_timestamp() - interval '2 min'"
        )
        connection.exec_driver_sql("UPDATE outbox SET handed = NULL, created = created - interval '3 min'")
        seen = webhooks_seen(connection)
        later.rollback()
    assert (seen.webhooks, seen.failing, seen.behind) == (1, {}, 2)
    assert 180 < seen.behind_s < 240
    assert client.replay_webhook(made.id) == 0, "it was taken"
    assert client.replay_webhook(made.id, since_s=3 * 3600) == 1
    assert client.replay_webhook(made.id, event=first.headers["webhook-id"]) == 1
    with pytest.raises(NotFound, match="no event"):
        client.replay_webhook(made.id, event="msg_999_1")


def test_a_silent_receiver_holds_up_nobody_else(house: House, client: Client, receiver: Receiver) -> None:
    over = threading.Event()
    with receiving() as silent:
        silent.answer = lambda _: over.wait(30)
        client.add_webhook(silent.url())
        client.add_webhook(receiver.url())
        for _ in range(6):
            end_a_job(house)
        began = time.monotonic()
        assert len({receiver.next().headers["webhook-id"] for _ in range(6)}) == 6
        assert time.monotonic() - began < 5
        assert silent.got.qsize() <= 4, "so many at once at most"
        over.set()


def test_a_process_that_ends_in_order_leaves_deliveries_to_the_next_at_once(
    house: House, client: Client, receiver: Receiver
) -> None:
    client.add_webhook(receiver.url())
    with running(house.settings):
        pass  # it stood by, or delivered and resigned
    job = end_a_job(house)
    assert told(receiver.next())["data"]["job"] == job


# -- where it may go


FORBIDDEN = [
    "http://example.com/",
    "https://localhost/",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://169.254.169.254/latest/meta-data",
    "https://[fd00:ec2::254]/",
    "https://[64:ff9b::7f00:1]/",
    "https://10.0.0.1/",
    "https://0x7f.1/",
    "https://2130706433/",
    "https://user:secret@127.0.0.1/",
    "https://nowhere.invalid/",
    "https://" + "a" * 3000,
    "\0",
]


def test_an_address_that_must_not_be_reached_is_refused_with_what_to_do(house: House) -> None:
    for url in FORBIDDEN:
        (problem,) = problems(house.call("POST", "/v1/webhooks", json={"url": url}))
        assert (problem["field"], bool(problem["remedy"])) == ("url", True)
    assert house.sql("SELECT count(*) FROM webhook") == [(0,)]


def test_an_address_is_looked_at_again_at_each_delivery(
    database_url: str, tmp_path: Path, receiver: Receiver
) -> None:
    """What was allowed, or public, when it was registered need not be so later."""
    with a_house(database_url, tmp_path) as house:
        house.sql(
            "INSERT INTO webhook (id, tenant_id, url, kinds, secret) VALUES ('wh_1', :tenant, :url, '{job_ended}', 'x')",
            tenant=house.tenants["default"],
            url=receiver.url().replace("http:", "https:"),
        )
        end_a_job(house)
        assert tries(house, 1).said == "refused: a host of a private or special network"
    assert receiver.got.empty()


def send(url: str, **more: Any) -> int:
    return asyncio.run(post(url, {}, b"{}", allowed=ALLOWED, **more))


def test_a_name_is_looked_up_once_and_its_certificate_and_host_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def look_up(host: str, port: int, *_: Any, **__: Any) -> Any:
        looks.append(host)
        # A second look would lead elsewhere.
        address = "127.0.0.1" if len(looks) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    certificate = certificate_for("hooks.test", tmp_path)
    with receiving(certificate) as receiver:
        monkeypatch.setattr("socket.getaddrinfo", look_up)
        assert send(receiver.url("hooks.test"), ca=str(certificate)) == 204
        assert receiver.next().headers["host"] == f"hooks.test:{receiver.port}"
        assert looks == ["hooks.test"]
        looks.clear()
        with pytest.raises(NotTaken, match="certificate is not trusted: self-signed"):
            send(receiver.url("hooks.test"))
        looks.clear()
        with pytest.raises(NotTaken, match="certificate is not trusted: IP address mismatch"):
            send(receiver.url("127.0.0.1"), ca=str(certificate))


def test_a_name_with_one_address_that_is_not_public_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("8.8.8.8", "10.0.0.1")
    ]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    with pytest.raises(NotTaken, match="refused: a host of a private"):
        send("https://mixed.example/")


def _redirects(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(307)
    handler.send_header("Location", "http://127.0.0.1:1/")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _never_ends_its_head(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for _ in range(1000):
        handler.wfile.write(b"x: " + b"y" * 1000 + b"\r\n")


def _never_ends_its_body(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(100_000):
        handler.wfile.write(b"3e8\r\n" + b"y" * 1000 + b"\r\n")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (_redirects, "status 307; redirects are not followed"),
        (_never_ends_its_head, "the answer was no HTTP"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-x\r\n\r\n"), "the answer was no HTTP"),
        (lambda handler: None, "the answer was no HTTP|not reached"),
        (404, "status 404"),
        (lambda handler: time.sleep(1), "no answer in"),
    ],
)
def test_what_a_receiver_does_wrong_is_told_and_harms_nobody(
    receiver: Receiver, answer: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posting, "TIMEOUT_S", 0.5)
    receiver.answer = answer
    with pytest.raises(NotTaken, match=why):
        send(receiver.url())


def test_of_an_endless_answer_the_status_counts_and_the_rest_is_left(receiver: Receiver) -> None:
    receiver.answer = _never_ends_its_body
    began = time.monotonic()
    assert send(receiver.url()) == 200
    assert time.monotonic() - began < 2


def test_no_proxy_of_the_environment_is_asked(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert send(receiver.url()) == 204


# -- what is asked


def test_a_condition_that_reads_what_is_no_answer_is_refused(house: House) -> None:
    for wrong in ("topic ==", "text == 'a'", "1 == 1", 5, "topic == 'a'\n", "x" * 2000):
        body = {"tasks": CLASSIFY, "rows": ["a"], "notify_when": wrong}
        (problem,) = problems(house.call("POST", "/v1/jobs", json=body))
        assert problem["field"] == "notify_when"
    name = next(iter(CLASSIFY))
    good = {"tasks": CLASSIFY, "rows": ["a"], "notify_when": f"{name} == 'sport'"}
    assert house.call("POST", "/v1/jobs", json=good).json()["notify_when"] == f"{name} == 'sport'"
