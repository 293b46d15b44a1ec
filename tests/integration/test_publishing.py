"""What the leader has done beside its step: a process publishes full steps, a thread extends many leases."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import text

import scheduler.dispatcher
import scheduler.publishing
from motet.local.valkey import ValkeyUrls
from motet.protocol.settings import Settings
from motet.protocol.transport import MemoryTransport, RedisTransport, RedisWorkerTransport, TransportLost
from motet.protocol.wire import Assignment, Beat
from scheduler.dispatcher import Dispatcher
from scheduler.policy.carve import Carved, Range
from scheduler.publishing import Publisher, serve, tell
from scheduler.store import leases
from scheduler.store.database import Database
from scheduler.store.leases import Leased, LeaseKey
from scheduler.store.words import SILENCE
from tests.integration.landing import HEAD, TRUNK, land, register
from tests.integration.test_protocol import TASKS, House, assert_accounted_for, expected, texts
from tests.integration.test_protocol import house as plain_house  # noqa: F401 - a fixture

WORKERS = ("w1", "w2")


@pytest.fixture(autouse=True)
def little_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of two sub-tasks is full; one lease is many, and so is one worker."""
    monkeypatch.setattr(scheduler.dispatcher, "MOST_PER_STEP", 2)
    monkeypatch.setattr(scheduler.dispatcher, "_MANY_LEASES", 1)
    monkeypatch.setattr(scheduler.dispatcher, "_MANY_WORKERS", 1)


@pytest.fixture
def house(plain_house: House) -> House:  # noqa: F811
    return plain_house


