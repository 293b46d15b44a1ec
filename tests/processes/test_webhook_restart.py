"""An event outlives the process that delivers it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from motet.client import Client
from motet.local.places import free_port
from motet.protocol.settings import Settings
from scheduler.store.database import Database
from tests.integration.api_house import House, furnish, running
from tests.integration.test_webhooks import end_a_job, settled
from tests.integration.webhook_receiver import receiving


def test_an_event_outlives_the_process_that_was_delivering_it(database_url: str, tmp_path: Path) -> None:
    """SIGKILL between the receiver's taking it and the record of that."""
    settings = Settings(
        database_url=database_url, blob_dir=str(tmp_path / "blobs"), api_port=0, webhook_hosts="127.0.0.1"
    )
    database, over, port = Database(database_url, pool=2), threading.Event(), free_port()
    env = {
        **os.environ,
        "MOTET_DATABASE_URL": database_url,
        "MOTET_BLOB_DIR": settings.blob_dir,
        "MOTET_REDIS_URL": "redis://127.0.0.1:1/0",
        "MOTET_API_PORT": str(port),
        "MOTET_WEBHOOK_HOSTS": settings.webhook_hosts,
        "MOTET_MIN_FREE_MB": "0",
    }
    with receiving() as receiver, httpx.Client(timeout=60, trust_env=False, verify=False) as line:
        house = House(f"http://127.0.0.1:{port}", settings, database, line)
        furnish(house)
        child = subprocess.Popen([sys.executable, "-m", "scheduler", "api"], env=env)
        try:
            _wait_until_healthy(port)
            with Client(house.url, house.tokens["user"]) as client:
                client.add_webhook(receiver.url())
            receiver.answer = lambda _: over.wait(30)
            end_a_job(house)
            first = receiver.next()
        finally:
            child.kill()
            child.wait()
        over.set()
        receiver.answer = 200
        assert settled(house, "waiting").attempts == 0
        with running(settings):
            again = receiver.next()
            assert (again.headers["webhook-id"], again.body) == (first.headers["webhook-id"], first.body)
            assert settled(house, "delivered").attempts == 1
    database.close()


def _wait_until_healthy(port: int) -> None:
    for _ in range(1000):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.02)
    raise AssertionError("the API did not start")
