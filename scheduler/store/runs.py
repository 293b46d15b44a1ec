"""Who runs what now, by live leases: for lists of workers."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

_RUNS = text("""
    SELECT l.worker, CASE WHEN j.tenant_id = :tenant THEN s.job_id END AS job,
           CASE WHEN j.tenant_id = :tenant THEN p.kind ELSE '' END AS pass_kind,
           count(*) AS subtasks, sum(s.n_rows) AS n_rows
      FROM lease l JOIN subtask s ON s.id = l.subtask_id JOIN job j ON j.id = s.job_id
      JOIN pass p ON p.job_id = s.job_id AND p.number = s.pass_number
     GROUP BY 1, 2, 3 ORDER BY 1, min(l.leased)""")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSubtasks:
    """Sub-tasks of one job and pass kind that a worker holds leases of."""

    #: None for jobs of other tenants, which are counted and not named.
    job: UUID | None
    pass_kind: str
    subtasks: int
    rows: int


def runs_by_worker(connection: Connection, tenant: UUID) -> dict[str, list[HeldSubtasks]]:
    """Who runs what now, by live leases: worker -> the tenant's jobs, oldest lease first, and all others."""
    found: dict[str, list[HeldSubtasks]] = {}
    for row in connection.execute(_RUNS, {"tenant": tenant}):
        run = HeldSubtasks(job=row.job, pass_kind=row.pass_kind, subtasks=row.subtasks, rows=int(row.n_rows))
        found.setdefault(row.worker, []).append(run)
    return found
