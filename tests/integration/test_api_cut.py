"""An answer that breaks off in the middle is seen to be broken: by our client, by curl, and through an old proxy."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import make_url

from motet import Client
from motet.errors import MotetError
from motet.results import read_frames
from scheduler.api import result_streams
from scheduler.api import results as route
from tests.integration.api_house import House, house

__all__ = ["house"]

TEXTS = [f"text {i}" for i in range(4 * 1024)]
#: What happens to the house of a job while its third block is read.
Fault = Callable[[House, str], None]


def database_away(house: House, job: str) -> None:
    _postgres(house, allow="false")


def job_removed(house: House, job: str) -> None:
    house.sql("DELETE FROM block_column WHERE job_id = :job", job=job)
    house.sql("DELETE FROM sealed_column")


def bug(house: House, job: str) -> None:
    raise RuntimeError("secret text of a user")


@pytest.fixture(params=[database_away, job_removed, bug])
def fault(request: pytest.FixtureRequest) -> Fault:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def job(house: House) -> str:
    """A job of four blocks, all answered."""
    job = str(house.submit(TEXTS)["id"])
    for block in range(4):
        house.answer(job, block)
    return job


@pytest.fixture
def breaking(house: House, job: str, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Blocks are read one by one, and the fault strikes as the third is read, once; the reads so far."""
    reads = [0]
    read_columns = route.read_columns

    def read(*args: Any) -> Any:
        reads[0] += 1
        if reads[0] == 3:
            fault(house, job)
        return read_columns(*args)

    monkeypatch.setattr(route, "_BATCH_BYTES", 1)
    # As a large answer is sent, block by block.
    monkeypatch.setattr(route, "_SMALL_BYTES", 0)
    monkeypatch.setattr(route, "read_columns", read)
    yield reads
    _postgres(house, allow="true")


def _postgres(house: House, *, allow: str) -> None:
    """Let nobody into the house's database any more and throw out who is in, or let all in again."""
    url = make_url(house.database.libpq_url)
    with psycopg.connect(url.set(database="postgres").render_as_string(False), autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS {allow}")
        if allow == "false":
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [url.database]
            )


def the_last_word(raw: bytes) -> dict[str, Any]:
    """The error behind the rows of the first two blocks."""
    *rows, last = [json.loads(line) for line in raw.decode().splitlines()]
    assert [row["row"] for row in rows] == list(range(2 * 1024))
    assert "secret" not in json.dumps(last)
    assert list(last) == ["error"]
    assert last["error"]["next"] == 2
    return last["error"]  # type: ignore[no-any-return]


def test_lines_that_break_off_end_with_an_error_and_without_the_end_of_their_body(
    house: House, job: str, fault: Fault, breaking: list[int]
) -> None:
    headers = {"Accept": "application/x-ndjson", "Authorization": f"Bearer {house.tokens['user']}"}
    pieces: list[bytes] = []
    with house.line.stream("GET", f"{house.url}/v1/jobs/{job}/results", headers=headers) as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            pieces.extend(answer.iter_bytes())
    error = the_last_word(b"".join(pieces))
    kind = {"database_away": "unavailable", "job_removed": "not_found", "bug": "internal"}[fault.__name__]
    assert error["type"] == kind
    assert ("after=2" in error["message"]) == (kind != "not_found")


def test_lines_break_off_visibly_behind_a_proxy_that_speaks_http_1_0(
    house: House, job: str, breaking: list[int]
) -> None:
    """There the end of the connection is the end of the body, so that only the last line can tell."""
    at = httpx.URL(house.url)
    with socket.create_connection((at.host, at.port or 0)) as line, line.makefile("rb") as answer:
        line.sendall(
            f"GET /v1/jobs/{job}/results HTTP/1.0\r\nHost: api\r\nAccept: application/x-ndjson\r\n"
            f"Authorization: Bearer {house.tokens['user']}\r\n\r\n".encode()
        )
        head, _, body = answer.read().partition(b"\r\n\r\n")
    assert b"200" in head.splitlines()[0]
    the_last_word(body)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_fails_where_lines_break_off(house: House, job: str, breaking: list[int]) -> None:
    url = f"{house.url}/v1/jobs/{job}/results"
    ended = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", "-H", "Accept: application/x-ndjson", "-H", "@-", url],
        input=f"Authorization: Bearer {house.tokens['user']}".encode(),
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 18, "curl's word for a file of which a part is missing"
    the_last_word(ended.stdout)


def test_frames_that_break_off_say_where_to_go_on_or_miss_the_end_of_their_body(
    house: House, job: str, fault: Fault, breaking: list[int]
) -> None:
    if fault is bug:
        with pytest.raises(httpx.RemoteProtocolError):
            house.call("GET", f"/v1/jobs/{job}/results")
        return
    answer = house.call("GET", f"/v1/jobs/{job}/results")
    *frames, end = read_frames(answer.content)
    assert [frame["block"] for frame in frames] == [0, 1]
    assert (end["next"], end["complete"]) == (2, False)


@pytest.mark.parametrize("fault", [database_away, bug])
def test_the_client_goes_on_behind_a_break_and_gets_each_row_once(
    house: House, job: str, breaking: list[int]
) -> None:
    with Client(house.url, house.tokens["user"], timeout=20) as client:
        rows = client.job(job).results()
        seen = [next(rows).index]
        _postgres(house, allow="true")
        seen += [row.index for row in rows]
    assert seen == list(range(len(TEXTS)))
    assert breaking[0] > 4


def test_the_server_says_in_its_log_why_it_cut_an_answer_off(
    house: House, job: str, fault: Fault, breaking: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        house.call("GET", f"/v1/jobs/{job}/results", headers={"Accept": "application/x-ndjson"})
    said = [r for r in caplog.records if r.getMessage() in ("answer cut off", "request failed")]
    assert len(said) == 1
    assert (said[0].getMessage() == "request failed") == (fault is bug), "with a trace where it is our fault"


def test_rows_that_a_server_leaves_out_are_missed(
    house: House, job: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    as_frame = result_streams.as_frame

    def forgetful(piece: result_streams.Merged | result_streams.End) -> bytes:
        return (
            b"" if isinstance(piece, result_streams.Merged) and piece.block.number == 1 else as_frame(piece)
        )

    monkeypatch.setattr(result_streams, "as_frame", forgetful)
    with Client(house.url, house.tokens["user"]) as client:
        found = client.job(job)
        for order in ("row", "done"):
            with pytest.raises(MotetError, match="3,072 of its 4,096 rows"):
                list(found.results(order=order))
        with pytest.raises(MotetError, match="3,072 of its 4,096 rows"):
            found.to_jsonl(tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir()), "no file that looks whole"


def test_a_request_whose_head_does_not_end_is_refused(house: House) -> None:
    at = httpx.URL(house.url)
    for head in (b"GET /healthz?" + b"x" * 200_000, b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 40_000):
        with socket.create_connection((at.host, at.port or 0)) as line, line.makefile("rb") as answer:
            with suppress(ConnectionError):
                line.sendall(head)
            assert answer.readline().startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    with socket.create_connection((at.host, at.port or 0)) as line, line.makefile("rb") as answer:
        for _ in range(3):
            line.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\na: " + b"b" * 30_000 + b"\r\n\r\n")
            assert answer.readline().startswith(b"HTTP/1.1 200"), "each request of a line has its own head"
            while (header := answer.readline().strip()) != b"":
                if header.lower().startswith(b"content-length"):
                    length = int(header.partition(b":")[2])
            answer.read(length)
