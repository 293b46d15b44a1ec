"""Flower, the real one, for motet's workers: ``python -m motet.local.flower``, from `motet up --flower` and from compose alike.

Workers take no remote control (docs/decisions/0004), so what Flower would ask them is read from their heartbeats:
devices, queues and lengths. All pages but the health check want the password, and none can change anything.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from flower.api.tasks import GetQueueLengths  # type: ignore[import-untyped]
from flower.app import Flower, rewrite_handler  # type: ignore[import-untyped]
from flower.command import apply_env_options, extract_settings, setup_logging  # type: ignore[import-untyped]
from flower.inspector import Inspector  # type: ignore[import-untyped]
from flower.options import options  # type: ignore[import-untyped]
from flower.urls import settings as pages  # type: ignore[import-untyped]
from flower.views.broker import BrokerView  # type: ignore[import-untyped]
from flower.views.monitor import Metrics  # type: ignore[import-untyped]
from tornado import web
from tornado.ioloop import PeriodicCallback

from motet.errors import SetupError
from motet.protocol.logs import configure, event
from motet.protocol.settings import Settings
from motet.protocol.transport import ENTRY_POINT, RedisReader, Seen, TransportLost, queue_name

#: By name: this module runs as __main__.
log = logging.getLogger("motet.local.flower")

#: How often the heartbeats are read; they come each second.
LOOK_S = 2.0
#: Tasks that Flower remembers, about 3 KiB each.
TASKS = 10_000
#: A worker that has been silent for this many seconds leaves pages and metrics.
PURGE_S = 300
EXIT_SETUP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowerSettings(Settings):
    """Flower's own settings, beside those that every process has."""

    flower_address: str = "127.0.0.1"
    flower_port: int = 5555
    flower_user: str = "motet"
    flower_password: str = field(default="", repr=False)
    #: Signs cookies: fixed, so that a restart logs nobody out.
    flower_cookie_secret: str = field(default="", repr=False)


class Beats(Inspector):  # type: ignore[misc]
    """Answers what Flower would ask of workers, from their heartbeats."""

    def __init__(self, flower: Flower, reader: RedisReader) -> None:
        super().__init__(flower.io_loop, flower.capp, timeout=1.0)
        self._state, self._reader = flower.events.state, reader
        self._lost = False

    async def look(self) -> dict[str, Seen]:
        """The workers that beat. Raises TransportLost."""
        return await self.io_loop.run_in_executor(None, self._reader.workers)  # type: ignore[no-any-return]

    async def _inspect_all(self, workername: str | None) -> None:
        """Flower's hook: renew ``workers``, by host name; what one of them runs now, only where it is asked for."""
        try:
            seen = await self.look()
        except TransportLost:
            if not self._lost:
                event(log, "redis lost", logging.WARNING)
            self._lost = True
            return
        self._lost = False
        found = {host_name(worker): answers(worker, one) for worker, one in seen.items()}
        if workername in found:
            found[workername]["active"] = self._active(workername)
        self.workers = defaultdict(dict, found)

    def _active(self, workername: str) -> list[dict[str, Any]]:
        tasks = (task for _, task in self._state.tasks_by_worker(workername) if task.state == "STARTED")
        return [
            {
                "name": t.name,
                "id": t.uuid,
                "acknowledged": True,
                "worker_pid": t.pid,
                "args": t.args,
                "kwargs": "",
            }
            for t in tasks
        ]


def host_name(worker: str) -> str:
    """What Celery calls a worker of ours."""
    return f"motet@{worker}"


def answers(worker: str, seen: Seen) -> dict[str, Any]:
    """What a worker would answer to Flower, as far as its heartbeat says it."""
    beat, queue = seen.beat, queue_name(worker)
    return {
        "timestamp": time.time(),
        "stats": {
            "pid": beat.pid,
            "prefetch_count": 0,
            # Shown in this order, as the first thing of the worker's page; what is in a list is shown as it is.
            "pool": {
                "device": [beat.device_name or beat.device_kind],
                "host": [beat.host],
                "state": beat.state,
                "memory": f"{beat.memory_used_mb / 1024:.1f} of {beat.memory_mb / 1024:.1f} GiB",
                "utilisation": f"{beat.utilisation:.0%}",
                "backlog": f"{beat.backlog_s:.1f} s",
                "sub-tasks held": len(beat.held),
                "rows done": f"{beat.rows_done:,}",
                "resident models": [digest[:12] for digest in beat.resident],
            },
            "broker": {"transport": "redis", "queue": queue},
            "total": {"rows": beat.rows_done},
        },
        "active_queues": [
            {
                "name": queue,
                "exclusive": False,
                "exchange": "",
                "durable": True,
                "routing_key": queue,
                "no_ack": False,
                "alias": None,
                "queue_arguments": None,
                "binding_arguments": None,
                "auto_delete": False,
            }
        ],
        "registered": [ENTRY_POINT],
        "scheduled": [],
        "reserved": [],
        "revoked": [],
        "conf": {},
    }


