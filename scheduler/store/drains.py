"""Drained workers: who gets no more work until somebody says so. Written by the API, read by the dispatcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, text

from scheduler.store.words import DRAINS, tell

#: A drained worker that nobody has heard of for so long is forgotten; so is what it refused to load.
FORGOTTEN_DAYS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """A worker that somebody drained."""

    worker: str
    #: Its host as it was then; "" where that was unknown.
    host: str
    #: RFC 3339, in UTC.
    since: str
    #: Name of the token that asked for it.
    by: str


_NAMES = text("SELECT worker FROM drained")
_ALL = text("""
    SELECT d.worker, d.host, to_char(d.since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS since,
           coalesce(k.name, d.by) AS by
      FROM drained d LEFT JOIN token k ON k.id = d.by ORDER BY d.worker""")
# Again changes nothing: since and by tell of the first time.
_DRAIN = text("""
    INSERT INTO drained (worker, host, by)
    SELECT worker, host, :by FROM unnest(CAST(:workers AS text[]), CAST(:hosts AS text[])) k (worker, host)
    ON CONFLICT (worker) DO NOTHING""")
_RESUME = text("DELETE FROM drained WHERE worker = ANY(:workers)")
_HOLDING = text("SELECT DISTINCT worker FROM lease")
_SEEN = text("""
    UPDATE drained SET seen = clock_timestamp()
     WHERE worker = ANY(:live) AND seen < clock_timestamp() - interval '1 hour'""")
_FORGET = text("DELETE FROM drained WHERE seen < clock_timestamp() - make_interval(days => :days)")
_FORGET_REFUSALS = text("""
    DELETE FROM refusal WHERE at < clock_timestamp() - make_interval(days => :days) AND worker <> ALL(:live)""")


def drained(connection: Connection) -> frozenset[str]:
    """Names of the drained workers."""
    return frozenset(connection.execute(_NAMES).scalars())


def drains(connection: Connection) -> dict[str, Drain]:
    """Every drained worker by its name."""
    return {row.worker: Drain(**row._mapping) for row in connection.execute(_ALL)}


def drain(connection: Connection, hosts: Mapping[str, str], by: str) -> None:
    """Drain these workers (worker -> host), and tell the dispatcher. Again is harmless."""
    at = {"workers": list(hosts), "hosts": list(hosts.values()), "by": by}
    connection.execute(_DRAIN, at)
    tell(connection, [DRAINS])


def resume(connection: Connection, workers: list[str]) -> None:
    """Let these workers have work again, and tell the dispatcher. Again is harmless."""
    connection.execute(_RESUME, {"workers": workers})
    tell(connection, [DRAINS])


def holding(connection: Connection) -> frozenset[str]:
    """Workers with a live lease, whether or not they know of it yet."""
    return frozenset(connection.execute(_HOLDING).scalars())


def forget_the_gone(connection: Connection, live: list[str]) -> int:
    """Forget drains and refusals of workers that nobody has heard of for a month. How many rows went."""
    connection.execute(_SEEN, {"live": live})
    return sum(
        connection.execute(statement, {"days": FORGOTTEN_DAYS, **more}).rowcount
        for statement, more in ((_FORGET, {}), (_FORGET_REFUSALS, {"live": live}))
    )
