"""Every answer that is no success becomes one typed error, in the API's own words and no one else's."""

from __future__ import annotations

import json
import logging
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from motet.client import Client
from motet.errors import (
    Conflict,
    InvalidJob,
    Late,
    MotetError,
    NotFound,
    Overloaded,
    SetupError,
    Unauthorized,
    Unreachable,
)
from motet.http import Address, BodyRefused, Http, error_of, error_told, look_at
from motet.progress import Bar
from motet.tasks import Classify
from tests.unit.fake_api import TOKEN, FakeApi, serving


def answer(status: int, body: Any = None, **headers: str) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = httpx.Request("GET", "http://api.test/v1/jobs")
    return httpx.Response(status, content=raw, headers=headers, request=request)


def said(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"type": "t", "message": message, **more}}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, Unauthorized),
        (403, Unauthorized),
        (404, NotFound),
        (409, Conflict),
        (413, BodyRefused),
        (408, Unreachable),
        (520, Unreachable),
        (524, Unreachable),
        (422, InvalidJob),
        (429, Overloaded),
        (503, Overloaded),
        (502, Unreachable),
        (504, Unreachable),
        (500, MotetError),
        (302, SetupError),
    ],
)
def test_a_status_is_an_error_type(status: int, kind: type[MotetError]) -> None:
    assert type(error_of(answer(status, said("in the API's words")))) is kind


@pytest.mark.parametrize("status", [401, 404, 409, 413, 422, 429, 503])
def test_the_words_are_the_apis(status: int) -> None:
    assert str(error_of(answer(status, said("say this")))) == "say this"


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 500, 502, 503])
@pytest.mark.parametrize(
    "body", [b"<html>Traceback: secret</html>", b"\xff\xfe", b"[]", b'{"error": 3}', b"null"]
)
def test_a_body_of_another_server_is_never_repeated(status: int, body: bytes) -> None:
    words = str(error_of(answer(status, body)))
    assert "secret" not in words
    assert str(status) in words


@pytest.mark.parametrize("more", ["see below", {}, [1], 1.5, None])
def test_what_another_server_says_beside_an_error_breaks_nothing(more: object) -> None:
    assert isinstance(error_of(answer(422, said("no", more=more))), InvalidJob)


@pytest.mark.parametrize(("status", "stored"), [(503, False), (504, True)])
def test_late_is_told_from_a_proxy_that_lost_its_patience(status: int, stored: bool) -> None:
    told = {"error": {"type": "late", "message": "not answered in time", "stored": stored, "row": 7}}
    late = error_of(answer(status, told))
    assert isinstance(late, Late)
    assert (late.stored, late.row, str(late)) == (stored, 7, "not answered in time")
    assert not isinstance(error_of(answer(status)), Late)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("late", Late),
        ("conflict", Conflict),
        ("overloaded", Overloaded),
        ("unavailable", Overloaded),
        ("invalid_job", InvalidJob),
        ("not_found", NotFound),
        ("forbidden", Unauthorized),
        ("internal", MotetError),
        ("of a newer server", MotetError),
    ],
)
def test_the_error_of_one_row_among_others_has_its_type(kind: str, expected: type[MotetError]) -> None:
    error = error_told({"type": kind, "message": "said\x1b so"})
    assert type(error) is expected
    assert "said\N{REPLACEMENT CHARACTER} so" in str(error)


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert "\x1b" not in str(error_of(answer(404, said("\x1b[2Jgone"))))


def test_problems_are_told_one_by_one() -> None:
    problem = {"field": "rows.text", "row": 3, "got": "int", "expected": "text", "remedy": "mend it"}
    error = error_of(answer(422, said("one problem", problems=[problem, "no object"])))
    assert isinstance(error, InvalidJob)
    assert str(error) == "row 3, rows.text: got int; expected text; mend it"


@pytest.mark.parametrize("body", [said("m", next_part=4), {**said("m"), "next_part": 4}])
def test_a_conflict_knows_the_part_that_is_wanted(body: Any) -> None:
    error = error_of(answer(409, body))
    assert isinstance(error, Conflict)
    assert error.next_part == 4


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), (None, 1.0), ("-3", 0.0), ("1e9", 3600.0), ("tomorrow", 1.0)],
)
def test_retry_after_is_read_and_bounded(header: str | None, seconds: float) -> None:
    error = error_of(answer(429, said("m"), **({"Retry-After": header} if header else {})))
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == seconds


