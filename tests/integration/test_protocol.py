"""The protocol, driven step by step: real Postgres, the live dispatcher and aggregator, an obedient worker.

Nothing sleeps: the test decides when a process steps, dies or is late.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import event, text

from motet.errors import Problem
from motet.protocol.columns import ERROR, CellError, Column
from motet.protocol.envelope import pack, unwrap
from motet.protocol.settings import Settings
from motet.protocol.transport import MemoryTransport
from motet.protocol.wire import Assignment, Beat, Outcome, Running, Usage
from motet.tasks import Classify
from scheduler.aggregator import Aggregator
from scheduler.dispatcher import Dispatcher
from scheduler.payloads import Payloads
from scheduler.policy.carve import Carved, Frontier, Range
from scheduler.policy.liveness import GRACE_S
from scheduler.store import leases
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.demand import Lengths, demand
from scheduler.store.demand import frontier as frontier_of
from scheduler.store.endings import delete_job, end_job
from scheduler.store.leadership import NotLeading
from scheduler.store.leases import Cut, Held, Leased, SecondLease
from scheduler.store.manifests import Manifests
from scheduler.store.outcomes import Recorded, record
from scheduler.store.sealing import task_shapes
from tests.integration.landing import HEAD, TRUNK, land, register

TASKS = {"size": Classify("length"), "again": Classify("length", scores=False)}


def label_of(text_: str) -> int:
    """What the obedient worker answers, computed here a second time by the oracle."""
    return min(2, len(text_) // 10)


def column(texts: list[str]) -> Column:
    n = len(texts)
    return Column(
        kind="label",
        status=bytes(n),
        arrays={
            "codes": struct.pack(f"<{n}h", *map(label_of, texts)),
            "scores": struct.pack(f"<{n}f", *([0.5] * n)),
        },
    )


@dataclass
class Hand:
    """A worker in the test's hands: it beats, takes messages and answers when told to."""

    transport: MemoryTransport
    name: str
    boot: str = "boot-1"
    seq: int = 0
    holding: dict[tuple[int, int], Assignment] = field(default_factory=dict)
    dropped: set[tuple[int, int]] = field(default_factory=set)
    #: Came here, and could not be run.
    left: set[tuple[int, int]] = field(default_factory=set)

    def beat(self) -> None:
        self.seq += 1
        control = self.transport.worker(self.name).beat(
            Beat(
                worker=self.name,
                boot=self.boot,
                seq=self.seq,
                engines=("encoder",),
                device_name="hand",
                held=tuple(self.holding),
                left=tuple(self.left),
            )
        )
        for key in control.drop if control else ():
            self.dropped.add(key)
            self.holding.pop(key, None)

    def take_all(self) -> list[Assignment]:
        side = self.transport.worker(self.name)
        taken = []
        while (key := side.take()) is not None:
            raw = side.fetch(*key)
            if raw is None:
                self.left.add(key)
            else:
                self.holding[key] = Assignment.decode(raw)
                taken.append(self.holding[key])
        return taken

    def outcome(self, a: Assignment, **kw: Any) -> Outcome:
        facts: dict[str, Any] = {
            "verdict": "done",
            "columns": {t.name: column(list(a.texts)) for t in a.tasks},
            "usage": Usage(tokens=len(a.texts), computed_tokens=len(a.texts), busy_s=0.001, micro_batches=1),
        }
        return Outcome(
            subtask=a.subtask,
            attempt=a.attempt,
            nonce=a.nonce,
            worker=self.name,
            boot=self.boot,
            **(facts | kw),
        )

    def report(self, outcome: Outcome) -> None:
        self.transport.worker(self.name).report(outcome.subtask, outcome.attempt, outcome.encode())
        self.holding.pop((outcome.subtask, outcome.attempt), None)

    def die(self) -> None:
        """SIGKILL and restart: another boot, nothing held; the queue and the evidence stay in Redis."""
        self.boot = f"boot-{int(self.boot[5:]) + 1}"
        self.holding.clear()


@dataclass
class House:
    """One cluster whose every move is a method call."""

    database: Database
    transport: MemoryTransport
    dispatcher: Dispatcher
    aggregator: Aggregator
    hands: list[Hand]
    now: float = 0.0

    def tick(self) -> int:
        """Every worker beats, then the dispatcher steps once."""
        self.now += 1.0
        for hand in self.hands:
            hand.beat()
        return self.dispatcher.step(self.now)

    def aggregate(self) -> None:
        while self.aggregator.step(block_s=0.0):
            pass

    def work(self) -> int:
        """One round in which every worker answers whatever it has."""
        self.tick()
        answered = 0
        for hand in self.hands:
            for a in hand.take_all():
                hand.report(hand.outcome(a))
                answered += 1
        self.aggregate()
        return answered

    def finish(self, job: UUID, rounds: int = 60) -> Any:
        """Work until the job ends."""
        for _ in range(rounds):
            if self.job(job).state not in ("loading", "running"):
                break
            self.work()
        return self.job(job)

    def job(self, job: UUID) -> Any:
        return self.sql("SELECT * FROM job WHERE id = :job", job=job)[0]

    def sql(self, statement: str, **at: Any) -> list[Any]:
        with self.database.transaction() as connection:
            result = connection.execute(text(statement), at)
            return list(result) if result.returns_rows else []

    def labels(self, job: UUID, task: str = "size") -> list[str | None]:
        rows = self.sql(
            "SELECT row, status, value FROM results WHERE job_id = :job AND task = :task ORDER BY row",
            job=job,
            task=task,
        )
        assert [r.row for r in rows] == list(range(len(rows)))
        return [r.value["label"] if r.status == "ok" else r.value["error"] for r in rows]

    def expire_leases(self) -> None:
        self.sql("UPDATE lease SET until = clock_timestamp() - interval '1 s'")

    def due(self) -> None:
        """The back-off of every piece has passed."""
        self.sql("UPDATE piece SET not_before = '-infinity'")


@pytest.fixture
def house(database_url: str) -> Iterator[House]:
    database = Database(database_url)
    transport = MemoryTransport()
    settings = Settings(subtask_s=0.25, depth=3, leader_lease_s=30.0, reclaim_s=0.0)
    register(database, TRUNK, HEAD)
    yield House(
        database,
        transport,
        Dispatcher(database, transport, settings),
        Aggregator(database, transport, settings),
        [Hand(transport, "w1"), Hand(transport, "w2")],
    )
    database.close()


def texts(n: int) -> list[str]:
    return ["x" * (i * 7 % 31) + str(i) for i in range(n)]


def expected(rows: list[str]) -> list[str]:
    return [HEAD.labels[label_of(t)] for t in rows]


