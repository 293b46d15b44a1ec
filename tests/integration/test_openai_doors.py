"""OpenAI's doors, asked by the real SDK: files, batches, and requests that wait for their answer."""

from __future__ import annotations

import json
import math
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from motet.errors import Overloaded
from motet.protocol.columns import CellError
from motet.states import Skip
from scheduler.api.auth import SCOPES, SUBMITS
from scheduler.api.bodies import clean_object
from scheduler.api.door import Door
from scheduler.api.openai.app import DOORS, PREFIX
from scheduler.api.openai.batch_work import BatchWorker
from scheduler.api.openai.requests import SERVED, read_request
from scheduler.api.resources import Resources
from scheduler.api.strict_json import loads
from scheduler.blocks import decode_block, row_order
from scheduler.policy.carve import carve
from scheduler.policy.cost import Price
from scheduler.store import registry
from scheduler.store.demand import Lengths, frontier
from tests.integration.api_house import DICE, RANKER, SPEAKER, House
from tests.integration.api_house import house as house

CHAT = "/v1/chat/completions"


@pytest.fixture
def speaking(house: House) -> House:
    with house.database.transaction() as connection:
        registry.add_model(connection, SPEAKER)
    return house


def client_of(house: House, token: str = "user", **more: Any) -> OpenAI:
    return OpenAI(base_url=f"{house.url}{PREFIX}", api_key=house.tokens[token], max_retries=0, **more)


@pytest.fixture
def client(speaking: House) -> Iterator[OpenAI]:
    with client_of(speaking) as client:
        yield client


@contextmanager
def answering(house: House) -> Iterator[None]:
    """A hand that answers every block of every job as soon as it may be carved."""
    stop = threading.Event()

    def work() -> None:
        done: set[tuple[str, int]] = set()
        while not stop.is_set():
            waiting = house.sql(
                "SELECT b.job_id, b.number FROM block b JOIN job j ON j.id = b.job_id"
                " WHERE b.passes_open > 0 AND j.state IN ('open', 'running')"
            )
            for job, number in waiting:
                if (str(job), number) not in done:
                    done.add((str(job), number))
                    house.answer(str(job), number)
            time.sleep(0.005)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


def line(number: int, model: str = "speaker", **body: Any) -> dict[str, Any]:
    asked = {"model": model, "messages": [{"role": "user", "content": f"question {number}"}], **body}
    return {"custom_id": f"id-{number}", "method": "POST", "url": CHAT, "body": asked}


def embedding(number: int, text: Any = "a text", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": f"id-{number}",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "tiny", "input": text, **body},
    }


def upload(client: OpenAI, lines: Sequence[Any]) -> str:
    raw = b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines)
    return client.files.create(file=("lines.jsonl", raw), purpose="batch").id


def batch(client: OpenAI, lines: Sequence[Any], **more: Any) -> openai.types.Batch:
    asked: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h", **more}
    return client.batches.create(input_file_id=upload(client, lines), **asked)


def until(client: OpenAI, made: openai.types.Batch, *states: str, within_s: float = 20) -> openai.types.Batch:
    end = time.monotonic() + within_s
    while (made := client.batches.retrieve(made.id)).status not in states:
        assert time.monotonic() < end, made
        time.sleep(0.02)
    return made


def lines_of(client: OpenAI, file: str | None) -> dict[str, dict[str, Any]]:
    if file is None:
        return {}
    lines = [json.loads(one) for one in client.files.content(file).read().splitlines()]
    found = {one["custom_id"]: one for one in lines}
    assert len(found) == len(lines)
    return found


# -- files


def test_a_file_comes_back_as_it_was(client: OpenAI) -> None:
    raw = b"any bytes \xff\x00\r\n--x\r\n" * 100_000
    made = client.files.create(file=("a/b/day.jsonl", raw), purpose="batch")
    assert (made.bytes, made.filename, made.purpose, made.status) == (
        len(raw),
        "day.jsonl",
        "batch",
        "processed",
    )
    assert made.expires_at is not None
    assert made.expires_at - made.created_at == 30 * 86_400
    assert client.files.content(made.id).read() == raw
    assert client.files.retrieve(made.id) == made
    short = client.files.create(
        file=b"x", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert short.expires_at is not None
    assert short.expires_at - short.created_at == 3600
    assert [one.id for one in client.files.list(limit=1)] == [short.id, made.id]
    assert [one.id for one in client.files.list(order="asc", purpose="batch")] == [made.id]
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)


def test_anothers_file_is_not_there(client: OpenAI, speaking: House) -> None:
    made = client.files.create(file=b"secret", purpose="batch")
    with client_of(speaking, "stranger") as stranger:
        assert list(stranger.files.list()) == []
        for ask in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
        with pytest.raises(openai.BadRequestError) as refused:
            stranger.batches.create(input_file_id=made.id, endpoint=CHAT, completion_window="24h")
    assert refused.value.code == "file_not_found"


def test_the_blob_of_a_file_is_kept_as_long_as_some_file_or_batch_names_it(
    client: OpenAI, speaking: House
) -> None:
    first, second = (client.files.create(file=b"same", purpose="batch").id for _ in range(2))
    client.files.delete(first)
    assert client.files.content(second).read() == b"same"
    client.files.delete(second)
    assert speaking.sql("SELECT 1 FROM blob") == []


