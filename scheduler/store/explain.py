"""What Postgres knows of one job for an explanation, and whose the jobs beside it are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from motet.protocol.manifest import Manifest
from motet.states import State
from scheduler.policy.placing.records import Demand
from scheduler.store import ask_spans
from scheduler.store.activity import NEWEST
from scheduler.store.ask_spans import AskSpan
from scheduler.store.database import one_moment
from scheduler.store.jobs import JobEntry, job_entry


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStanding:
    """How one pass of the job stands."""

    #: Of all rows that are not under way nor done, those tried again later included.
    demand: Demand
    kind: str
    tasks: tuple[str, ...]
    rows: int
    rows_open: int
    rows_done: int
    #: Rows that came back and are tried again later: how many, in how many seconds the last, tried how often.
    rows_later: int
    later_s: float
    tries: int
    #: Tasks whose answers it reads; rows that wait for these, and the bytes that it reads of them.
    needs: tuple[str, ...] = ()
    rows_blocked: int = 0
    bytes_blocked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A job as of one moment."""

    job: JobEntry
    passes: tuple[PassStanding, ...]
    #: Seconds until its deadline; None: it has none.
    left_s: float | None
    #: Of an open job: what became of its asks in the last minute, at all API processes.
    asks: AskSpan | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a job is, and its class."""

    tenant: str
    priority: int
    name: str


_PASSES = text("""
    SELECT p.number, p.kind, p.numerics, p.rate_key, cardinality(p.needs) > 0 AS dependent, p.rows_waiting, p.bytes_waiting, m.manifest, j.tenant_id, j.priority, t.weight,
           array_prepend(p.model_id, ARRAY(SELECT k.model_id FROM task k
                                            WHERE k.job_id = p.job_id AND k.pass_number = p.number)) AS model_ids,
           ARRAY(SELECT k.name FROM task k WHERE k.job_id = p.job_id AND k.pass_number = p.number ORDER BY k.number) AS tasks,
           CASE WHEN p.tokens > 0 THEN CAST(p.bytes_done AS double precision) / p.tokens ELSE 0 END AS bytes_per_token,
           date_part('epoch', j.deadline - clock_timestamp()) AS left_s,
           (SELECT sum(n) FROM block_pass b WHERE b.job_id = p.job_id AND b.pass_number = p.number
               AND b.block_number >= :from_block) AS n_rows,
           (SELECT sum(done) FROM block_pass b WHERE b.job_id = p.job_id AND b.pass_number = p.number
               AND b.block_number >= :from_block) AS rows_done,
           (SELECT sum(s.n_rows) FROM subtask s
             WHERE s.job_id = p.job_id AND s.pass_number = p.number AND s.state = 'open') AS rows_open,
           ARRAY(SELECT k.name FROM task k WHERE k.job_id = p.job_id AND k.number = ANY(p.needs) ORDER BY k.number) AS needs,
           blocked.n_rows AS rows_blocked, blocked.bytes AS bytes_blocked,
           later.n_rows AS rows_later, later.left_s AS later_s, later.tries
      FROM pass p JOIN job j ON j.id = p.job_id JOIN tenant t ON t.id = j.tenant_id JOIN model m ON m.id = p.model_id
      LEFT JOIN LATERAL (SELECT sum(hi - lo) AS n_rows, max(tries) AS tries,
                                date_part('epoch', max(not_before) - clock_timestamp()) AS left_s
                           FROM piece WHERE piece.job_id = p.job_id AND piece.pass_number = p.number
                                        AND not_before > clock_timestamp()) later ON true
      LEFT JOIN LATERAL (SELECT sum(w.n) AS n_rows, sum(w.bytes) AS bytes FROM block_pass w
                          WHERE w.job_id = p.job_id AND w.pass_number = p.number AND w.state = 'waiting') blocked ON true
     WHERE p.job_id = :job ORDER BY p.number""")


def standing(connection: Connection, tenant: UUID, job: UUID) -> Standing:
    """How a job stands. Raises NotFound.

    The connection's transaction must be fresh: it becomes a read of one moment.
    """
    one_moment(connection)
    entry = job_entry(connection, tenant, job)
    # An open job has rows of days: of those that are done only the newest are looked at.
    from_block = max(0, entry.n_blocks - NEWEST) if entry.state == State.OPEN else 0
    found = connection.execute(_PASSES, {"job": job, "from_block": from_block}).all()
    return Standing(
        job=entry,
        left_s=found[0].left_s if found else None,
        asks=ask_spans.last_minute(ask_spans.look(connection, job)) if entry.state == State.OPEN else None,
        passes=tuple(
            PassStanding(
                demand=Demand(
                    job=str(job),
                    pass_number=row.number,
                    tenant=str(row.tenant_id),
                    weight=row.weight,
                    priority=row.priority,
                    # Behind all others that it is compared with.
                    age=1 << 40,
                    model_ids=frozenset(row.model_ids),
                    numerics=row.numerics,
                    model=Manifest.from_json(row.manifest),
                    rate_key=row.rate_key,
                    dependent=row.dependent,
                    rows_waiting=row.rows_waiting,
                    bytes_waiting=row.bytes_waiting,
                    bytes_per_token=row.bytes_per_token,
                    deadline=row.left_s,
                ),
                kind=row.kind,
                tasks=tuple(row.tasks),
                rows=int(row.n_rows or 0),
                rows_open=int(row.rows_open or 0),
                rows_done=int(row.rows_done or 0),
                rows_later=int(row.rows_later or 0),
                later_s=row.later_s or 0.0,
                tries=row.tries or 0,
                needs=tuple(row.needs),
                rows_blocked=int(row.rows_blocked or 0),
                bytes_blocked=int(row.bytes_blocked or 0),
            )
            for row in found
        ),
    )


_OWNERS = text("SELECT id, tenant_id, priority, name FROM job WHERE id = ANY(:jobs)")


def owners(connection: Connection, jobs: Collection[UUID]) -> dict[str, Owner]:
    """Whose these jobs are."""
    return {
        str(row.id): Owner(str(row.tenant_id), row.priority, row.name)
        for row in connection.execute(_OWNERS, {"jobs": list(jobs)})
    }
