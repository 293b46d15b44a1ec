"""The API when what it stands on is away, how it describes itself, and how an installation begins."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import make_url

from motet.errors import SetupError
from motet.local.places import free_port
from motet.messages.cluster import ClusterPressure
from motet.messages.jobs import FailedCells, JobList, JobRecord, PartLanded, Plan
from motet.messages.refusals import ErrorRecord
from motet.messages.registry import ModelList
from motet.messages.tokens import Token, TokenList
from scheduler.api.opening import SUBMISSION
from scheduler.bootstrap import bootstrap
from scheduler.store.database import Database
from tests.integration.api_house import CLASSIFY, TWO, House, a_house, house
from tests.integration.test_api_auth import routes
from tests.messages import holds

__all__ = ["house"]


def test_without_its_database_every_answer_says_when_to_come_back(house: House) -> None:
    job = house.submit(["a"])["id"]
    house.answer(job, 0)
    house.database.close()
    url = make_url(house.database.libpq_url)
    name = url.database
    with psycopg.connect(url.set(database="postgres").render_as_string(False), autocommit=True) as admin:
        # As if Postgres were stopped: nobody gets in, and who is in is thrown out.
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        for method, path in (
            ("GET", f"/v1/jobs/{job}"),
            ("POST", "/v1/jobs"),
            ("GET", f"/v1/jobs/{job}/results"),
        ):
            answer = house.call(method, path, json={"tasks": CLASSIFY} if method == "POST" else None)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable"), answer.text
            assert int(answer.headers["Retry-After"]) >= 1
        assert house.call("GET", "/healthz", token=None).status_code == 200
        assert "postgres" in house.call("GET", "/readyz", token=None).json()["error"]["message"]
        assert house.call("GET", "/v1/jobs", token=None).status_code == 401
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert house.job(job)["state"] == "succeeded", "and goes on when it is back"
    assert len(house.results(job)[0]) == 1


def test_a_watcher_hears_again_after_the_database_was_away(house: House) -> None:
    job = house.submit(["a"])
    house.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'motet-watch'")
    house.answer(job["id"], 0)
    answer = house.call("GET", f"/v1/jobs/{job['id']}", params={"wait_s": 10, "version": job["version"]})
    assert answer.json()["state"] == "succeeded"
    until = time.monotonic() + 10
    while time.monotonic() < until:
        ((n,),) = house.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'motet-watch'")
        if n:
            break
        time.sleep(0.05)
    assert n == 1


def test_ready_means_postgres_redis_and_a_leader(database_url: str, redis_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, redis_url=redis_url) as house:
        assert house.call("GET", "/readyz", token=None).json()["error"]["message"] == "not there: leader"
        house.sql("UPDATE leader SET until = now() + interval '1 minute'")
        assert house.call("GET", "/readyz", token=None).json() == {
            "ready": True,
            "postgres": True,
            "redis": True,
            "leader": True,
        }


def test_without_redis_jobs_are_taken_and_workers_are_not_known(database_url: str, tmp_path: Path) -> None:
    with a_house(database_url, tmp_path, redis_url="redis://127.0.0.1:1/0") as house:
        assert house.open(rows=["a"])["state"] == "running"
        away = house.call("GET", "/v1/workers")
        assert (away.status_code, away.json()["error"]["type"]) == (503, "unavailable")
        assert "Retry-After" in away.headers
        assert house.call("POST", "/v1/plan", json={"tasks": CLASSIFY, "rows": ["a"]}).json()["devices"] == 0


def test_a_bug_shows_nothing_of_itself(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret text of a user")

    monkeypatch.setattr("scheduler.api.jobs.store.job_entries", broken)
    answer = house.call("GET", "/v1/jobs")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "internal"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    (line,) = [r for r in caplog.records if r.getMessage() == "request failed"]
    assert line.request == answer.headers["X-Request-Id"]


# -- how it describes itself


def test_every_route_is_described_with_an_example(house: House) -> None:
    described = house.call("GET", "/openapi.json", token=None).json()
    assert house.call("GET", "/docs", token=None).status_code == 200
    for method, path in routes():
        route = described["paths"][path][method.lower()]
        assert route["summary"]
        assert route["tags"]
        if path in ("/healthz",):
            continue
        assert any("content" in r for r in route["responses"].values()), (method, path)
        body = route.get("requestBody")
        if body and "application/json" in body["content"]:
            assert "example" in body["content"]["application/json"], (method, path)
        for parameter in route.get("parameters", ()):
            assert parameter.get("description") or parameter["in"] == "path", (path, parameter)


def test_real_answers_have_the_fields_of_the_messages_and_no_others(house: House) -> None:
    job = house.submit(["a"], TWO)["id"]
    holds(JobRecord, house.job(job))
    holds(JobList, house.call("GET", "/v1/jobs").json())
    holds(Plan, house.call("POST", "/v1/plan", json={"tasks": TWO, "rows": ["a"]}).json())
    holds(PartLanded, house.put(house.open()["id"], 0, ["a"]).json())
    holds(FailedCells, house.call("GET", f"/v1/jobs/{job}/errors").json())
    holds(ModelList, house.call("GET", "/v1/models").json())
    holds(ClusterPressure, house.call("GET", "/v1/cluster").json())
    holds(TokenList, house.call("GET", "/v1/tokens", token="admin").json())
    made = house.call("POST", "/v1/tokens", token="admin", json={"name": "a", "scope": "read"})
    holds(Token, made.json())
    for refused in (
        house.call("GET", "/v1/jobs/none"),
        house.call("POST", "/v1/jobs", json={}),
        house.put(job, 5, ["a"]),
    ):
        holds(ErrorRecord, refused.json()["error"], sparse=True)
    submitted = house.call("POST", "/v1/jobs", json={**SUBMISSION, "tasks": TWO})
    assert submitted.status_code == 202, "the example of the description works"


# -- how it begins and ends


def test_a_bootstrap_can_be_repeated_and_mends_what_was_lost(database_url: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokens.json"
    first = bootstrap(database_url, path)
    assert set(first) == {"admin", "user", "worker"}
    assert json.loads(path.read_text()) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert bootstrap(database_url, path) == first
    with a_house(database_url, tmp_path) as house:
        assert house.call("GET", "/v1/tokens", token=first["admin"]).status_code == 200
        assert house.call("GET", "/v1/tokens", token=first["user"]).status_code == 403
        assert house.sql("SELECT count(*) FROM token WHERE name LIKE 'first %'") == [(3,)]
        house.sql("DELETE FROM token WHERE name = 'first user'")
        house.sql("UPDATE token SET revoked = now() WHERE name = 'first worker'")
        assert bootstrap(database_url, path) == first
        assert house.call("GET", "/v1/jobs", token=first["user"]).status_code == 200
        assert house.call("GET", "/v1/models", token=first["worker"]).status_code == 401, "revoked for good"
    path.write_text("{}")
    with pytest.raises(SetupError, match=r"tokens\.json"):
        bootstrap(database_url, path)


def test_the_process_serves_and_ends_when_it_is_told_to(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    tokens = bootstrap(database_url, tmp_path / "tokens.json")
    with Database(database_url, pool=1).transaction():
        pass
    port = free_port()
    env = {
        "MOTET_DATABASE_URL": database_url,
        "MOTET_REDIS_URL": redis_url,
        "MOTET_BLOB_DIR": str(tmp_path / "blobs"),
        "MOTET_API_PORT": str(port),
        "PATH": "/usr/bin:/bin",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "scheduler", "api"],
        env=env,
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        headers = {"Authorization": f"Bearer {tokens['user']}"}
        until = time.monotonic() + 30
        while True:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/v1/jobs", headers=headers, trust_env=False)
                break
            except httpx.ConnectError:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.1)
        assert answer.json() == {"jobs": [], "next": None}
        assert "server" not in answer.headers
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGTERM)
    for line in said.splitlines():
        assert json.loads(line)["process"] == "api"
    assert all(token.partition(".")[2] not in said for token in tokens.values())
