"""One contract, two transports: the in-memory one must be as strict as Redis."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from motet.local.valkey import Valkey
from motet.protocol.manifest import Manifest
from motet.protocol.transport import (
    OUTCOMES,
    WORKERS,
    Entry,
    Lag,
    MemoryTransport,
    RedisTransport,
    RedisWorkerTransport,
    SchedulerTransport,
    TransportLost,
    WorkerTransport,
    queue_name,
)
from motet.protocol.wire import Assignment, Beat, Control, Outcome, Running

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


def test_it_tells_whose_beat_is_new(pair: Pair) -> None:
    for name in ("w1", "w2", "w3"):
        pair.worker(name).beat(Beat(worker=name, boot="b", seq=1))
    first = pair.scheduler.hear()
    assert (first.beats.keys(), first.renewed) == ({"w1", "w2", "w3"}, {"w1", "w2", "w3"})
    assert pair.scheduler.hear().renewed == set()
    pair.worker("w1").beat(Beat(worker="w1", boot="b", seq=2**40))
    pair.worker("w2").beat(Beat(worker="w2", boot="b", seq=1, held=((1, 1),)))
    second = pair.scheduler.hear()
    assert second.renewed == {"w1", "w2"}
    assert second.beats["w2"].held == ((1, 1),)
    assert second.beats["w3"] is first.beats["w3"]
    pair.worker("w1").beat(Beat(worker="w1", boot="c", seq=2**40))
    third = pair.scheduler.hear()
    assert (third.renewed, third.beats["w1"].boot) == ({"w1"}, "c")


def test_queues_and_evidence_of_many_workers_are_read_at_once(pair: Pair) -> None:
    pair.scheduler.publish_all({"w1": [assignment(1), assignment(2)], "w2": [assignment(3)]})
    assert pair.scheduler.queued_at(["w2", "w1", "w3"]) == {
        "w1": {(1, 1), (2, 1)},
        "w2": {(3, 1)},
        "w3": set(),
    }
    running = Running(boot="b", rows={(1, 1): (0,)})
    pair.worker("w1").mark_running(running)
    assert pair.scheduler.running_at(["w1", "w2"]) == {"w1": running, "w2": None}
    assert (pair.scheduler.queued_at([]), pair.scheduler.running_at([])) == ({}, {})


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
    monkeypatch.setattr("motet.protocol.transport.scheduler._SENT_AT_ONCE", 1)
    scheduler = RedisTransport(redis_url)
    scheduler._redis.client.set(queue_name("w1"), "no list")
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


def test_what_a_reader_that_is_gone_left_is_inherited_at_once_and_once(pair: Pair) -> None:
    read(pair)
    for subtask in (7, 8):
        pair.worker("w").report(subtask, 1, outcome(subtask))
    left = read(pair, "dead")
    assert len(left) == 2
    time.sleep(0.35)
    assert pair.scheduler.inherit("heir", lambda _: False, 10) == [], "a live one keeps its entries"
    assert pair.scheduler.inherit("heir", lambda name: name == "dead", 10) == left
    assert pair.scheduler.inherit("late", lambda name: name == "dead", 10) == []
    pair.scheduler.acknowledge(e.id for e in left)
    assert pair.scheduler.outcome_backlog() == 0


def test_what_was_read_for_a_reader_that_never_had_the_answer_comes_back_to_it(pair: Pair) -> None:
    """Redis that stood still carries out what it finds on a line that its reader has given up."""
    read(pair)
    pair.worker("w").report(7, 1, outcome(7))
    lost = read(pair, "reader")
    assert read(pair, "reader") == [], "to Redis it is read"
    assert pair.scheduler.inherit("other", lambda _: False, 10) == []
    assert pair.scheduler.inherit("reader", lambda _: False, 10) == lost
    pair.scheduler.acknowledge(e.id for e in lost)
    assert pair.scheduler.inherit("reader", lambda _: False, 10) == []


def test_readers_that_are_gone_and_left_nothing_are_forgotten(redis_url: str) -> None:
    scheduler = RedisTransport(redis_url)
    scheduler.read_outcomes("dead", 10, 0.01, 60)
    scheduler.read_outcomes("alive", 10, 0.01, 60)
    time.sleep(0.35)
    scheduler.inherit("heir", lambda name: name == "dead", 10)
    assert scheduler.readers().keys() == {"alive"}
    scheduler.close()


def test_outcomes_wait_until_they_are_settled_whoever_has_read_them(pair: Pair) -> None:
    worker = pair.worker("w")
    for subtask in range(40):
        worker.report(subtask, 1, outcome(subtask))
    everything = {(subtask, 1) for subtask in range(40)}
    assert pair.scheduler.waiting_outcomes() == everything
    first = read(pair, "a")
    assert pair.scheduler.waiting_outcomes() == everything
    pair.scheduler.acknowledge(e.id for e in first[:4])
    worker.report(99, 1, outcome(99))
    assert pair.scheduler.waiting_outcomes() == everything - {(i, 1) for i in range(4)} | {(99, 1)}
    while entries := read(pair, "b"):
        pair.scheduler.acknowledge(e.id for e in entries)
    assert pair.scheduler.waiting_outcomes() == {(i, 1) for i in range(4, 10)}


def test_the_body_of_an_outcome_that_waits_is_read_once_however_often_one_asks(redis_url: str) -> None:
    scheduler = RedisTransport(redis_url)
    worker = RedisWorkerTransport(redis_url, "w")
    for subtask in range(100):
        worker.report(subtask, 1, outcome(subtask))

    def ranges() -> int:
        return int(scheduler._redis.client.info("commandstats").get("cmdstat_xrange", {"calls": 0})["calls"])

    assert len(scheduler.waiting_outcomes()) == 100
    scheduler.read_outcomes("c", 60, 0.01, 60)
    before = ranges()
    for _ in range(5):
        assert len(scheduler.waiting_outcomes()) == 100
    assert ranges() == before, "nothing has come behind the last one that is known"
    # A worker that was taken over can cut the stream; then those outcomes are lost, and their leases run out.
    scheduler._redis.client.xtrim(OUTCOMES, 0, approximate=False)
    assert len(scheduler.waiting_outcomes()) == 60, "those that were read are still with their reader"
    scheduler.close()
    worker.close()


def test_a_full_redis_still_gives_out_and_takes_back_what_is_in_it(tmp_path: Path) -> None:
    valkey = Valkey(tmp_path, maxmemory="8mb")
    urls = valkey.start()
    scheduler, worker = RedisTransport(urls.scheduler), RedisWorkerTransport(urls.worker, "w")
    try:
        before = scheduler.identity()
        scheduler.read_outcomes("c", 10, 0.01, 60)
        for subtask in (1, 2):
            worker.report(subtask, 1, b"garbage")
        for size in (200_000, 2_000, 1):
            with suppress(redis.OutOfMemoryError):
                for i in range(10_000):
                    scheduler._redis.client.set(f"filler {size} {i}", bytes(size))
        with pytest.raises(TransportLost):
            worker.report(3, 1, outcome(3))
        assert scheduler.identity() == before
        assert scheduler.waiting_outcomes() == {(1, 1), (2, 1)}
        for entry in scheduler.read_outcomes("c", 10, 0.01, 60):
            scheduler.bury(entry, "garbage")
        assert scheduler.outcome_backlog() == 0
        assert scheduler.dead_letters() == 0, "there is no room for them"
    finally:
        scheduler.close()
        worker.close()
        valkey.stop()


def test_messages_and_names_that_are_none_are_passed_over(redis_url: str) -> None:
    scheduler = RedisTransport(redis_url)
    client = scheduler._redis.client
    scheduler.publish_all({"w": [assignment(1)]})
    for message in (
        b"[" * 100_000,
        b'{"headers": {"motet": [1e999, 1]}}',
        b'{"headers": {"motet": 7}}',
        b"\xff",
    ):
        client.lpush(queue_name("w"), message)
    assert scheduler.queued("w") == {(1, 1)}
    client.sadd(WORKERS, b"\xff\xfe", b"", b"*", b"a\0b", *(f"none-{i}" for i in range(30)))
    client.lpush("motet:w:list:beat", "no beat")
    client.sadd(WORKERS, "list")
    RedisWorkerTransport(redis_url, "w").beat(Beat(worker="w", boot="b", seq=1, device_name="a\0b"))
    beats = scheduler.beats()
    assert beats.keys() == {"w"}
    assert "\0" not in beats["w"].device_name, "Postgres does not take it"
    for _ in range(2):
        scheduler.beats()
    assert client.smembers(WORKERS) == {b"w"}
    scheduler.close()


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


def test_differences_are_counted(pair: Pair) -> None:
    assert pair.scheduler.differences() == 0
    pair.scheduler.count_differences(2)
    pair.scheduler.count_differences(1)
    assert pair.scheduler.differences() == 3


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
