"""Doors: the open job behind each (tenant, endpoint, model), found, made, and closed when nobody comes any more."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Connection, text

from motet.states import State
from scheduler.store.landing import close_job

_ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(hashtextextended(:what, 1))")
_FIND = text(f"""
    SELECT d.job_id FROM door d JOIN job j ON j.id = d.job_id AND j.state = '{State.OPEN}'
     WHERE d.tenant_id = :tenant AND d.endpoint = :endpoint AND d.model_id = :model""")
_PUT = text("""
    INSERT INTO door (tenant_id, endpoint, model_id, job_id) VALUES (:tenant, :endpoint, :model, :job)
    ON CONFLICT (tenant_id, endpoint, model_id) DO UPDATE SET job_id = :job, used = clock_timestamp()""")
_USED = text("UPDATE door SET used = clock_timestamp() WHERE job_id = :job")
_TOO_MANY = text("""
    SELECT job_id FROM door WHERE tenant_id = :tenant ORDER BY used DESC, job_id OFFSET :most FOR UPDATE""")
_IDLE = text("""
    SELECT tenant_id, job_id FROM door WHERE used < now() - make_interval(secs => :idle_s)
     ORDER BY used LIMIT 100 FOR UPDATE SKIP LOCKED""")
_DROP = text("DELETE FROM door WHERE job_id = :job")
_STATE = text("SELECT state FROM job WHERE id = :job")


def lock_doors(connection: Connection, tenant: UUID) -> None:
    """Until the end of the transaction nobody else makes a door of this tenant."""
    connection.execute(_ONE_AT_A_TIME, {"what": str(tenant)})


def find_door(connection: Connection, tenant: UUID, endpoint: str, model: int) -> UUID | None:
    """The open job behind a door; None where there is none that takes rows."""
    at = {"tenant": tenant, "endpoint": endpoint, "model": model}
    return connection.execute(_FIND, at).scalar()


def put_door(
    connection: Connection, tenant: UUID, endpoint: str, model: int, job: UUID, *, most: int
) -> None:
    """Put a job behind a door. Of more than ``most`` doors those are closed that were not used for the longest time."""
    connection.execute(_PUT, {"tenant": tenant, "endpoint": endpoint, "model": model, "job": job})
    for old in connection.execute(_TOO_MANY, {"tenant": tenant, "most": most}).scalars().all():
        _shut(connection, tenant, old)


def used_door(connection: Connection, job: UUID) -> None:
    """Somebody asked there just now."""
    connection.execute(_USED, {"job": job})


def shut_idle_doors(connection: Connection, idle_s: float) -> int:
    """Close those that nobody used for so long; how many."""
    idle = connection.execute(_IDLE, {"idle_s": idle_s}).all()
    for row in idle:
        _shut(connection, row.tenant_id, row.job_id)
    return len(idle)


def _shut(connection: Connection, tenant: UUID, job: UUID) -> None:
    if connection.execute(_STATE, {"job": job}).scalar() == State.OPEN:
        close_job(connection, tenant, job)
    connection.execute(_DROP, {"job": job})
