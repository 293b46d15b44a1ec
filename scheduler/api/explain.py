"""Why a job waits and when it will be done: gathers the facts that the dispatcher goes by, and tells them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from uuid import UUID

from motet.messages.explanation import Explanation
from motet.protocol.transport import TransportLost
from motet.protocol.wire import Beat
from scheduler import facts
from scheduler.api.auth import Caller
from scheduler.api.cluster import throttle_of
from scheduler.api.records import JobPath
from scheduler.api.resources import Resources, Use, job_id
from scheduler.api.routing import Routes
from scheduler.explaining.case import Case
from scheduler.explaining.explain import explain
from scheduler.store import explain as store
from scheduler.store.registry import has_leader

routes = Routes(tags=["jobs"])


@routes.get(
    "/v1/jobs/{job}/explain",
    summary="Why a job waits: behind whom, for which model, what cannot run it, and when it will be done",
)
def explain_job(use: Use, caller: Caller, job: JobPath) -> Explanation:
    return explanation(use, caller.tenant, job_id(job))


def explanation(use: Resources, tenant: UUID, job: UUID) -> Explanation:
    """Why the job waits, or when it will be done. Raises NotFound."""
    # Beats before leases: an attempt that a beat names and no lease does has ended.
    beats = _heard(use)
    with use.database.transaction() as connection:
        standing = store.standing(connection, tenant, job)
        known = facts.read(connection, 0.0, use.manifests)
        jobs = {UUID(d.job) for d in known.demand} | {h.job for h in known.held}
        owners = store.owners(connection, jobs)
        leads = has_leader(connection)
    s = use.settings
    return explain(
        Case(
            standing=standing,
            facts=known,
            owners=owners,
            beats=beats,
            memory_share=s.memory_share,
            lane_share=s.lane_share,
            leads=leads,
            throttle=throttle_of(use.door.look()),
            subtask_s=s.subtask_s,
            ahead_s=s.ahead_s,
            depth=s.depth,
            now=datetime.now(UTC),
        )
    )


def _heard(use: Resources) -> Mapping[str, Beat] | None:
    """Beats of live workers; None where Redis is away, and nobody can be heard."""
    try:
        return None if use.transport is None else use.live_workers()
    except TransportLost:
        return None
