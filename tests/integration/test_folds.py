"""Folded state in the store: one state for a key, whoever lands its rows, in the order in which they are numbered."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from motet.folds import Count, Ewm, Last, Max, Sum
from motet.protocol.envelope import unwrap
from motet.tasks import Classify
from scheduler.blocks import IncomingPart, decode_block
from scheduler.store import endings, feeds, folds, landing
from scheduler.store.database import Database
from scheduler.store.feeds import NewAsk
from scheduler.store.landing import LoadingJob
from tests.integration.landing import HEAD, TRUNK, land, register

FOLDS = {
    "n": Count(key="{who}"),
    "n_week": Count(key="{who}", window="7d"),
    "spent": Sum("{amount}", key="{who}", window="1d"),
    "most": Max("{amount}", key="{who}"),
    "lately": Last("{text}", key="{who}"),
    "here": Count(key="{place}", window="1h"),
}
#: What reads two of them, and some text.
TASKS = {"length": Classify("length", input="{text} {n_week} {lately}")}


@pytest.fixture
def database(database_url: str) -> Database:
    found = Database(database_url)
    register(found, TRUNK, HEAD)
    return found


def opened(database: Database, **more: Any) -> LoadingJob:
    job = land(database, [], TASKS, **{"folds": FOLDS, **more})
    with database.transaction() as connection:
        tenant = connection.execute(
            text("SELECT tenant_id FROM job WHERE id = :job"), {"job": job}
        ).scalar_one()
        return landing.loading(connection, tenant, job)


@pytest.fixture
def feed(database: Database) -> LoadingJob:
    return opened(database)


def row(who: str | None, amount: float | None, place: int = 1) -> dict[str, Any]:
    return {"text": uuid.uuid4().hex[:8], "who": who, "amount": amount, "place": place}


def lands(database: Database, feed: LoadingJob, *rows: Mapping[str, Any], key: str = "") -> bool:
    """One caller's rows, under a key."""
    part = IncomingPart(columns={name: [r[name] for r in rows] for name in feed.asked})
    ask = NewAsk(key=(key or uuid.uuid4().hex).encode(), digest=b"rows", n_rows=len(rows))
    with database.transaction() as connection:
        return feeds.land_asks(connection, feed, part, [ask])[1]


def stored(database: Database, job: UUID) -> list[dict[str, Any]]:
    """The rows of a job in their order, with what they were given."""
    with database.transaction() as connection:
        payloads = connection.execute(
            text("SELECT payload FROM block WHERE job_id = :job ORDER BY number"), {"job": job}
        ).scalars()
        columns = [decode_block(bytes(payload)).values for payload in payloads]
    return [
        {name: values[i] for name, values in block.items()}
        for block in columns
        for i in range(len(next(iter(block.values()))))
    ]


def states(database: Database, job: UUID) -> list[Any]:
    with database.transaction() as connection:
        found = connection.execute(text("SELECT state, until FROM fold WHERE job_id = :job"), {"job": job})
        return [(unwrap(bytes(row.state)), row.until) for row in found]


def recomputed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for i, one in enumerate(rows):
        mine = [r for r in rows[:i] if r["who"] == one["who"] is not None]
        amounts = [r["amount"] for r in mine if r["amount"] is not None]
        found.append(
            {
                "n": len(mine),
                "n_week": len(mine),
                "spent": sum(amounts),
                "most": max(amounts, default=None),
                "lately": mine[-1]["text"] if mine else None,
                "here": sum(r["place"] == one["place"] for r in rows[:i]),
            }
        )
    return found


def test_rows_of_many_threads_are_given_what_a_recomputation_over_their_order_gives(
    database: Database, feed: LoadingJob
) -> None:
    start = threading.Barrier(6)

    def caller(number: int) -> None:
        dice = random.Random(number)
        start.wait()
        for turn in range(12):
            rows = [
                row(dice.choice("abc"), dice.choice((None, 1, 2, 30)), dice.randint(1, 2))
                for _ in range(dice.randint(1, 4))
            ]
            # Every third ask is repeated, as after a lost answer.
            for _ in range(1 + (turn % 3 == 0)):
                lands(database, feed, *rows, key=f"{number}/{turn}")

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = stored(database, feed.id)
    assert len(rows) > 100
    assert [{name: r[name] for name in FOLDS} for r in rows] == recomputed(rows)


