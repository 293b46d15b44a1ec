"""Real servers for tests: one Postgres and one Valkey for a whole run, a fresh database for each test."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from motet.local.cluster import Cluster, registered
from motet.local.postgres import Postgres
from motet.local.valkey import Valkey, ValkeyUrls
from motet.protocol.redis_url import redis_py_url

NUMBERS = itertools.count(1)

#: A folder in memory, on Linux. Dropping a database of a test waits 100 ms for a disk, and 3 ms for this.
MEMORY = Path("/dev/shm")
#: What must be free there, so that a run with two clusters fits, and earlier runs never fill the memory.
ROOM_BYTES = 6 << 30


def spare_time() -> None:
    """Let this run, and every process that it starts, keep what it compiles and write its files into memory.

    Tests start some two hundred Python processes; each that had to compile torch again would take seconds more. And
    their matrices are small: shared by threads, each product takes longer, and other tests wait for the cores.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if "TMPDIR" not in os.environ and _suits(MEMORY):
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None  # pytest has asked for it already


def _suits(folder: Path) -> bool:
    """Whether a folder can stand in for /tmp: there, open to us, with room, and programs in it may be run."""
    return (
        os.access(folder, os.W_OK | os.X_OK)
        and not os.statvfs(folder).f_flag & os.ST_NOEXEC
        and shutil.disk_usage(folder).free > ROOM_BYTES
    )


spare_time()

#: Folder -> files of it that one process runs, one after the other. Those of the first two share a cluster, which each
#: process would start anew; those of the last hold a whole cluster to seconds, which two at once could not keep.
TOGETHER = {
    "tests/acceptance": ("test_a_real_job", "test_apps", "test_functions", "test_language_models"),
    "tests/processes": ("test_compressed_on_a_cluster", "test_doors", "test_pictures", "test_training"),
    "tests/chaos": ("test_backup_restore", "test_chaos", "test_outages"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file's tests in one process, and those of files that belong together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    folders = {f"{folder}/{name}.py": folder for folder, names in TOGETHER.items() for name in names}

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return folders.get(file, file)

    return Together(config, log)


@pytest.hookimpl(
    wrapper=True, tryfirst=True
)  # before pytest-timeout's: waiting for others is not the test's time
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test marked ``alone`` while no other one runs. It holds short times that a busy machine would break."""
    if not hasattr(item.config, "workerinput"):  # no pytest-xdist: every test is alone
        return (yield)
    shared = Path(item.config.option.basetemp).parent
    with locked(shared / "door", fcntl.LOCK_EX) as door:
        # Who waits to be alone keeps the door, so that those who come later do not overtake.
        alone = item.get_closest_marker("alone") is not None
        with locked(shared / "room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
            if not alone:
                fcntl.flock(door, fcntl.LOCK_UN)
            return (yield)


@contextmanager
def locked(path: Path, how: int) -> Iterator[int]:
    """Hold a lock that other processes hold too, until the end of the block; its file stays."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
        yield fd
    finally:
        os.close(fd)


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


@pytest.fixture(scope="session")
def with_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stopped cluster that knows the shipped models; ``copy_of`` gives each test its own.

    One for all processes of a run: registering them takes a dozen CPU seconds.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = shared / "with-models"
    with locked(shared / "with-models.lock", fcntl.LOCK_EX):
        if not registered(folder).exists():
            with Cluster(folder, port=0):
                pass
    return folder


def copy_of(prepared: Path, folder: Path) -> Path:
    """A copy of a stopped cluster's folder, in ``folder``."""
    folder.mkdir(exist_ok=True)
    # Postgres' files belong to its own user where we are root.
    subprocess.run(["cp", "--archive", f"{prepared}/.", str(folder)], check=True)
    return folder


def _named(url: str, database: str) -> str:
    return make_url(url).set(database=database).render_as_string(hide_password=False)


def _libpq(url: str) -> str:
    return url.replace("+psycopg", "")
