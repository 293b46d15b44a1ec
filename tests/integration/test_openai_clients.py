"""OpenAI's doors, asked as clients are: odd but legal ways to write a request, and what they do with the answer."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import openai
import pytest
from openai import OpenAI

from scheduler.api.allowance import Allowance
from scheduler.api.openai.app import PREFIX
from tests.integration.api_house import House
from tests.integration.api_house import house as house
from tests.integration.test_openai_doors import CHAT, answering, line, upload
from tests.integration.test_openai_doors import client as client
from tests.integration.test_openai_doors import speaking as speaking


def test_a_slash_behind_a_path_changes_nothing(speaking: House) -> None:
    """Proxies and clients that join addresses by hand put one there."""
    for path in ("models", "files", "batches"):
        assert speaking.call("GET", f"{PREFIX}/{path}/").json()["object"] == "list"
    with answering(speaking):
        said = speaking.call("POST", f"{PREFIX}/chat/completions/", json=line(0)["body"])
    assert said.status_code == 200, said.text
    assert speaking.call("GET", f"{PREFIX}/").status_code == 404


def test_null_is_as_good_as_nothing_for_whatever_a_client_sends(client: OpenAI, speaking: House) -> None:
    """Clients send null for options of other servers that their caller left out."""
    with answering(speaking):
        client.chat.completions.create(**line(0)["body"], extra_body={"thinking": None, "top_k": None})
    asked: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h", "metadata": None}
    asked["input_file_id"] = upload(client, [line(0)])
    client.batches.create(**asked, extra_body={"priority": None, "model": None})
    with pytest.raises(openai.BadRequestError, match="thinking"):
        client.chat.completions.create(**line(0)["body"], extra_body={"thinking": {}})


def test_a_body_may_come_compressed_in_pieces_or_by_http_1_0(speaking: House) -> None:
    raw = json.dumps(line(0)["body"]).encode()
    path = f"{PREFIX}/chat/completions"
    host, port = speaking.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.0\r\nAuthorization: Bearer {speaking.tokens['user']}\r\nContent-Length: {len(raw)}\r\n\r\n"
    with answering(speaking):
        packed = gzip.compress(raw)
        assert (
            speaking.call("POST", path, content=packed, headers={"Content-Encoding": "gzip"}).status_code
            == 200
        )
        assert speaking.call("POST", path, content=iter([raw[:9], raw[9:]])).status_code == 200
        with socket.create_connection((host, int(port)), timeout=10) as old:
            old.sendall(head.encode() + raw)
            told = b"".join(iter(partial(old.recv, 65536), b""))
    assert told.split(b"\r\n", 1)[0].endswith(b" 200 OK")
    assert json.loads(told.partition(b"\r\n\r\n")[2])["object"] == "chat.completion"


#: Boundary, the file's disposition, what comes before the form, and what the file is called then.
ODD_FORMS: Sequence[tuple[str, str, str, str]] = (
    ("x", 'name="file"; filename="a.jsonl"', "", "a.jsonl"),
    ("x y'()+_,-./:=?z", 'name="file"; filename="größe 日本.jsonl"', "", "größe 日本.jsonl"),
    ("-" * 70, 'name="file"; filename="a\\"b;c.jsonl"', "", 'a"b;c.jsonl'),
    ("x", "name=file; filename=a.jsonl", "\r\n", "a.jsonl"),
    ("x", 'name="file"; filename="C:\\night\\a.jsonl"', "", "a.jsonl"),
    ("x", 'name="file"', "", "file"),
)


def test_forms_are_read_however_they_are_written(speaking: House) -> None:
    for boundary, disposition, before, name in ODD_FORMS:
        form = (
            f"{before}--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\na line\r\n"
            f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{boundary}--\r\nrest'
        )
        kind = f'Multipart/Form-Data; charset=utf-8; Boundary="{boundary}"'
        answer = speaking.call(
            "POST", f"{PREFIX}/files", content=form.encode(), headers={"Content-Type": kind}
        )
        assert answer.status_code == 200, answer.text
        assert (answer.json()["filename"], answer.json()["bytes"]) == (name, 6)
    packed = speaking.call(
        "POST",
        f"{PREFIX}/files",
        content=gzip.compress(b"--x--"),
        headers={"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": "gzip"},
    )
    assert (packed.status_code, packed.json()["error"]["param"]) == (400, "Content-Encoding")


def test_pages_hold_everything_once_and_end_only_at_the_end(client: OpenAI) -> None:
    made = [client.files.create(file=b"x", purpose="batch").id for _ in range(5)]
    assert [one.id for one in client.files.list(limit=2, order="asc")] == made
    assert [one.id for one in client.files.list(limit=2)] == made[::-1]
    batches = [
        client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h").id for file in made
    ]
    assert [one.id for one in client.batches.list(limit=2)] == batches[::-1]
    # Of a page whose last file was deleted nobody knows what follows: that is no end.
    client.files.delete(made[1])
    with pytest.raises(openai.NotFoundError):
        client.files.list(limit=2, order="asc", after=made[1])
    with pytest.raises(openai.NotFoundError):
        client.batches.list(after="batch_nobody")
    assert list(client.files.list(order="asc", after=made[4])) == []


def test_their_client_waits_as_long_as_it_is_told_and_is_answered(
    speaking: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [0.7]
    monkeypatch.setattr(Allowance, "take", lambda *_: refused.pop() if refused else 0.0)
    with OpenAI(
        base_url=f"{speaking.url}{PREFIX}", api_key=speaking.tokens["user"], max_retries=1
    ) as patient:
        begin = time.monotonic()
        assert patient.models.list().data
        assert 0.9 < time.monotonic() - begin < 5
        refused.append(0.7)
        with pytest.raises(openai.RateLimitError) as told:
            patient.with_options(max_retries=0).models.list()
    assert told.value.response.headers["retry-after"] == "1"
    assert told.value.code == "rate_limit_exceeded"
