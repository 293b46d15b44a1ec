"""Where the machine plays: one real Postgres database whose clock stands still until the machine moves it.

Every statement of the store asks ``clock_timestamp()``. A schema that the search path names before ``pg_catalog``
holds another function of that name, which reads a table; so leases, the lead and back-offs run out when the
machine says so, and a whole day takes no time. Defaults of columns are bound to a function when a table is made:
they are bound anew. Nothing of the store is changed for it.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, text

from motet.protocol.transport import MemoryTransport, TransportLost
from scheduler.store import sealing
from scheduler.store.database import WORK, Database, StoreUnavailable
from scheduler.store.listening import Listener
from scheduler.store.words import Words, heard
from tests.integration import landing
from tests.integration.landing import HEAD, register

#: Who has a connection: two dispatchers, two aggregators, two processes of the API, and the machine itself.
ROLES = ("A", "B", "agg0", "agg1", "api0", "api1", "machine")

#: So large that it is believed slow: a handful of rows makes several sub-tasks.
TRUNK = replace(landing.TRUNK, parameters=600_000_000)
OTHER_TRUNK = replace(TRUNK, name="other", trunk="o")
OTHER_HEAD = replace(HEAD, name="other-length", trunk="o", trunk_model="other@1")

_CLOCK = """
CREATE SCHEMA machine;
CREATE TABLE machine.clock (at timestamptz NOT NULL);
INSERT INTO machine.clock VALUES ('2026-01-01T00:00:00Z');
CREATE FUNCTION machine.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql AS 'SELECT at FROM machine.clock';
DO $$ BEGIN
  EXECUTE format('ALTER DATABASE %I SET search_path = machine, public, pg_catalog', current_database());
  EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database());
END $$;
"""
_DEFAULTS = """
SELECT format('ALTER TABLE public.%I ALTER %I SET DEFAULT machine.clock_timestamp()', c.relname, a.attname)
  FROM pg_attrdef d JOIN pg_class c ON c.oid = d.adrelid JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
 WHERE pg_get_expr(d.adbin, d.adrelid) LIKE '%clock_timestamp()'
"""
#: Deleting some tens of rows takes a tenth of the time of TRUNCATE, which makes new files.
_EMPTY = """
DELETE FROM lease; DELETE FROM subtask; DELETE FROM piece; DELETE FROM cells; DELETE FROM block_column;
DELETE FROM block_pass; DELETE FROM ask; DELETE FROM block; DELETE FROM job; DELETE FROM sealed_column; DELETE FROM refusal;
DELETE FROM outbox; DELETE FROM drained; DELETE FROM rate; DELETE FROM pace; DELETE FROM load_time;
UPDATE leader SET epoch = 0, holder = '', until = '-infinity', transport = '';
UPDATE machine.clock SET at = '2026-01-01T00:00:00Z';
SELECT setval(pg_get_serial_sequence('subtask', 'id'), 1), setval(pg_get_serial_sequence('piece', 'id'), 1),
       setval(pg_get_serial_sequence('sealed_column', 'id'), 1);
"""
_AUDIT = text("""
    SELECT pg_current_xact_id_if_assigned() IS NOT NULL AS wrote, holder,
           until > clock_timestamp() OR until = '-infinity' AS leads FROM leader""")


class Broken(AssertionError):
    """An invariant does not hold."""


class Crash(BaseException):
    """The process is gone at this point, as after SIGKILL. No code of ours may catch it."""


class Tap(Database):
    """The connection of one process, which breaks or freezes at a chosen transaction of its next step."""

    def __init__(self, url: str, role: str) -> None:
        super().__init__(url, pool=2)
        self.role = role
        #: Which transaction of the step, from 0, and what befalls it; None: nothing does.
        self.at, self.fault = 0, ""
        self.done = 0
        #: What happens while the process is frozen.
        self.meanwhile: Callable[[], None] = lambda: None
        #: Under which name it leads, where it is a dispatcher.
        self.me: str | None = None
        #: A fault came to pass in this step.
        self.struck = False
        #: (which transaction of its step, the function it is of) of each that wrote; of each that a fault befell.
        self.commits: list[tuple[int, str]] = []
        self.broken: list[tuple[int, str]] = []

    def arm(self, at: int = 0, fault: str = "") -> None:
        self.at, self.fault, self.done, self.struck = at, fault, 0, False

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        mine = self.fault if self.done == self.at else ""
        # Above this generator stands contextlib, and above that whoever opens the transaction.
        here = (self.done, sys._getframe(2).f_code.co_name)
        self.done += 1
        self.struck |= bool(mine)
        if mine == "freeze":
            self.meanwhile()
        with super().transaction() as connection:
            yield connection
            if self._audit(connection):
                self.commits.append(here)
                if mine:
                    self.broken.append(here)
            if mine.endswith("before"):
                raise _end(mine)
        if mine.endswith("after"):
            raise _end(mine)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Breaks and freezes as a transaction does."""
        with self.transaction() as connection:
            yield connection

    def _audit(self, connection: Connection) -> bool:
        """No write under an old epoch: whoever writes leads at that very moment, for nobody can take over meanwhile.

        Whether it wrote at all."""
        if self.role == "machine":
            return False
        row = connection.execute(_AUDIT).one()
        if self.me is not None and row.wrote and not (row.holder == self.me and row.leads):
            raise Broken(f"6: {self.me} writes, and {row.holder} leads, or nobody")
        return bool(row.wrote)


