"""The real client and the real API with a proxy between them that limits bodies, loses patience, or is alone."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from motet import Classify, Client
from motet.artefacts import send_file
from motet.errors import InvalidJob, MotetError, Unreachable
from motet.http import Address, Http
from scheduler.blocks import decode_block
from tests.integration.api_house import House, house
from tests.integration.proxy import Proxy, proxied

__all__ = ["house"]

TASKS = {"topic": Classify("topics")}
#: Characters of which no packing makes less than five eighths.
_DENSE = "".join(map(chr, range(33, 127)))


def dense(rows: int, length: int, seed: int = 0) -> list[str]:
    """Texts that packing hardly shrinks."""
    dice = random.Random(seed)
    return ["".join(dice.choices(_DENSE, k=length)) for _ in range(rows)]


@pytest.fixture
def proxy(house: House) -> Iterator[Proxy]:
    with proxied(house.url) as proxy:
        yield proxy


@pytest.fixture
def client(house: House, proxy: Proxy) -> Iterator[Client]:
    with Client(proxy.url, house.tokens["user"], timeout=20) as client:
        yield client


def stored(house: House, job: str) -> list[str]:
    """The texts of a job as the server holds them, in row order."""
    found = house.sql("SELECT payload FROM block WHERE job_id = :job ORDER BY number", job=job)
    return [text for (payload,) in found for text in decode_block(bytes(payload)).texts()["text"]]


def blocks(house: House, job: str) -> list[Any]:
    return house.sql("SELECT first_row, n_rows FROM block WHERE job_id = :job ORDER BY number", job=job)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if r.name.startswith("motet") and r.levelno >= logging.WARNING
    ]


# -- bodies


def test_parts_that_a_proxy_refuses_are_sent_in_smaller_ones_of_the_same_blocks(
    house: House, proxy: Proxy, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    texts = dense(3000, 3000)
    with Client(house.url, house.tokens["user"]) as near:
        direct = near.submit(texts, TASKS, reuse=False)
    job = client.submit(texts, TASKS, reuse=False)
    assert (job.state, job.rows) == ("running", 3000)
    assert stored(house, job.id) == texts
    assert blocks(house, job.id) == blocks(house, direct.id), "so that stored columns are found for reuse"
    refused = proxy.statuses("PUT", "/parts/").count(413)
    assert 1 <= refused <= 4, "what was refused once is not tried again and again"
    (said,) = warnings(caplog)
    assert "413" in said
    assert proxy.url in said
    assert "client_max_body_size" in said


def test_a_part_that_was_packed_before_the_form_changed_is_sent_as_what_it_is(
    house: House, proxy: Proxy, client: Client
) -> None:
    """Near the API bodies are raw until one is refused; the next part is ready by then."""
    proxy.most_body_bytes = 800_000
    texts = dense(370, 3000)  # a part of one block, and a short one
    job = client.submit(texts, TASKS)
    assert (job.state, stored(house, job.id)) == ("running", texts)


@pytest.mark.parametrize("most", [300_000, 20_000])
def test_a_block_that_is_too_large_for_a_proxy_is_sent_in_halves(
    house: House, proxy: Proxy, client: Client, most: int
) -> None:
    proxy.most_body_bytes = most
    texts = dense(400, 6000)
    job = client.submit(texts, TASKS)
    assert (job.state, stored(house, job.id)) == ("running", texts)


def test_bad_rows_stay_where_they_are_in_smaller_parts(house: House, proxy: Proxy, client: Client) -> None:
    proxy.most_body_bytes = 50_000
    rows: list[Any] = dense(300, 4000)
    for i in range(0, 300, 7):
        rows[i] = None if i % 2 else {"text": b""}
    job = client.submit(rows, TASKS, bad_rows="error")
    for number in range(len(blocks(house, job.id))):
        house.answer(job.id, number)
    assert [r.index for r in job.results() if not r.ok] == list(range(0, 300, 7))


def test_a_small_job_that_a_proxy_refuses_is_sent_in_parts(
    house: House, proxy: Proxy, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.most_body_bytes = 100_000
    texts = dense(100, 2000)
    job = client.submit(texts, TASKS, key="small")
    assert (job.state, stored(house, job.id)) == ("running", texts)
    assert client.submit(texts, TASKS, key="small").id == job.id
    (said,) = warnings(caplog)
    assert "client_max_body_size" in said


@pytest.mark.parametrize("again_through_it", [True, False])
def test_an_upload_in_smaller_parts_that_broke_off_goes_on_under_its_key(
    house: House, proxy: Proxy, client: Client, again_through_it: bool
) -> None:
    texts = dense(3000, 3000)

    def breaks() -> Iterator[str]:
        yield from texts[:2900]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        client.submit(breaks(), TASKS, key="nightly")
    (left,) = client.jobs()
    assert (left.state, 0 < left.rows < 3000) == ("loading", True)
    url = proxy.url if again_through_it else house.url
    with Client(url, house.tokens["user"], timeout=20) as again:
        job = again.submit(texts, TASKS, key="nightly")
        assert (job.id, job.state) == (left.id, "running")
    assert stored(house, job.id) == texts


def test_an_upload_that_stopped_within_a_part_goes_on_there(
    house: House, proxy: Proxy, client: Client
) -> None:
    """Its first smaller parts landed; what comes next is no whole part of the source."""
    texts = dense(3000, 3000)
    puts = []

    def fault(method: str, path: str) -> int | None:
        if method == "PUT":
            puts.append(path)
        return 401 if method == "PUT" and len(puts) == 9 else None

    proxy.fault = fault
    with pytest.raises(MotetError):
        client.submit(texts, TASKS, key="nightly")
    proxy.fault = lambda method, path: None
    job = client.submit(texts, TASKS, key="nightly")
    assert (job.state, stored(house, job.id)) == ("running", texts)


def test_a_proxy_that_takes_no_row_at_all_is_named_with_what_to_set(
    house: House, proxy: Proxy, client: Client
) -> None:
    proxy.most_body_bytes = 2_000
    with pytest.raises(InvalidJob) as caught:
        client.submit(dense(20, 5000), TASKS)
    said = str(caught.value)
    assert "413" in said
    assert f"{proxy.url}/v1/jobs/" in said
    assert "client_max_body_size 32m" in said
    assert "html" not in said
    assert list(client.jobs()) == [], "nothing stays behind"


def test_a_plan_is_made_from_a_smaller_sample_where_a_proxy_refuses_the_whole(
    house: House, proxy: Proxy, client: Client
) -> None:
    texts = dense(2000, 3000)
    with Client(house.url, house.tokens["user"]) as near:
        whole = near.plan(texts, TASKS)
    proxy.most_body_bytes = 500_000
    plan = client.plan(texts, TASKS)
    assert plan.rows == whole.rows == 2000
    assert plan.tokens == pytest.approx(whole.tokens, rel=0.05)


def test_a_file_of_a_model_that_a_proxy_refuses_says_how_much_it_must_take(
    house: House, proxy: Proxy, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(40 << 20))
    http = Http(Address(url=proxy.url, token=house.tokens["admin"]))
    with pytest.raises(InvalidJob, match="client_max_body_size 40m"):
        send_file(http, hashlib.sha256(path.read_bytes()).hexdigest(), path)


def test_a_file_of_a_model_is_sent_again_where_a_proxy_was_alone(
    house: House, proxy: Proxy, tmp_path: Path
) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    fails = [502, 504, 522]
    proxy.fault = lambda method, path: fails.pop() if method == "PUT" and fails else None
    http = Http(Address(url=proxy.url, token=house.tokens["admin"]), sleep=lambda s: None)
    send_file(http, sha256, path)
    assert proxy.statuses("PUT", sha256) == [522, 504, 502, 201]
    assert house.call("GET", f"/v1/blobs/{sha256}", token="worker").content == b"weights"


# -- time


@pytest.mark.parametrize("late", [504, 502, 408, 524, None])
def test_a_wait_that_a_proxy_cuts_short_goes_on_with_shorter_ones(
    house: House, proxy: Proxy, late: int | None
) -> None:
    """The time limit is shorter than the proxy's: waiting for a job is no trying."""
    job_id = house.submit(["a", "b"])["id"]
    proxy.patience_s, proxy.late = 1.2, late
    with Client(proxy.url, house.tokens["user"], timeout=1) as client:
        job = client.job(job_id)
        answering = threading.Timer(1.8, house.answer, (job_id, 0))
        answering.start()
        rows = list(job.results())
        answering.join()
        assert [r.index for r in rows] == [0, 1]
        assert proxy.statuses("GET", "/results").count(late or 0) == 1
        assert set(proxy.statuses("GET", "/results")) == {late or 0, 200}
        second = client.job(house.submit(["new"])["id"])
        answering = threading.Timer(1.4, house.answer, (second.id, 0))
        answering.start()
        assert second.wait().state == "succeeded"
        answering.join()
        assert set(proxy.statuses("GET", second.id)) == {200}, "the client has learned how long it may wait"


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504, 520, 521, 522, 523, 524])
def test_a_proxy_that_is_alone_for_a_while_is_waited_out(house: House, proxy: Proxy, status: int) -> None:
    fails = [status] * 3
    proxy.fault = lambda method, path: fails.pop() if fails else None
    http = Http(Address(url=proxy.url, token=house.tokens["user"]), sleep=lambda s: None)
    assert list(Client.over(http).jobs()) == []
    assert proxy.statuses("GET", "/v1/jobs") == [status] * 3 + [200]


@pytest.mark.parametrize("status", [408, 502, 504, 520, 521, 522, 523, 524])
def test_what_could_be_done_twice_with_harm_is_not_tried_again_behind_a_proxy(
    house: House, proxy: Proxy, status: int
) -> None:
    proxy.fault = lambda method, path: status
    http = Http(Address(url=proxy.url, token=house.tokens["admin"]), sleep=lambda s: None)
    with pytest.raises(Unreachable, match=str(status)):
        Client.over(http).create_token("mine")
    assert proxy.statuses("POST", "/v1/tokens") == [status]


@pytest.mark.parametrize("status", [400, 403, 404, 405, 411, 414, 431, 500, 501, 505, 525, 530])
def test_a_proxys_page_is_never_shown_but_where_it_stood_and_what_to_look_at(
    house: House, proxy: Proxy, status: int
) -> None:
    proxy.fault = lambda method, path: status
    http = Http(Address(url=proxy.url, token=house.tokens["user"]), sleep=lambda s: None)
    with pytest.raises(MotetError) as caught:
        list(Client.over(http).jobs())
    said = str(caught.value)
    assert str(status) in said
    assert f"{proxy.url}/v1/jobs" in said
    assert "proxy" in said
    assert "<" not in said
    assert "nginx" not in said