def test_a_key_that_is_there_folds_nothing(database: Database, feed: LoadingJob) -> None:
    assert lands(database, feed, row("a", 5), key="k")
    before = states(database, feed.id)
    assert not lands(database, feed, row("a", 5), row("b", 5), key="k")
    assert states(database, feed.id) == before


def test_what_a_row_is_given_is_stored_typed_and_counts_in_its_length(
    database: Database, feed: LoadingJob
) -> None:
    lands(database, feed, row("a", 5))
    lands(database, feed, row("a", 2))
    with database.transaction() as connection:
        block = connection.execute(
            text(
                "SELECT payload, bytes, (SELECT bytes FROM block_pass WHERE block_number = 1) AS read FROM block WHERE number = 1"
            )
        ).one()
    found = decode_block(bytes(block.payload))
    assert found.types["n_week"] == found.types["spent"] == "int"
    assert list(found.values) == list(feed.fields)
    # The text, "1", the last text, and two spaces.
    assert block.read == 8 + 1 + 8 + 2
    assert block.bytes > block.read


def test_jobs_share_no_state_and_one_without_state_writes_none(database: Database, feed: LoadingJob) -> None:
    other = opened(database)
    plain = opened(database, folds=None)
    assert not plain.folds
    lands(database, feed, row("a", 5))
    lands(database, other, row("a", 5))
    part = IncomingPart(columns={name: ["x"] for name in plain.asked})
    with database.transaction() as connection:
        feeds.land_asks(connection, plain, part, [NewAsk(key=b"k", digest=b"d", n_rows=1)])
    assert stored(database, other.id)[0]["n"] == 0
    assert states(database, plain.id) == []


def test_what_no_longer_counts_is_swept_and_nothing_else(database: Database) -> None:
    windowed = {
        "n_week": Count(key="{who}", window="1h"),
        "lately": Ewm("{amount}", key="{who}", half_life="1h"),
    }
    some, ever = opened(database, folds=windowed), opened(database)
    for who in "abc":
        lands(database, some, row(who, 1))
        lands(database, ever, row(who, 1))
    with database.transaction() as connection:
        assert folds.sweep(connection) == 0
    assert len(states(database, some.id)) == 3
    # Two templates; the one of customers has folds without a window.
    assert sorted(until is None for _, until in states(database, ever.id)) == [False, True, True, True]
    with database.transaction() as connection:
        connection.execute(text("UPDATE fold SET until = until - interval '60 hours'"))
        assert folds.sweep(connection, limit=2) == 2
        assert folds.sweep(connection) == 2
    assert states(database, some.id) == []
    assert len(states(database, ever.id)) == 3
    lands(database, some, row("a", 1))
    assert stored(database, some.id)[-1]["n_week"] == 0


def test_state_goes_when_its_job_takes_no_more_rows(database: Database, feed: LoadingJob) -> None:
    closed, cancelled, deleted = (opened(database) for _ in range(3))
    for job in (feed, closed, cancelled, deleted):
        lands(database, job, row("a", 5))
    with database.transaction() as connection:
        landing.close_job(connection, feed.tenant, closed.id)
        endings.cancel_job(connection, feed.tenant, cancelled.id)
        endings.remove_job(connection, feed.tenant, deleted.id)
        assert folds.sweep(connection) == 4
    assert [len(states(database, job.id)) for job in (feed, closed, cancelled, deleted)] == [2, 0, 0, 0]


def test_state_holds_no_word_of_a_key_and_is_an_envelope(database: Database, feed: LoadingJob) -> None:
    lands(database, feed, row("customer-4711", 5))
    with database.transaction() as connection:
        keys = connection.execute(text("SELECT key FROM fold")).scalars().all()
    assert all(len(key) == 32 and b"4711" not in key for key in keys)


def test_expiry_moves_in_steps_so_that_most_updates_stay_in_their_page(
    database: Database, feed: LoadingJob
) -> None:
    for _ in range(40):
        lands(database, feed, row("a", 1))
    with database.transaction() as connection:
        connection.execute(text("SELECT pg_stat_force_next_flush()"))
    with database.transaction() as connection:
        counted = connection.execute(
            text("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'fold'")
        ).one()
    assert counted.n_tup_upd >= 70
    assert counted.n_tup_hot_upd >= 0.9 * counted.n_tup_upd