# -- a server that takes no more now


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with serving() as fake:
        yield fake


@pytest.fixture
def client(api: FakeApi) -> Client:
    return Client.over(Http(Address(url=api.url, token=TOKEN)))


def rows(n: int) -> Iterator[str]:
    return (f"row {i}" for i in range(n))


TOPIC = {"topic": Classify("news-topics")}


def test_an_upload_that_is_refused_for_a_while_goes_on_at_its_part(
    api: FakeApi, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    api.fail_once("PUT", "/parts/1", 429, times=3)
    job = client.submit(rows(4000), TOPIC)
    assert [api.count("PUT", f"/parts/{n}") for n in range(4)] == [1, 4, 1, 1]
    assert api.jobs[job.id].rows == 4000
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records if r.name.startswith("motet")] == [
        ("motet.upload", logging.WARNING, "waiting to send rows: as asked")
    ], "said once for each part that waits"


@pytest.mark.parametrize(("n", "path"), [(1, "/v1/jobs"), (4000, "/v1/jobs"), (4000, "/parts/2")])
def test_the_bar_says_what_is_waited_for(
    api: FakeApi,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    n: int,
    path: str,
) -> None:
    shown: list[tuple[str, threading.Thread]] = []
    show = Bar.show

    def seen(self: Bar, words: object, *, share: float | None = None) -> None:
        shown.append((str(words), threading.current_thread()))
        show(self, words, share=share)

    monkeypatch.setattr(Bar, "show", seen)
    api.fail_once("PUT" if "parts" in path else "POST", path, 429, times=2)
    client.submit(rows(n), TOPIC, progress=True)
    assert [words for words, _ in shown].count("waiting: as asked") == 1
    assert {thread for _, thread in shown} == {threading.main_thread()}
    assert not [r for r in caplog.records if r.name.startswith("motet")]