def assert_accounted_for(house: House, job: UUID, rows: int) -> None:
    """The promise, in SQL: every cell once, the counters true, nothing left lying about."""
    j = house.job(job)
    assert j.cells_ok + j.cells_error + j.cells_skipped == rows * j.n_tasks
    [counted] = house.sql(
        "SELECT count(*) FILTER (WHERE status = 'ok') AS ok, count(*) FILTER (WHERE status = 'error') AS error,"
        " count(DISTINCT (row, task)) AS different, count(*) AS cells FROM results WHERE job_id = :job",
        job=job,
    )
    assert (counted.ok, counted.error) == (j.cells_ok, j.cells_error)
    assert counted.cells == counted.different == rows * j.n_tasks
    for table in ("piece", "lease", "cells"):
        assert house.sql(f"SELECT count(*) AS n FROM {table}")[0].n == 0
    assert house.sql("SELECT count(*) AS n FROM subtask WHERE state = 'open'")[0].n == 0
    assert house.sql("SELECT coalesce(sum(rows_waiting), 0) AS n FROM pass")[0].n == 0


def test_a_job_goes_from_rows_to_merged_results(house: House) -> None:
    rows = texts(300)
    job = land(house.database, rows, TASKS, block_rows=64)
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(rows)
    assert_accounted_for(house, job, 300)
    [merged] = house.sql("SELECT cells FROM merged WHERE job_id = :job AND row = 7", job=job)
    assert merged.cells["again"]["value"]["label"] == expected(rows)[7]


def test_two_tasks_on_one_trunk_cost_one_pass(house: House) -> None:
    land(house.database, texts(10), TASKS)
    house.tick()
    sent = [a for hand in house.hands for a in hand.take_all()]
    assert {t.name for a in sent for t in a.tasks} == {"size", "again"}
    assert sum(len(a.texts) for a in sent) == 10


def test_rows_of_a_killed_worker_are_done_elsewhere_and_its_late_outcome_changes_nothing(
    house: House,
) -> None:
    rows = texts(200)
    job = land(house.database, rows, TASKS, block_rows=64)
    house.tick()
    victim = house.hands[0]
    lost = victim.take_all()
    assert lost
    stale = [victim.outcome(a) for a in lost]
    victim.die()
    house.tick()
    for outcome in stale:
        victim.report(outcome)
    house.aggregate()
    assert house.job(job).cells_ok == 0
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(rows)
    assert house.job(job).attempts_lost == len(lost)
    assert_accounted_for(house, job, 200)


def test_a_silent_worker_keeps_its_lease_until_it_expires_and_no_longer(house: House) -> None:
    rows = texts(20)
    job = land(house.database, rows, TASKS)
    house.tick()
    silent = house.hands.pop(0)
    held = silent.take_all()
    assert held
    house.tick()
    assert house.job(job).attempts_lost == 0
    for _ in range(6):
        house.tick()
    house.expire_leases()
    assert house.finish(job).state == "succeeded"
    assert house.job(job).attempts_lost >= len(held)
    assert_accounted_for(house, job, 20)