BROKEN_UPLOADS: Sequence[Any] = (
    ({"files": {"file": b"x"}}, "purpose"),
    ({"files": {"file": b"x"}, "data": {"purpose": "poetry"}}, "purpose"),
    ({"data": {"purpose": "batch"}}, "file"),
    ({"content": b"no form", "headers": {"Content-Type": "text/plain"}}, "file"),
    ({"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, "file"),
    ({"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, "file"),
    ({"files": {"purpose": (None, b"y" * 100_000), "file": b"x"}}, "file"),
    (
        {"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[seconds]": "5"}},
        "expires_after.seconds",
    ),
)


def test_a_broken_upload_is_refused_by_name(speaking: House) -> None:
    for form, param in BROKEN_UPLOADS:
        answer = speaking.call("POST", f"{PREFIX}/files", **form)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param


# -- batches


def test_every_line_is_once_in_one_of_the_two_files(client: OpenAI, speaking: House) -> None:
    lines = [
        *(line(n, temperature=0, max_tokens=n + 1) for n in range(20)),
        *(embedding(20 + n, f"text {n}") for n in range(5)),
        embedding(25, ["one", "two", "three"], encoding_format="base64"),
        line(26, n=3),
    ]
    with answering(speaking):
        made = batch(client, lines, metadata={"night": "7"})
        assert made.status == "validating"
        ended = until(client, made, "completed", "failed")
    assert ended.status == "completed", ended.errors
    assert ended.metadata == {"night": "7"}
    assert ended.request_counts is not None
    assert (ended.request_counts.total, ended.request_counts.completed, ended.request_counts.failed) == (
        27,
        27,
        0,
    )
    assert ended.error_file_id is None
    found = lines_of(client, ended.output_file_id)
    assert set(found) == {f"id-{n}" for n in range(27)}
    assert all(one["response"]["status_code"] == 200 for one in found.values())
    said = found["id-3"]["response"]["body"]
    assert said["object"] == "chat.completion"
    assert said["choices"][0]["message"]["content"].startswith("row ")
    assert said["usage"]["total_tokens"] == 10
    assert [c["index"] for c in found["id-26"]["response"]["body"]["choices"]] == [0, 1, 2]
    vectors = found["id-25"]["response"]["body"]["data"]
    assert [one["index"] for one in vectors] == [0, 1, 2]
    assert isinstance(vectors[0]["embedding"], str)
    assert len(found["id-20"]["response"]["body"]["data"][0]["embedding"]) == 2
    assert ended.usage is not None
    assert ended.usage.output_tokens == 20 * 3 + 9
    # Rows of others are skipped, and counted.
    job = speaking.job(ended.x_motet["job"])  # type: ignore[attr-defined]
    assert job["state"] == "succeeded"
    assert job["cells"] == {**job["cells"], "ok": 31, "skipped": 31, "error": 0}
    reasons = speaking.call("GET", f"/v1/jobs/{job['id']}/errors").json()
    assert {one["error"] for one in reasons["errors"]} == {Skip.CONDITION}
    assert [one.id for one in client.batches.list()] == [made.id]


def test_a_batch_also_answers_responses_rankings_and_classes(client: OpenAI, speaking: House) -> None:
    asked: dict[str, dict[str, Any]] = {
        "responses": {"model": "speaker", "input": "Hello", "temperature": 0},
        "rerank": {"model": "tiny", "query": "a", "documents": ["b", "c"]},
        "classify": {"model": "tiny", "input": "c", "labels": ["a", "b"]},
    }
    lines = [
        {"custom_id": path, "method": "POST", "url": f"/v1/{path}", "body": body}
        for path, body in asked.items()
    ]
    # The same texts, asked for otherwise: another line's answer would be wrong.
    lines.append({**lines[1], "custom_id": "first", "body": {**asked["rerank"], "top_n": 1}})
    with answering(speaking):
        ended = until(client, batch(client, lines, endpoint="/v1/responses"), "completed", "failed")
    found = {name: one["response"]["body"] for name, one in lines_of(client, ended.output_file_id).items()}
    assert found["responses"]["output"][0]["content"][0]["text"].startswith("row ")
    assert [len(found[name]["results"]) for name in ("rerank", "first")] == [2, 1]
    assert found["classify"]["data"][0]["prediction"] in ("a", "b")


def test_equal_lines_that_are_not_drawn_run_once(client: OpenAI, speaking: House) -> None:
    same = {"messages": [{"role": "user", "content": "the same"}]}
    lines = [line(n, **same, temperature=0) for n in range(4)]
    lines += [line(10 + n, **same, temperature=1) for n in range(3)]
    lines += [line(20 + n, **same, temperature=1, seed=5) for n in range(2)]
    with answering(speaking):
        ended = until(client, batch(client, lines), "completed", "failed")
    assert len(lines_of(client, ended.output_file_id)) == 9
    assert speaking.job(ended.x_motet["job"])["rows"] == 1 + 3 + 1  # type: ignore[attr-defined]
    assert ended.request_counts is not None
    assert ended.request_counts.completed == 9


def test_the_end_of_a_batch_is_heard_and_not_looked_for(
    client: OpenAI, speaking: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scheduler.api.openai.batch_work as work

    monkeypatch.setattr(work, "_LOOK_S", 30.0)
    with answering(speaking):
        for number in range(2):
            # The first one ends the last look that was begun before.
            until(client, batch(client, [line(number)]), "completed", within_s=10)


def test_lines_about_one_text_go_to_one_worker_whatever_their_order_in_the_file(
    client: OpenAI, speaking: House
) -> None:
    texts = [f"{n} " + "and so on " * (20 + n) for n in range(12)]
    lines = [
        line(4 * n + k, messages=[{"role": "user", "content": f"{text}Prompt {k}."}], temperature=0)
        for n, text in enumerate(texts)
        for k in range(4)
    ]
    random.Random(3).shuffle(lines)
    made = until(client, batch(client, lines), "in_progress", "failed")
    job = made.x_motet["job"]  # type: ignore[attr-defined]
    with speaking.database.transaction() as connection:
        waiting = frontier(connection, job, 0, Lengths(), rows=100)
    [stored] = speaking.sql("SELECT payload, row_order FROM block WHERE job_id = :job", job=job)
    asked, order = decode_block(stored.payload).values["asked"], row_order(stored.row_order)
    texts_of = []
    while (carved := carve(waiting, 0.01, Price(0.0, 0.001, 0.0, 0.0), cap_s=1.0, least=9)) is not None:
        rows = [order[i] for r in carved.ranges for i in range(r.lo, r.hi)]
        texts_of.append([str(asked[row]).partition("Prompt")[0] for row in rows])
    assert [len(one) for one in texts_of] == [8] * 6
    assert all(len(set(one)) == 2 for one in texts_of)
    with answering(speaking):
        ended = until(client, made, "completed", "failed")
    assert set(lines_of(client, ended.output_file_id)) == {one["custom_id"] for one in lines}


TOPIC = {"topic": {"kind": "classify", "model": "topics"}}
LOUD = {
    "loud": {"kind": "generate", "model": "speaker", "about": "{text}", "prompt": "Shout.", "max_tokens": 5}
}


def test_tasks_in_a_line_are_merged_in_its_answer_and_counted_with_it(
    client: OpenAI, speaking: House
) -> None:
    """Two sets of tasks, lines without any, and equal ones that run once: each line is one, whatever it asks."""
    lines = [line(n, temperature=0, tasks={**TOPIC, **LOUD}) for n in range(3)]
    lines += [
        line(
            3,
            temperature=0,
            tasks=dict(reversed([*TOPIC.items(), *LOUD.items()])),
            messages=lines[0]["body"]["messages"],
        )
    ]
    lines += [line(4, tasks={"topic": {"kind": "embed", "model": "tiny", "input": "{text}"}})]
    lines += [line(5), embedding(6)]
    made = until(client, batch(client, lines), "in_progress", "failed")
    assert made.status == "in_progress", made.errors
    job = made.x_motet["job"]  # type: ignore[attr-defined]
    assert made.request_counts is not None
    assert (made.request_counts.total, made.request_counts.completed) == (7, 0)
    with answering(speaking):
        ended = until(client, made, "completed", "failed")
    assert ended.request_counts is not None
    assert (ended.request_counts.completed, ended.request_counts.failed) == (7, 0)
    found = {name: one["response"]["body"] for name, one in lines_of(client, ended.output_file_id).items()}
    assert set(found) == {f"id-{n}" for n in range(7)}
    for number in (0, 1, 2, 3):
        told = found[f"id-{number}"]["x_motet"]
        assert set(told["tasks"]) == {"topic", "loud"}
        assert told["tasks"]["topic"] in ("business", "sport")
        assert told["tasks"]["loud"]["text"].startswith("row ")
        assert told["errors"] == {}
    assert found["id-3"]["x_motet"] == found["id-0"]["x_motet"]
    assert len(found["id-4"]["x_motet"]["tasks"]["topic"]) == 2
    assert not {"x_motet"} & (found["id-5"].keys() | found["id-6"].keys())
    assert ended.usage is not None
    assert ended.usage.output_tokens == 6 * 3, "of the chats alone, each line's once"
    names = list(speaking.job(job)["tasks"])
    assert {"answer", "topic", "loud"} < set(names)
    assert len(names) == 3 + 2 + 1 + 1
    assert speaking.job(job)["rows"] == 6


def test_a_task_beside_a_line_that_fails_is_told_and_the_line_is_answered(
    client: OpenAI, speaking: House
) -> None:
    made = until(client, batch(client, [line(0, tasks=TOPIC)]), "in_progress")
    job = made.x_motet["job"]  # type: ignore[attr-defined]
    with speaking.database.transaction() as connection:
        from motet.protocol.columns import CellError, Column
        from scheduler.store import sealing

        broken = Column(
            kind="label",
            status=b"\1",
            arrays={"codes": b"\0\0", "scores": b"\0" * 4},
            errors={0: CellError("too_long", "x")},
        )
        stored = sealing.store_column(connection, speaking.tenants["default"], broken, None)
        connection.exec_driver_sql(
            "INSERT INTO block_column SELECT job_id, 0, number, %s FROM task WHERE name = 'topic'", (stored,)
        )
        connection.exec_driver_sql("UPDATE job SET cells_error = 1")
        connection.exec_driver_sql(
            "UPDATE block_pass SET state = 'sealed', cursor = n, done = n WHERE pass_number ="
            " (SELECT pass_number FROM task WHERE name = 'topic')"
        )
    speaking.answer(job, 0)
    ended = until(client, made, "completed")
    (found,) = lines_of(client, ended.output_file_id).values()
    assert found["response"]["body"]["x_motet"] == {
        "tasks": {"topic": None},
        "errors": {"topic": {"error": "too_long", "message": "x"}},
    }


def test_a_function_that_is_given_answers_by_name_stands_in_one_set_alone(
    client: OpenAI, speaking: House
) -> None:
    with speaking.database.transaction() as connection:
        registry.add_model(connection, replace(DICE, name="fixed", deterministic=True))
    given = {"said": {"kind": "function", "model": "fixed", "inputs": ["answer.text"]}}
    failed = until(
        client, batch(client, [line(0, tasks=TOPIC), line(1, tasks=given)]), "failed", "in_progress"
    )
    assert failed.errors is not None
    assert [(one.code, one.line, one.param) for one in failed.errors.data or ()] == [
        ("unsupported_value", 2, "tasks")
    ]
    taken = until(
        client, batch(client, [line(0, tasks=given), line(1, tasks=TOPIC)]), "failed", "in_progress"
    )
    assert taken.status == "in_progress", taken.errors


def test_lines_are_counted_while_they_run_whatever_their_rows(client: OpenAI, speaking: House) -> None:
    """Of several rows, several for one row, and with tasks beside: exact for the blocks that are done."""
    same = {"messages": [{"role": "user", "content": "the same"}], "temperature": 0}
    lines = [
        *(line(n, **same) for n in range(4)),
        line(4, n=3),
        embedding(5, ["a", "b"]),
        line(6, tasks=TOPIC),
    ]
    made = until(client, batch(client, lines), "in_progress")
    job = made.x_motet["job"]  # type: ignore[attr-defined]
    blocks = [number for (number,) in speaking.sql("SELECT number FROM block ORDER BY number")]
    assert blocks == [0]
    speaking.sql("UPDATE batch SET owned_until = clock_timestamp() + interval '1 h', owner = 'nobody'")
    speaking.answer(job, 0, failing={1: CellError("engine", "x")})
    counts = client.batches.retrieve(made.id).request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (7, 6, 1)
    (listed,) = client.batches.list()
    assert listed.request_counts == counts
    speaking.sql("UPDATE batch SET owned_until = clock_timestamp()")
    ended = until(client, made, "completed")
    assert ended.request_counts == counts


#: Lines that are refused, and as what.
BAD_LINES: Sequence[tuple[bytes, str]] = (
    (b"{broken", "invalid_json_line"),
    (b"[]", "invalid_json_line"),
    (b"\xff\xfe", "invalid_json_line"),
    (b'{"custom_id": "a\\u0000b"}', "invalid_json_line"),
    (b'{"custom_id": "a", "custom_id": "b"}', "invalid_json_line"),
    (json.dumps(line(0)).encode(), "duplicate_custom_id"),
    (json.dumps({**line(1), "custom_id": None}).encode(), "missing_required_parameter"),
    (json.dumps({**line(1), "custom_id": "x" * 513}).encode(), "invalid_value"),
    (json.dumps({**line(1), "url": "/v1/images"}).encode(), "invalid_url"),
    (json.dumps({**line(1), "method": "GET"}).encode(), "invalid_method"),
    (json.dumps({**line(1), "body": 3}).encode(), "missing_required_parameter"),
    (json.dumps(line(1, model="nobody")).encode(), "model_not_found"),
    (json.dumps(line(1, model="tiny")).encode(), "model_mismatch"),
    (json.dumps(line(1, logit_bias={"5": 1})).encode(), "unsupported_parameter"),
    (json.dumps(line(1, top_p=5)).encode(), "invalid_value"),
    (json.dumps(line(1, stream=True)).encode(), "unsupported_parameter"),
    (json.dumps(line(1, tasks={"vector": {"kind": "embed", "model": "nobody"}})).encode(), "model_not_found"),
    (json.dumps(line(1, tasks={"vector": {"kind": "embed", "model": "topics"}})).encode(), "invalid_value"),
    (json.dumps(line(1, tasks={"x": {"kind": "guess", "model": "topics"}})).encode(), "invalid_value"),
    (json.dumps(line(1, wings=2)).encode(), "unknown_parameter"),
    (json.dumps(line(1, temperature="hot")).encode(), "invalid_value"),
    (json.dumps(line(1, messages=[])).encode(), "invalid_value"),
    (b'{"custom_id": "' + b"x" * 9_000_000, "line_too_long"),
    (json.dumps(line(1, messages=[{"role": "user", "content": "x" * 300_000}])).encode(), "too_long"),
)


def test_a_bad_line_fails_its_batch_with_its_number_and_code(client: OpenAI, speaking: House) -> None:
    lines = [line(0), *(raw for raw, _ in BAD_LINES), line(9)]
    failed = until(client, batch(client, lines), "failed", "in_progress")
    assert failed.errors is not None
    told = [(one.code, one.line) for one in failed.errors.data or ()]
    assert told == [(code, number) for number, (_, code) in enumerate(BAD_LINES, 2)]
    assert failed.output_file_id is None
    assert speaking.sql("SELECT 1 FROM job") == []


def test_an_empty_file_fails(client: OpenAI) -> None:
    failed = until(client, batch(client, [b"", b"  "]), "failed")
    assert failed.errors is not None
    assert [one.code for one in failed.errors.data or ()] == ["empty_file"]


def test_a_cancelled_batch_tells_of_every_line(client: OpenAI, speaking: House) -> None:
    made = until(client, batch(client, [line(n) for n in range(5)]), "in_progress")
    cancelled = client.batches.cancel(made.id)
    assert cancelled.status in ("cancelling", "cancelled")
    ended = until(client, made, "cancelled")
    assert client.batches.cancel(made.id).status == "cancelled"
    assert ended.output_file_id is None
    undone = lines_of(client, ended.error_file_id)
    assert set(undone) == {f"id-{n}" for n in range(5)}
    assert {one["error"]["code"] for one in undone.values()} == {"batch_cancelled"}
    assert ended.request_counts is not None
    assert (ended.request_counts.total, ended.request_counts.failed) == (5, 5)


def test_a_batch_that_is_late_keeps_what_is_done(client: OpenAI, speaking: House) -> None:
    lines = [line(0), *(embedding(n, "x" * n) for n in range(1, 4))]
    made = until(client, batch(client, lines, completion_window="30m"), "in_progress")
    (job,) = speaking.sql("SELECT id FROM job")[0]
    with speaking.database.transaction() as connection:
        from scheduler.store.endings import end_job, overdue

        connection.exec_driver_sql("UPDATE job SET deadline = clock_timestamp()")
        for late, why in overdue(connection, 60).items():
            end_job(connection, late, "failed", why)  # type: ignore[arg-type]
    ended = until(client, made, "expired")
    undone = lines_of(client, ended.error_file_id)
    assert len(undone) == 4
    assert {one["error"]["code"] for one in undone.values()} == {"batch_expired"}
    assert speaking.job(str(job))["state"] == "failed"


def test_a_create_that_is_sent_again_makes_no_second_batch(client: OpenAI, speaking: House) -> None:
    file = upload(client, [line(0)])
    asked: dict[str, Any] = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    first = client.batches.create(**asked)
    again = client.batches.create(**asked, extra_headers={"x-stainless-retry-count": "1"})
    other = client.batches.create(**asked)
    assert again.id == first.id != other.id
    keyed = [client.batches.create(**asked, extra_headers={"Idempotency-Key": "k"}).id for _ in range(2)]
    assert keyed[0] == keyed[1]
    with pytest.raises(openai.BadRequestError):
        client.batches.create(**{**asked, "completion_window": "2h"}, extra_headers={"Idempotency-Key": "k"})


WRONG_CREATES: Sequence[Any] = (
    ({"completion_window": "soon"}, "completion_window"),
    ({"completion_window": "9999h"}, "completion_window"),
    ({"endpoint": "/v1/images"}, "endpoint"),
    ({"input_file_id": "file-none"}, "input_file_id"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"priority": "first"}, "priority"),
    ({"wings": 2}, "wings"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
)


def test_a_wrong_create_is_refused_by_name(client: OpenAI, speaking: House) -> None:
    for more, param in WRONG_CREATES:
        body = {
            "input_file_id": upload(client, [line(0)]),
            "endpoint": CHAT,
            "completion_window": "24h",
            **more,
        }
        answer = speaking.call("POST", f"{PREFIX}/batches", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_what_a_killed_process_left_behind_is_taken_over(speaking: House, client: OpenAI) -> None:
    """Wherever its owner dies: the next one begins at the last step that was committed."""
    killed: list[str] = []

    class Dies(BaseException):
        pass

    file = upload(client, [line(n) for n in range(30)])
    use = Resources.of(speaking.settings)
    # Whoever serves the API here stays away.
    speaking.sql(
        "CREATE FUNCTION nobody() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.owner NOT IN ('', 'mine', 'heir') THEN RETURN NULL; END IF; RETURN NEW; END $$"
    )
    speaking.sql("CREATE TRIGGER nobody BEFORE UPDATE ON batch FOR EACH ROW EXECUTE FUNCTION nobody()")
    made = client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    steps = ("planned_with", "land_part", "close_job")
    import scheduler.api.openai.batch_load as load

    for step in steps:
        owner = load if hasattr(load, step) else load.landing
        before = getattr(owner, step)

        def dies(*args: Any, step: str = step, **more: Any) -> Any:
            killed.append(step)
            raise Dies

        setattr(owner, step, dies)
        try:
            with pytest.raises(Dies):
                BatchWorker(use, "mine").step()
        finally:
            setattr(owner, step, before)
        assert BatchWorker(use, "heir").step() is False, "it is still owned"
        speaking.sql("UPDATE batch SET owned_until = clock_timestamp() - interval '1 s'")
    assert killed == list(steps)
    assert BatchWorker(use, "heir").step()
    assert client.batches.retrieve(made.id).status == "in_progress"
    assert len(speaking.sql("SELECT 1 FROM job")) == 1
    with answering(speaking):
        while speaking.sql("SELECT state FROM job")[0].state != "succeeded":
            time.sleep(0.01)
    assert BatchWorker(use, "heir").step()
    ended = client.batches.retrieve(made.id)
    assert ended.status == "completed"
    assert len(lines_of(client, ended.output_file_id)) == 30
    use.close()


def test_a_file_of_too_many_lines_fails_and_one_that_was_cut_off_leaves_nothing(
    client: OpenAI, speaking: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.api.openai.lines.MOST_LINES", 5)
    failed = until(client, batch(client, [line(n) for n in range(6)]), "failed")
    assert failed.errors is not None
    assert [one.code for one in failed.errors.data or ()] == ["too_many_tasks"]
    host, port = speaking.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line_to:
        head = (
            f"POST {PREFIX}/files HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
            f"Authorization: Bearer {speaking.tokens['user']}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
            'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        )
        line_to.sendall(head.encode() + b"y" * 100_000)
    coming = Path(speaking.settings.blob_dir) / "incoming"
    end = time.monotonic() + 10
    while any(coming.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(list(client.files.list())) == 1


# -- requests that wait


def test_a_chat_is_answered(client: OpenAI, speaking: House) -> None:
    with answering(speaking):
        said = client.chat.completions.create(
            model="speaker",
            messages=[
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            ],
            temperature=0.5,
            n=3,
            seed=7,
            stop=["\n"],
            max_completion_tokens=5,
            response_format={"type": "json_object"},
        )
        again = client.chat.completions.create(
            model="speaker@1", messages=[{"role": "user", "content": "Hello"}]
        )
    assert [choice.message.content for choice in said.choices] == ["row 0", "row 1", "row 2"]
    assert said.choices[0].finish_reason == "stop"
    assert said.usage is not None
    assert (said.usage.prompt_tokens, said.usage.completion_tokens, said.usage.total_tokens) == (7, 9, 16)
    assert again.choices[0].message.content is not None
    (job,) = speaking.sql("SELECT state, priority, n_rows, name FROM job")
    assert (job.state, job.priority, job.n_rows) == ("open", 0, 4)


def test_a_prompt_is_continued(client: OpenAI, speaking: House) -> None:
    with answering(speaking):
        said = client.completions.create(model="speaker", prompt=["Once", "Twice"], n=2, max_tokens=4)
    assert [choice.index for choice in said.choices] == [0, 1, 2, 3]
    assert said.usage is not None
    assert said.usage.prompt_tokens == 14


def test_texts_become_vectors(client: OpenAI, speaking: House) -> None:
    with answering(speaking):
        # The SDK asks for base64 by itself.
        one = client.embeddings.create(model="tiny", input="a text")
        many = client.embeddings.create(model="tiny", input=["a"] * 40, encoding_format="float", dimensions=2)
    assert one.data[0].embedding == [0.0, 0.5]
    assert len(many.data) == 40
    assert all(math.isclose(d.embedding[1], 0.5) for d in many.data)
    assert one.usage.prompt_tokens > 0


def test_a_response_is_a_chat_that_nobody_keeps(client: OpenAI, speaking: House) -> None:
    with answering(speaking):
        said = client.responses.create(
            model="speaker",
            instructions="Be brief.",
            input=[{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
            max_output_tokens=5,
            temperature=0,
            text={"format": {"type": "json_schema", "name": "any", "schema": {"type": "object"}}},
        )
    assert (said.status, said.output_text, said.instructions) == ("completed", "row 0", "Be brief.")
    assert said.usage is not None
    assert (said.usage.input_tokens, said.usage.output_tokens) == (7, 3)
    [asked] = speaking.sql("SELECT name FROM job")
    assert asked.name == "openai /v1/responses speaker@1"


def test_documents_are_ranked_and_texts_classified_by_their_vectors(client: OpenAI, speaking: House) -> None:
    """The n-th text's vector is (n, 0.5): the first is like the second more than like the third."""
    with answering(speaking):
        ranked: Any = client.post(
            "/rerank",
            cast_to=object,
            body={
                "model": "tiny",
                "query": "what",
                "documents": ["b", {"text": "c"}, "d"],
                "top_n": 2,
                "return_documents": True,
            },
        )
        sorted_: Any = client.post(
            "/classify", cast_to=object, body={"model": "tiny", "input": ["c", "d"], "labels": ["a", "b"]}
        )
    assert [(one["index"], one["document"]["text"]) for one in ranked["results"]] == [(0, "b"), (1, "c")]
    assert math.isclose(ranked["results"][0]["relevance_score"], 0.5 / math.sqrt(1.25))
    assert ranked["usage"]["prompt_tokens"] > 0
    assert [one["prediction"] for one in sorted_["data"]] == ["b", "b"]
    assert [one["label"] for one in sorted_["data"][0]["predictions"]] == ["a", "b"]


def test_documents_are_ranked_by_a_cross_encoder_where_the_model_is_one(
    client: OpenAI, speaking: House
) -> None:
    with speaking.database.transaction() as connection:
        registry.add_model(connection, RANKER)
    body = {"model": "ranker", "query": "what", "documents": ["b", {"text": "c"}], "return_documents": True}
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/rerank", "body": {**body, "top_n": 1}}
    with answering(speaking):
        ranked: Any = client.post("/rerank", cast_to=object, body=body)
        by_vectors: Any = client.post("/rerank", cast_to=object, body={**body, "model": "tiny"})
        ended = until(client, batch(client, [asked, line(1)], endpoint="/v1/rerank"), "completed", "failed")
    assert ranked["results"] == [
        {"index": 1, "relevance_score": 0.75, "document": {"text": "c"}},
        {"index": 0, "relevance_score": 0.25, "document": {"text": "b"}},
    ]
    assert ranked["usage"]["prompt_tokens"] > 0
    assert {one["relevance_score"] for one in by_vectors["results"]}.isdisjoint({0.75, 0.25})
    found = lines_of(client, ended.output_file_id)["a"]["response"]["body"]
    assert [one["index"] for one in found["results"]] == [1]
    assert "ranker" in {model.id for model in client.models.list()}
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="ranker", input="a")
    assert refused.value.code == "model_mismatch"


def test_an_ask_that_is_refused_at_the_door_is_counted(client: OpenAI, speaking: House) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "a"}
    with answering(speaking):
        client.embeddings.create(**asked)
    ((job,),) = speaking.sql("SELECT id FROM job")
    busy = Overloaded("too much", retry_after_s=3)
    for who in (
        lambda: client.embeddings.create(**asked),
        lambda: speaking.call("POST", f"/v1/jobs/{job}/ask", json={}),
    ):
        with pytest.MonkeyPatch.context() as patch:

            async def full(self: Door, *, interactive: bool) -> None:
                raise busy

            patch.setattr(Door, "admit_ask", full)
            with suppress(openai.RateLimitError):
                who()
    told = speaking.call("GET", "/metrics", token="read").text
    assert 'motet_asks_total{result="refused"} 2.0' in told


def test_tasks_about_the_last_message_are_answered_beside_it(client: OpenAI, speaking: House) -> None:
    tasks = {
        "topic": {"kind": "classify", "model": "topics"},
        "vector": {"kind": "embed", "model": "tiny", "input": "{text}"},
    }
    asked: dict[str, Any] = {"model": "speaker", "messages": [{"role": "user", "content": "Shares rose."}]}
    with answering(speaking):
        said: Any = client.chat.completions.create(**asked, extra_body={"tasks": tasks})
        client.chat.completions.create(**asked, extra_body={"tasks": tasks})
        client.chat.completions.create(**asked)
        told: list[Any] = list(
            client.chat.completions.create(**asked, stream=True, extra_body={"tasks": tasks})
        )
    assert said.choices[0].message.content == "row 0"
    assert said.x_motet == {"tasks": {"topic": "business", "vector": [0.0, 0.5]}, "errors": {}}
    assert len(speaking.sql("SELECT 1 FROM job")) == 2, "one for each distinct set"
    assert told[-1].x_motet == said.x_motet
    nobody = {"topic": {"kind": "classify", "model": "nobody"}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, extra_body={"tasks": nobody})
    assert refused.value.param == "tasks.topic.model"


def test_models_that_can_be_asked_are_listed(client: OpenAI) -> None:
    assert {"speaker", "speaker@1", "tiny", "tiny@1"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("speaker").owned_by == "motet"
    for name in ("topics", "nobody"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


WRONG_REQUESTS: Sequence[Any] = (
    ("chat/completions", {}, 400, "model"),
    ("chat/completions", {"model": "speaker"}, 400, "messages"),
    ("chat/completions", {"model": "nobody", "messages": []}, 404, "model"),
    ("chat/completions", {"model": "tiny", "messages": []}, 400, "model"),
    ("embeddings", {"model": "speaker", "input": "a"}, 400, "model"),
    ("embeddings", {"model": "tiny", "input": []}, 400, "input"),
    ("embeddings", {"model": "tiny", "input": [[1, 2]]}, 400, "input"),
    ("embeddings", {"model": "tiny", "input": "a", "dimensions": 1}, 400, "dimensions"),
    ("completions", {"model": "speaker", "prompt": "a", "echo": True}, 400, "echo"),
    ("completions", {"model": "speaker", "prompt": "a", "n": 0}, 400, "n"),
    (
        "responses",
        {"model": "speaker", "input": "a", "previous_response_id": "resp_1"},
        400,
        "previous_response_id",
    ),
    ("rerank", {"model": "speaker", "query": "a", "documents": ["b"]}, 400, "model"),
    ("classify", {"model": "tiny", "input": "a", "labels": ["b"]}, 400, "labels"),
    ("nowhere", {}, 404, None),
)


def test_a_wrong_request_is_refused_in_their_form(speaking: House) -> None:
    for path, body, status, param in WRONG_REQUESTS:
        answer = speaking.call("POST", f"{PREFIX}/{path}", json=body)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param
        assert answer.headers["x-request-id"]


def test_tools_are_refused_with_a_sentence(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools are not served"):
        client.chat.completions.create(
            model="speaker",
            messages=[{"role": "user", "content": "hi"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


def test_a_door_whose_job_was_closed_gets_another_one(client: OpenAI, speaking: House) -> None:
    with answering(speaking):
        client.embeddings.create(model="tiny", input="first")
        (job,) = speaking.sql("SELECT id FROM job")[0]
        speaking.call("POST", f"/v1/jobs/{job}/close", json={})
        client.embeddings.create(model="tiny", input="second")
    assert len(speaking.sql("SELECT 1 FROM job")) == 2


def test_a_door_that_nobody_uses_is_closed(client: OpenAI, speaking: House) -> None:
    with answering(speaking):
        client.embeddings.create(model="tiny", input="first")
    use = Resources.of(speaking.settings)
    BatchWorker(use).tidy()
    assert speaking.sql("SELECT state FROM job")[0].state == "open"
    speaking.sql("UPDATE door SET used = used - interval '25 hours'")
    BatchWorker(use).tidy()
    assert speaking.sql("SELECT state FROM job")[0].state == "succeeded"
    use.close()


def test_every_door_is_closed_to_whoever_may_not_submit(speaking: House) -> None:
    for method, path in DOORS:
        address = PREFIX + path.format(file="file-1", batch="batch_1", model="tiny")
        for token in (None, "garbage", *(scope for scope in SCOPES if scope not in SUBMITS)):
            answer = speaking.call(method, address, token=token)
            assert answer.status_code == (403 if token in SCOPES else 401), (method, path, token)
            assert answer.json()["error"]["code"] in ("invalid_api_key", "insufficient_permissions")
    stranger = OpenAI(base_url=f"{speaking.url}{PREFIX}", api_key="sk-wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_method_that_a_door_does_not_have_is_refused(speaking: House) -> None:
    answer = speaking.call("PUT", f"{PREFIX}/files")
    assert answer.status_code == 405
    assert isinstance(answer, httpx.Response)


# -- garbage


def test_no_garbage_is_the_servers_own_failure(speaking: House) -> None:
    """Bodies that were torn, and values that nobody expects, at every door."""
    dice = random.Random(3)
    odd: list[Any] = [
        None,
        True,
        -1,
        2**63,
        0.5,
        "",
        "\0",
        "\ud800",
        "x" * 70_000,
        [],
        [[]],
        {},
        {"a": {}},
        [1, "a"],
    ]
    whole: dict[str, dict[str, Any]] = {
        "chat/completions": {**line(0)["body"], "stop": ["x"], "response_format": {"type": "json_object"}},
        "completions": {"model": "speaker", "prompt": ["a", "b"], "n": 2},
        "embeddings": {"model": "tiny", "input": ["a"], "encoding_format": "float", "dimensions": 3},
        "responses": {"model": "speaker", "input": "a", "instructions": "b", "text": {}},
        "rerank": {"model": "tiny", "query": "a", "documents": ["b"], "top_n": 1},
        "classify": {"model": "tiny", "input": "a", "labels": ["b", "c"]},
        "batches": {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h", "metadata": {}},
    }
    statuses: set[int] = set()
    for path, good in whole.items():
        bodies = [json.dumps({**good, name: value}).encode() for name in [*good, "wings"] for value in odd]
        bodies += [json.dumps(value).encode() for value in odd]
        bodies += [json.dumps(good).encode()[: dice.randrange(200)] for _ in range(20)]
        bodies += [dice.randbytes(dice.randrange(200)) for _ in range(20)]
        # Nobody answers here: what is taken would wait.
        bodies = [raw for raw in bodies if not _is_taken(path, raw)]
        for raw in bodies:
            answer = speaking.call("POST", f"{PREFIX}/{path}", content=raw)
            assert answer.status_code < 500, (path, raw[:200], answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            statuses.add(answer.status_code)
    for path in (
        "/files/%00",
        "/files/%ff",
        "/batches/..%2f",
        "/models/" + "x" * 300,
        "/batches?limit=x",
        "/files?after=%00",
        "/files?order=up",
        "/files?purpose=%00",
        "/batches?after=" + "y" * 99,
    ):
        answer = speaking.call("GET", f"{PREFIX}{path}")
        assert answer.status_code < 500, (path, answer.text)
        statuses.add(answer.status_code)
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\ndata\r\n--x--\r\n'
    for _ in range(60):
        torn = bytearray(form * dice.randrange(1, 3))
        for _ in range(dice.randrange(1, 6)):
            torn[dice.randrange(len(torn))] = dice.randrange(256)
        boundary = dice.choice(["x", "x", "x", "", "y" * 300, '"', "\u00e9"])
        kind = f"multipart/form-data; boundary={boundary}".encode("latin-1")
        answer = speaking.call("POST", f"{PREFIX}/files", content=bytes(torn), headers={"Content-Type": kind})
        assert answer.status_code == 400, (bytes(torn), answer.text)
    assert statuses >= {400, 404}


def _is_taken(path: str, raw: bytes) -> bool:
    """A request that is good, and so waits for an answer."""
    endpoint = f"/v1/{path}"
    if endpoint not in SERVED:
        return False
    try:
        asked = read_request(endpoint, clean_object(loads(raw)), lambda ids: "text")
    except Exception:  # noqa: BLE001 - whatever it is, it is refused
        return False
    return asked.model in ("speaker", "tiny") and asked.dimensions in (None, 2)
