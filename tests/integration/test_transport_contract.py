"""One contract, two transports: the in-memory one must be as strict as Redis."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from motet import transport
from motet.manifest import Manifest
from motet.transport import (
    Entry,
    Lag,
    MemoryTransport,
    RedisTransport,
    RedisWorkerTransport,
    SchedulerTransport,
    TransportLost,
    WorkerTransport,
)
from motet.wire import Assignment, Beat, Control, Outcome, Running

MODEL = Manifest(name="m", version="1", engine="encoder", answers="vector")


@dataclass
class Pair:
    """Both sides of one transport, and a way to lose everything in it."""

    scheduler: SchedulerTransport
    worker: Callable[[str], WorkerTransport]
    empty: Callable[[], None]


@pytest.fixture(params=["memory", "redis"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    if request.param == "memory":
        shared = MemoryTransport()
        yield Pair(shared, shared.worker, shared.empty)
        return
    urls: Any = request.getfixturevalue("redis_urls")
    request.getfixturevalue("redis_url")
    scheduler = RedisTransport(urls.scheduler)
    workers: list[RedisWorkerTransport] = []

    def worker(name: str) -> RedisWorkerTransport:
        workers.append(RedisWorkerTransport(urls.worker, name))
        return workers[-1]

    def empty() -> None:
        for key in scheduler._redis.client.scan_iter("*"):
            scheduler._redis.client.delete(key)

    yield Pair(scheduler, worker, empty)
    scheduler.close()
    for w in workers:
        w.close()


def assignment(subtask: int, attempt: int = 1) -> Assignment:
    return Assignment(
        subtask=subtask,
        attempt=attempt,
        nonce="n",
        job="j",
        tenant="t",
        pass_kind="encoder m",
        model=MODEL,
        numerics="fast",
        max_tokens=0,
        tasks=(),
        texts=("a text that must not leave",),
    )


def outcome(subtask: int) -> bytes:
    return Outcome(subtask=subtask, attempt=1, nonce="n", worker="w", boot="b", verdict="failed").encode()


def read(pair: Pair, consumer: str = "c", reclaim_s: float = 60.0) -> list[Entry]:
    return pair.scheduler.read_outcomes(consumer, 10, 0.05, reclaim_s)


def test_a_beat_is_heard_and_answered_with_the_newest_control_word(pair: Pair) -> None:
    worker = pair.worker("w1")
    beat = Beat(worker="w1", boot="b", seq=1)
    assert worker.beat(beat) is None
    assert pair.scheduler.beats() == {"w1": beat}
    pair.scheduler.control({"w1": Control(epoch=1), "w2": Control(epoch=1)})
    pair.scheduler.control({"w1": Control(epoch=2, drop=((1, 1),))})
    assert worker.beat(beat) == Control(epoch=2, drop=((1, 1),))


def test_a_published_attempt_waits_in_its_workers_queue_with_its_payload(pair: Pair) -> None:
    pair.scheduler.publish_all({"w1": [assignment(1), assignment(2, attempt=3)]})
    assert pair.scheduler.queued("w1") == {(1, 1), (2, 3)}
    assert pair.scheduler.queued("w2") == set()
    raw = pair.worker("w1").fetch(2, 3)
    assert raw is not None
    assert Assignment.decode(raw) == assignment(2, attempt=3)
    assert pair.worker("w1").fetch(2, 1) is None


def test_the_messages_of_a_step_reach_every_worker_in_order(pair: Pair) -> None:
    pair.scheduler.publish_all({})
    pair.scheduler.publish_all({"w1": [assignment(1), assignment(3)], "w2": [assignment(2)], "w3": []})
    assert [pair.scheduler.queued(name) for name in ("w1", "w2", "w3")] == [{(1, 1), (3, 1)}, {(2, 1)}, set()]
    for name, subtask in (("w1", 1), ("w1", 3), ("w2", 2)):
        raw = pair.worker(name).fetch(subtask, 1)
        assert raw is not None
        assert Assignment.decode(raw) == assignment(subtask)


def test_what_redis_refuses_for_one_worker_is_sent_to_the_others(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_SENT_AT_ONCE", 1)
    scheduler = RedisTransport(redis_url)
    scheduler._redis.client.set(transport.queue_name("w1"), "no list")
    with pytest.raises(TransportLost):
        scheduler.publish_all({"w1": [assignment(1)], "w2": [assignment(2), assignment(3)]})
    assert scheduler.queued("w2") == {(2, 1), (3, 1)}
    scheduler.close()


def test_an_outcome_is_pending_until_it_is_acknowledged(pair: Pair) -> None:
    read(pair)
    pair.worker("w").report(7, 1, outcome(7))
    assert pair.scheduler.waiting_outcomes() == {(7, 1)}
    [entry] = read(pair)
    assert Outcome.decode(entry.body).subtask == 7
    assert read(pair) == []
    assert pair.scheduler.waiting_outcomes() == {(7, 1)}
    pair.scheduler.acknowledge([entry.id])
    assert pair.scheduler.waiting_outcomes() == set()
    assert pair.scheduler.outcome_backlog() == 0


def test_what_a_dead_aggregator_left_is_taken_over(pair: Pair) -> None:
    read(pair)
    pair.worker("w").report(7, 1, outcome(7))
    [first] = read(pair, "dead")
    [again] = read(pair, "alive", reclaim_s=0.0)
    assert again == first


def test_reporting_drops_the_payload(pair: Pair) -> None:
    pair.scheduler.publish_all({"w": [assignment(1)]})
    pair.worker("w").report(1, 1, outcome(1))
    assert pair.worker("w").fetch(1, 1) is None


def test_an_unreadable_entry_is_buried_not_read_again(pair: Pair) -> None:
    read(pair)
    pair.worker("w").report(1, 1, b"garbage")
    [entry] = read(pair)
    assert pair.scheduler.dead_letters() == 0
    pair.scheduler.bury(entry, "cannot decode")
    assert pair.scheduler.outcome_backlog() == 0
    assert pair.scheduler.dead_letters() == 1


def test_the_lag_is_the_age_of_the_oldest_entry_and_ends_with_it(pair: Pair) -> None:
    assert pair.scheduler.outcome_lag() == Lag(0, 0.0)
    worker = pair.worker("w")
    read(pair)
    worker.report(1, 1, outcome(1))
    [first] = read(pair)
    before = pair.scheduler.outcome_lag()
    worker.report(2, 1, outcome(2))
    time.sleep(0.02)
    both = pair.scheduler.outcome_lag()
    assert (before.entries, both.entries) == (1, 2)
    assert both.oldest_s > before.oldest_s, "read is not yet recorded: it goes on waiting"
    pair.scheduler.acknowledge([first.id])
    assert pair.scheduler.outcome_lag().entries == 1
    [second] = read(pair)
    pair.scheduler.acknowledge([second.id])
    assert pair.scheduler.outcome_lag() == Lag(0, 0.0)


def test_the_rows_of_a_running_micro_batch_outlive_their_process(pair: Pair) -> None:
    running = Running(boot="b", rows={(1, 1): (0, 4)})
    worker = pair.worker("w")
    worker.mark_running(running)
    assert pair.scheduler.running("w") == running
    worker.mark_running(None)
    assert pair.scheduler.running("w") is None


def test_identity_changes_when_everything_was_lost_and_work_goes_on(pair: Pair) -> None:
    before = pair.scheduler.identity()
    assert pair.scheduler.identity() == before
    read(pair)
    pair.empty()
    assert pair.scheduler.identity() != before
    pair.worker("w").report(7, 1, outcome(7))
    found = read(pair) or read(pair)
    assert [Outcome.decode(e.body).subtask for e in found] == [7]


def test_a_forgotten_worker_leaves_nothing(pair: Pair) -> None:
    worker = pair.worker("w1")
    worker.beat(Beat(worker="w1", boot="b", seq=1))
    pair.scheduler.publish_all({"w1": [assignment(1)]})
    pair.scheduler.forget("w1")
    assert pair.scheduler.beats() == {}
    assert pair.scheduler.queued("w1") == set()
    assert worker.fetch(1, 1) is None
