"""How long the leader rests: until a worker asks, rows come back, or the next beat step, and never less than a breath."""

from __future__ import annotations

from uuid import UUID

import pytest

from motet.protocol.manifest import Manifest
from motet.protocol.settings import Settings
from motet.protocol.transport import MemoryTransport
from scheduler.dispatcher import BEAT_STEP_S, MOST_PER_STEP, Dispatcher
from scheduler.policy.placing.records import Demand, WorkerState
from scheduler.policy.pressure import OUTCOMES, throttle
from scheduler.store.database import Database
from scheduler.store.words import SILENCE

MODEL = Manifest(name="m", version="1", engine="encoder", answers="vector", trunk="m", parameters=10**6)
NOW = 100.0


@pytest.fixture
def leader() -> Dispatcher:
    """It leads, has just heard all workers, and never asks its database."""
    dispatcher = Dispatcher(
        Database("postgresql+psycopg://nobody@localhost:1/none"), MemoryTransport(), Settings()
    )
    dispatcher.epoch, dispatcher._words, dispatcher._beat_at = 1, SILENCE, NOW + BEAT_STEP_S
    return dispatcher


def give_work(dispatcher: Dispatcher) -> None:
    """A worker is there, and rows wait for it."""
    dispatcher._placer.worker(
        WorkerState(name="w", boot="b", device_kind="cpu", device_name="d", engines=("encoder",)), NOW
    )
    dispatcher._placer.want(
        Demand(
            job=str(UUID(int=1)), pass_number=0, tenant="t", weight=1.0, priority=1, age=1, model_ids=frozenset(),
            model=MODEL, rows_waiting=1000, bytes_waiting=10**5,
        )
    )  # fmt: skip


def test_where_nothing_waits_it_rests_until_the_next_beat_step(leader: Dispatcher) -> None:
    assert leader.rest_s(NOW) == pytest.approx(BEAT_STEP_S)


def test_a_worker_that_asks_is_answered_after_a_breath(leader: Dispatcher) -> None:
    give_work(leader)
    assert 0 < leader.rest_s(NOW) <= 0.01


def test_under_full_back_pressure_it_rests_until_the_next_beat_step(leader: Dispatcher) -> None:
    give_work(leader)
    leader._open_share = throttle(OUTCOMES[1], 0.0)
    assert leader.rest_s(NOW) == pytest.approx(BEAT_STEP_S)
    assert leader._decide(NOW) == [], "and it asks nothing of Postgres"


def test_between_the_limits_it_sends_a_part(leader: Dispatcher) -> None:
    leader._open_share = throttle(sum(OUTCOMES) // 2, 0.0)
    assert leader._most_to_send() == pytest.approx(MOST_PER_STEP / 2, abs=1)


def test_rows_that_were_put_off_are_looked_at_when_they_may_be_carved(leader: Dispatcher) -> None:
    leader._later[UUID(int=1)] = NOW + 0.1
    assert leader.rest_s(NOW) == pytest.approx(0.1)


def test_what_it_changed_itself_is_read_after_a_breath(leader: Dispatcher) -> None:
    leader._touched.add(UUID(int=1))
    assert 0 < leader.rest_s(NOW) <= 0.01


def test_a_standby_looks_at_its_own_pace(leader: Dispatcher) -> None:
    leader.epoch = None
    assert leader.rest_s(NOW) == leader.settings.tick_s
