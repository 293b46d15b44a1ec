"""What a one-row job costs the leader in round trips to Postgres: each is a wait in the way of one row."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from scheduler.store import leases
from scheduler.store.words import Words
from tests.integration.landing import land
from tests.integration.test_protocol import TASKS, House, house

__all__ = ["house"]


@contextmanager
def round_trips(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What Postgres is asked meanwhile by this thread, a text for all that is asked at once; COMMIT included."""
    asked: list[str] = []
    pipelines: list[object] = []
    me = threading.get_ident()
    execute, command = psycopg.Cursor.execute, psycopg.Connection._exec_command

    def note(connection: psycopg.Connection[Any], query: str) -> None:
        if threading.get_ident() != me:
            return
        pipeline = connection._pipeline
        if query.startswith("BEGIN") or (pipeline is not None and any(pipeline is one for one in pipelines)):
            asked[-1] += "; " + query
        else:
            asked.append(query)
        if pipeline is not None:
            pipelines.append(pipeline)

    def executed(self: Any, query: Any, *arguments: Any, **more: Any) -> Any:
        note(self.connection, " ".join(str(query).split()))
        return execute(self, query, *arguments, **more)

    def commanded(self: Any, query: Any, *arguments: Any, **more: Any) -> Any:
        note(self, bytes(query).decode())
        return command(self, query, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Cursor, "execute", executed)
        patch.setattr(psycopg.Connection, "_exec_command", commanded)
        yield asked


def test_a_one_row_job_costs_the_leader_seven_round_trips(
    house: House,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two to read what waits, three to lease it, one to read what is sent, and one to see that it has ended."""
    # The models are known, the workers too, and the leader has beaten a moment ago.
    house.finish(land(house.database, ["before"], TASKS))
    house.tick()
    job = land(house.database, ["one row"], TASKS)
    with round_trips(monkeypatch) as sent:
        assert house.dispatcher.step(house.now, Words(landed=frozenset({job}))) == 1
    [a] = [a for hand in house.hands for a in hand.take_all()]
    assert len(sent) == 6, "\n".join(sent)
    [hand] = [hand for hand in house.hands if hand.holding]
    hand.report(hand.outcome(a))
    house.aggregate()
    with round_trips(monkeypatch) as sent:
        house.dispatcher.step(house.now, Words(done=frozenset({a.subtask}), done_of=frozenset({job})))
    assert len(sent) == 1, "\n".join(sent)


def test_leases_are_extended_beside_one_that_is_about_to_be_deleted(house: House) -> None:
    """An aggregator deletes leases in its own order: to wait for one while holding another could be a deadlock."""
    house.tick()
    for name in ("one", "another"):
        land(house.database, [name], TASKS)
    house.tick()
    with house.database.reading() as connection:
        keys = leases.held_keys(connection, 0, 10)
    assert len(keys) == 2
    house.expire_leases()
    epoch = house.dispatcher.epoch
    assert epoch is not None
    with house.database.transaction() as aggregator:
        aggregator.execute(text("DELETE FROM lease WHERE subtask_id = :id"), {"id": keys[0][0]})
        leases.extend(house.database, epoch, keys, 8.0)
    with house.database.reading() as connection:
        assert [h.key for h in leases.held(connection)] == keys[1:]
        assert leases.due(connection, 4.0) == {}
