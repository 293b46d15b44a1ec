"""``GET /v1/doctor``: what the server's side finds of itself: Postgres, Redis, leader, disk, workers, models.

``python -m scheduler.api.doctor`` prints the same without an API that runs, for `motet doctor` on a server's host.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from motet.doctor import Finding, checks, cluster, look
from motet.doctor.cluster import PostgresFacts, WorkerFacts
from motet.errors import SetupError
from motet.messages.cluster import DoctorReport
from motet.protocol.settings import Settings
from motet.protocol.transport import RedisTransport, TransportLost
from motet.protocol.wire import PROTOCOL, Beat
from scheduler.api.auth import Caller
from scheduler.api.resources import Use
from scheduler.api.routing import Routes
from scheduler.store import registry
from scheduler.store.database import Database, StoreUnavailable
from scheduler.store.doctor import leader_seen, postgres_seen
from scheduler.store.webhooks import webhooks_seen

routes = Routes(tags=["cluster"])

#: What concerns whoever submits; the rest tells of the server's insides.
FOR_ALL = frozenset({"workers", "models"})


@routes.get(
    "/v1/doctor",
    summary="What is wrong with the server's side, and what to do; all of it for administrators",
)
def doctor(use: Use, caller: Caller) -> DoctorReport:
    beats = _beats(use.transport)
    silent = use.workers.silent(beats, time.monotonic()) if beats else set()
    found = examine(use.settings, use.database, use.transport, beats, silent)
    return DoctorReport(
        scope=caller.scope,
        version=look.version_here(),
        protocol=PROTOCOL,
        findings=tuple(f for f in found if caller.scope == "admin" or f.area in FOR_ALL),
    )


def examine(
    settings: Settings,
    database: Database,
    transport: RedisTransport | None,
    beats: Mapping[str, Beat] | None,
    silent: set[str],
) -> list[Finding]:
    """All that the server's side can see of itself. ``beats`` is None where Redis did not give them."""
    found = _of_postgres(database)
    if settings.redis_url:
        found += look.redis(settings.redis_url, "scheduler")
    else:
        remedy = "set MOTET_REDIS_URL of the API"
        found.append(
            Finding(area="redis", name="reach", state="fail", what="no Redis is configured", remedy=remedy)
        )
    if settings.blob_dir:
        found += checks.folder(look.folder("blobs", Path(settings.blob_dir)))
    if beats is not None:
        seen = [
            WorkerFacts(worker=name, state="silent" if name in silent else b.state, protocol=b.protocol)
            for name, b in sorted(beats.items())
        ]
        found += cluster.workers(seen, PROTOCOL)
    if transport is not None:
        with suppress(TransportLost):
            found.append(cluster.backlog(transport.outcome_backlog()))
            found.append(cluster.aggregator(min(transport.readers().values(), default=None)))
    return found


def _of_postgres(database: Database) -> list[Finding]:
    """Postgres, and what only a migrated database can tell: leader, outcomes, models, webhooks."""
    try:
        with database.transaction() as connection:
            seen = postgres_seen(connection)
            clock_s = seen.clock_s - time.time()
        facts = {name: getattr(seen, name) for name in seen.__slots__ if name != "clock_s"}
        found = cluster.postgres(PostgresFacts(**facts, clock_s=clock_s, head=head()))
        if seen.revision is None:
            return found
        with database.transaction() as connection:
            led = leader_seen(connection)
            found.append(cluster.leader(led.leads, led.holder, led.epoch))
            found.append(cluster.models(len(registry.models(connection))))
            told = webhooks_seen(connection)
            found += cluster.webhooks(told.webhooks, told.failing, told.behind, told.behind_s)
    except (StoreUnavailable, SQLAlchemyError) as error:
        # Of a driver's error only the kind: its words may hold an address.
        what = f"Postgres does not answer: {error if isinstance(error, StoreUnavailable) else type(error).__name__}"
        remedy = "start Postgres, open its port to this host, or mend MOTET_DATABASE_URL"
        return [Finding(area="postgres", name="reach", state="fail", what=what, remedy=remedy)]
    return found


def head() -> str:
    """The newest revision of this code's migrations."""
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    import migrations

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return str(ScriptDirectory.from_config(config).get_current_head())


def _beats(transport: RedisTransport | None) -> Mapping[str, Beat] | None:
    try:
        return transport.beats() if transport is not None else None
    except TransportLost:
        return None


def main() -> int:
    """Print the findings as JSON, from this host's own settings. Returns 2 where a setting is missing."""
    try:
        settings = Settings.from_env().need("database_url")
        transport = RedisTransport(settings.redis_url) if settings.redis_url else None
        # One look tells nobody's silence: that takes two, some seconds apart.
        found = examine(
            settings, Database(settings.database_url, pool=1), transport, _beats(transport), set()
        )
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps([f.to_json() for f in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
