"""The connection to Postgres: one pool, short transactions, and one error for "not now"."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from math import inf
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row
from sqlalchemy import Connection, Engine, TextClause, create_engine, event, exc, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import make_url
from sqlalchemy.pool import ConnectionPoolEntry

from motet.protocol import traces

#: Dispatchers listen here: there is new work, or room for it.
WORK = "motet_work"
#: Watchers listen here; the payload is a job's id.
JOB = "motet_job"
#: Whoever delivers events listens here: there are new ones.
EVENTS = "motet_events"


#: Seconds after its use for which a connection counts as alive. Longer: more transactions fail, and are tried again, when
#: Postgres is restarted. Shorter: more of them ask first.
_FRESH_S = 1.0
#: Under this name a connection keeps when it was used last.
_RESTED = "rested"


_NOTIFY = text("""
    SELECT count(pg_notify(channel, payload))
      FROM unnest(CAST(:channels AS text[]), CAST(:payloads AS text[])) k (channel, payload)""")


def _rests(_: Any, record: ConnectionPoolEntry) -> None:
    record.info[_RESTED] = time.monotonic()


class StoreUnavailable(Exception):
    """Postgres does not answer, restarted, or cut the transaction. Nothing was recorded, or nobody knows:
    whoever meets this tries again, and every write is made so that a second time is harmless."""


class Database:
    """A pool of connections. Safe to share between threads."""

    def __init__(self, url: str, *, pool: int = 5) -> None:
        self._url = make_url(url)
        self.engine: Engine = create_engine(
            self._url,
            pool_size=pool,
            max_overflow=pool,
            pool_timeout=5,
            # The one that was used last: few of them are in use, and Postgres has their plans and tables at hand.
            pool_use_lifo=True,
            # An autobegin transaction only ever inside `transaction`.
            isolation_level="READ COMMITTED",
            connect_args={
                "connect_timeout": 3,
                "application_name": "motet",
                # Whoever freezes inside a transaction, the leader above all, must not hold its locks for ever.
                # And statements are planned once for all parameters: they take arrays, for which Postgres would else plan anew.
                "options": "-c idle_in_transaction_session_timeout=5s -c lock_timeout=3s -c statement_timeout=30s"
                " -c plan_cache_mode=force_generic_plan",
                "keepalives_idle": 10,
                "tcp_user_timeout": 15_000,
            },
            # A parameter may be a user's text: never in a log, never in an exception.
            hide_parameters=True,
        )

        self._reading = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        event.listen(self.engine, "checkin", _rests)
        event.listen(self.engine, "checkout", self._asked_for)

    def _asked_for(self, connection: Any, record: ConnectionPoolEntry, _: Any) -> None:
        """A connection that a restart of Postgres killed is replaced before use, not handed out. One that was used a
        moment ago is not asked: in a burst that would be a round trip for each transaction."""
        if time.monotonic() - record.info.get(_RESTED, -inf) > _FRESH_S:
            try:
                alive = self.engine.dialect.do_ping(connection)
            except psycopg.Error:
                alive = False
            if not alive:
                raise exc.DisconnectionError

    @property
    def libpq_url(self) -> str:
        """The URL for psycopg itself (LISTEN needs a connection of its own)."""
        return self._url.set(drivername="postgresql").render_as_string(hide_password=False)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction: committed at the end, rolled back on any error.

        Raises StoreUnavailable where Postgres is away, restarted, too slow, or broke a deadlock.
        """
        # Spans of what a transaction did are told once it has committed.
        with _or_unavailable(), traces.together(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Statements that only read, each at a moment of its own, as in ``transaction``: without BEGIN and COMMIT, which are
        two round trips more. Raises StoreUnavailable as that does."""
        with _or_unavailable(), self._reading.connect() as connection:
            yield connection

    def ping(self) -> None:
        """Raise StoreUnavailable unless Postgres answers."""
        with self.transaction() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def _or_unavailable() -> Iterator[None]:
    """Turn trouble that passes into StoreUnavailable."""
    try:
        yield
    except exc.DBAPIError as error:
        if _transient(error.orig):
            raise StoreUnavailable(type(error.orig).__name__) from None
        raise
    except psycopg.Error as error:
        # COPY speaks to the driver itself, so its errors come as they are.
        if _transient(error):
            raise StoreUnavailable(type(error).__name__) from None
        raise
    except exc.TimeoutError:
        raise StoreUnavailable("no free connection") from None


#: Classes of SQLSTATE that pass by themselves: connection trouble, serialisation and deadlock, no resources
#: (a full disk, too many connections), operator intervention (shutdown, cancelled statement), lock not available.
_TRANSIENT_CLASSES = ("08", "40", "53", "57", "55P03", "25P0", "XX", "58")


def _transient(error: BaseException | None) -> bool:
    state = getattr(error, "sqlstate", None)
    if state is None:
        return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError))
    return str(state).startswith(_TRANSIENT_CLASSES)


#: A statement and its parameters.
Asked = tuple[TextClause, Mapping[str, Any]]


def together(connection: Connection, *asked: Asked) -> list[list[Any]]:
    """Execute these in order, in one round trip; the rows of each. For what is executed hundreds of times a second.

    They go to the driver itself, which costs a third of the way through SQLAlchemy.
    """
    driver: Any = connection.connection.driver_connection
    spelled = [(_spelled(statement), parameters) for statement, parameters in asked]
    for watch in connection.dispatch.before_cursor_execute:
        for statement, parameters in spelled:
            watch(connection, None, statement, parameters, None, False)
    with driver.pipeline():
        cursors = [
            driver.cursor(binary=True, row_factory=namedtuple_row).execute(statement, parameters)
            for statement, parameters in spelled
        ]
    return [cursor.fetchall() if cursor.description else [] for cursor in cursors]


def _end(line: Any) -> Iterator[Any]:
    """The end of a pipeline as in psycopg, but with nothing behind the Sync: where a Flush follows it, as psycopg's does,
    Postgres no longer counts how long the transaction is idle, and a leader that froze would keep its locks for ever."""
    try:
        line._enqueue_sync()
        yield from line._communicate_gen()
    finally:
        yield from line._fetch_gen(flush=False)


# For all of them: a statement with a list of parameters is a pipeline too.
psycopg.Pipeline._exit_gen = _end  # type: ignore[assignment, method-assign]


@lru_cache(256)
def _spelled(statement: TextClause) -> str:
    """A statement as the driver takes it."""
    return str(statement.compile(dialect=_DIALECT))


_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call]


def notify(connection: Connection, channel: str, payload: str = "") -> None:
    """Wake listeners when (and only if) this transaction commits."""
    notify_all(connection, [(channel, payload)])


def notify_all(connection: Connection, notes: Collection[tuple[str, str]]) -> None:
    """``notify`` with each of these (channel, payload), in one statement."""
    connection.execute(*notifying(notes))


def notifying(notes: Collection[tuple[str, str]]) -> Asked:
    """The statement of ``notify_all``."""
    channels, payloads = zip(*notes, strict=True)
    return _NOTIFY, {"channels": list(channels), "payloads": list(payloads)}


def one_moment(connection: Connection) -> None:
    """One snapshot for all statements of a fresh transaction: else rows could be seen twice, or nowhere, while they move."""
    connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