def _end(fault: str) -> BaseException:
    if fault.startswith("crash"):
        return Crash(fault)
    return StoreUnavailable("the connection broke, and nobody knows whether it was committed")


class TappedTransport(MemoryTransport):
    """Redis in memory, which fails at a chosen call of the scheduler, and shows what is published before it is."""

    #: Calls until one fails; None: all is well.
    fails_in: int | None = None
    #: The next read is carried out, and its answer is lost on the way.
    swallows: bool = False
    #: How often all workers were heard.
    looks: int = 0
    watch: Callable[[Mapping[str, Any]], None] = staticmethod(lambda by_worker: None)

    def _tap(self) -> None:
        if self.fails_in is None:
            return
        if self.fails_in <= 0:
            self.fails_in = None
            raise TransportLost("the connection broke")
        self.fails_in -= 1

    def identity(self) -> str:
        self._tap()
        return super().identity()

    def hear(self) -> Any:
        self._tap()
        self.looks += 1
        return super().hear()

    def queued_at(self, workers: Any) -> Any:
        self._tap()
        return super().queued_at(workers)

    def running_at(self, workers: Any) -> Any:
        self._tap()
        return super().running_at(workers)

    def control(self, controls: Any) -> None:
        self._tap()
        super().control(controls)

    def waiting_outcomes(self) -> Any:
        self._tap()
        return super().waiting_outcomes()

    def read_outcomes(self, consumer: str, count: int, block_s: float, reclaim_s: float) -> Any:
        self._tap()
        found = super().read_outcomes(consumer, count, block_s, reclaim_s)
        if self.swallows:
            self.swallows = False
            raise TransportLost("the connection broke after it was read")
        return found

    def acknowledge(self, entries: Any) -> None:
        self._tap()
        super().acknowledge(entries)

    def publish_all(self, by_worker: Any) -> None:
        self.watch(by_worker)
        self._tap()
        super().publish_all(by_worker)


class SureListener(Listener):
    """Hears all that was committed by now, so that a play goes the same way each time: words may be late on a busy machine.

    A mark is said behind them, and heard last, since Postgres delivers in the order of commits.
    """

    _MARK = "mark"

    def wait(self, timeout_s: float) -> Words:
        if self._connection is None:
            return super().wait(timeout_s)
        mark = f"{self._MARK} {uuid.uuid4()}"
        self._connection.execute("SELECT pg_notify(%s, %s)", (WORK, mark))
        said: list[str] = []
        for note in self._connection.notifies(timeout=10.0):
            if note.payload == mark:
                return heard(said)
            if not note.payload.startswith(self._MARK):
                said.append(note.payload)
        raise AssertionError("Postgres did not deliver within 10 s what it was told")


class Stage:
    """The database and its connections: made once, emptied for each play."""

    def __init__(self, url: str) -> None:
        with Database(url).transaction() as connection:
            connection.exec_driver_sql(_CLOCK.replace("%", "%%"))
            for statement in list(connection.exec_driver_sql(_DEFAULTS.replace("%", "%%")).scalars()):
                connection.exec_driver_sql(statement)
        self.taps = {role: Tap(url, role) for role in ROLES}
        #: What dispatchers hear of committed transactions, on real connections.
        self.listeners = {role: SureListener(self.taps[role]) for role in ("A", "B")}
        register(self.taps["machine"], TRUNK, HEAD, OTHER_TRUNK, OTHER_HEAD)

    def empty(self) -> None:
        """As it was at first, clock and numbers included; so that a play goes the same way each time."""
        for tap in self.taps.values():
            tap.arm()
            tap.me = None
        for listener in self.listeners.values():
            listener.close()
        # Jobs of one play have the ids of those of another.
        sealing.task_shapes.cache.clear()
        with self.taps["machine"].transaction() as connection:
            connection.exec_driver_sql(_EMPTY)

    def advance(self, seconds: float) -> None:
        with self.taps["machine"].transaction() as connection:
            connection.execute(
                text("UPDATE machine.clock SET at = at + make_interval(secs => :s)"), {"s": seconds}
            )

    def close(self) -> None:
        for listener in self.listeners.values():
            listener.close()
        for tap in self.taps.values():
            tap.close()
