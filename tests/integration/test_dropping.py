"""Rows that nobody waits for any more: late or abandoned, exactly once, wherever they are at that moment."""

from __future__ import annotations

import struct
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from motet.protocol.columns import Column
from motet.protocol.settings import Settings
from motet.protocol.transport import MemoryTransport
from motet.protocol.wire import Assignment, Beat, Outcome
from motet.states import Skip
from motet.tasks import Classify
from scheduler.aggregator import Aggregator
from scheduler.dispatcher import Dispatcher
from scheduler.store import dropping, endings, feeds, landing
from scheduler.store.database import Database
from scheduler.store.landing import LoadingJob
from scheduler.store.listening import Listener
from scheduler.store.words import EVERYTHING
from tests.integration.landing import HEAD, TRUNK, land, register
from tests.integration.test_feeds import ask, part_of

TASKS = {
    "length": Classify("length"),
    "then": Classify("length", input="{text}{length}"),
    "last": Classify("length", input="{then}"),
}


class Cluster:
    """A leader, an aggregator and a worker that are told what to do, and one open job."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        register(self.database, TRUNK, HEAD)
        self.now = 100.0
        self.transport = MemoryTransport(clock=lambda: self.now)
        self.dispatcher = Dispatcher(self.database, self.transport, Settings(), me="here")
        self.aggregator = Aggregator(self.database, self.transport, Settings(), me="here")
        self.listener = Listener(self.database)
        self.worker = self.transport.worker("w")
        self.held: dict[tuple[int, int], Assignment] = {}
        self.seq = 0
        job = land(self.database, [], TASKS, priority=0)
        with self.database.transaction() as connection:
            tenant = connection.execute(text("SELECT tenant_id FROM job")).scalar_one()
            self.feed: LoadingJob = landing.loading(connection, tenant, job)
        self.tick(words=False)

    @property
    def job(self) -> UUID:
        return self.feed.id

    def ask(self, key: str, *texts: str, due_s: float | None = 60.0) -> int:
        """The block that the rows land in."""
        with self.database.transaction() as connection:
            landed, _ = feeds.land_asks(
                connection, self.feed, part_of(*texts), [ask(key, len(texts))], due_s=due_s
            )
        return landed[0].block

    def tick(self, *, beats: bool = True, words: bool = True) -> None:
        """The leader steps; the worker beats before, and takes what it is sent."""
        self.now += 0.5
        self.seq += 1
        if beats:
            self.worker.beat(
                Beat(
                    worker="w",
                    boot="b",
                    seq=self.seq,
                    engines=("encoder",),
                    device_name="hand",
                    resident=(TRUNK.digest,),
                    held=tuple(self.held),
                )
            )
        self.dispatcher.step(self.now, self.listener.wait(0.2) if words else EVERYTHING)
        while (key := self.worker.take()) is not None:
            self.held[key] = Assignment.decode(self.worker.fetch(*key) or b"")

    def answer(self) -> None:
        """The worker answers all that it holds."""
        for a in self.held.values():
            n = len(a.texts)
            column = Column(
                kind="label",
                status=bytes(n),
                arrays={"codes": bytes(2 * n), "scores": struct.pack(f"<{n}f", *[0.5] * n)},
            )
            done = Outcome(
                subtask=a.subtask,
                attempt=a.attempt,
                nonce=a.nonce,
                worker="w",
                boot="b",
                verdict="done",
                columns={t.name: column for t in a.tasks},
            )
            self.worker.report(*a.key, done.encode())
        self.held.clear()
        self.aggregator.step(0.0)

    def abandon(self, *blocks: int) -> int:
        with self.database.transaction() as connection:
            return dropping.abandon(connection, self.job, blocks)

    def sql(self, statement: str) -> Any:
        with self.database.transaction() as connection:
            return connection.execute(text(statement)).all()

    def cells(self) -> tuple[int, int, int, int]:
        """Rows, and cells that are ok, errors, skipped."""
        [row] = self.sql("SELECT n_rows, cells_ok, cells_error, cells_skipped FROM job")
        return tuple(row)

    def said(self, block: int) -> list[set[str]]:
        """Of each task how the cells of a block were answered: "ok", or why they were not."""
        with self.database.transaction() as connection:
            columns = feeds.look(connection, self.job, [block]).answered[block]
        return [
            {columns[n].errors[i].error if i in columns[n].errors else "ok" for i in range(len(columns[n]))}
            for n in sorted(columns)
        ]

    def nothing_is_left(self) -> None:
        [(left,)] = self.sql(
            "SELECT (SELECT count(*) FROM lease) + (SELECT count(*) FROM piece) + (SELECT count(*) FROM cells)"
            " + (SELECT count(*) FROM subtask WHERE state = 'open') + (SELECT sum(rows_waiting) FROM pass)"
            " + (SELECT sum(bytes_waiting) FROM pass) + (SELECT n_blocks - blocks_done FROM job)"
        )
        assert left == 0


@pytest.fixture
def cluster(database_url: str) -> Any:
    made = Cluster(database_url)
    yield made
    made.listener.close()
    made.database.close()


def overdue(cluster: Cluster, block: int) -> None:
    with cluster.database.transaction() as connection:
        connection.execute(
            text("UPDATE block SET due = clock_timestamp() - interval '1 s' WHERE number = :n"), {"n": block}
        )


def test_what_no_worker_had_begun_in_time_is_late(cluster: Cluster) -> None:
    block = cluster.ask("k", "a", "bb")
    kept = cluster.ask("other", "c", due_s=None)
    overdue(cluster, block)
    cluster.tick()
    assert cluster.said(block) == [{Skip.LATE}] * 3
    cluster.tick()
    assert [len(a.texts) for a in cluster.held.values()] == [1]
    for _ in range(3):
        cluster.answer()
        cluster.tick()
    assert cluster.said(kept) == [{"ok"}] * 3
    assert cluster.cells() == (3, 3, 0, 6)
    cluster.nothing_is_left()
    assert cluster.ask("k", "a", "bb") == 2


def test_what_was_leased_is_never_late(cluster: Cluster) -> None:
    block = cluster.ask("k", "a")
    cluster.tick()
    overdue(cluster, block)
    cluster.tick()
    assert len(cluster.held) == 1
    cluster.answer()
    # Its next pass had not begun.
    cluster.tick()
    assert cluster.said(block) == [{"ok"}, {Skip.LATE}, {Skip.LATE}]
    assert cluster.cells() == (1, 1, 0, 2)
    cluster.nothing_is_left()


def test_what_runs_is_abandoned_at_once_and_its_outcome_comes_too_late(cluster: Cluster) -> None:
    block = cluster.ask("k", "a", "b")
    cluster.tick()
    [key] = cluster.held
    assert cluster.abandon(block) == 2
    assert cluster.said(block) == [{Skip.ABANDONED}] * 3
    # The leader tells the worker at its next step, whatever the worker has said by then.
    cluster.tick(beats=False)
    control = cluster.worker.hear()
    assert control is not None
    assert control.drop == (key,)
    cluster.answer()
    assert cluster.said(block) == [{Skip.ABANDONED}] * 3
    assert cluster.cells() == (2, 0, 0, 6)
    assert cluster.abandon(block) == 0
    cluster.nothing_is_left()
    assert cluster.ask("k", "a", "b") == block + 1


def test_rows_that_came_back_and_what_is_answered_already(cluster: Cluster) -> None:
    block = cluster.ask("k", "a", "b", "c")
    cluster.tick()
    cluster.answer()
    cluster.tick()
    assert {len(a.texts) for a in cluster.held.values()} == {3}
    # A piece: its worker died.
    cluster.held.clear()
    cluster.worker.beat(Beat(worker="w", boot="another", seq=0, state="starting"))
    cluster.dispatcher.step(cluster.now + 0.5, cluster.listener.wait(0.2))
    assert [tuple(row) for row in cluster.sql("SELECT hi - lo FROM piece")] == [(3,)]
    assert cluster.abandon(block) == 3
    assert cluster.said(block) == [{"ok"}, {Skip.ABANDONED}, {Skip.ABANDONED}]
    assert cluster.cells() == (3, 3, 0, 6)
    cluster.nothing_is_left()


def test_rows_that_share_a_subtask_with_others_go_on(cluster: Cluster) -> None:
    blocks = [cluster.ask("k", "a", due_s=None), cluster.ask("other", "b", due_s=None)]
    cluster.tick()
    [both] = cluster.held.values()
    assert len(both.texts) == 2
    cluster.abandon(blocks[0])
    for _ in range(3):
        cluster.answer()
        cluster.tick()
    # What of it was begun is done, and the rest is late.
    assert cluster.said(blocks[0]) == [{"ok"}, {Skip.LATE}, {Skip.LATE}]
    assert cluster.said(blocks[1]) == [{"ok"}] * 3
    assert cluster.cells() == (2, 4, 0, 2)
    cluster.nothing_is_left()


def test_blocks_that_may_be_dropped_share_no_subtask(cluster: Cluster) -> None:
    for key in "abc":
        cluster.ask(key, key)
    cluster.tick()
    assert [len(a.texts) for a in cluster.held.values()] == [1, 1, 1]


def test_a_job_that_has_ended_keeps_its_cells(cluster: Cluster) -> None:
    block = cluster.ask("k", "a")
    with cluster.database.transaction() as connection:
        endings.cancel_job(connection, cluster.feed.tenant, cluster.job)
    assert cluster.abandon(block) == 0
    assert cluster.cells() == (1, 0, 0, 3)


def test_the_audit_tells_what_was_missed_and_not_what_was_on_its_way_twice(cluster: Cluster) -> None:
    audit = cluster.dispatcher._audit

    def differs() -> bool:
        with cluster.database.reading() as connection:
            return bool(audit.go_on(connection, cluster.now))

    def looks_at_jobs() -> None:
        audit._begins_at = cluster.now
        assert not differs()
        assert not differs()

    # It listens from here on.
    cluster.tick()
    cluster.ask("first", "a")
    looks_at_jobs()
    # Between two looks the leader heard of it, and another row has landed just now.
    cluster.dispatcher.step(cluster.now, cluster.listener.wait(0.2))
    cluster.ask("second", "b")
    assert not differs()
    looks_at_jobs()
    assert differs()
