"""Bad input gets 422 with field, row and remedy; whatever else a stranger sends gets an answer, never a 500."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.api_house import CLASSIFY, House, a_house, house, problems

__all__ = ["house"]

TOPIC = CLASSIFY["topic"]


def submission(**changes: Any) -> dict[str, Any]:
    return {"tasks": CLASSIFY, "rows": ["a"], **changes}


def task(**changes: Any) -> dict[str, Any]:
    return submission(tasks={"topic": {**TOPIC, **changes}})


#: (what is sent, field of the first problem, its row, words of what was found)
SUBMISSIONS: list[tuple[Any, str, int | None, str]] = [
    (task(model="topcis"), "tasks.topic.model", None, "topcis"),
    (task(model="topics@7"), "tasks.topic.model", None, "topics@7"),
    (task(model="tiny"), "tasks.topic.model", None, "answers vector"),
    (task(model=7), "tasks.topic.model", None, "7"),
    (task(kind="divine"), "tasks.topic.kind", None, "divine"),
    (task(kind=None), "tasks.topic.kind", None, "None"),
    (task(input="no field"), "tasks.topic.input", None, "no field"),
    (task(input="{text!r}"), "tasks.topic.input", None, "{text!r}"),
    (task(input="{title}"), "rows.title", 0, "no such field"),
    (task(max_tokens=2**63), "tasks.topic.max_tokens", None, "64 bits"),
    (task(colour="red"), "tasks.topic.colour", None, "unknown option"),
    (submission(tasks={}), "tasks", None, "no task"),
    (submission(tasks=[]), "tasks", None, "list"),
    (submission(tasks={"a b": TOPIC}), "tasks", None, "a b"),
    (submission(rows=[]), "rows", None, "0 rows"),
    (submission(rows=["a"] * 1025), "rows", None, "1,025 rows"),
    (submission(rows="a"), "rows", None, "no list"),
    (submission(rows=["a", 7]), "rows", 1, "a number"),
    (submission(rows=["a", {"text": [2**63]}]), "rows.text", 1, "64 bits"),
    (submission(rows=["a", {"text": {"a": float("-inf")}}]), "rows.text", 1, "infinite"),
    (submission(rows=["a", {"text": float("nan")}]), "rows.text", 1, "NaN"),
    (submission(rows=[{"text": 2**63, "n": 2**63}]), "rows.text", 0, "64 bits"),
    (submission(rows=["a\0b"]), "rows.text", 0, "NUL"),
    (submission(rows=["a", "\ud800"]), "rows.text", 1, "surrogate"),
    (submission(rows=["a", "x" * 300_000]), "rows.text", 1, "300,000 bytes"),
    (submission(name=7), "name", None, "7"),
    (submission(name="a\0"), "name", None, "NUL"),
    (submission(name="\ud800"), "name", None, "surrogate"),
    (submission(name="x" * 201), "name", None, "xxx"),
    (submission(priority="now"), "priority", None, "now"),
    (submission(priority=["normal"]), "priority", None, "normal"),
    (submission(reuse="yes"), "reuse", None, "yes"),
    (submission(bad_rows={}), "bad_rows", None, "{}"),
    (submission(deadline=float("inf")), "deadline", None, "infinite"),
    (submission(colour="red"), "colour", None, "unknown option"),
    ([], "body", None, "list"),
    (None, "body", None, "nothing"),
    ("text", "body", None, "str"),
]


def test_a_submission_that_is_wrong_is_told_where_and_what_to_do(house: House) -> None:
    for body, field, row, words in SUBMISSIONS:
        first = problems(house.call("POST", "/v1/jobs", content=json.dumps(body)))[0]
        assert (first["field"], first["row"]) == (field, row), (body, first)
        assert words in first["got"], (body, first)
        assert first["expected"]
        assert first["remedy"]
    assert house.sql("SELECT count(*) FROM job") == [(0,)]


def test_a_body_that_is_no_json_is_told_where_it_breaks(house: House) -> None:
    bodies = {
        b"": "broken JSON",
        b"{": "broken JSON",
        b'{\n"tasks": {\n"a" 1}}': "line 3 column 5",
        b"\xff\xfe": "not UTF-8, at byte 0",
        b"[" * 100_000: "nested deeper",
        b'{"a": 1} x': "Extra data",
        b"1" * 100_000: "64 bits",
    }
    for raw, words in bodies.items():
        (problem,) = problems(house.call("POST", "/v1/jobs", content=raw))
        assert words in problem["got"] + problem["expected"] or words == "64 bits", (raw[:20], problem)


def test_two_tasks_of_one_name_are_refused(house: House) -> None:
    spec = json.dumps(TOPIC)
    raw = f'{{"tasks": {{"topic": {spec}, "mood": {spec}, "topic": {spec}}}, "rows": ["a"]}}'
    (problem,) = problems(house.call("POST", "/v1/jobs", content=raw))
    assert problem["got"] == "two tasks named topic"
    twice = f'{{"tasks": {{"topic": {spec}}}, "rows": ["a"], "rows": ["b"]}}'
    assert "twice" in problems(house.call("POST", "/v1/jobs", content=twice))[0]["got"]


def test_twenty_problems_are_told_and_the_others_counted(house: House) -> None:
    answer = house.call("POST", "/v1/jobs", json=submission(rows=[1] * 500))
    assert [p["row"] for p in problems(answer)] == list(range(20))
    assert answer.json()["error"]["more"] == 480
    assert answer.json()["error"]["message"].endswith("\nand 480 more")
    assert "more" not in house.call("POST", "/v1/jobs", json=submission(rows=[1])).json()["error"]


def test_an_empty_job_is_not_run_and_goes_on_loading(house: House) -> None:
    job = house.open()["id"]
    (problem,) = problems(house.close(job, 0, 0))
    assert problem["got"] == "no row"
    assert house.job(job)["state"] == "loading"
    problems(house.put(job, 0, []))
    problems(house.put_raw(job, 0, b"\n\n", "application/x-ndjson"))
    assert house.put(job, 0, ["now"]).status_code == 200
    assert house.close(job, 1, 1).status_code == 202


def test_a_part_of_no_known_form_is_refused(house: House) -> None:
    job = house.open()["id"]
    for raw, kind in (
        (b"\xc1", "application/msgpack"),
        (msgpack.packb({"columns": {"text": ["a"], "other": []}}), "application/msgpack"),
        (b'"a"', "text/plain"),
        (b'"a"', ""),
    ):
        problems(house.put_raw(job, 0, raw, kind))
    missing = problems(
        house.put_raw(job, 0, msgpack.packb({"columns": {"body": ["a"]}}), "application/msgpack")
    )
    assert (missing[0]["field"], missing[0]["row"]) == ("rows.text", 0)
    assert "body" in missing[0]["expected"]


def test_numbers_and_names_in_the_address_are_checked_too(house: House) -> None:
    job = house.open()["id"]
    for method, path in (
        ("GET", "/v1/jobs?limit=0"),
        ("GET", "/v1/jobs?limit=x"),
        ("GET", "/v1/jobs?state=asleep"),
        ("GET", "/v1/jobs?state=%00"),
        ("GET", "/v1/jobs?after=%00"),
        ("GET", f"/v1/jobs/{job}?wait_s=31"),
        ("GET", f"/v1/jobs/{job}?wait_s=nan"),
        ("GET", f"/v1/jobs/{job}?version=99999999999999999999"),
        ("GET", f"/v1/jobs/{job}/results?after=-1"),
        ("GET", f"/v1/jobs/{job}/results?after=99999999999"),
        ("GET", f"/v1/jobs/{job}/results?order=up"),
        ("GET", f"/v1/jobs/{job}/errors?after=x"),
        ("PUT", f"/v1/jobs/{job}/parts/-1"),
        ("PUT", f"/v1/jobs/{job}/parts/99999999999"),
        ("PUT", f"/v1/jobs/{job}/parts/x"),
    ):
        assert problems(house.call(method, path)), path
    assert house.call("GET", f"/v1/jobs/{job}/results?tasks=nobody").status_code == 404
    assert house.call("GET", f"/v1/jobs/{job}/results?tasks=%00").status_code == 404
    for body in ({}, {"parts": -1, "rows": 1}, {"parts": True, "rows": 1}, {"parts": 1, "rows": 2**63}, []):
        problems(house.call("POST", f"/v1/jobs/{job}/close", json=body))
    keys = {"": 422, "a" * 201: 422, "naïve key": 201}
    for key, status in keys.items():
        answer = house.call(
            "POST", "/v1/jobs", json={"tasks": CLASSIFY}, headers={"Idempotency-Key": key.encode("latin-1")}
        )
        assert answer.status_code == status, key


def test_unknown_routes_and_methods_are_told_in_json(house: House) -> None:
    assert house.call("GET", "/v1/nothing").json()["error"]["type"] == "not_found"
    assert house.call("PATCH", "/v1/jobs").json()["error"]["type"] == "method_not_allowed"


def test_a_field_name_that_postgres_cannot_hold_is_told_without_it(house: House) -> None:
    rows = [{"a\0b": "x"}, {"\ud800": "x"}, {"\0": 2**63}]
    body = json.dumps({"tasks": CLASSIFY, "rows": rows, "bad_rows": "error"})
    answer = house.call("POST", "/v1/jobs", content=body)
    assert answer.status_code == 202, answer.text
    errors = house.call("GET", f"/v1/jobs/{answer.json()['id']}/errors").json()["errors"]
    assert [e["row"] for e in errors] == [0, 1, 2]


# -- fuzzing


@pytest.fixture(scope="module")
def doors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One house for all examples of this module, on a database of its own."""
    import psycopg
    from sqlalchemy import make_url

    base = request.getfixturevalue("postgres_url")
    admin: psycopg.Connection = request.getfixturevalue("migrated")
    admin.execute("CREATE DATABASE fuzzed TEMPLATE migrated")
    url = make_url(base).set(database="fuzzed").render_as_string(hide_password=False)
    folder: Path = tmp_path_factory.mktemp("fuzzed")
    with (
        a_house(url, folder, max_active_jobs=10**6) as house,
        httpx.Client(trust_env=False, timeout=60) as line,
    ):
        yield house, line, house.open()["id"]


