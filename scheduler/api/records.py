"""Jobs as messages: what Postgres knows of one, as docs/http.md shows it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Path, Query

from motet.messages.jobs import BlockCounts, CellCounts, JobPass, JobRecord, JobUsage, Priority
from motet.states import State
from scheduler.api.bell import MAX_WAIT_S
from scheduler.store.jobs import JobEntry, TaskEntry
from scheduler.store.opening import PRIORITIES

JobPath = Annotated[str, Path(description="The job's id.", examples=["0b9f3c1e-6f0c-4f0e-9b0a-2f6f0a3c8d11"])]
WaitS = Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for something new.")]

#: Share of the cells from which on their pace says how long the others will take.
_PACE_SHARE = 0.03
PRIORITY_NAMES: Mapping[int, Priority] = {number: name for name, number in PRIORITIES.items()}  # type: ignore[misc]


def describe(job: JobEntry) -> JobRecord:
    """A job as it is shown."""
    total = job.n_rows * job.n_tasks
    return JobRecord(
        id=str(job.id),
        name=job.name,
        state=State(job.state),
        kind=job.kind,  # type: ignore[arg-type]
        reason=job.reason,
        priority=PRIORITY_NAMES[job.priority],
        rows=job.n_rows,
        parts=job.n_parts,
        tasks={task.name: _described(task) for task in job.tasks},
        cells=CellCounts(
            total=total,
            ok=job.cells_ok,
            error=job.cells_error,
            skipped=job.cells_skipped,
            reused=job.cells_reused,
        ),
        passes=tuple(
            JobPass(
                kind=p.kind,
                tasks=p.tasks,
                model=p.model_ref,
                numerics=p.numerics,  # type: ignore[arg-type]
                max_tokens=p.max_tokens,
                needs=p.needs,
            )
            for p in job.passes
        ),
        blocks=BlockCounts(total=job.n_blocks, done=job.blocks_done),
        version=job.version,
        partial=job.state == State.SUCCEEDED and job.cells_ok < total,
        usage=JobUsage(
            tokens=job.tokens,
            computed_tokens=job.computed_tokens,
            tokens_cached=job.tokens_cached,
            tokens_out=job.tokens_out,
            busy_s=job.busy_s,
            subtasks=job.subtasks,
            attempts_lost=job.attempts_lost,
        ),
        created=moment(job.created) or "",
        started=moment(job.started),
        closed=moment(job.closed),
        finished=moment(job.finished),
        deadline=moment(job.deadline),
        retention_days=job.retention_days,
        keep_s=job.keep_s,
        first_row=job.first_row,
        folds=job.folds or {},
        notify_when=job.notify_when,
        rows_matched=job.rows_matched,
        eta_s=eta_s(job),
    )


def _described(task: TaskEntry) -> dict[str, Any]:
    """A task's spec with what it uses, and the type of its answers: known before the first of them."""
    column = {"kind": task.kind} | ({"dim": task.dim, "dtype": task.dtype} if task.kind == "vector" else {})
    artefact = {"artefact_ref": task.artefact_ref} if task.artefact_ref else {}
    return {
        **task.spec,
        "model_ref": task.model_ref,
        **artefact,
        # Rows that bring their own labels: the field that lists them.
        "labels": list(task.labels) or task.spec.get("labels", []),
        "column": column,
    }


def eta_s(job: JobEntry) -> float | None:
    """Seconds left at the pace so far, reused cells apart; None where there is no pace yet.

    The first few cells have waited for their model to load: they are no pace.
    """
    done = job.cells_ok + job.cells_error + job.cells_skipped - job.cells_reused
    left = job.n_rows * job.n_tasks - job.cells_reused - done
    if job.state != State.RUNNING or not job.running_s or done < _PACE_SHARE * (done + left) or done <= 0:
        return None
    return round(job.running_s * left / done, 1)


def moment(at: datetime | None) -> str | None:
    """A time of the database as RFC 3339 in UTC."""
    return None if at is None else at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
