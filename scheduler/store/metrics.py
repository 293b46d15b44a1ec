"""What the figures at ``/metrics`` say of Postgres: three statements whose cost does not grow with what is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, text

from motet.states import CARVED, LIVE
from scheduler.store.rates import speeds
from scheduler.store.schema import spelt
from scheduler.store.webhooks import PendingEvents, pending_events

#: A job is looked for among the ended ones for so long after its end: longer than any transaction that ends one.
MARGIN = timedelta(seconds=60)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFigures:
    """The counts of one job that is unfinished, or ended lately."""

    id: UUID
    state: str
    n_rows: int
    #: Rows × tasks.
    n_cells: int
    cells_ok: int
    cells_error: int
    cells_skipped: int
    cells_reused: int
    tokens: int
    computed_tokens: int
    busy_s: float
    #: Sub-tasks whose outcome was taken in.
    subtasks: int
    attempts_lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFigures:
    """What Postgres says at one moment."""

    #: By the database's clock.
    now: datetime
    jobs: list[JobFigures]
    open_subtasks: int
    leases: int
    #: Seconds since the oldest live lease was given; 0 where there is none.
    oldest_lease_s: float
    #: Rows × passes of running jobs that wait to be carved.
    rows_waiting: int
    epoch: int
    #: Seconds until the leader's lease runs out; 0 where nobody leads.
    leader_left_s: float
    database_bytes: int
    #: Device name -> tokens per second, as learned of the model that it runs fastest.
    speeds: Mapping[str, float]
    pending: PendingEvents


_NOW = text(f"""
    SELECT clock_timestamp() AS now, epoch,
           CASE WHEN until > clock_timestamp()
                THEN CAST(extract(epoch FROM until - clock_timestamp()) AS double precision) ELSE 0 END AS left_s,
           (SELECT count(*) FROM subtask WHERE state = 'open') AS open_subtasks,
           (SELECT count(*) FROM lease) AS leases,
           (SELECT CAST(coalesce(extract(epoch FROM clock_timestamp() - min(leased)), 0) AS double precision)
              FROM lease) AS oldest_lease_s,
           (SELECT CAST(coalesce(sum(p.rows_waiting), 0) AS bigint) FROM pass p JOIN job j ON j.id = p.job_id
             WHERE p.rows_waiting > 0 AND j.state IN {spelt(CARVED)}) AS rows_waiting,
           pg_database_size(current_database()) AS database_bytes
      FROM leader WHERE id = 1""")
_COUNTS = """
    SELECT id, state, n_rows, n_rows * n_tasks AS n_cells, cells_ok, cells_error, cells_skipped, cells_reused,
           tokens, computed_tokens, busy_s, subtasks, attempts_lost FROM job"""
_JOBS = text(f"""
    {_COUNTS} WHERE state IN {spelt(LIVE)} UNION ALL {_COUNTS} WHERE finished > :since""")
#: For a test that asks Postgres how it would find the answers.
STATEMENTS = (_NOW, _JOBS)


def figures(connection: Connection, since: datetime | None) -> StoreFigures:
    """The figures, with every job that is unfinished or ended after ``since``, by the database's clock.

    ``since`` None: ended within the last MARGIN. Use ``now - MARGIN`` of one look for the next: no end is missed.
    """
    row = connection.execute(_NOW).one()
    return StoreFigures(
        now=row.now,
        jobs=[
            JobFigures(**job._mapping)
            for job in connection.execute(_JOBS, {"since": since or row.now - MARGIN})
        ],
        open_subtasks=row.open_subtasks,
        leases=row.leases,
        oldest_lease_s=row.oldest_lease_s,
        rows_waiting=row.rows_waiting,
        epoch=row.epoch,
        leader_left_s=float(row.left_s),
        database_bytes=row.database_bytes,
        speeds=speeds(connection),
        pending=pending_events(connection),
    )