#: Every code point, and often those that Postgres or UTF-8 cannot hold.
ANY_TEXT = st.text(st.characters() | st.sampled_from("\0\ud800"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
SPEC = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["classify", "embed", "number", "function"]) | JSON,
        "model": st.sampled_from(["topics", "tiny", "tones@1", "dice", "@", "a@b@c"]) | JSON,
        "input": st.sampled_from(["{text}", "{{{text}}}", "{a}{b}", "{text"]) | JSON,
        "max_tokens": st.integers() | JSON,
        "too_long": st.sampled_from(["truncate", "error"]) | JSON,
        "numerics": JSON,
        "scores": st.booleans() | JSON,
    },
)
BODY = st.fixed_dictionaries(
    {},
    optional={
        "tasks": st.dictionaries(st.sampled_from(["t", "a.b"]) | st.text(max_size=5), SPEC | JSON, max_size=3)
        | JSON,
        "rows": st.lists(
            st.text(max_size=5) | st.dictionaries(st.sampled_from(["text", "a"]), JSON) | JSON, max_size=4
        )
        | JSON,
        "name": st.text(st.characters(), max_size=10) | JSON,
        "priority": st.sampled_from(["interactive", "bulk"]) | JSON,
        "reuse": JSON,
        "bad_rows": st.sampled_from(["refuse", "error"]) | JSON,
        "total_rows": st.integers() | JSON,
        "total_bytes": st.integers() | JSON,
    },
)
ROWS = st.lists(ANY_TEXT | st.dictionaries(st.just("text") | ANY_TEXT, JSON, max_size=3) | JSON, max_size=4)
#: Only the rows are odd, so that they reach Postgres.
TAKEN = st.fixed_dictionaries({"tasks": st.just(CLASSIFY), "bad_rows": st.just("error"), "rows": ROWS})
MODEL = st.dictionaries(
    st.sampled_from(
        [
            "name",
            "version",
            "engine",
            "answers",
            "files",
            "sizes",
            "trunk",
            "trunk_model",
            "labels",
            "dim",
            "scores",
        ]
    ),
    st.sampled_from(["a", "1", "encoder", "label", {"a.json": "0" * 64}, ["x", "y"], 3]) | JSON,
)