def test_a_message_that_was_never_sent_is_rescued(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    house.tick()
    house.transport.queues.clear()
    house.transport.payloads.clear()
    house.tick()
    house.expire_leases()
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def test_an_attempt_whose_payload_is_lost_is_closed_as_soon_as_its_worker_says_so(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    house.hands.pop()
    house.tick()
    sent = len(house.transport.payloads)
    house.transport.payloads.clear()
    [hand] = house.hands
    assert not hand.take_all()
    assert len(hand.left) == sent > 0
    house.tick()
    assert house.job(job).attempts_lost == sent
    again = hand.take_all()
    assert again, "its rows are sent again in the same step"
    assert not house.sql("SELECT 1 FROM subtask WHERE deaths > 0"), "and nothing is blamed"
    for a in again:
        hand.report(hand.outcome(a))
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def test_a_pass_is_priced_by_the_fields_that_it_reads(house: House) -> None:
    n = 120
    rows = [{"title": f"{i:040}", "body": f"{i:04000}"} for i in range(n)]
    tasks = {"title": Classify("length", input="{title}"), "body": Classify("length", input="{body}")}
    house.hands.pop()
    job = land(house.database, rows, tasks, block_rows=50)
    cut_at = 5 * TRUNK.max_tokens
    waiting = house.sql("SELECT bytes_waiting FROM pass WHERE job_id = :job ORDER BY number", job=job)
    assert [w.bytes_waiting for w in waiting] == [40 * n, cut_at * n]
    sent: dict[int, list[tuple[int, int, float]]] = {0: [], 1: []}
    for _ in range(60):
        house.tick()
        for hand in house.hands:
            for a in hand.take_all():
                title = a.tasks[0].name == "title"
                tokens = (10 if title else 256) * len(a.texts)
                [cut_] = house.sql("SELECT bytes FROM subtask WHERE id = :id", id=a.subtask)
                sent[0 if title else 1].append((len(a.texts), cut_.bytes, a.predicted_s))
                # A worker's own count of bytes is not gone by.
                usage = Usage(tokens=tokens, computed_tokens=tokens, text_bytes=10**9, busy_s=tokens / 1e4)
                hand.report(hand.outcome(a, usage=usage))
        house.aggregate()
        if all(sent.values()):
            break
    assert all(size == 40 * n_rows for n_rows, size, _ in sent[0])
    assert all(size == cut_at * n_rows for n_rows, size, _ in sent[1])
    (titles, _, title_s), (bodies, _, body_s) = sent[0][0], sent[1][0]
    assert title_s / titles < body_s / bodies / 5, "a row of titles is priced as one"
    assert titles > 5 * bodies, "and so are sub-tasks cut"
    learned = house.sql(
        "SELECT bytes_done / tokens AS n FROM pass WHERE job_id = :job ORDER BY number", job=job
    )
    assert [ratio.n for ratio in learned] == [4, 5], "by the bytes that it is applied to"
    with house.database.transaction() as connection:
        assert [d.bytes_per_token for d in demand(connection, 0.0, Manifests())][-1] == 5.0
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, n)


def test_a_lease_whose_commit_nobody_heard_of_does_not_wait_for_its_end(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = land(house.database, texts(20), TASKS)
    real = leases.lease

    def cut_off(*arguments: Any) -> Any:
        monkeypatch.setattr(leases, "lease", real)
        real(*arguments)
        raise StoreUnavailable("the connection was lost at COMMIT")

    monkeypatch.setattr(leases, "lease", cut_off)
    with pytest.raises(StoreUnavailable):
        house.tick()
    unheard = house.sql("SELECT count(*) AS n FROM lease")[0].n
    assert unheard > 0
    assert not house.transport.queues
    house.tick()
    assert house.job(job).attempts_lost == unheard
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def test_what_was_sent_outlives_an_outage_of_postgres(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    house.tick()
    # On its way: no longer in the queue, not yet in a beat.
    assert [h.transport.worker(h.name).take() for h in house.hands] != [None, None]
    with pytest.raises(StoreUnavailable), house.dispatcher._leasing():
        raise StoreUnavailable("away")
    house.tick()
    assert house.job(job).attempts_lost == 0
    house.expire_leases()
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def test_losing_all_of_redis_costs_repeated_work_and_no_row(house: House) -> None:
    rows = texts(200)
    job = land(house.database, rows, TASKS, block_rows=64)
    house.work()
    house.tick()
    house.transport.empty()
    for hand in house.hands:
        hand.holding.clear()
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(rows)
    assert_accounted_for(house, job, 200)


def test_an_outcome_that_waits_on_the_stream_is_merged_and_never_rescued(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    house.tick()
    for hand in house.hands:
        for a in hand.take_all():
            hand.report(hand.outcome(a))
    house.expire_leases()
    house.tick()
    assert house.job(job).attempts_lost == 0
    house.aggregate()
    assert house.job(job).cells_ok > 0


def test_an_outcome_read_twice_counts_once(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    house.tick()
    for hand in house.hands:
        for a in hand.take_all():
            hand.report(hand.outcome(a))
            hand.report(hand.outcome(a))
    second = Aggregator(house.database, house.transport, house.aggregator.settings)
    entries = house.transport.read_outcomes("a", 64, 0.0, 0.0)
    house.aggregate()
    assert entries
    assert second.step(0.0) == 0
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


@pytest.mark.parametrize(
    "forge",
    [
        lambda o: replace(o, nonce="guessed"),
        lambda o: replace(o, attempt=o.attempt + 1),
        lambda o: replace(o, subtask=o.subtask + 1000),
    ],
)
def test_a_forged_outcome_is_dropped(house: House, forge: Any) -> None:
    job = land(house.database, texts(20), TASKS)
    house.tick()
    hand = next(h for h in house.hands if house.transport.queues.get(h.name))
    a = hand.take_all()[0]
    house.transport.worker(hand.name).report(a.subtask, a.attempt, forge(hand.outcome(a)).encode())
    house.aggregate()
    assert house.job(job).cells_ok == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda o: replace(o, columns={}),
        lambda o: replace(o, columns={name: column(["x"] * 99) for name in o.columns}),
        lambda o: replace(
            o,
            columns={
                n: replace(c, arrays={**c.arrays, "codes": c.arrays["codes"].replace(b"\0\0", b"\x09\0")})
                for n, c in o.columns.items()
            },
        ),
    ],
    ids=["no columns", "another length", "a label that is none"],
)
def test_a_wrong_outcome_of_a_true_worker_is_a_failed_attempt(house: House, spoil: Any) -> None:
    job = land(house.database, ["short", "rows"] * 10, TASKS)
    house.tick()
    for hand in house.hands:
        for a in hand.take_all():
            hand.report(spoil(hand.outcome(a)))
    house.aggregate()
    assert house.job(job).cells_ok == 0
    house.due()
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def test_rows_with_a_retriable_error_come_back_and_their_neighbours_do_not(house: House) -> None:
    rows = texts(20)
    job = land(house.database, rows, TASKS)
    house.hands.pop()
    house.tick()
    [hand] = house.hands
    asked = hand.take_all()
    for a in asked:
        sound = column(list(a.texts))
        flaky = replace(
            sound,
            status=bytes([ERROR]) + sound.status[1:],
            errors={0: CellError("engine", "the device hiccuped", retriable=True)},
        )
        hand.report(hand.outcome(a, columns={"size": flaky, "again": sound}))
    house.aggregate()
    assert house.job(job).cells_ok == 2 * (sum(len(a.texts) for a in asked) - len(asked))
    assert house.sql("SELECT sum(hi - lo) AS n, max(tries) AS tries FROM piece")[0] == (len(asked), 1)
    house.due()
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(rows)
    assert_accounted_for(house, job, 20)


def test_a_row_that_always_fails_becomes_an_error_after_five_tries(house: House) -> None:
    rows = [*texts(9), "the bad one"]
    job = land(house.database, rows, {"size": Classify("length")})
    for _ in range(12):
        house.due()
        house.tick()
        for hand in house.hands:
            for a in hand.take_all():
                good = column(list(a.texts))
                status = bytes(ERROR if t == "the bad one" else 0 for t in a.texts)
                errors = {
                    i: CellError("engine", "RuntimeError", retriable=True)
                    for i, t in enumerate(a.texts)
                    if t == "the bad one"
                }
                hand.report(hand.outcome(a, columns={"size": replace(good, status=status, errors=errors)}))
        house.aggregate()
    j = house.job(job)
    assert (j.state, j.cells_ok, j.cells_error) == ("succeeded", 9, 1)
    assert house.labels(job) == [*expected(rows[:9]), "engine"]
    assert_accounted_for(house, job, 10)


def test_a_row_that_kills_its_worker_is_found_and_no_other_row_is_blamed(house: House) -> None:
    rows = [*texts(15), "poison!"]
    job = land(house.database, rows, {"size": Classify("length")})
    house.hands.pop()
    [hand] = house.hands
    deaths = 0
    for _ in range(80):
        if house.job(job).state != "running":
            break
        house.due()
        house.tick()
        for a in hand.take_all():
            if a.key not in hand.holding:
                continue
            if "poison!" in a.texts:
                house.transport.worker("w1").mark_running(
                    Running(boot=hand.boot, rows={a.key: tuple(range(len(a.texts)))})
                )
                hand.die()
                deaths += 1
                break
            hand.report(hand.outcome(a))
            house.transport.worker("w1").mark_running(None)
        house.aggregate()
    j = house.job(job)
    assert (j.state, j.cells_ok, j.cells_error) == ("succeeded", 15, 1)
    assert house.labels(job) == [*expected(rows[:15]), "poison"]
    assert deaths <= 2 * 4 + 3
    assert_accounted_for(house, job, 16)


def test_cancelling_freezes_the_counts_and_frees_the_device(house: House) -> None:
    job = land(house.database, texts(300), TASKS, block_rows=64)
    house.work()
    house.tick()
    hand = house.hands[0]
    running = hand.take_all()
    assert running
    with house.database.transaction() as connection:
        assert end_job(connection, job, "cancelled", "asked")
    frozen = house.job(job)
    assert frozen.cells_ok + frozen.cells_error + frozen.cells_skipped == 300 * 2
    lost = dict(house.sql("SELECT id, worker FROM subtask WHERE state = 'lost'"))
    assert {lost[a.subtask] for a in running} == {hand.name}
    assert "" not in lost.values(), "each names the worker that had it"
    house.tick()
    hand.beat()
    assert hand.dropped == {a.key for a in running}
    for a in running:
        hand.report(hand.outcome(a))
    house.aggregate()
    after = house.job(job)
    assert (after.cells_ok, after.version) == (frozen.cells_ok, frozen.version)
    house.work()
    assert house.work() == 0


def test_a_deleted_job_leaves_nothing_and_its_late_outcomes_find_nothing(house: House) -> None:
    job = land(house.database, texts(100), TASKS, block_rows=32)
    house.work()
    house.tick()
    running = [(h, a) for h in house.hands for a in h.take_all()]
    with house.database.transaction() as connection:
        end_job(connection, job, "cancelled", "asked")
        assert delete_job(connection, job)
    for hand, a in running:
        hand.report(hand.outcome(a))
    house.aggregate()
    for table in (
        "job",
        "block",
        "block_pass",
        "piece",
        "subtask",
        "lease",
        "cells",
        "sealed_column",
        "block_column",
    ):
        assert house.sql(f"SELECT count(*) AS n FROM {table}")[0].n == 0, table


def test_a_standby_leads_when_the_leader_is_late_and_the_old_one_writes_nothing(house: House) -> None:
    job = land(house.database, texts(50), TASKS)
    house.tick()
    standby = Dispatcher(house.database, house.transport, house.dispatcher.settings)
    assert standby.step(house.now) == 0
    assert standby.epoch is None
    house.sql("UPDATE leader SET until = clock_timestamp() - interval '1 s'")
    standby.step(house.now)
    assert standby.epoch is not None
    assert house.dispatcher.epoch is not None
    assert standby.epoch > house.dispatcher.epoch
    house.expire_leases()
    house.transport.queues.clear()
    before = house.sql("SELECT count(*) AS n FROM subtask")[0].n
    house.now += 0.01
    with pytest.raises(NotLeading):
        house.dispatcher.step(house.now)
    assert house.sql("SELECT count(*) AS n FROM subtask")[0].n == before
    house.dispatcher = standby
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 50)


def test_the_lead_of_a_process_that_is_gone_is_taken_before_it_runs_out(house: House) -> None:
    house.tick()
    leads = house.dispatcher.epoch
    with subprocess.Popen(
        [sys.executable, "-c", "from scheduler.identity import own_name; print(own_name()); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout
        name = other.stdout.readline().strip()
        house.sql("UPDATE leader SET holder = :name", name=name)
        standby = Dispatcher(house.database, house.transport, house.dispatcher.settings)
        standby.step(house.now)
        assert standby.epoch is None, "it lives"
        other.kill()
    standby.step(house.now)
    assert standby.epoch is not None
    assert leads is not None
    assert standby.epoch > leads
    with pytest.raises(NotLeading):
        house.dispatcher._chores(leads, house.now)
    where, _, rest = name.rpartition(":")
    elsewhere = f"{where}:0000abcd-{rest.partition('-')[2]}"
    house.sql("UPDATE leader SET holder = :name, epoch = epoch + 1", name=elsewhere)
    another = Dispatcher(house.database, house.transport, standby.settings)
    another.step(house.now)
    assert another.epoch is None, "of a process elsewhere nothing is known"


def test_after_a_restore_of_an_older_dump_the_lead_is_taken_in_a_later_epoch_all_the_same(
    house: House,
) -> None:
    house.tick()
    before = house.dispatcher.epoch
    assert before is not None
    house.sql("UPDATE leader SET epoch = 3, until = '-infinity'")
    restored = Dispatcher(house.database, house.transport, house.dispatcher.settings)
    restored.step(house.now)
    assert restored.epoch is not None
    # Equal within one second, and a worker obeys that too.
    assert restored.epoch >= before
    ahead = restored.epoch + 3600
    house.sql(f"UPDATE leader SET epoch = {ahead}, until = '-infinity'")
    restored.step(house.now + 60)
    assert restored.epoch == ahead + 1, "nor does it go back where the clock did"


def refuse_all(house: House, *hands: Hand) -> None:
    """These workers cannot load what they were sent."""
    for hand in hands:
        for a in hand.take_all():
            failure = hand.outcome(
                a,
                verdict="failed",
                columns={},
                error=("cannot_load", "needs a GPU"),
                refused=TRUNK.digest,
            )
            hand.report(failure)
    house.aggregate()
    house.due()


@pytest.mark.parametrize("closed", [True, False])
def test_a_job_that_no_worker_can_load_fails_with_the_reason(house: House, closed: bool) -> None:
    job = land(house.database, texts(5), TASKS, close=closed)
    begun = house.now
    while house.job(job).state in ("loading", "running") and house.now < begun + 2 * GRACE_S:
        house.tick()
        refuse_all(house, *house.hands)
        house.now += 10
    j = house.job(job)
    assert j.state == "failed"
    assert j.reason == "no worker can load trunk@1: needs a GPU"
    assert j.cells_skipped == 10
    assert house.now > begun + GRACE_S


def test_a_job_outlives_a_restart_of_the_only_worker_that_can_load_its_model(house: House) -> None:
    rows = texts(50)
    refuses, able = house.hands
    house.hands = [refuses]
    house.tick()
    job = land(house.database, rows, TASKS)
    for _ in range(3):
        house.tick()
        refuse_all(house, refuses)
    able.boot = "boot-2"
    starts = Beat(worker=able.name, boot=able.boot, seq=0, state="starting")
    house.transport.worker(able.name).beat(starts)
    for _ in range(10):
        house.tick()
        house.now += 10
    assert house.job(job).state == "running"
    house.hands = [refuses, able]
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(rows)


def test_resubmitting_a_finished_job_runs_nothing(house: House) -> None:
    rows = texts(150)
    first = land(house.database, rows, TASKS, block_rows=64)
    house.finish(first)
    again = land(house.database, rows, TASKS, block_rows=64)
    j = house.job(again)
    assert (j.state, j.cells_reused, j.subtasks) == ("succeeded", 300, 0)
    assert house.labels(again) == house.labels(first)


def test_a_cancelled_job_resumes_where_it_was(house: House) -> None:
    rows = texts(300)
    first = land(house.database, rows, TASKS, block_rows=32)
    for _ in range(40):
        if house.job(first).blocks_done >= 3:
            break
        house.work()
    done = house.job(first).blocks_done
    with house.database.transaction() as connection:
        end_job(connection, first, "cancelled", "asked")
    again = land(house.database, rows, TASKS, block_rows=32)
    assert house.job(again).blocks_done == done
    assert house.finish(again).state == "succeeded"
    assert house.job(again).cells_reused == done * 32 * 2
    assert house.labels(again) == expected(rows)


def test_an_added_task_runs_only_its_own_column(house: House) -> None:
    rows = texts(100)
    house.finish(land(house.database, rows, {"size": TASKS["size"]}, block_rows=64))
    job = land(
        house.database, rows, {"size": TASKS["size"], "wide": Classify("length", scores=True)}, block_rows=64
    )
    house.tick()
    asked = {t.name for h in house.hands for a in h.take_all() for t in a.tasks}
    assert asked == {"wide"}
    assert house.job(job).cells_reused == 100


def test_a_broken_row_is_an_error_of_every_task_and_the_rest_is_done(house: House) -> None:
    rows: list[Any] = [*texts(9), Problem("text", "NUL", "text", "remove it", row=9)]
    job = land(house.database, rows, TASKS, block_rows=4)
    assert house.finish(job).state == "succeeded"
    j = house.job(job)
    assert (j.cells_ok, j.cells_error) == (18, 2)
    assert house.labels(job) == [*expected(rows[:9]), "bad_row"]
    assert_accounted_for(house, job, 10)


def hurt(kind: str) -> dict[str, Any]:
    """What a broken or spiteful engine may report."""
    match kind:
        case "NUL in an error's words":
            return {"verdict": "failed", "columns": {}, "error": ("engine", "a\0b")}
        case "NUL in a refusal":
            return {"verdict": "failed", "columns": {}, "error": ("x", "\0"), "refused": TRUNK.digest}
        case "NaN seconds":
            return {"usage": Usage(tokens=200, busy_s=float("nan"))}
        case "more tokens than there are":
            return {"usage": Usage(tokens=2**63, busy_s=1.0)}
        case _:
            return {"usage": Usage(tokens=2**39, computed_tokens=2**39, text_bytes=2**39, busy_s=9e6)}


@pytest.mark.parametrize(
    "kind",
    [
        "NUL in an error's words",
        "NUL in a refusal",
        "NaN seconds",
        "more tokens than there are",
        "much of everything",
    ],
)
def test_no_outcome_can_stop_the_aggregator(house: House, kind: str) -> None:
    hurtful = land(house.database, texts(5), TASKS)
    healthy = land(house.database, texts(50), TASKS)
    house.tick()
    for hand in house.hands:
        for a in hand.take_all():
            hand.report(hand.outcome(a, **(hurt(kind) if a.job == str(hurtful) else {})))
    house.aggregate()
    for _ in range(3):
        house.due()
        house.work()
        house.expire_leases()
    assert house.finish(healthy).state == "succeeded"
    assert_accounted_for_all(house, healthy, 50)


def test_what_cannot_be_read_is_buried_and_its_neighbours_are_recorded(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    house.tick()
    stranger = house.transport.worker("w9")
    [hand, *_] = house.hands
    taken = [a for h in house.hands for a in h.take_all()]
    real = hand.outcome(taken[0])
    bombs = [pack(bytes(300 << 20)), b"\x28\xb5\x2f\xfd"]
    unreadable = [b"", b"garbage", real.encode()[:-9], *bombs]
    strange = [
        replace(real, subtask=2**63 - 1, attempt=2**15 - 1),
        replace(real, nonce="\0", worker="\0" * 999, boot="\0"),
    ]
    unreadable += [pack(unwrap(real.encode()) | {"subtask": number}) for number in (2**63, -1)]
    for body in [*unreadable, *(o.encode() for o in strange)]:
        stranger.report(taken[0].subtask, taken[0].attempt, body)
    for a in taken:
        hand.report(hand.outcome(a))
    house.aggregate()
    assert len(house.transport.buried) == len(unreadable)
    assert house.sql("SELECT count(*) AS n FROM lease")[0].n == 0
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def test_an_outcome_that_nothing_can_be_done_with_is_dropped_and_its_rows_are_rescued(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = land(house.database, texts(20), TASKS)
    house.tick()
    taken = [(h, a) for h in house.hands for a in h.take_all()]
    hurtful = taken[0][1].subtask

    def breaks(database: Database, outcomes: list[Outcome]) -> Recorded:
        if any(o.subtask == hurtful for o in outcomes):
            raise ValueError("nobody foresaw this")
        return record(database, outcomes)

    monkeypatch.setattr("scheduler.aggregator.record", breaks)
    for hand, a in taken:
        hand.report(hand.outcome(a))
    house.aggregate()
    assert house.transport.outcome_backlog() == 0
    assert house.sql("SELECT subtask_id FROM lease") == [(hurtful,)]
    house.expire_leases()
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def assert_accounted_for_all(house: House, job: UUID, rows: int) -> None:
    j = house.job(job)
    assert j.cells_ok + j.cells_error + j.cells_skipped == rows * j.n_tasks


def test_a_head_that_cannot_be_attached_fails_its_own_job_and_no_other(house: House) -> None:
    register(house.database, replace(HEAD, name="broken", labels=("a", "b")))
    broken = land(house.database, texts(5), {"x": Classify("broken")})
    healthy = land(house.database, texts(5), {"size": Classify("length")}, tenant="another")
    while house.job(broken).state == "running" and house.now < 2 * GRACE_S:
        house.tick()
        for hand in house.hands:
            for a in hand.take_all():
                if a.job == str(broken):
                    refused = a.tasks[0].manifest.digest
                    error = ("cannot_load", "broken@1: its weights are missing")
                    hand.report(hand.outcome(a, verdict="failed", columns={}, error=error, refused=refused))
                else:
                    hand.report(hand.outcome(a))
        house.aggregate()
        house.due()
        house.now += 10
    assert house.job(healthy).state == "succeeded"
    j = house.job(broken)
    assert (j.state, "broken@1" in j.reason) == ("failed", True)


def test_a_pause_of_redis_condemns_nobody(house: House) -> None:
    job = land(house.database, ["one row"], {"size": Classify("length")})
    house.hands.pop()
    [hand] = house.hands
    for _ in range(4):
        house.tick()
        for a in hand.take_all():
            house.transport.worker("w1").mark_running(Running(boot=hand.boot, rows={a.key: (0,)}))
        house.now += 20
        house.expire_leases()
        house.dispatcher.step(house.now)
        house.now += 5
        house.dispatcher.step(house.now)
    house.transport.worker("w1").mark_running(None)
    hand.holding.clear()
    assert house.finish(job).state == "succeeded"
    assert house.job(job).cells_ok == 1


def test_cancelling_counts_only_cells_that_can_be_read(house: House) -> None:
    job = land(house.database, texts(64), TASKS, block_rows=64)
    house.hands.pop()
    house.tick()
    [hand] = house.hands
    first = hand.take_all()[0]
    hand.report(hand.outcome(first))
    house.aggregate()
    with house.database.transaction() as connection:
        end_job(connection, job, "cancelled", "asked")
    j = house.job(job)
    readable = house.sql("SELECT count(*) AS n FROM results WHERE job_id = :job AND status = 'ok'", job=job)[
        0
    ].n
    assert (j.cells_ok, j.cells_ok + j.cells_skipped) == (readable, 128)
    assert house.sql("SELECT count(*) AS n FROM cells")[0].n == 0


def test_work_is_not_sent_while_outcomes_pile_up(house: House) -> None:
    land(house.database, texts(50), TASKS)
    house.transport.entries.update({f"0-{i}": ((i, 1), b"") for i in range(1001)})
    assert house.tick() == 0
    house.transport.entries.clear()
    assert house.tick() > 0


def test_a_suspect_with_a_retriable_error_stays_alone(house: House) -> None:
    job = land(house.database, ["suspect"], {"size": Classify("length")})
    house.hands.pop()
    [hand] = house.hands
    house.tick()
    [a] = hand.take_all()
    house.transport.worker("w1").mark_running(Running(boot=hand.boot, rows={a.key: (0,)}))
    hand.die()
    house.tick()
    house.due()
    house.tick()
    [a] = hand.take_all()
    assert a.exclusive
    again = replace(
        column(["suspect"]), status=bytes([ERROR]), errors={0: CellError("out_of_memory", "", retriable=True)}
    )
    hand.report(hand.outcome(a, columns={"size": again}))
    house.aggregate()
    assert house.sql("SELECT exclusive FROM piece WHERE job_id = :job", job=job)[0].exclusive


# -- leases, clones and recalls, between the dispatcher's decision and its transaction ---------------


def led(house: House) -> int:
    """The epoch in which the house's dispatcher leads; its workers are not heard, so it sends nothing itself."""
    house.dispatcher.step(house.now)
    assert house.dispatcher.epoch is not None
    return house.dispatcher.epoch


def frontier(house: House, job: UUID, rows: int = 1000) -> Frontier:
    with house.database.transaction() as connection:
        return frontier_of(connection, str(job), 0, Lengths(), rows=rows)


def cut(house: House, job: UUID, *ranges: tuple[int, int, int], worker: str = "w1") -> Cut:
    """A sub-task of these (block, lo, hi), as the dispatcher would have decided it."""
    blocks = {b.number: b for b in frontier(house, job).blocks}
    return Cut(
        job=str(job),
        pass_number=0,
        worker=worker,
        boot="boot-1",
        device="hand",
        device_kind="cpu",
        predicted_s=0.5,
        carved=Carved(
            ranges=tuple(Range(b, lo, hi, blocks[b].bytes_between(lo, hi)) for b, lo, hi in ranges),
            todo=0b11,
        ),
    )


def lease(house: House, *cuts: Cut) -> list[Leased]:
    return leases.lease(house.database, led(house), cuts, 8.0)


def clone(house: House, *subtasks: int, worker: str = "w2") -> list[Leased]:
    asked = [
        SecondLease(
            subtask=s, worker=worker, boot="boot-1", device="hand", device_kind="cpu", predicted_s=0.25
        )
        for s in subtasks
    ]
    return leases.clone(house.database, led(house), asked, 8.0)


def held(house: House) -> list[Held]:
    with house.database.transaction() as connection:
        return sorted(leases.held(connection), key=lambda h: h.key)


def send(house: House, *leased: Leased) -> list[Assignment]:
    """Publish, and let each worker take what is its."""
    house.transport.publish_all(Payloads(house.database, Manifests()).assignments(leased))
    return [a for hand in house.hands for a in hand.take_all()]


def assert_each_row_is_in_one_place(house: House, job: UUID) -> None:
    """Beyond the cursor, in a piece, in one open sub-task, or done; and the pass' counters say the same."""
    [there] = house.sql(
        "SELECT n_rows, coalesce((SELECT sum(n - cursor) FROM block_pass WHERE job_id = :job), 0) AS uncarved,"
        " coalesce((SELECT sum(hi - lo) FROM piece WHERE job_id = :job), 0) AS pieces,"
        " coalesce((SELECT sum(n_rows) FROM subtask WHERE job_id = :job AND state = 'open'), 0) AS open,"
        " coalesce((SELECT sum(done) FROM block_pass WHERE job_id = :job), 0) AS done,"
        " (SELECT sum(rows_waiting) FROM pass WHERE job_id = :job) AS waiting,"
        " (SELECT sum(bytes_waiting) FROM pass WHERE job_id = :job) AS bytes,"
        " (SELECT sum(bytes) FROM block WHERE job_id = :job) AS all_bytes,"
        " coalesce((SELECT sum(bytes) FROM subtask WHERE job_id = :job AND state IN ('open', 'done')), 0) AS taken"
        " FROM job WHERE id = :job",
        job=job,
    )
    assert there.uncarved + there.pieces + there.open + there.done == there.n_rows
    assert there.waiting == there.uncarved + there.pieces
    assert there.bytes + there.taken == there.all_bytes


def test_sub_tasks_of_one_step_are_leased_in_order_each_with_its_own_nonce(house: House) -> None:
    job = land(house.database, texts(100), TASKS, block_rows=50)
    leased = lease(
        house,
        cut(house, job, (0, 0, 20)),
        cut(house, job, (0, 20, 50), (1, 0, 10), worker="w2"),
        cut(house, job, (1, 10, 11)),
    )
    assert [(one.worker, one.attempt, one.carved.rows) for one in leased] == [
        ("w1", 1, 20),
        ("w2", 1, 40),
        ("w1", 1, 1),
    ]
    assert [one.subtask for one in leased] == sorted({one.subtask for one in leased})
    assert len({one.nonce for one in leased}) == 3
    now = held(house)
    assert [h.key for h in now] == [(one.subtask, 1) for one in leased]
    assert [(h.job, h.pass_number, h.n_rows, h.bytes, h.clone) for h in now] == [
        (job, 0, one.carved.rows, one.carved.bytes, False) for one in leased
    ]
    assert all(0 <= h.age_s < 5 for h in now)
    with house.database.transaction() as connection:
        assert leases.due(connection, 3.0) == {}
        assert leases.due(connection, 8.0) == {h.key: False for h in now}
    assert_each_row_is_in_one_place(house, job)
    house.transport.publish_all(Payloads(house.database, Manifests()).assignments(leased))
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 100)


def test_a_job_that_ended_between_decision_and_lease_gets_none_and_the_others_theirs(house: House) -> None:
    ended, going = (land(house.database, texts(20), TASKS) for _ in range(2))
    cuts = [cut(house, ended, (0, 0, 10)), cut(house, going, (0, 0, 10))]
    with house.database.transaction() as connection:
        end_job(connection, ended, "cancelled", "asked")
    assert [one.job for one in lease(house, *cuts)] == [str(going)]
    assert house.sql("SELECT count(*) AS n FROM subtask WHERE job_id = :job", job=ended)[0].n == 0
    assert_each_row_is_in_one_place(house, going)


def test_a_stale_cut_is_left_out_whole_and_its_neighbours_are_not(house: House) -> None:
    job = land(house.database, texts(60), TASKS, block_rows=20)
    first, then = cut(house, job, (0, 0, 5)), cut(house, job, (0, 5, 20))
    stale = [cut(house, job, (0, 5, 9)), cut(house, job, (2, 0, 4), (0, 0, 5)), cut(house, job, (1, 3, 9))]
    sound = cut(house, job, (2, 0, 20))
    leased = lease(house, first, then, *stale, sound)
    assert [one.carved for one in leased] == [first.carved, then.carved, sound.carved]
    assert_each_row_is_in_one_place(house, job)
    assert lease(house, first, then, sound) == []
    assert lease(house) == []
    assert_each_row_is_in_one_place(house, job)


def test_a_piece_is_eaten_once(house: House) -> None:
    job = land(house.database, texts(30), TASKS)
    lease(house, cut(house, job, (0, 0, 10)), cut(house, job, (0, 10, 20)))
    assert leases.recall(house.database, led(house), held(house)) == 2
    one, other = frontier(house, job).pieces
    base = cut(house, job, (0, 20, 30))
    both = replace(base, carved=Carved(ranges=(one.range, other.range), todo=0b11, pieces=(one.id, other.id)))
    again = replace(base, carved=Carved(ranges=(other.range,), todo=0b11, pieces=(other.id,)))
    assert [found.carved for found in lease(house, both, again)] == [both.carved]
    assert lease(house, again, both) == []
    assert frontier(house, job).pieces == []
    assert_each_row_is_in_one_place(house, job)


def test_a_piece_of_another_job_is_not_eaten(house: House) -> None:
    job, another = (land(house.database, texts(20), TASKS) for _ in range(2))
    lease(house, cut(house, job, (0, 0, 10)))
    leases.recall(house.database, led(house), held(house))
    [piece] = frontier(house, job).pieces
    strange = replace(
        cut(house, another, (0, 0, 5)), carved=Carved(ranges=(piece.range,), todo=0b11, pieces=(piece.id,))
    )
    assert lease(house, strange) == []
    assert_each_row_is_in_one_place(house, job)
    assert_each_row_is_in_one_place(house, another)


def test_the_frontier_reads_as_many_blocks_as_are_asked_for(house: House) -> None:
    job = land(house.database, texts(100), TASKS, block_rows=10)
    assert [b.number for b in frontier(house, job, rows=25).blocks] == [0, 1, 2]
    lease(house, cut(house, job, (0, 0, 10), (1, 0, 7)))
    blocks = frontier(house, job, rows=4).blocks
    assert [(b.number, b.cursor, b.n) for b in blocks] == [(1, 7, 10), (2, 0, 10)]
    assert [b.bytes_between(0, 10) for b in frontier(house, job).blocks] == [
        row.bytes
        for row in house.sql(
            "SELECT bytes FROM block WHERE job_id = :job AND number > 0 ORDER BY number", job=job
        )
    ]


def test_a_clone_runs_beside_the_first_and_whoever_answers_first_is_believed(house: House) -> None:
    rows = texts(20)
    job = land(house.database, rows, TASKS)
    [first] = lease(house, cut(house, job, (0, 0, 20)))
    [second] = clone(house, first.subtask)
    assert (second.subtask, second.attempt, second.worker) == (first.subtask, 2, "w2")
    assert second.nonce != first.nonce
    assert second.carved.ranges == first.carved.ranges
    assert [h.clone for h in held(house)] == [False, True]
    assert house.sql("SELECT DISTINCT device, device_kind FROM lease") == [("hand", "cpu")]
    assert_each_row_is_in_one_place(house, job)
    original, copy = send(house, first, second)
    assert replace(copy, attempt=1, nonce=first.nonce, predicted_s=first.predicted_s) == original
    slow, fast = house.hands
    fast.report(fast.outcome(copy))
    house.aggregate()
    assert held(house) == []
    with house.database.transaction() as connection:
        found = leases.fates(connection, [(first.subtask, 1), (first.subtask, 2), (first.subtask + 1, 1)])
    done = (False, "done", "w2", pytest.approx(0.001))
    assert found == {
        (first.subtask, 1): done,
        (first.subtask, 2): done,
        (first.subtask + 1, 1): (False, "", "", 0.0),
    }
    version = house.job(job).version
    slow.report(slow.outcome(original))
    house.aggregate()
    j = house.job(job)
    assert (j.state, j.version, j.attempts_lost) == ("succeeded", version, 0)
    assert house.labels(job) == expected(rows)
    assert_accounted_for(house, job, 20)


def test_a_clone_that_fails_ends_both_and_the_rows_are_done_again(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    [first] = lease(house, cut(house, job, (0, 0, 20)))
    original, copy = send(house, first, *clone(house, first.subtask))
    slow, fast = house.hands
    fast.report(fast.outcome(copy, verdict="failed", columns={}, error=("engine", "it broke")))
    slow.report(slow.outcome(original))
    house.aggregate()
    assert (held(house), house.job(job).cells_ok) == ([], 0)
    assert_each_row_is_in_one_place(house, job)
    house.due()
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def test_nothing_is_cloned_twice_or_onto_its_own_worker_or_after_its_end(house: House) -> None:
    job = land(house.database, texts(30), TASKS)
    first, suspect, done = lease(
        house, cut(house, job, (0, 0, 10)), cut(house, job, (0, 10, 20)), cut(house, job, (0, 20, 30))
    )
    house.sql("UPDATE subtask SET exclusive = true WHERE id = :id", id=suspect.subtask)
    [hand, _] = house.hands
    for a in send(house, done):
        hand.report(hand.outcome(a))
    house.aggregate()
    assert clone(house, first.subtask, worker="w1") == []
    assert clone(house, suspect.subtask, done.subtask, done.subtask + 100) == []
    house.sql("UPDATE subtask SET exclusive = false, deaths = 1 WHERE id = :id", id=suspect.subtask)
    assert clone(house, suspect.subtask) == []
    assert len(clone(house, first.subtask, first.subtask)) == 1
    assert clone(house, first.subtask, worker="w3") == []
    assert clone(house) == []
    assert len(held(house)) == 3
    with house.database.transaction() as connection:
        end_job(connection, job, "cancelled", "asked")
    assert held(house) == []
    assert clone(house, suspect.subtask) == []


def test_when_one_of_two_leases_is_lost_the_other_goes_on(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    [first] = lease(house, cut(house, job, (0, 0, 20)))
    _, copy = send(house, first, *clone(house, first.subtask))
    slow, fast = house.hands
    slow.die()
    house.tick()
    assert [h.key for h in held(house)] == [copy.key]
    assert house.job(job).attempts_lost == 0
    fast.report(fast.outcome(copy))
    house.aggregate()
    assert house.job(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def test_recalled_rows_return_as_if_nothing_had_been_and_a_late_outcome_is_dropped(house: House) -> None:
    rows = texts(40)
    job = land(house.database, rows, TASKS, block_rows=20)
    leased = lease(house, cut(house, job, (0, 0, 20), (1, 0, 5)), cut(house, job, (1, 5, 20)))
    house.sql("UPDATE subtask SET tries = 2, deaths = 3 WHERE id = :id", id=leased[0].subtask)
    sent = send(house, *leased)
    assert leases.recall(house.database, led(house), held(house)) == 2
    assert held(house) == []
    assert house.sql("SELECT count(*) AS n FROM subtask")[0].n == 0
    assert house.job(job).attempts_lost == 0
    found = [(p.range.block, p.range.lo, p.range.hi, p.tries, p.deaths) for p in frontier(house, job).pieces]
    assert found == [(0, 0, 20, 2, 3), (1, 0, 5, 2, 3), (1, 5, 20, 0, 0)]
    assert_each_row_is_in_one_place(house, job)
    for a in sent:
        house.hands[0].report(house.hands[0].outcome(a))
    house.aggregate()
    assert house.job(job).cells_ok == 0
    assert_each_row_is_in_one_place(house, job)
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(rows)
    assert_accounted_for(house, job, 40)


def test_recalling_one_of_two_leases_leaves_the_other_and_recalling_twice_is_harmless(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    [first] = lease(house, cut(house, job, (0, 0, 20)))
    clone(house, first.subtask)
    both = held(house)
    assert leases.recall(house.database, led(house), both[1:]) == 0
    assert held(house)[0].key == both[0].key
    assert [one.attempt for one in clone(house, first.subtask)] == [3], "no attempt is counted twice"
    assert leases.recall(house.database, led(house), [*held(house), *both]) == 1
    assert leases.recall(house.database, led(house), both) == 0
    assert leases.recall(house.database, led(house), []) == 0
    assert_each_row_is_in_one_place(house, job)
    assert house.finish(job).state == "succeeded"
    assert_accounted_for(house, job, 20)


def test_what_was_answered_before_its_recall_stays_answered(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    leased = lease(house, cut(house, job, (0, 0, 20)))
    waiting = held(house)
    [hand, _] = house.hands
    for a in send(house, *leased):
        hand.report(hand.outcome(a))
    house.aggregate()
    assert leases.recall(house.database, led(house), waiting) == 0
    assert_accounted_for(house, job, 20)


def test_an_old_leader_leases_clones_and_recalls_nothing(house: House) -> None:
    job = land(house.database, texts(20), TASKS)
    [first] = lease(house, cut(house, job, (0, 0, 10)))
    more = cut(house, job, (0, 10, 20))
    old = led(house) - 1
    with pytest.raises(NotLeading):
        leases.lease(house.database, old, [more], 8.0)
    with pytest.raises(NotLeading):
        leases.clone(
            house.database,
            old,
            [
                SecondLease(
                    subtask=first.subtask,
                    worker="w2",
                    boot="b",
                    device="d",
                    device_kind="cpu",
                    predicted_s=1.0,
                )
            ],
            8.0,
        )
    with pytest.raises(NotLeading):
        leases.recall(house.database, old, held(house))
    assert [h.key for h in held(house)] == [(first.subtask, 1)]


def test_what_was_decided_and_could_not_be_leased_is_decided_anew(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = land(house.database, ["short", "rows"] * 10, TASKS)

    def away(*_: object) -> list[Leased]:
        raise StoreUnavailable("gone for a moment")

    with monkeypatch.context() as patched:
        patched.setattr("scheduler.dispatcher.leases.lease", away)
        with pytest.raises(StoreUnavailable):
            house.tick()
    assert house.finish(job).cells_ok == 20 * len(TASKS)


def waiting(house: House, limit: int) -> list[UUID]:
    with house.database.transaction() as connection:
        return [UUID(d.job) for d in demand(connection, house.now, Manifests(), limit)]


def test_many_waiting_jobs_of_one_tenant_hide_neither_another_tenant_nor_bulk_work(house: House) -> None:
    many = [land(house.database, texts(20), TASKS) for _ in range(12)]
    bulk = [land(house.database, texts(20), TASKS, priority=2) for _ in range(2)]
    other = land(house.database, texts(20), TASKS, tenant="other")
    urgent = land(house.database, texts(20), TASKS, priority=0)
    assert waiting(house, 500) == [urgent, *many, other, *bulk]
    assert waiting(house, 4) == [urgent, many[0], other, bulk[0]]
    assert waiting(house, 6) == [urgent, *many[:2], other, *bulk]
    assert waiting(house, 8) == [urgent, *many[:4], other, *bulk]


def test_whoever_comes_after_more_jobs_than_a_step_looks_at_is_served_all_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.facts.demand", partial(demand, limit=4))
    rows = texts(60)
    many = [land(house.database, rows, TASKS) for _ in range(12)]
    bulk = land(house.database, rows, TASKS, priority=2)
    other = land(house.database, rows, TASKS, tenant="other")
    ended: list[UUID] = []
    while len(ended) < 14:
        assert house.work(), "something waits, and nobody works for it"
        ended += [j for j in (*many, bulk, other) if j not in ended and house.job(j).state == "succeeded"]
    assert ended.index(other) < 4
    assert ended.index(bulk) < 12


def test_an_outcome_of_few_rows_is_recorded_in_three_round_trips(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a few rows cost beside the model is, above all, statements: none may come back unseen."""
    job = land(house.database, texts(3), TASKS)
    # As in an open job, whose columns nobody uses again.
    house.sql("UPDATE block SET keys = '{}' WHERE job_id = :job RETURNING 1", job=job)
    house.tick()
    [(hand, [first])] = [(hand, taken) for hand in house.hands if (taken := hand.take_all())]
    outcome = hand.outcome(first)
    # So that what is remembered of the pass is there, as in a job of more than one outcome.
    with house.database.transaction() as connection:
        task_shapes(connection, job, 0)
    #: For each statement whether it had a round trip to itself.
    asked: list[bool] = []
    trips: list[int] = []
    pipeline = psycopg.Connection.pipeline

    def counted(connection: Any) -> Any:
        trips.append(len(asked))
        return pipeline(connection)

    monkeypatch.setattr(psycopg.Connection, "pipeline", counted)
    event.listen(
        house.database.engine,
        "before_cursor_execute",
        lambda _, cursor, *__: asked.append(cursor is not None),
    )
    done = record(house.database, [outcome])
    assert (done.accepted, done.sealed) == (1, 2)
    succeeds = 1  # and an open job never does
    assert (len(asked), asked.count(True), len(trips)) == (10 + succeeds, 0, 3)
