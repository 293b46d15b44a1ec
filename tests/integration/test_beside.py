"""What the leader does beside its step: full steps are sent there, and many leases are extended; nothing else differs."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

import scheduler.dispatcher
from motet.protocol.transport import TransportLost
from motet.protocol.wire import Assignment
from scheduler.store import leases
from scheduler.store.words import SILENCE
from tests.integration.landing import land
from tests.integration.test_protocol import TASKS, House, assert_accounted_for, expected, house, texts

__all__ = ["house"]


@pytest.fixture(autouse=True)
def steps_are_soon_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sub-tasks; one lease is many, and so is one worker."""
    monkeypatch.setattr(scheduler.dispatcher, "MOST_PER_STEP", 2)
    monkeypatch.setattr(scheduler.dispatcher, "_MANY_LEASES", 1)
    monkeypatch.setattr(scheduler.dispatcher, "_MANY_WORKERS", 1)


def names_of_threads(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> set[str]:
    """On which threads this is called from now on, by the beginning of their names."""
    names: set[str] = set()
    act = getattr(owner, method)

    def noted(*arguments: Any) -> Any:
        names.add(threading.current_thread().name.split("_")[0])
        return act(*arguments)

    monkeypatch.setattr(owner, method, noted)
    return names


def test_a_job_of_full_steps_is_answered_whole(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    senders = names_of_threads(monkeypatch, house.transport, "publish_all")
    extenders = names_of_threads(monkeypatch, leases, "extend")
    rows = texts(300)
    job = land(house.database, rows, TASKS, block_rows=64)
    house.tick()
    [hand.take_all() for hand in house.hands]
    house.sql("UPDATE lease SET until = clock_timestamp() + interval '1 s'")
    house.tick()
    [lease] = house.sql("SELECT min(date_part('epoch', until - clock_timestamp())) AS left_s FROM lease")
    assert lease.left_s > 2, "those of attempts that beats tell of were extended"
    for hand in house.hands:
        for assignment in list(hand.holding.values()):
            hand.report(hand.outcome(assignment))
    house.aggregate()
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(rows)
    assert_accounted_for(house, job, 300)
    assert "beside" in senders
    assert extenders == {"beside"}


def test_a_beat_step_looks_when_all_is_sent(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    land(house.database, texts(300), TASKS)
    house.tick()
    done: list[str] = []
    publish, hear = house.transport.publish_all, house.transport.hear

    def slowly(by_worker: Mapping[str, Sequence[Assignment]]) -> None:
        time.sleep(0.05)
        publish(by_worker)
        done.append("sent")

    def heard() -> Any:
        done.append("heard")
        return hear()

    monkeypatch.setattr(house.transport, "publish_all", slowly)
    monkeypatch.setattr(house.transport, "hear", heard)
    assert house.dispatcher.step(house.now, SILENCE) == 2
    assert done == [], "the step did not wait"
    house.tick()
    assert done[:2] == ["sent", "heard"]


def test_what_could_not_be_sent_is_told_by_the_next_step_and_done_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts(300)
    job = land(house.database, rows, TASKS)
    house.tick()

    def lost(_: object) -> None:
        raise TransportLost("the connection broke")

    with monkeypatch.context() as broken:
        broken.setattr(house.transport, "publish_all", lost)
        assert house.dispatcher.step(house.now, SILENCE) == 2
        with pytest.raises(TransportLost):
            house.tick()
    house.tick()
    house.expire_leases()
    assert house.finish(job).state == "succeeded"
    assert house.labels(job) == expected(rows)
    assert_accounted_for(house, job, 300)


def test_a_leader_that_stops_has_sent_all_that_it_leased(house: House) -> None:
    land(house.database, texts(300), TASKS)
    house.tick()
    house.dispatcher.step(house.now, SILENCE)
    house.dispatcher.stop()
    leased = house.sql("SELECT count(*) AS n FROM lease")[0].n
    assert sum(len(hand.take_all()) for hand in house.hands) == leased > 2