def as_lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
ADDRESSES = (
    "/v1/jobs",
    "/v1/plan",
    "/v1/models",
    "/v1/tokens",
    "/v1/jobs/{job}/close",
)


@FUZZ
@given(
    st.sampled_from(ADDRESSES),
    BODY
    | TAKEN
    | MODEL
    | JSON
    | st.dictionaries(st.sampled_from(["parts", "rows", "name", "scope", "expires_days", "tenant"]), JSON),
)
def test_no_json_provokes_a_500(doors: Any, address: str, body: Any) -> None:
    house, line, job = doors
    raw = json.dumps(body)
    answer = line.post(
        house.url + address.format(job=job),
        content=raw,
        headers={"Authorization": f"Bearer {house.tokens['admin']}"},
    )
    assert answer.status_code < 500, (address, raw, answer.text)
    assert answer.status_code < 300 or answer.json()["error"]["message"]


@FUZZ
@given(TAKEN)
def test_no_row_provokes_a_500(doors: Any, body: Any) -> None:
    house, line, _ = doors
    headers = {"Authorization": f"Bearer {house.tokens['user']}"}
    answer = line.post(f"{house.url}/v1/jobs", content=json.dumps(body), headers=headers)
    assert answer.status_code == (202 if body["rows"] else 422), (body, answer.text)


