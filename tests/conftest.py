"""Real servers for tests: one Postgres and one Valkey for a whole run, a fresh database for each test."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from motet.embedded.postgres import Postgres
from motet.embedded.valkey import Valkey, ValkeyUrls
from motet.redis_url import redis_py_url

NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The SQLAlchemy URL of a real Postgres, started for this run, with an empty database ``motet``."""
    with tempfile.TemporaryDirectory(prefix="motet-test-") as folder:
        postgres = Postgres(Path(folder))
        try:
            yield postgres.start()
        finally:
            postgres.stop()


@pytest.fixture(scope="session")
def migrated(postgres_url: str) -> Iterator[psycopg.Connection]:
    """A connection to create databases with, and the database ``migrated`` to copy them from."""
    from scheduler.migrate import upgrade  # here: unit tests need no Alembic

    with psycopg.connect(_libpq(postgres_url), dbname="postgres", autocommit=True) as admin:
        admin.execute("CREATE DATABASE migrated")
        upgrade(_named(postgres_url, "migrated"))
        yield admin


@pytest.fixture
def database_url(postgres_url: str, migrated: psycopg.Connection) -> Iterator[str]:
    """The SQLAlchemy URL of a fresh, migrated database. A copy takes some 50 ms, migrations a second."""
    name = f"test_{next(NUMBERS)}"
    migrated.execute(f"CREATE DATABASE {name} TEMPLATE migrated")
    yield _named(postgres_url, name)
    # Connections that the test forgot end first: DROP … WITH (FORCE) looks only every 100 ms whether they have.
    cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s"
    while migrated.execute(cut, [name]).fetchone() != (0,):
        time.sleep(0.001)
    migrated.execute(f"DROP DATABASE {name}")


@pytest.fixture(scope="session")
def redis_urls() -> Iterator[ValkeyUrls]:
    """The URLs of a real Valkey, started for this run, one for each role."""
    with tempfile.TemporaryDirectory(prefix="motet-test-") as folder:
        valkey = Valkey(Path(folder))
        try:
            yield valkey.start()
        finally:
            valkey.stop()


@pytest.fixture
def redis_url(redis_urls: ValkeyUrls) -> str:
    """The scheduler's URL of a Valkey that holds nothing."""
    with redis.Redis.from_url(redis_py_url(redis_urls.scheduler)) as client:
        if keys := list(client.scan_iter(count=1000)):  # its rights do not hold FLUSHALL
            client.unlink(*keys)
    return redis_urls.scheduler


def _named(url: str, database: str) -> str:
    return make_url(url).set(database=database).render_as_string(hide_password=False)


def _libpq(url: str) -> str:
    return url.replace("+psycopg", "")
