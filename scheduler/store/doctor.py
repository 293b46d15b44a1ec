"""What Postgres says of itself, for the doctor: read, never written."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

# Each of these is readable by any user: no superuser, no pg_monitor.
_POSTGRES = text("""
    SELECT CAST(current_setting('server_version_num') AS int) / 10000 AS release,
           current_setting('server_version') AS version,
           current_setting('fsync') AS fsync,
           current_setting('synchronous_commit') AS synchronous_commit,
           current_setting('full_page_writes') AS full_page_writes,
           CAST(current_setting('max_connections') AS int) AS max_connections,
           CAST(current_setting('max_connections') AS int)
             - CAST(current_setting('superuser_reserved_connections') AS int)
             - CAST(coalesce(current_setting('reserved_connections', true), '0') AS int)
             - CAST((SELECT sum(numbackends) FROM pg_stat_database) AS int) AS free_connections,
           pg_database_size(current_database()) AS size_bytes,
           to_regclass('alembic_version') IS NOT NULL AS migrated,
           CAST(extract(epoch FROM clock_timestamp()) AS double precision) AS clock_s""")
_REVISION = text("SELECT version_num FROM alembic_version")
_LEADER = text("SELECT epoch, holder, until > clock_timestamp() AS leads FROM leader WHERE id = 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresSeen:
    """Settings and state of the server and of motet's database in it."""

    #: Major release, such as 17.
    release: int
    version: str
    fsync: str
    synchronous_commit: str
    full_page_writes: str
    max_connections: int
    #: Connections left to users who are no superusers.
    free_connections: int
    size_bytes: int
    #: None: no migration has run.
    revision: str | None
    #: Its clock, in seconds since 1970.
    clock_s: float


@dataclass(frozen=True, slots=True)
class LeaderSeen:
    """The lease of the dispatcher that leads, or led last."""

    epoch: int
    holder: str
    leads: bool


def postgres_seen(connection: Connection) -> PostgresSeen:
    """What Postgres says of itself, also of a database that motet's migrations have not seen yet."""
    seen = dict(connection.execute(_POSTGRES).one()._mapping)
    migrated = seen.pop("migrated")
    return PostgresSeen(revision=connection.execute(_REVISION).scalar() if migrated else None, **seen)


def leader_seen(connection: Connection) -> LeaderSeen:
    """Who leads. Only for a database that has been migrated."""
    row = connection.execute(_LEADER).one()
    return LeaderSeen(row.epoch, row.holder, row.leads)
