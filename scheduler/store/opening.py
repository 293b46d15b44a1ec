"""Opening a job: its spec, its passes and its tasks. A submission that arrives twice opens one job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from uuid import UUID

from psycopg.types.json import Jsonb
from sqlalchemy import Connection, text

from motet.errors import Conflict, Overloaded
from motet.states import LIVE, State
from scheduler.blocks import is_digest, keyed
from scheduler.store.database import Asked, together
from scheduler.store.registry import SECRET
from scheduler.store.schema import spelt

PRIORITIES: Mapping[str, int] = {"interactive": 0, "normal": 1, "bulk": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A task of a job that is being opened: columns of its row."""

    name: str
    pass_number: int
    model_id: int
    kind: str
    spec: Mapping[str, Any]
    labels: tuple[str, ...]
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPass:
    """A pass of a job that is being opened: columns of its row; its number is its place."""

    kind: str
    model_id: int
    numerics: str
    max_tokens: int
    input: str
    #: Numbers of the tasks whose cells it reads.
    needs: tuple[int, ...] = ()
    #: ``PassPlan.rate_key``.
    rate_key: str = ""
    #: How often it reads each field of the job, and bytes beside them: see ``scheduler.blocks.Reads``.
    reads: tuple[int, ...] = ()
    bytes_beside: int = 0
    #: It runs on the rows for which this holds; None: on all.
    condition: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job that is being opened, planned and checked."""

    id: UUID
    tenant: UUID
    name: str
    priority: int
    reuse: bool
    bad_rows: Literal["refuse", "error"]
    #: Fields that some task reads, in order of first use: what is stored of a row.
    fields: tuple[str, ...]
    tasks: tuple[NewTask, ...]
    passes: tuple[NewPass, ...]
    #: Sha256 of what was asked, and the client's name for asking it.
    request_digest: bytes
    idempotency_key: str | None = None
    #: Seconds from now in which it must end, or it fails; None: no hurry.
    deadline_s: float | None = None
    #: Days after its end at which it is deleted, where the cluster does not delete it sooner; None: as all others.
    retention_days: float | None = None
    #: Its rows come by asking, until it is closed.
    open: bool = False
    #: Seconds for which an open job keeps a row after it was answered; None: until it is removed.
    keep_s: float | None = None
    #: Name -> spec of what is folded of them; None: nothing.
    folds: Mapping[str, Any] | None = None
    #: Each row for which this holds is an event, and numbers of the tasks whose answers it reads; None: no row is.
    notify_when: str | None = None
    notify_needs: tuple[int, ...] = ()


_BY_KEY = text("""
    SELECT j.id, j.request_digest, t.digest_key FROM job j JOIN tenant t ON t.id = j.tenant_id
     WHERE j.tenant_id = :tenant AND j.idempotency_key = :key""")
_UNFINISHED_JOBS = text(f"""
    SELECT count(*) FROM job WHERE tenant_id = :tenant AND state IN {spelt(LIVE)}""")
_STILL_THERE = text("""
    SELECT id FROM model WHERE id = ANY(:ids) AND NOT manifest ? 'removed' ORDER BY id FOR KEY SHARE""")
_OPEN = text("""
    INSERT INTO job (id, tenant_id, name, kind, priority, reuse, bad_rows, fields, n_tasks, idempotency_key,
                     request_digest, deadline, retention_days, keep_s, folds, state, started,
                     notify_when, notify_needs)
    VALUES (:id, :tenant, :name, :kind, :priority, :reuse, :bad_rows, :fields, :n_tasks, :key, :digest,
            clock_timestamp() + make_interval(secs => CAST(:deadline_s AS double precision)), :retention_days,
            :keep_s, CAST(:folds AS jsonb), :state, CASE WHEN :open THEN clock_timestamp() END,
            :notify_when, :notify_needs)
    ON CONFLICT (tenant_id, idempotency_key) DO NOTHING RETURNING id""")
# Nothing where the same request, sent twice at once, opened another job.
_ADD_PASSES = text("""
    INSERT INTO pass (job_id, number, kind, model_id, numerics, max_tokens, input, needs, rate_key, reads, bytes_beside,
                      condition)
    SELECT j.id, p.* FROM job j, jsonb_to_recordset(CAST(:passes AS jsonb)) AS p (
           number smallint, kind text, model_id bigint, numerics text, max_tokens int, input text, needs smallint[],
           rate_key text, reads int[], bytes_beside int, condition text)
     WHERE j.id = :job""")
_ADD_TASKS = text("""
    INSERT INTO task (job_id, number, name, pass_number, model_id, kind, spec, labels, digest)
    SELECT j.id, t.number, t.name, t.pass_number, t.model_id, t.kind, t.spec, t.labels, decode(t.digest, 'hex')
      FROM job j, jsonb_to_recordset(CAST(:tasks AS jsonb)) AS t (
           number smallint, name text, pass_number smallint, model_id bigint, kind text, spec jsonb, labels text[],
           digest text)
     WHERE j.id = :job""")


def opened_before(connection: Connection, tenant: UUID, key: str, request_digest: bytes) -> UUID | None:
    """The job that this Idempotency-Key opened, if any. Raises Conflict where it opened another one."""
    (found,) = together(connection, _asked_before(tenant, key))
    return _same_request(found, request_digest)


def _asked_before(tenant: UUID, key: str | None) -> Asked:
    return _BY_KEY, {"tenant": tenant, "key": key}


def _same_request(found: Sequence[Any], request_digest: bytes) -> UUID | None:
    """The job among what `_asked_before` found, if any. Raises Conflict where another body opened it."""
    if not found:
        return None
    (job,) = found
    if not is_digest(bytes(job.digest_key), request_digest, bytes(job.request_digest)):
        raise Conflict(f"this Idempotency-Key opened job {job.id}, from another body; use a new key")
    opened: UUID = job.id
    return opened


def open_job(connection: Connection, job: NewJob, *, max_active_jobs: int) -> UUID:
    """Open a job, or find the one that the same key and body opened. Its id.

    Raises Overloaded beyond ``max_active_jobs`` of the tenant, Conflict where a model has just been removed
    or the key belongs to another body.
    """
    models = {t.model_id for t in job.tasks} | {p.model_id for p in job.passes}
    of_tenant = {"tenant": job.tenant}
    same, ((unfinished,),), there, ((secret,),) = together(
        connection,
        _asked_before(job.tenant, job.idempotency_key),
        (_UNFINISHED_JOBS, of_tenant),
        (_STILL_THERE, {"ids": sorted(models)}),
        (SECRET, of_tenant),
    )
    if (opened := _same_request(same, job.request_digest)) is not None:
        return opened
    if unfinished >= max_active_jobs:
        raise Overloaded(f"{max_active_jobs} jobs are unfinished; wait for one, or cancel it", 10.0)
    if len(there) != len(models):
        raise Conflict("a model of this job was removed just now; submit it again")
    passes = [{"number": number, **asdict(p)} for number, p in enumerate(job.passes)]
    tasks = [{"number": number, **asdict(t), "digest": t.digest.hex()} for number, t in enumerate(job.tasks)]
    made, _, _ = together(
        connection,
        (
            _OPEN,
            {
                "id": job.id,
                "tenant": job.tenant,
                "name": job.name,
                "kind": "train" if any(t.kind == "fit" for t in job.tasks) else "infer",
                "priority": job.priority,
                "reuse": job.reuse,
                "bad_rows": job.bad_rows,
                "fields": list(job.fields),
                "n_tasks": len(job.tasks),
                "key": job.idempotency_key,
                "digest": keyed(bytes(secret), job.request_digest),
                "deadline_s": job.deadline_s,
                "retention_days": job.retention_days,
                "keep_s": job.keep_s,
                "folds": None if job.folds is None else Jsonb(job.folds),
                "state": State.OPEN if job.open else State.LOADING,
                "open": job.open,
                "notify_when": job.notify_when,
                "notify_needs": list(job.notify_needs),
            },
        ),
        (_ADD_PASSES, {"job": job.id, "passes": Jsonb(passes)}),
        (_ADD_TASKS, {"job": job.id, "tasks": Jsonb(tasks)}),
    )
    if not made:
        # The same request, sent twice at once: the other one has committed by now.
        assert job.idempotency_key is not None
        before = opened_before(connection, job.tenant, job.idempotency_key, job.request_digest)
        if before is None:
            raise Conflict("the same request is under way; send it again")
        return before
    return job.id
