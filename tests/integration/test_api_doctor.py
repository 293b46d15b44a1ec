"""The doctor over real servers that were broken on purpose: each time the finding, its state and its remedy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from motet.cli import main
from motet.doctor import Finding, look
from motet.local.children import Child
from motet.local.places import free_port
from motet.local.valkey import RIGHTS, ValkeyUrls, _find_binary
from motet.messages.cluster import DoctorReport
from motet.protocol.redis_url import redis_py_url
from motet.protocol.transport import RedisTransport, RedisWorkerTransport
from motet.protocol.wire import Beat
from scheduler.api.doctor import head
from tests.integration.api_house import House, a_house
from tests.messages import holds

Found = dict[tuple[str, str], Finding]


@pytest.fixture
def house(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[House]:
    with a_house(database_url, tmp_path, redis_url=redis_url, dead_s=0.2) as house:
        yield house


def by_name(findings: list[Finding]) -> Found:
    found = {(f.area, f.name): f for f in findings}
    assert len(found) == len(findings), "each finding is said once"
    return found


def asked(house: House, token: str = "admin") -> Found:
    answer = house.call("GET", "/v1/doctor", token=token)
    assert answer.status_code == 200, answer.text
    holds(DoctorReport, answer.json())
    return by_name([Finding.checked(one) for one in answer.json()["findings"]])


def here(house: House, token: str = "admin", **env: str) -> Found:
    """What `motet doctor` finds through this API, the machine apart."""
    return by_name(
        look.server({"MOTET_URL": house.url, "MOTET_TOKEN": house.tokens.get(token, token), **env})
    )


def test_a_good_server_has_nothing_to_mend_but_the_workers_and_the_leader(house: House) -> None:
    found = asked(house)
    wrong = {key for key, f in found.items() if f.state in ("warn", "fail") and f.area != "disk"}
    assert wrong == {("server", "leader"), ("server", "aggregator"), ("workers", "ready")}
    for key in [
        ("postgres", "version"),
        ("postgres", "migrations"),
        ("postgres", "durability"),
        ("postgres", "connections"),
        ("redis", "policy"),
        ("redis", "memory"),
        ("redis", "rights"),
        ("redis", "version"),
        ("disk", "blobs folder"),
        ("server", "outcomes"),
        ("models", "registered"),
    ]:
        assert found[key].state == "ok", found[key]
    assert all(f.remedy for f in found.values() if f.state in ("warn", "fail"))


def test_what_it_tries_in_redis_leaves_nothing_behind(house: House, redis_url: str) -> None:
    before = keys(redis_url)
    asked(house)
    assert keys(redis_url) - before <= {b"motet:canary", b"motet:outcomes"}, (
        "what every scheduler makes; nobody's in particular"
    )


def keys(url: str) -> set[bytes]:
    with redis.Redis.from_url(redis_py_url(url)) as client:
        return set(client.scan_iter())


def test_who_is_no_administrator_sees_workers_and_models_only(house: House) -> None:
    for token in ("user", "read", "worker"):
        assert {f.area for f in asked(house, token).values()} == {"workers", "models"}
        found = here(house, token)
        assert found["server", "token"].what == f"valid, of scope {token}"
        assert found["server", "own checks"].state == "skipped"
    assert here(house)["server", "token"].what == "valid, of scope admin"


def test_a_wrong_token_is_named_and_nothing_more_is_asked(house: House) -> None:
    found = here(house, f"{'0' * 12}.nonsense")
    assert found["server", "reach"].state == "ok"
    assert found["server", "token"].state == "fail"
    assert "motet token create" in found["server", "token"].remedy
    assert ("server", "version") not in found


def test_a_server_that_is_not_there_is_named(house: House) -> None:
    found = here(house, MOTET_URL=f"http://127.0.0.1:{free_port()}")
    assert found["server", "reach"].state == "fail"
    assert "MOTET_URL" in found["server", "reach"].remedy


def test_a_server_that_is_not_motet_is_named(house: House) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "_get", lambda url, token="": _OtherServer())
        found = by_name(look.server({"MOTET_URL": house.url, "MOTET_TOKEN": "a.b"}))
    assert "not as motet does" in found["server", "own checks"].what


class _OtherServer:
    status_code = 200
    headers: dict[str, str] = {}  # noqa: RUF012

    def json(self) -> Any:
        return ["hello"]


def test_a_leader_is_seen(house: House) -> None:
    house.sql("UPDATE leader SET epoch = 7, holder = 'host:1', until = now() + interval '1 hour'")
    leader = asked(house)["server", "leader"]
    assert (leader.state, leader.what) == ("ok", "host:1 leads, epoch 7")
    assert here(house)["server", "ready"].state == "ok"


def test_an_aggregator_is_seen_by_what_it_asks(house: House, redis_url: str) -> None:
    assert asked(house)["server", "aggregator"].state == "fail"
    transport = RedisTransport(redis_url)
    transport.read_outcomes("host:1", 1, 0.01, 6.0)
    transport.close()
    assert asked(house)["server", "aggregator"].state == "ok"


def test_an_old_database_is_named_with_the_command_that_mends_it(house: House) -> None:
    house.sql("UPDATE alembic_version SET version_num = '0000'")
    old = asked(house)["postgres", "migrations"]
    assert (old.state, old.remedy) == ("fail", "python -m scheduler migrate")
    house.sql("UPDATE alembic_version SET version_num = '9999'")
    newer = asked(house)["postgres", "migrations"]
    assert newer.state == "fail"
    assert "install the newer motet" in newer.remedy
    house.sql("UPDATE alembic_version SET version_num = :head", head=head())
    assert asked(house)["postgres", "migrations"].state == "ok"


def test_a_database_that_breaks_its_promises_is_named(house: House) -> None:
    name = house.sql("SELECT current_database() AS name")[0].name
    house.sql(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    house.database.close()
    house.sql(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    )
    # Whoever is the first to use a connection that was cut is told to come back.
    house.call("GET", "/v1/doctor")
    durability = asked(house)["postgres", "durability"]
    assert durability.state == "fail"
    assert "synchronous_commit off" in durability.what
    assert "ALTER SYSTEM SET synchronous_commit = on" in durability.remedy


def test_models_and_workers_are_counted(house: House, redis_urls: ValkeyUrls) -> None:
    house.sql("DELETE FROM model")
    assert asked(house)["models", "registered"].state == "warn"
    beats = {
        "good": Beat(worker="good", boot="b", seq=1),
        "old": Beat(worker="old", boot="b", seq=1, protocol=0),
        "leaving": Beat(worker="leaving", boot="b", seq=1, state="draining"),
    }
    for name, beat in beats.items():
        line = RedisWorkerTransport(redis_urls.worker, name)
        line.beat(beat)
        line.close()
    found = asked(house, "user")
    assert found["workers", "ready"].what == "1 ready, 1 draining"
    assert found["workers", "protocol"].state == "fail"
    assert found["workers", "protocol"].what.endswith(": old")
    # Their sequence stands still: after dead_s (here 0.2 s) they are silent.
    assert ("workers", "silent") not in found
    deadline = time.monotonic() + 10
    while ("workers", "silent") not in asked(house, "user"):
        assert time.monotonic() < deadline, "nobody fell silent"
        time.sleep(0.05)
    assert asked(house, "user")["workers", "ready"].state == "fail"


# -- Redis, broken


def test_redis_that_is_away_is_named_by_api_and_worker(
    database_url: str, tmp_path: Path, redis_urls: ValkeyUrls
) -> None:
    nowhere = f"redis://worker:secret-word@127.0.0.1:{free_port()}/0"
    with a_house(database_url, tmp_path, redis_url=nowhere) as house:
        found = asked(house)
        assert found["redis", "reach"].state == "fail"
        assert (
            "Redis" in here(house)["server", "ready"].what or "redis" in here(house)["server", "ready"].what
        )
        assert "secret-word" not in json.dumps([f.to_json() for f in found.values()])
    assert by_name(look.redis(nowhere, "worker"))["redis", "reach"].what == "no use of Redis: ConnectionError"
    wrong = redis_urls.worker.replace("worker:", "worker:x")
    refused = by_name(look.redis(wrong, "worker"))["redis", "reach"]
    assert refused.what == "no use of Redis: AuthenticationError"
    assert "password" in refused.remedy


def test_each_role_has_the_rights_it_needs_and_no_role_those_of_another(
    redis_urls: ValkeyUrls, redis_url: str
) -> None:
    assert by_name(look.redis(redis_urls.scheduler, "scheduler"))["redis", "rights"].state == "ok"
    worker = by_name(look.redis(redis_urls.worker, "worker"))
    assert worker["redis", "rights"].state == "ok"
    assert worker["redis", "version"].state == "ok"
    assert worker["redis", "memory"].state == "skipped"
    as_scheduler = by_name(look.redis(redis_urls.worker, "scheduler"))["redis", "rights"]
    assert as_scheduler.state == "fail"
    assert "read INFO" in as_scheduler.what
    as_worker = by_name(look.redis(redis_urls.flower, "worker"))["redis", "rights"]
    assert as_worker.state == "fail"
    assert "write its keys" in as_worker.what
    assert not {k for k in keys(redis_urls.scheduler) if b"doctor" in k}


@pytest.fixture
def bad_redis(tmp_path: Path) -> Iterator[str]:
    """A server that evicts, has no limit of memory and knows one user who may do all."""
    port = free_port()
    config = f'bind 127.0.0.1\nport {port}\nsave ""\nmaxmemory-policy allkeys-lru\nuser default on >pw ~* &* +@all\n'
    child = Child("valkey", [_find_binary(), "-"], feed=config.encode(), log=tmp_path / "log", cwd=tmp_path)
    child.start()
    try:
        url = f"redis://default:pw@127.0.0.1:{port}/0"
        with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0)) as client:
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert child.alive, child.tail()
        yield url
    finally:
        child.stop(5)


def test_a_redis_that_evicts_or_fills_the_machine_is_named(
    house: House, bad_redis: str, database_url: str, tmp_path: Path
) -> None:
    found = by_name(look.redis(bad_redis, "scheduler"))
    assert found["redis", "policy"].state == "fail"
    assert "noeviction" in found["redis", "policy"].remedy
    assert found["redis", "memory"].state == "warn"
    with redis.Redis.from_url(bad_redis) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.set("filler", b"x" * 15_000_000)
        client.config_set("maxmemory", 20_000_000)
    found = by_name(look.redis(bad_redis, "scheduler"))
    assert found["redis", "policy"].state == "ok"
    assert "beyond 70 %" in found["redis", "memory"].what
    with redis.Redis.from_url(bad_redis) as client:
        client.config_set("maxmemory", 1_000_000)
    found = by_name(look.redis(bad_redis, "scheduler"))
    assert found["redis", "reach"].what == "no use of Redis: OutOfMemoryError"


def test_a_worker_role_without_its_rights_hears_which(bad_redis: str) -> None:
    port = urlsplit(bad_redis).port
    with redis.Redis.from_url(bad_redis) as client:
        without = RIGHTS["worker"].replace("+mget +set ", "").replace("+xlen", "")
        client.execute_command("ACL", "SETUSER", "worker", "on", ">w", "resetchannels", *_words(without))
    found = by_name(look.redis(f"redis://worker:w@127.0.0.1:{port}/0", "worker"))["redis", "rights"]
    assert found.state == "fail"
    assert found.what == "the user may not write its keys, see outcomes, which the worker needs"


def _words(rights: str) -> list[str]:
    """An ACL rule as SETUSER takes it: a selector is one word."""
    words: list[str] = []
    for part in rights.split(" "):
        if words and words[-1].startswith("(") and not words[-1].endswith(")"):
            words[-1] += f" {part}"
        else:
            words.append(part)
    return words


# -- without an API


def test_a_servers_host_is_examined_where_no_api_runs(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    env = {"MOTET_DATABASE_URL": database_url, "MOTET_REDIS_URL": redis_url, "MOTET_BLOB_DIR": str(tmp_path)}
    found = by_name(look.behind({**_path(), **env}))
    assert found["postgres", "migrations"].state == "ok"
    assert found["redis", "policy"].state == "ok"
    assert found["disk", "blobs folder"].state == "ok"
    url = database_url.replace("/test_", "/no_such_")
    reach = by_name(look.behind({**_path(), **env, "MOTET_DATABASE_URL": url}))["postgres", "reach"]
    assert reach.state == "fail"
    assert by_name(look.behind(_path()))["server", "own checks"].what.startswith("error: MOTET_DATABASE_URL")


def test_an_empty_database_is_no_riddle(
    postgres_url: str, migrated: psycopg.Connection, redis_url: str
) -> None:
    migrated.execute("CREATE DATABASE empty_for_doctor")
    try:
        url = postgres_url.replace("@/motet", "@/empty_for_doctor")
        assert url != postgres_url
        env = {**_path(), "MOTET_DATABASE_URL": url, "MOTET_REDIS_URL": redis_url}
        found = by_name(look.behind(env))
        assert found["postgres", "migrations"].what.startswith("the database is at nothing")
        assert ("server", "leader") not in found
    finally:
        migrated.execute("DROP DATABASE empty_for_doctor")


def _path() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if not name.startswith("MOTET_")}


def test_the_command_prints_both_sides_and_ends_with_1_where_something_fails(
    house: House,
    redis_url: str,
    redis_urls: ValkeyUrls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    env = {
        **_path(),
        "MOTET_URL": house.url,
        "MOTET_TOKEN": house.tokens["admin"],
        "MOTET_REDIS_URL": redis_urls.worker,
        "MOTET_HOME": str(tmp_path / "home"),
    }
    asking = RedisTransport(redis_url)
    asking.read_outcomes("host:1", 1, 0.01, 6.0)
    asking.close()
    house.sql("UPDATE leader SET epoch = 1, holder = 'me', until = now() + interval '1 hour'")
    ran = motet(env, "doctor", "--json")
    said = json.loads(ran.stdout)
    assert (ran.returncode, said["ok"]) == (0, True), ran.stdout
    assert {"python", "machine", "gpu", "server", "postgres", "redis", "workers", "models"} <= {
        f["area"] for f in said["findings"]
    }
    by_name([Finding.checked(f) for f in said["findings"]])
    house.sql("UPDATE alembic_version SET version_num = '0000'")
    monkeypatch.setattr(look, "machine", lambda *_: [])  # looked at once is enough: torch takes seconds
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--quiet"])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert "✗" in said.out
    assert "→ python -m scheduler migrate" in said.out
    assert "1 must be mended" in said.out
    assert said.err == ""


def motet(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", "from motet.cli import main; main()", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_transport_of_no_right_is_no_trouble_of_ours(redis_urls: ValkeyUrls) -> None:
    """The scheduler's user may not read the configuration; the doctor does not need it."""
    transport = RedisTransport(redis_urls.scheduler)
    with pytest.raises(redis.exceptions.NoPermissionError):
        transport._redis.client.config_get("maxmemory")
    transport.close()
    assert by_name(look.redis(redis_urls.scheduler, "scheduler"))["redis", "policy"].state == "ok"