class Queues:
    """Flower's idea of a broker: every worker's queue, one list each, with its length."""

    def __init__(self, flower: MotetFlower) -> None:
        self._flower = flower

    async def queues(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Length, and what the worker holds of it. ``names`` is Flower's guess and not needed."""
        try:
            seen = await self._flower.inspector.look()
        except TransportLost:
            raise web.HTTPError(503, "Redis does not answer; try again") from None
        alive = {name for name, worker in self._flower.events.state.workers.items() if worker.alive}
        return [
            {
                "name": queue_name(worker),
                "messages": one.queued + len(one.beat.held),
                "messages_ready": one.queued,
                "messages_unacknowledged": len(one.beat.held),
                "consumers": int(host_name(worker) in alive),
            }
            for worker, one in seen.items()
        ]


class OurQueues:
    """Makes a page of Flower's read our queues."""

    application: Any

    def get_broker(self) -> Queues:
        return Queues(self.application)


class BrokerPage(OurQueues, BrokerView):  # type: ignore[misc]
    """/broker"""


class QueueLengths(OurQueues, GetQueueLengths):  # type: ignore[misc]
    """/api/queues/length"""


class ClosedMetrics(Metrics):  # type: ignore[misc]
    """/metrics, which Flower shows to everybody: with our password."""

    @web.authenticated
    async def get(self) -> None:
        await super().get()


class MotetFlower(Flower):  # type: ignore[misc]
    """Flower that reads heartbeats, with a lock on every page but the health check."""

    def __init__(self, reader: RedisReader, **how: Any) -> None:
        super().__init__(**how)
        self.inspector = Beats(self, reader)
        ours = [(r"/broker", BrokerPage), (r"/api/queues/length", QueueLengths), (r"/metrics", ClosedMetrics)]
        if self.options.url_prefix:
            ours = [rewrite_handler(page, self.options.url_prefix) for page in ours]
        # Asked before Flower's own.
        self.add_handlers(r".*", ours)

    def start(self) -> None:
        PeriodicCallback(self.update_workers, LOOK_S * 1000).start()
        super().start()


def celery_app(redis_url: str) -> Celery:
    """The Celery application that hears the workers' events with Flower's narrow rights."""
    app = Celery("flower", broker=redis_url)
    app.conf.update(
        accept_content=["json"],
        broker_connection_max_retries=None,
        broker_transport_options={
            "ack_emulation": False,
            "priority_steps": [0],
            "socket_timeout": 5,
            "socket_connect_timeout": 3,
            "health_check_interval": 5,
        },
        # kombu tends queues that expire with Lua scripts, which no user of ours may run.
        event_queue_expires=None,
        control_queue_expires=None,
    )
    return app


def build(settings: FlowerSettings) -> MotetFlower:
    """Flower as these settings want it. Its own FLOWER_* variables count as well, but not against the lock."""
    apply_env_options()
    options.address, options.port = settings.flower_address, settings.flower_port
    options.basic_auth = [f"{settings.flower_user}:{settings.flower_password}"]
    options.auth = ""
    options.cookie_secret = settings.flower_cookie_secret
    options.read_only = True
    options.debug = False
    options.persistent = False
    # Workers send events without being told to.
    options.enable_events = False
    options.max_tasks = TASKS
    options.purge_offline_workers = PURGE_S
    options.tasks_columns = "name,args,state,received,runtime,worker"
    extract_settings()
    setup_logging()
    return MotetFlower(
        RedisReader(settings.redis_url), capp=celery_app(settings.redis_url), options=options, **pages
    )


def main() -> int:
    """Serve until SIGTERM or Ctrl-C. Returns 0, or 2 where a setting is missing or the port is taken."""
    configure("flower")
    try:
        settings = read_settings()
        configure("flower", settings.log_level)
        flower = build(settings)
        flower.start_http_server()
    except SetupError as error:
        event(log, str(error), logging.ERROR)
        return EXIT_SETUP
    except OSError as error:
        event(log, f"cannot listen: {error.strerror}; see MOTET_FLOWER_PORT", logging.ERROR)
        return EXIT_SETUP
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    event(log, "ready", address=settings.flower_address, port=settings.flower_port)
    try:
        flower.start()
    except KeyboardInterrupt:
        flower.stop()
    return 0


def read_settings() -> FlowerSettings:
    """The settings of the environment. Raises SetupError for one that is missing."""
    settings = FlowerSettings.from_env().need("redis_url", "flower_password", "flower_cookie_secret")
    assert isinstance(settings, FlowerSettings)
    return settings


if __name__ == "__main__":
    sys.exit(main())