@FUZZ
@given(
    st.sampled_from(["application/msgpack", "application/x-ndjson"]),
    st.sampled_from([None, "zstd", "gzip"]),
    st.binary(max_size=200)
    | ROWS.map(as_lines)
    | st.builds(
        msgpack.packb,
        st.fixed_dictionaries(
            {
                "columns": st.dictionaries(
                    st.sampled_from(["text", "x"]), st.lists(st.none() | st.text(max_size=5), max_size=3)
                )
            },
            optional={
                "bad": st.dictionaries(st.integers(0, 3), st.lists(st.text(max_size=4), max_size=3)),
                "bad_fields": st.dictionaries(
                    st.sampled_from(["text", "x"]),
                    st.lists(
                        st.tuples(
                            st.just("bad_row"), st.text(max_size=4), st.lists(st.integers(-1, 4), max_size=3)
                        )
                        | st.lists(st.none() | st.text(max_size=4), max_size=3),
                        max_size=2,
                    )
                    | st.none(),
                ),
                "first_row": st.integers(-1, 5),
            },
        ),
    ),
)
def test_no_part_provokes_a_500(doors: Any, kind: str, coding: str | None, raw: bytes) -> None:
    house, line, _ = doors
    job = house.open(bad_rows="error")["id"]
    headers = {"Authorization": f"Bearer {house.tokens['user']}", "Content-Type": kind}
    headers |= {"Content-Encoding": coding} if coding else {}
    answer = line.put(f"{house.url}/v1/jobs/{job}/parts/0", content=raw, headers=headers)
    assert answer.status_code < 500, answer.text


@FUZZ
@given(
    st.sampled_from(["GET", "PUT", "POST", "DELETE", "HEAD"]),
    st.sampled_from(["/v1/jobs/", "/v1/models/", "/v1/blobs/", "/v1/tokens/", "/v1/jobs/x/parts/", "/"]),
    st.text(max_size=20),
    st.dictionaries(
        st.sampled_from(["limit", "after", "state", "wait_s", "version", "order", "tasks"]),
        st.text(max_size=8),
        max_size=3,
    ),
)
def test_no_address_provokes_a_500(
    doors: Any, method: str, path: str, rest: str, query: dict[str, str]
) -> None:
    from urllib.parse import quote

    house, line, _ = doors
    query.pop("wait_s", None)
    answer = line.request(
        method,
        house.url + path + quote(rest.encode("utf-8", "surrogatepass"), safe=""),
        params={k: v.encode("utf-8", "surrogatepass") for k, v in query.items()},
        headers={"Authorization": f"Bearer {house.tokens['admin']}"},
    )
    assert answer.status_code < 500, answer.text