@pytest.mark.parametrize("key", [None, "nightly"])
def test_ctrl_c_ends_an_upload_that_waits_at_once(api: FakeApi, client: Client, key: str | None) -> None:
    api.fail_once("PUT", "/parts/1", 429, times=1000)
    interrupt = threading.Timer(1.0, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    interrupt.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        client.submit(rows(4000), TOPIC, key=key)
    tried = api.count("PUT", "/parts/1")
    assert time.monotonic() - began < 4
    for thread in threading.enumerate():
        if thread.name.startswith("motet-upload"):
            thread.join(4)
            assert not thread.is_alive()
    assert api.count("PUT", "/parts/1") == tried, "it does not try once more"
    assert [job.rows for job in api.jobs.values()] == ([] if key is None else [1024]), "a key can go on"


def test_the_end_of_patience_says_how_long_it_was_and_what_else_to_do(api: FakeApi) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    api.fail_once("POST", "/v1/jobs", 429, times=1000)
    http = Http(
        Address(url=api.url, token=TOKEN), timeout_s=30.0, sleep=sleep, clock=lambda: now[0], dice=lambda: 1.0
    )
    with Client.over(http) as client, pytest.raises(Overloaded) as caught:
        client.submit(["a"], TOPIC)
    assert str(caught.value).startswith("as asked (still so after 24 s: come back in ")
    assert str(caught.value).endswith("or give the client a longer timeout)")


# -- where the server is


def test_what_is_given_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    local = {"url": "http://127.0.0.1:8700", "token": "a.user", "admin_token": "a.admin"}
    (tmp_path / "client.json").write_text(json.dumps(local))
    env = {"MOTET_HOME": str(tmp_path)}
    assert Address.find(env=env) == Address(url="http://127.0.0.1:8700", token="a.user")
    assert Address.find(env=env, admin=True).token == "a.admin"
    env |= {"MOTET_URL": "https://api.test/", "MOTET_TOKEN": "b.user"}
    assert Address.find(env=env) == Address(url="https://api.test", token="b.user")
    assert Address.find("http://c.test", "c.user", env=env) == Address(url="http://c.test", token="c.user")


def test_the_token_of_this_machine_is_never_shown_to_another(tmp_path: Path) -> None:
    (tmp_path / "client.json").write_text(json.dumps({"url": "http://127.0.0.1:8700", "token": "a.user"}))
    with pytest.raises(Unauthorized, match="MOTET_TOKEN"):
        Address.find("https://elsewhere.test", env={"MOTET_HOME": str(tmp_path)})


def test_a_token_can_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a.user\n")
    env = {"MOTET_HOME": str(tmp_path), "MOTET_TOKEN_FILE": str(tmp_path / "token")}
    assert Address.find(env=env).token == "a.user"
    with pytest.raises(SetupError, match="MOTET_TOKEN_FILE"):
        Address.find(env=env | {"MOTET_TOKEN_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize(
    "url",
    [
        "api.test",
        "ftp://api.test",
        "http://",
        "http://me:pw@api.test",
        "http://a?b=c",
        "http://[::1",
        "http://a:99999",
    ],
)
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(SetupError, match="expected one like"):
        Address.find(url, "a.user", env={"MOTET_HOME": str(tmp_path)})


@pytest.mark.parametrize("token", ["a b", "a\nX-Other: 1", "é"])
def test_a_token_that_is_none_is_refused_without_repeating_it(tmp_path: Path, token: str) -> None:
    with pytest.raises(SetupError, match="copy it again") as caught:
        Address.find("http://a.test", token, env={"MOTET_HOME": str(tmp_path)})
    assert token not in str(caught.value)


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "client.json").write_text("{")
    with pytest.raises(SetupError, match=r"client\.json"):
        Address.find(env={"MOTET_HOME": str(tmp_path)})


def test_an_address_never_prints_its_token() -> None:
    assert "secret" not in repr(Address(url="http://a.test", token="id.secret"))


# -- callers that try again by themselves


def test_what_is_asked_once_is_not_asked_again(api: FakeApi) -> None:
    http = Http(Address(url=api.url, token=TOKEN), sleep=lambda s: pytest.fail("it waits"))
    for how, kind in ((503, Overloaded), ("lost", Unreachable), (422, InvalidJob)):
        api.fault = lambda method, path, how=how: how
        api.requests.clear()
        with pytest.raises(kind):
            http.once("PUT", "/v1/blobs/0", content=b"x")
        with pytest.raises(kind):
            list(http.pieces("/v1/blobs/0", 10))
        assert len(api.requests) == 2, how
    http.close()


def test_pieces_that_end_early_are_an_error_behind_those_that_came(api: FakeApi) -> None:
    http = Http(Address(url=api.url, token=TOKEN))
    whole = b"".join(http.pieces("/v1/workers", 7))
    assert json.loads(whole)["workers"]
    api.fault = lambda method, path: "torn"
    seen: list[bytes] = []
    with pytest.raises(Unreachable, match="the connection was lost"):
        seen.extend(http.pieces("/v1/workers", 7))
    assert len(seen) == len(whole) // 2 // 7
    assert whole.startswith(b"".join(seen))
    http.close()


def test_a_body_in_pieces_is_sent_from_its_beginning_whenever_it_is_tried(api: FakeApi) -> None:
    http = Http(Address(url=api.url, token=TOKEN), sleep=lambda s: None)
    begun = []

    def pieces() -> Iterator[bytes]:
        begun.append(1)
        yield b'{"name": "m", "version": "1", '
        yield b'"labels": []}'

    api.fail_once("POST", "/models", 503)
    size = {"Content-Length": str(sum(map(len, pieces())))}
    begun.clear()
    made = http.request("POST", "/v1/models", content=pieces, headers=size)
    assert (made.json()["ref"], len(begun)) == ("m@1", 2)
    http.close()


def test_headers_of_a_line_go_with_every_request_and_with_its_pickle(api: FakeApi) -> None:
    line = Http(Address(url=api.url, token="none"), headers={"Authorization": f"Bearer {TOKEN}"})
    for http in (line, pickle.loads(pickle.dumps(line))):
        assert http.get("/v1/workers")["workers"]
        http.close()


def test_any_address_may_be_looked_at(api: FakeApi) -> None:
    assert look_at(f"{api.url}/v1/workers", timeout_s=5).status_code == 401
    assert look_at(f"{api.url}/v1/workers", token=TOKEN, timeout_s=5).is_success
    for url, words in (("http://127.0.0.1:9/", "no connection"), ("http://[::1", "no address")):
        with pytest.raises(Unreachable, match=words):
            look_at(url, timeout_s=5)
