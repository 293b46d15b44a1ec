"""Typed values from the client's sources to stored blocks, and an upload from before they had types going on after it."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgpack
import pytest
from sqlalchemy import create_engine, text

from motet import Classify, Client, Function
from motet.errors import Conflict
from motet.protocol.envelope import pack
from scheduler.blocks import IncomingPart, decode_block, fields_digest, reuse_key
from scheduler.migrate import downgrade, upgrade
from tests.integration.api_house import CLASSIFY, House, a_house, client, house

__all__ = ["client", "house"]

ROWS: list[dict[str, Any]] = [
    {"age": 41, "price": Decimal("1.50"), "on": date(2026, 11, 30), "tags": ["a", 1]},
    {"age": None, "price": Decimal(2), "on": None, "tags": {"x": None}},
    {"age": True, "price": 0.5, "on": "soon", "tags": []},
]
TASKS = {
    "kind": Classify("topics", input="{age} {price} {on} {tags}"),
    "roll": Function("dice", input="{age}"),
}


def stored(house: House, job: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for (payload,) in house.sql(f"SELECT payload FROM block WHERE job_id = '{job}' ORDER BY number"):
        for name, values in decode_block(bytes(payload)).values.items():
            found.setdefault(name, []).extend(values)
    return found


def test_a_job_keeps_the_types_of_its_rows(house: House, client: Client) -> None:
    job = client.submit(ROWS, TASKS)
    assert stored(house, job.id) == {
        name: [row[name] for row in ROWS] for name in ("age", "price", "on", "tags")
    }
    [(lengths,)] = house.sql("SELECT lengths FROM block")
    assert struct.unpack("<12I", lengths) == (2, 0, 4, 4, 1, 3, 10, 0, 4, 4, 10, 0)
    house.answer(job.id, 0)
    again = client.submit(ROWS, TASKS)
    assert house.job(again.id)["cells"]["reused"] == 3, "the function draws"
    assert client.plan(ROWS, TASKS).rows == 3


def test_json_numbers_and_nulls_are_taken_inline_and_by_lines(house: House, client: Client) -> None:
    rows = [{"text": 1}, {"text": 1.0}, {"text": None}, {"text": True}, {"text": ["a", {"b": 1}]}]
    job = client.submit(rows, {"roll": Function("dice")})
    lines = house.open({"roll": {"kind": "function", "model": "dice"}})["id"]
    house.put_raw(lines, 0, "\n".join(map(json.dumps, rows)).encode(), "application/x-ndjson")
    for one in (job.id, lines):
        assert list(map(repr, stored(house, one)["text"])) == ["1", "1.0", "None", "True", "['a', {'b': 1}]"]


def test_the_same_number_of_another_type_is_another_request(house: House, client: Client) -> None:
    client.submit([{"text": 1}], {"roll": Function("dice")}, key="once")
    client.submit([{"text": 1}], {"roll": Function("dice")}, key="once")
    for value in (1.0, "1", True, None):
        with pytest.raises(Conflict):
            client.submit([{"text": value}], {"roll": Function("dice")}, key="once")


def test_no_digest_of_a_short_text_can_be_tried_without_the_tenants_secret(house: House) -> None:
    job = house.open()["id"]
    raw = msgpack.packb({"columns": {"text": ["yes"]}, "first_row": 0})
    house.put_raw(job, 0, raw)
    [(secret,)] = house.sql("SELECT digest_key FROM tenant WHERE name = 'default'")
    [(digest,)] = house.sql("SELECT digest FROM part")
    plain = hashlib.sha256(raw).digest()
    assert bytes(digest) == hmac.digest(bytes(secret), plain, "sha256")
    [(keys,)] = house.sql("SELECT keys FROM block")
    [(task,)] = house.sql("SELECT digest FROM task")
    guess = reuse_key(fields_digest({"text": ["yes"]}, {}, ("text",)), bytes(task))
    assert [bytes(key) for key in keys] == [hmac.digest(bytes(secret), guess, "sha256")]
    [[count, different]] = house.sql("SELECT count(*), count(DISTINCT digest_key) FROM tenant")
    assert count == different > 1


def test_an_upload_that_was_under_way_before_values_had_types_goes_on(
    database_url: str, tmp_path: Path
) -> None:
    first, second = (
        msgpack.packb({"columns": {"text": rows}, "first_row": at})
        for rows, at in ((["a", "b"], 0), (["c"], 2))
    )
    opening = json.dumps({"tasks": CLASSIFY, "rows": ["inline"]})
    key = {"Idempotency-Key": "nightly"}
    with a_house(database_url, tmp_path) as house:
        inline = house.call("POST", "/v1/jobs", content=opening, headers=key).json()["id"]
        sealed = house.submit(["a", "b"])["id"]
        house.answer(sealed, 0)
        job = house.open()["id"]
        house.put_raw(job, 0, first)
        assert house.job(job)["cells"]["reused"] == 2
        house.put_raw(job, 1, second)
    _make_old(database_url, job, [first, second], json.loads(opening))
    upgrade(database_url)
    with a_house(database_url, tmp_path) as house:
        assert house.call("POST", "/v1/jobs", content=opening, headers=key).json()["id"] == inline
        assert house.put_raw(job, 0, first).json()["total_rows"] == 2, "the same part"
        assert house.put_raw(job, 1, first).status_code == 409
        third = msgpack.packb({"columns": {"text": [3]}, "first_row": 3})
        assert house.put_raw(job, 2, third).json()["total_rows"] == 4
        assert house.close(job, 3, 4).status_code == 202
        assert stored(house, job) == {"text": ["a", "b", "c", 3]}
        again = house.submit(["a", "b"])["id"]
        assert house.job(again)["state"] == "succeeded", "its column is found by the key of before"
        for block in (1, 2):
            house.answer(job, block)
        assert house.job(job)["state"] == "succeeded"


def test_a_part_that_an_api_of_before_stored_is_the_same_part(house: House) -> None:
    job = house.open()["id"]
    raw = msgpack.packb({"columns": {"text": ["a"]}, "first_row": 0})
    house.put_raw(job, 0, raw)
    with house.database.transaction() as connection:
        connection.execute(text("UPDATE part SET digest = :d"), {"d": hashlib.sha256(raw).digest()})
    assert house.put_raw(job, 0, raw).json()["total_rows"] == 1


def _make_old(url: str, job: str, parts: list[bytes], opening: Any) -> None:
    """Take a database back to what version 0009 held: bare payloads, digests without a key."""
    downgrade(url, "0010")
    engine = create_engine(url)
    with engine.begin() as connection:
        for number, raw in enumerate(parts):
            connection.execute(
                text("UPDATE part SET digest = :d WHERE job_id = :j AND number = :n"),
                {"d": hashlib.sha256(raw).digest(), "j": UUID(job), "n": number},
            )
        connection.execute(
            text("UPDATE job SET request_digest = :d WHERE idempotency_key = 'nightly'"),
            {"d": hashlib.sha256(json.dumps(opening, sort_keys=True).encode()).digest()},
        )
        found = connection.execute(text("SELECT job_id, digest FROM task")).all()
        tasks = {row.job_id: row.digest for row in found}
        for at in connection.execute(text("SELECT job_id, number, payload FROM block")).all():
            columns = decode_block(bytes(at.payload)).values
            part = IncomingPart(columns=columns)
            old = reuse_key(fields_digest(part.columns, {}, ("text",)), bytes(tasks[at.job_id]))
            connection.execute(
                text("UPDATE block SET payload = :p, keys = :k WHERE job_id = :j AND number = :n"),
                {"p": pack({"columns": columns}), "k": [old], "j": at.job_id, "n": at.number},
            )
            connection.execute(
                text(
                    "UPDATE sealed_column SET key = :k WHERE id IN (SELECT column_id FROM block_column"
                    " WHERE job_id = :j AND block_number = :n)"
                ),
                {"k": old, "j": at.job_id, "n": at.number},
            )
        connection.execute(text("ALTER TABLE tenant DROP COLUMN digest_key"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0009'"))
    engine.dispose()


def test_going_down_fails_the_jobs_whose_blocks_an_older_version_cannot_read(
    database_url: str, tmp_path: Path
) -> None:
    with a_house(database_url, tmp_path) as house:
        job = house.submit(["a"])["id"]
        done = house.submit(["b"])["id"]
        house.answer(done, 0)
    downgrade(database_url, "0009")
    upgrade(database_url)
    with a_house(database_url, tmp_path) as house:
        assert (house.job(job)["state"], house.job(done)["state"]) == ("failed", "succeeded")
        assert "taken back" in house.job(job)["reason"]
        assert house.job(house.submit(["b"])["id"])["state"] == "running", "reuse begins anew"