def test_leases_that_are_extended_beside_the_step_are_extended_when_it_ends(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    extend = leases.extend

    def noted(*arguments: Any) -> None:
        threads.append(threading.current_thread().name)
        extend(*arguments)

    monkeypatch.setattr(leases, "extend", noted)
    rows = texts(300)
    job = land(house.database, rows, TASKS, block_rows=64)
    house.tick()
    for hand in house.hands:
        hand.take_all()
    house.sql("UPDATE lease SET until = clock_timestamp() + interval '1 s'")
    house.tick()
    [lease] = house.sql("SELECT min(date_part('epoch', until - clock_timestamp())) AS left_s FROM lease")
    assert lease.left_s > 2
    assert [name.split("_")[0] for name in threads] == ["beside"]
    for hand in house.hands:
        for assignment in list(hand.holding.values()):
            hand.report(hand.outcome(assignment))
    house.aggregate()
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(rows)
    assert_accounted_for(house, job, 300)


@dataclass
class Led:
    """A leader over real servers whose publisher is ready, and a job of many sub-tasks for two workers."""

    database: Database
    transport: RedisTransport
    dispatcher: Dispatcher
    publisher: Publisher
    now: float = 0.0

    def look(self) -> int:
        """A beat step."""
        self.now += 1.0
        return self.dispatcher.step(self.now, SILENCE)

    def begin(self) -> None:
        """A full step, which is left to the publisher."""
        assert self.dispatcher.step(self.now, SILENCE) == 2
        assert self.publisher._under_way

    def all_is_sent(self) -> bool:
        with self.database.reading() as connection:
            leased = {(s, a) for s, a in connection.execute(text("SELECT subtask_id, attempt FROM lease"))}
        queued: list[LeaseKey] = [k for keys in self.transport.queued_at(WORKERS).values() for k in keys]
        return len(leased) > 2 and set(queued) == leased


@pytest.fixture
def led(database_url: str, redis_url: str, redis_urls: ValkeyUrls) -> Iterator[Led]:
    database, transport = Database(database_url), RedisTransport(redis_urls.scheduler)
    register(database, TRUNK, HEAD)
    publisher = Publisher({"MOTET_DATABASE_URL": database_url, "MOTET_REDIS_URL": redis_urls.scheduler})
    settings = Settings(subtask_s=0.25, depth=10, ahead_s=60.0, leader_lease_s=60.0)
    dispatcher = Dispatcher(database, transport, settings, publisher=publisher)
    for name in WORKERS:
        RedisWorkerTransport(redis_urls.worker, name).beat(
            Beat(worker=name, boot="b", seq=1, engines=("encoder",), device_name="hand")
        )
    led = Led(database, transport, dispatcher, publisher)
    dispatcher.step(led.now)
    led.look()
    land(database, texts(400), TASKS, block_rows=64)
    dispatcher.step(led.now)
    deadline = time.monotonic() + 30
    while not publisher._is_ready():
        assert time.monotonic() < deadline, "the publisher does not start"
        time.sleep(0.02)
    yield led
    publisher.close()
    transport.close()
    database.close()


def test_full_steps_are_sent_when_the_next_one_is_judged_by_queues_and_when_the_leader_stops(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    led.begin()
    monkeypatch.setattr(led.dispatcher, "_was_emptied", lambda epoch, now: True)
    sent: list[bool] = []
    queued_at = led.transport.queued_at

    def noted(workers: Collection[str]) -> Any:
        sent.append(not led.publisher._under_way)
        return queued_at(workers)

    monkeypatch.setattr(led.transport, "queued_at", noted)
    led.look()
    assert sent[0], "of an emptied Redis nothing is judged that is still on its way"
    led.begin()
    led.begin()
    pid = led.publisher.pid
    assert pid is not None
    led.dispatcher.stop()
    assert led.all_is_sent()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_a_publisher_was_given_when_it_died_is_sent_by_the_leader(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = led.publisher.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    led.begin()
    os.kill(pid, signal.SIGKILL)
    assert led.dispatcher.step(led.now, SILENCE) == 2, "without it the step sends by itself"
    assert led.all_is_sent()
    assert led.publisher.pid is None
    monkeypatch.setattr(scheduler.publishing, "_AGAIN_S", 0.0)
    led.look()
    assert led.publisher.pid not in (None, pid), "a beat step starts another one"


@dataclass
class Noted:
    """In place of payloads: keeps what they are asked for."""

    asked: list[Leased] = field(default_factory=list)

    def assignments(self, leased: Sequence[Leased]) -> dict[str, list[Assignment]]:
        self.asked += leased
        return {}


ONE = Leased(
    subtask=7, attempt=2, nonce="n", worker="w", job="j", pass_number=1, predicted_s=0.5, measured=True,
    carved=Carved(ranges=(Range(3, 0, 5, 40), Range(4, 2, 4, 8)), todo=5, exclusive=True),
)  # fmt: skip


class Away(MemoryTransport):
    """Redis does not answer, from when it is told."""

    away = False

    def publish_all(self, by_worker: Mapping[str, Sequence[Assignment]]) -> None:
        if self.away:
            raise TransportLost("the connection broke")
        super().publish_all(by_worker)


def test_trouble_of_the_publisher_is_the_leaders() -> None:
    transport, payloads, publisher = Away(), Noted(), Publisher()
    publisher._line, theirs = socket.socketpair()
    server = threading.Thread(target=serve, args=(theirs, transport, payloads))
    server.start()
    while not publisher._is_ready():
        time.sleep(0.001)
    assert publisher.begin([ONE])
    assert publisher.end() == ()
    assert payloads.asked == [ONE]
    transport.away = True
    assert publisher.begin([ONE])
    with pytest.raises(TransportLost):
        publisher.end()
    assert publisher.end() == (), "it is told once"
    publisher.close()
    server.join(10)
    assert not server.is_alive(), "it ends with its line"
    theirs.close()


def test_a_publisher_that_stands_still_is_not_waited_for() -> None:
    publisher = Publisher()
    publisher._line, theirs = socket.socketpair()
    publisher._line.settimeout(0.05)
    with theirs:
        assert not publisher.begin([ONE]), "it has not said that it is ready"
        tell(theirs, "")
        assert publisher.begin([ONE])
        assert publisher.end() == [ONE], "nobody knows whether it was sent"
        assert not publisher.begin([ONE])
