"""Open jobs in the store: asks land together, once for each key, and their rows are dense and in commit order."""

from __future__ import annotations

import threading
import uuid
from uuid import UUID

import pytest
from sqlalchemy import text

from motet.errors import Conflict
from motet.tasks import Classify, Embed
from scheduler.blocks import IncomingPart
from scheduler.store import feeds, landing
from scheduler.store.database import Database
from scheduler.store.feeds import FeedLook, LandedAsk, NewAsk
from scheduler.store.landing import LoadingJob
from tests.integration.landing import HEAD, TRUNK, land, register

TASKS = {
    "length": Classify("length"),
    "vector": Embed("trunk"),
    "again": Classify("length", input="{length}"),
}


@pytest.fixture
def database(database_url: str) -> Database:
    found = Database(database_url)
    register(found, TRUNK, HEAD)
    return found


@pytest.fixture
def feed(database: Database) -> LoadingJob:
    """An open job, without a row."""
    job = land(database, [], TASKS)
    with database.transaction() as connection:
        tenant = connection.execute(
            text("SELECT tenant_id FROM job WHERE id = :job"), {"job": job}
        ).scalar_one()
        return landing.loading(connection, tenant, job)


def part_of(*texts: str, bad: frozenset[int] = frozenset()) -> IncomingPart:
    return IncomingPart(
        columns={"text": ["" if i in bad else t for i, t in enumerate(texts)]},
        bad=dict.fromkeys(bad, ("bad_row", "text: got null")),
    )


def ask(key: str, rows: int = 1, *, digest: str = "same") -> NewAsk:
    return NewAsk(key=key.encode(), digest=digest.encode(), n_rows=rows)


def lands(
    database: Database, feed: LoadingJob, part: IncomingPart, *asks: NewAsk
) -> tuple[list[LandedAsk], bool]:
    with database.transaction() as connection:
        return feeds.land_asks(connection, feed, part, asks)


def counts(database: Database, job: UUID) -> tuple[int, ...]:
    with database.transaction() as connection:
        row = connection.execute(
            text(
                "SELECT n_rows, n_blocks, blocks_done, cells_ok, cells_error, cells_skipped,"
                " (SELECT sum(rows_waiting) FROM pass WHERE job_id = job.id), (SELECT count(*) FROM ask WHERE job_id = job.id)"
                " FROM job WHERE id = :job"
            ),
            {"job": job},
        ).one()
    return tuple(map(int, row))


def test_asks_of_many_callers_land_as_one_block(database: Database, feed: LoadingJob) -> None:
    landed, stored = lands(database, feed, part_of("a", "bb", "ccc"), ask("x", 2), ask("y"))
    assert stored
    assert [(a.block, a.lo, a.n_rows, a.first_row) for a in landed] == [(0, 0, 2, 0), (0, 2, 1, 0)]
    # The head and the trunk are one pass; what reads the head's answer waits behind it.
    assert counts(database, feed.id) == (3, 1, 0, 0, 0, 0, 3, 2)
    again, _ = lands(database, feed, part_of("d"), ask("z"))
    assert (again[0].block, again[0].first_row) == (1, 3)


def test_a_key_that_is_there_stores_nothing_and_says_where_its_rows_are(
    database: Database, feed: LoadingJob
) -> None:
    (first,), _ = lands(database, feed, part_of("a"), ask("x"))
    found, stored = lands(database, feed, part_of("a", "b"), ask("x"), ask("y"))
    assert not stored
    assert found == [first]
    assert counts(database, feed.id)[0] == 1


def test_a_key_with_other_rows_is_told_by_its_digest(database: Database, feed: LoadingJob) -> None:
    lands(database, feed, part_of("a"), ask("x", digest="one"))
    (found,), stored = lands(database, feed, part_of("b"), ask("x", digest="other"))
    assert not stored
    assert found.digest == b"one"


def test_the_same_keys_at_once_land_once_and_rows_are_dense(database: Database, feed: LoadingJob) -> None:
    start = threading.Barrier(8)
    found: list[list[LandedAsk]] = []

    def caller(number: int) -> None:
        start.wait()
        for turn in range(10):
            asks = [ask(f"shared {turn}"), ask(f"own {number} {turn}")]
            while asks:
                texts = [a.key.decode() for a in asks]
                landed, stored = lands(database, feed, part_of(*texts), *asks)
                found.append(landed)
                if stored:
                    break
                asks = [a for a in asks if a.key not in {known.key for known in landed}]

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places: dict[bytes, set[tuple[int, int]]] = {}
    for one in found:
        for a in one:
            places.setdefault(a.key, set()).add((a.block, a.lo))
    assert len(places) == 90
    assert all(len(where) == 1 for where in places.values())
    with database.transaction() as connection:
        rows = connection.execute(
            text("SELECT first_row, n_rows FROM block WHERE job_id = :job ORDER BY number"), {"job": feed.id}
        ).all()
    assert [row.first_row for row in rows] == [sum(r.n_rows for r in rows[:i]) for i in range(len(rows))]
    assert sum(row.n_rows for row in rows) == 90 == counts(database, feed.id)[0]


def test_a_block_that_no_task_can_be_asked_is_answered_at_once(database: Database, feed: LoadingJob) -> None:
    lands(database, feed, part_of("", bad=frozenset({0})), ask("x"))
    n_rows, n_blocks, done, ok, error, skipped, waiting, _ = counts(database, feed.id)
    assert (n_rows, n_blocks, done, waiting) == (1, 1, 1, 0)
    assert (ok, error + skipped) == (0, 3)
    with database.transaction() as connection:
        answered = feeds.look(connection, feed.id, [0, 7]).answered
    assert set(answered) == {0}
    assert sorted(answered[0]) == [0, 1, 2]


def test_what_is_under_way_is_not_told_as_answered(database: Database, feed: LoadingJob) -> None:
    lands(database, feed, part_of("a"), ask("x"))
    with database.transaction() as connection:
        assert feeds.look(connection, feed.id, [0]) == FeedLook(state="open", answered={})
        assert feeds.look(connection, uuid.uuid4(), [0]).state is None


def test_a_job_that_is_no_longer_open_takes_no_ask_but_knows_the_old_ones(
    database: Database, feed: LoadingJob
) -> None:
    (first,), _ = lands(database, feed, part_of("a"), ask("x"))
    with database.transaction() as connection:
        connection.execute(
            text("UPDATE job SET state = 'running', closed = now() WHERE id = :job"), {"job": feed.id}
        )
    with pytest.raises(Conflict, match="takes no more rows"):
        lands(database, feed, part_of("b"), ask(uuid.uuid4().hex))
    assert lands(database, feed, part_of("a"), ask("x")) == ([first], False)
