"""Health checks, against processes that work, have stopped working, or were never there."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.local.places import free_port
from motet.protocol.settings import Settings
from motet.protocol.transport import RedisTransport, RedisWorkerTransport
from motet.protocol.wire import Beat
from scheduler import health
from scheduler.__main__ import main as scheduler
from scheduler.aggregator import Aggregator
from scheduler.store.database import Database
from scheduler.store.leadership import lead, resign
from tests.integration.api_house import a_house
from workers.__main__ import main as workers


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A process' ``main`` sets up logging for good; its stream ends with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_dispatcher_is_well_while_somebody_leads(database_url: str) -> None:
    settings = Settings(database_url=database_url)
    with pytest.raises(health.Unwell, match="no dispatcher leads"):
        health.check("dispatch", settings)

    database = Database(database_url, pool=1)
    epoch = lead(database, "me", None, 60)
    assert epoch is not None
    assert health.check("dispatch", settings) == "a dispatcher leads"
    resign(database, "me", epoch)
    database.close()
    with pytest.raises(health.Unwell, match="no dispatcher leads"):
        health.check("dispatch", settings)


def test_an_aggregator_is_well_while_it_asks_for_outcomes(
    redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(redis_url=redis_url, database_url=database_url)
    with pytest.raises(health.Unwell, match="has ever asked"):
        health.check("aggregate", settings)

    database, transport = Database(database_url, pool=1), RedisTransport(redis_url)
    Aggregator(database, transport, settings, me="elsewhere:1").step(0.01)
    with pytest.raises(health.Unwell, match="has ever asked"):
        health.check("aggregate", settings)
    Aggregator(database, transport, settings, me=f"{socket.gethostname()}:1").step(0.01)
    assert "the aggregator asked for outcomes" in health.check("aggregate", settings)

    monkeypatch.setattr(health, "READ_S", 0.0)
    time.sleep(0.01)
    with pytest.raises(health.Unwell, match="last asked for outcomes"):
        health.check("aggregate", settings)
    database.close()
    transport.close()


def test_an_api_is_well_when_it_is_ready_and_says_what_is_missing(database_url: str, tmp_path: Path) -> None:
    nobody = Settings(api_port=free_port())
    with pytest.raises(health.Unwell, match="does not answer on port"):
        health.check("api", nobody)
    with a_house(database_url, tmp_path) as house:
        here = Settings(api_host="0.0.0.0", api_port=int(house.url.rpartition(":")[2]))
        with pytest.raises(health.Unwell, match="not ready: not there: redis, leader"):
            health.check("api", here)


def test_servers_that_are_away_make_unwell_and_a_slip_of_the_hand_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTET_DATABASE_URL", f"postgresql+psycopg://x@127.0.0.1:{free_port()}/x")
    monkeypatch.setenv("MOTET_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    assert scheduler(["health", "dispatch"]) == 1
    assert "Postgres does not answer" in capsys.readouterr().err
    assert scheduler(["health", "aggregate"]) == 1
    assert "Redis does not answer" in capsys.readouterr().err
    assert scheduler(["health", "dispatcher"]) == 2
    assert "expected one of api, dispatch, aggregate" in capsys.readouterr().err


def test_workers_are_well_while_the_cluster_hears_each_of_them(
    redis_url: str,
    database_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = socket.gethostname()

    def beat(worker: str, host: str, seq: int) -> None:
        transport = RedisWorkerTransport(redis_url, worker)
        transport.beat(Beat(worker=worker, boot="b", seq=seq, host=host))
        transport.close()

    with a_house(database_url, tmp_path, redis_url=redis_url, dead_s=0.05) as house:
        monkeypatch.setenv("MOTET_URL", house.url)
        monkeypatch.setenv("MOTET_TOKEN", house.tokens["worker"])
        beat("far", "far", 1)
        assert workers(["health"]) == 1
        assert capsys.readouterr().out == f"no worker of {host} beats\n"
        beat("near-0", host, 1)
        beat("near-1", host, 1)
        assert workers(["health"]) == 0
        assert capsys.readouterr().out == "near-0: ready, near-1: ready\n"
        # The other one goes on; this one does not.
        time.sleep(0.06)
        beat("near-0", host, 2)
        assert workers(["health"]) == 1
        assert capsys.readouterr().out == "near-0: ready, near-1: silent\n"
    monkeypatch.setenv("MOTET_URL", f"http://127.0.0.1:{free_port()}")
    assert workers(["health"]) == 1
    assert "127.0.0.1" in capsys.readouterr().out
