"""Every route is closed: a table of all of them against every kind of token."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from scheduler.api.auth import ALLOWED, PAGES, SCOPES
from tests.integration.api_house import CLASSIFY, House, house

__all__ = ["house"]

OPEN = {("GET", "/healthz"), ("GET", "/readyz")}
#: What FastAPI itself serves: the description, which holds no data.
DESCRIPTION = {"/openapi.json", "/docs", "/docs/oauth2-redirect"}
#: What stands in the paths of routes beside a job: only its own scope lets anybody do anything there.
PLACE = {
    "number": 0,
    "row": 0,
    "ref": "topics",
    "name": "topics",
    "alias": "prod",
    "token": "none",
    "sha256": "0" * 64,
    "worker": "none",
    "webhook": "wh_000000000000",
}


def routes() -> list[tuple[str, str]]:
    from motet.protocol.settings import Settings
    from scheduler.api import create_app

    app = create_app(
        Settings(database_url="postgresql+psycopg://nobody@127.0.0.1:1/none", blob_dir="/nonexistent")
    )
    found: list[tuple[str, str]] = []
    for route in app.routes:
        if isinstance(route, APIRoute):
            found += [(method, route.path) for method in sorted(route.methods)]
        else:
            assert getattr(route, "path", "") in DESCRIPTION, route
    return found


def test_the_table_of_scopes_names_every_route_and_no_other() -> None:
    assert set(routes()) == set(ALLOWED)


def test_only_health_is_open() -> None:
    assert {route for route, scopes in ALLOWED.items() if "anyone" in scopes} == OPEN
    for route, scopes in ALLOWED.items():
        assert route in OPEN or scopes <= set(SCOPES)


def test_every_route_refuses_every_token_that_is_not_good_enough(house: House) -> None:
    job = house.submit(["a"])["id"]
    house.sql("UPDATE token SET expires = now() - interval '1 second' WHERE name = 'read'")
    expired = house.tokens["read"]
    house.tokens["fresh"] = made(house, "read")
    revoked = made(house, "user")
    house.call("DELETE", f"/v1/tokens/{revoked.partition('.')[0]}", token="admin")
    token_id, _, secret = house.tokens["user"].partition(".")
    bad = {
        "none": None,
        "garbage": "garbage",
        "no secret": f"{token_id}.",
        "wrong secret": f"{token_id}.{secret[:-1]}{'A' if secret[-1] != 'A' else 'B'}",
        "unknown id": f"ffffffffffff.{secret}",
        "another's secret": f"{token_id}.{house.tokens['admin'].partition('.')[2]}",
        "not ascii": "é.ü".encode("latin-1"),
        "expired": expired,
        "revoked": revoked,
    }
    good = {
        "user": house.tokens["user"],
        "read": house.tokens["fresh"],
        "admin": house.tokens["admin"],
        "worker": house.tokens["worker"],
    }
    for (method, path), scopes in ALLOWED.items():
        if (method, path) in OPEN:
            continue
        address = path.format(**PLACE, job=job)
        for name, token in bad.items():
            answer = ask(house, method, address, token)
            assert answer.status_code == 401, (method, path, name, answer.text)
            assert "WWW-Authenticate" in answer.headers
        for scope, token in good.items():
            if scope not in scopes:
                answer = ask(house, method, address, token)
                assert answer.status_code == 403, (method, path, scope, answer.text)
        if "{job}" in path and "user" in scopes:
            answer = ask(house, method, address, house.tokens["stranger"], good_body(path))
            assert answer.status_code == 404, (method, path, answer.text)
    assert house.job(job)["state"] == "running", "nobody of them has touched it"


def test_a_token_that_was_used_just_now_is_refused_once_it_is_revoked(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = made(house, "user"), made(house, "user")
    for token in (here, elsewhere):
        assert ask(house, "GET", "/v1/jobs", token).status_code == 200
    house.call("DELETE", f"/v1/tokens/{here.partition('.')[0]}", token="admin")
    assert ask(house, "GET", "/v1/jobs", here).status_code == 401, "at once where it was revoked"
    # Another API process hears of it within two seconds.
    house.sql(f"UPDATE token SET revoked = now() WHERE id = '{elsewhere.partition('.')[0]}'")
    monkeypatch.setattr("scheduler.api.auth._FRESH_S", 0.0)
    assert ask(house, "GET", "/v1/jobs", elsewhere).status_code == 401


def test_a_token_that_was_found_just_now_is_not_looked_up_again_and_its_secret_still_counts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = made(house, "user")
    assert ask(house, "GET", "/v1/jobs", token).status_code == 200

    def looked_up(*_: object) -> None:
        raise AssertionError("it is known")

    monkeypatch.setattr("scheduler.api.auth.find_token", looked_up)
    monkeypatch.setattr("scheduler.api.auth._FRESH_S", 60.0)
    assert ask(house, "GET", "/v1/jobs", token).status_code == 200
    assert ask(house, "GET", "/v1/jobs", f"{token.partition('.')[0]}.wrong").status_code == 401


def good_body(path: str) -> Any:
    """A body that would be taken, so that only the tenant is in the way."""
    if path.endswith("/close"):
        return {"json": {"parts": 1, "rows": 1}}
    if "/parts/" in path:
        return {"content": b'"a"', "headers": {"Content-Type": "application/x-ndjson"}}
    return {}


def ask(house: House, method: str, path: str, token: Any, more: Any = None) -> Any:
    more = dict(more or {})
    headers = dict(more.pop("headers", {}))
    if token is not None:
        headers["Authorization"] = b"Bearer " + (token if isinstance(token, bytes) else token.encode())
    return house.call(method, path, token=None, headers=headers, **more)


def made(house: House, scope: str) -> str:
    answer = house.call("POST", "/v1/tokens", token="admin", json={"name": scope, "scope": scope})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["token"])


def test_another_way_to_say_who_one_is_does_not_count(house: House) -> None:
    for headers in (
        {"Authorization": f"Basic {house.tokens['user']}"},
        {"Authorization": house.tokens["user"]},
        {"X-Api-Key": house.tokens["user"]},
        {"Cookie": f"token={house.tokens['user']}"},
    ):
        assert house.call("GET", "/v1/jobs", token=None, headers=headers).status_code == 401
    assert house.call("GET", f"/v1/jobs?token={house.tokens['user']}", token=None).status_code == 401
    assert house.call(
        "GET", "/v1/jobs", token=None, headers={"Authorization": f"bearer {house.tokens['user']}"}
    ).is_success


def test_the_pages_alone_take_basic_which_a_browser_repeats_unasked(house: House) -> None:
    job = house.submit(["a"])["id"]
    basic = {"Authorization": httpx.BasicAuth(*house.tokens["admin"].split("."))._auth_header}
    for method, path in ALLOWED:
        if (method, path) in OPEN:
            continue
        address = path.format(**PLACE, job=job)
        answer = house.call(method, address, token=None, headers=basic)
        assert answer.status_code == (200 if (method, path) in PAGES else 401), (method, path)
    assert {method for method, _ in PAGES} == {"GET"}


def test_a_wrong_token_is_refused_before_its_body_is_read(house: House) -> None:
    answer = house.call("POST", "/v1/jobs", token="garbage", content=b"x" * 40_000_000)
    assert answer.status_code == 401


def test_an_administrator_sees_the_jobs_of_the_own_tenant_only(house: House) -> None:
    theirs = house.call("POST", "/v1/jobs", token="stranger", json={"tasks": CLASSIFY, "rows": ["a"]}).json()[
        "id"
    ]
    assert house.call("GET", f"/v1/jobs/{theirs}", token="admin").status_code == 404
    assert house.call("GET", "/v1/jobs", token="admin").json()["jobs"] == []


def test_no_secret_and_no_text_is_logged(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        canary = "canary-of-a-user"
        job = house.open({"topic": {**CLASSIFY["topic"]}}, name=canary, bad_rows="error")["id"]
        house.put(job, 0, [canary, f"{canary}\0"])
        house.call("GET", f"/v1/jobs?state={canary}")
        house.call("POST", "/v1/jobs", json={"tasks": {canary: {"kind": canary}}})
        house.call("POST", "/v1/tokens", token="admin", json={"name": "n", "scope": "user"})
        house.answer(job, 0)
        house.results(job)
    said = "\n".join(
        f"{r.getMessage()} {vars(r)}" for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))
    )
    assert canary not in said
    assert all(t.partition(".")[2] not in said for t in house.tokens.values())
    assert "request" in said
