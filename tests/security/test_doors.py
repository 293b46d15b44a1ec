"""What a stranger learns at each door: nothing. Beside the table of tokens in tests/integration/test_api_auth.py."""

from __future__ import annotations

import itertools
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from scheduler.api.allowance import BURST_S, Allowance
from scheduler.api.auth import ALLOWED
from tests.integration.api_house import CLASSIFY, House, a_house, house
from tests.integration.test_api_auth import PLACE, good_body

__all__ = ["house"]

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND")


def test_a_method_that_a_path_does_not_have_is_refused_to_everybody(house: House) -> None:
    job = house.submit(["a"])["id"]
    asked = 0
    for path, method in itertools.product(sorted({path for _, path in ALLOWED}), METHODS):
        if (method, path) in ALLOWED or method == "CONNECT":
            continue
        address = path.format(**PLACE, job=job)
        for token in (None, "user", "admin", "stranger"):
            answer = house.call(method, address, token=token)
            assert answer.status_code in (401, 404, 405), (method, path, token, answer.status_code)
            asked += 1
    assert asked > 400
    assert house.job(job)["state"] == "running"


def test_anothers_job_and_one_that_never_was_are_answered_alike(house: House) -> None:
    """Byte for byte: whether an id is taken is nobody else's business."""
    theirs, never = house.submit(["a"])["id"], str(uuid.uuid4())
    for (method, path), scopes in ALLOWED.items():
        # What a worker learns from under its lease is in tests/integration/test_api_fits.py.
        if "{job}" not in path or "user" not in scopes:
            continue
        answers = []
        for job in (theirs, never):
            more: dict[str, Any] = good_body(path)
            answer = house.call(method, path.format(job=job, number=0), token="stranger", **more)
            answers.append((answer.status_code, answer.content.replace(job.encode(), b"<job>")))
        assert answers[0] == answers[1], (method, path)
        assert answers[0][0] == 404


def test_nothing_of_another_tenant_is_reached_through_a_parameter(house: House) -> None:
    theirs = house.open(key="the same key")["id"]
    house.submit(["a shared text"])
    # Their key is free for us, their job is no place in our list, and their columns are not reused for us.
    opened = house.call(
        "POST",
        "/v1/jobs",
        token="stranger",
        json={"tasks": CLASSIFY},
        headers={"Idempotency-Key": "the same key"},
    )
    assert opened.status_code == 201
    assert opened.json()["id"] != theirs
    after = house.call("GET", "/v1/jobs", token="stranger", params={"after": theirs})
    assert theirs not in after.text
    mine = house.submit(["a shared text"])["id"]
    house.answer(mine, 0)
    again = house.call(
        "POST", "/v1/jobs", token="user", json={"tasks": CLASSIFY, "rows": ["a shared text"]}
    ).json()
    strange = house.call(
        "POST", "/v1/jobs", token="stranger", json={"tasks": CLASSIFY, "rows": ["a shared text"]}
    ).json()
    assert again["cells"]["reused"] == 1
    assert strange["cells"]["reused"] == 0


@pytest.mark.parametrize("scope", ["user", "read", "admin", "worker"])
def test_a_token_ends_by_itself_at_its_time(house: House, scope: str) -> None:
    made = house.call(
        "POST",
        "/v1/tokens",
        token="admin",
        json={"name": "short", "scope": scope, "expires_days": 0.8 / 86400},
    ).json()
    assert house.call("GET", "/v1/models", token=made["token"]).status_code == 200
    until = time.monotonic() + 10
    while (status := house.call("GET", "/v1/models", token=made["token"]).status_code) == 200:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert status == 401
    listed = {t["id"]: t for t in house.call("GET", "/v1/tokens", token="admin").json()["tokens"]}
    assert listed[made["id"]]["expires"]
    assert "secret" not in str(listed)


def test_no_list_and_no_row_of_the_database_holds_a_secret(house: House) -> None:
    for shown in house.tokens.values():
        secret = shown.partition(".")[2]
        assert secret not in house.call("GET", "/v1/tokens", token="admin").text
        dumped = house.sql("SELECT CAST(t AS text) AS row FROM token t")
        assert not any(secret in row.row for row in dumped)


def test_a_token_that_asks_too_often_waits_and_nobody_else_does(database_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, max_requests_s=1) as house:
        answers = [house.call("GET", "/v1/models") for _ in range(60)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= 10
        assert {answer.status_code for answer in answers} == {200, 429}
        assert refused[-1].json()["error"]["type"] == "overloaded"
        assert int(refused[-1].headers["Retry-After"]) >= 1
        # Who shows a wrong secret for that token takes nothing of it, and others have their own.
        assert house.call("GET", "/v1/models", token="read").status_code == 200
        token_id = house.tokens["worker"].partition(".")[0]
        for _ in range(60):
            assert house.call("GET", "/v1/models", token=f"{token_id}.wrong").status_code == 401
        assert house.call("GET", "/v1/models", token="worker").status_code == 200
        assert house.call("GET", "/healthz", token=None).status_code == 200


def test_an_ask_of_an_open_job_takes_a_tenth_of_a_request(database_url: str, tmp_path: Path) -> None:
    """An open job has a bound of its own: rows that wait."""
    with a_house(database_url, tmp_path, max_requests_s=1) as house:
        place = f"/v1/jobs/{uuid.uuid4()}/ask"
        codes = [house.call("POST", place, json={"rows": ["a"]}).status_code for _ in range(60)]
        assert codes == [404] * 60
        codes = [house.call("POST", place, json={"rows": ["a"]}).status_code for _ in range(80)]
        assert 429 in codes


def test_an_allowance_fills_again_and_never_beyond_its_burst() -> None:
    now = [0.0]
    allowance = Allowance(2.0, clock=lambda: now[0])
    burst = sum(not allowance.take("t") for _ in range(100))
    assert burst == 2 * BURST_S
    assert allowance.take("t") == pytest.approx(0.5)
    now[0] = 0.5
    assert allowance.take("t") == 0
    assert allowance.take("t") > 0
    now[0] = 1e9
    assert sum(not allowance.take("t") for _ in range(100)) == 2 * BURST_S
    assert not any(Allowance(0.0).take("t") for _ in range(10_000))
    now[0] = 2e9
    assert sum(not allowance.take("t", 0.1) for _ in range(1000)) in (20 * BURST_S - 1, 20 * BURST_S)
