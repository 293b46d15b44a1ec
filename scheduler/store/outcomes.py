"""Outcomes come in: fenced, cut by block, counted, and handed to sealing, all in one transaction.

Fence first (an outcome counts only under a live lease of an open sub-task of a running job), then append,
count and seal. Reading an entry twice, or two aggregators at once, is harmless: the sub-task is closed by then.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import Connection, text

from motet.protocol import traces
from motet.protocol.columns import CellError, Column, cut
from motet.protocol.wire import Outcome, Usage
from motet.states import CARVED
from scheduler.merge import (
    BadColumn,
    Positions,
    check,
    errors_column,
    mark_returned,
    returned_rows,
)
from scheduler.policy.carve import part
from scheduler.policy.cost import LoadKey, Workload
from scheduler.policy.lifecycle import MAX_TRIES, GivenUp, Return, backoff_s, failed, runs
from scheduler.store import words
from scheduler.store.database import JOB, Asked, Database, notify, together
from scheduler.store.leases import OpenSubtask, open_subtask, put_back
from scheduler.store.places import Place
from scheduler.store.rates import Timed, learn
from scheduler.store.schema import spelt
from scheduler.store.sealing import (
    BlockAnswers,
    PartlyBad,
    TaskShape,
    append,
    asked_for,
    partly_bad,
    task_shapes,
    without_bad,
)
from scheduler.store.spending import Amount, by_block, spend


@dataclass
class Recorded:
    """What one transaction of the aggregator did, for its log and its metrics."""

    accepted: int = 0
    #: Outcomes without a live lease: stale, doubled, forged, or of an ended job.
    dropped: int = 0
    failed: int = 0
    rows: int = 0
    sealed: int = 0

    def add(self, other: Recorded) -> None:
        """Count another transaction with this one."""
        for name in ("accepted", "dropped", "failed", "rows", "sealed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


_LOCK_JOBS_OF = text("""
    SELECT id FROM job WHERE id IN (SELECT job_id FROM subtask WHERE id = ANY(:ids)) ORDER BY id FOR NO KEY UPDATE""")
_LIVE = text(f"""
    SELECT s.*, l.attempt, l.nonce, l.worker AS holder, l.boot, l.device, l.device_kind, l.clone, p.numerics,
           m.digest AS model, coalesce(nullif(p.rate_key, ''), nullif(m.trunk, ''), m.digest) AS learned_as,
           coalesce(CAST(m.manifest ->> 'parameters' AS bigint), 0) AS parameters
      FROM subtask s JOIN lease l ON l.subtask_id = s.id JOIN job j ON j.id = s.job_id
      JOIN pass p ON p.job_id = s.job_id AND p.number = s.pass_number JOIN model m ON m.id = p.model_id
     WHERE s.id = ANY(:ids) AND s.state = 'open' AND j.state IN {spelt(CARVED)}
     ORDER BY s.id FOR UPDATE OF s""")
_REFUSE = text("""
    INSERT INTO refusal (model_id, worker, boot, why)
    SELECT id, :worker, :boot, :why FROM model WHERE digest = :digest ORDER BY id
    ON CONFLICT (model_id, worker) DO UPDATE SET boot = excluded.boot, why = excluded.why, at = clock_timestamp()""")
# What is counted in a job, which is named twice: the planner knows the length of a list, and not of a set in JSON; and
# how large what was read turned out to be, in one statement with the sub-tasks that say so.
_COUNTED = """
    UPDATE job SET cells_ok = cells_ok + c.ok, cells_error = cells_error + c.error, version = version + 1,
           tokens = job.tokens + c.tokens, computed_tokens = computed_tokens + c.computed,
           busy_s = job.busy_s + c.busy_s, subtasks = job.subtasks + c.subtasks,
           tokens_cached = job.tokens_cached + c.tokens_cached, tokens_out = job.tokens_out + c.tokens_out,
           started = coalesce(started, clock_timestamp())
      FROM jsonb_to_recordset(CAST(:counts AS jsonb)) AS c (
           job uuid, ok bigint, error bigint, tokens bigint, computed bigint, busy_s float8, subtasks int,
           tokens_cached bigint, tokens_out bigint)
     WHERE job.id = c.job AND job.id = ANY(:jobs)"""
_COUNT = text(_COUNTED)
_CLOSE = text(f"""
    WITH k AS MATERIALIZED (
      SELECT * FROM jsonb_to_recordset(CAST(:closed AS jsonb)) AS k (
             id bigint, state text, worker text, busy_s real, tokens bigint, job uuid, pass smallint, bytes bigint)),
    closed AS (
      UPDATE subtask SET state = k.state, closed = clock_timestamp(), worker = k.worker, busy_s = k.busy_s,
             tokens = k.tokens FROM k WHERE subtask.id = k.id),
    dropped AS (DELETE FROM lease USING k WHERE lease.subtask_id = k.id),
    measured AS (
      UPDATE pass SET bytes_done = pass.bytes_done + m.bytes, tokens = pass.tokens + m.tokens
        FROM (SELECT job, pass, CAST(sum(bytes) AS bigint) AS bytes, CAST(sum(tokens) AS bigint) AS tokens FROM k
               WHERE state = 'done' AND tokens > 0 GROUP BY job, pass) m
       WHERE pass.job_id = m.job AND pass.number = m.pass)
    {_COUNTED}""")

#: Outcomes that are shorter than either of these teach nothing about speed.
_LEARN_FROM_TOKENS, _LEARN_FROM_S = 128, 0.25
#: Failures that say nothing about the rows: what was asked never reached the engine.
_BLAMELESS = frozenset({"cannot_fetch"})


def record(database: Database, outcomes: Sequence[Outcome]) -> Recorded:
    """Take in these outcomes, in one transaction. Acknowledge their entries only when this has returned."""
    done = Recorded()
    began = time.time()
    with database.transaction() as connection:
        ids = sorted({o.subtask for o in outcomes})
        _, leased = together(connection, (_LOCK_JOBS_OF, {"ids": ids}), (_LIVE, {"ids": ids}))
        live = {(row.id, row.attempt): row for row in leased}
        answers: list[BlockAnswers] = []
        #: Sub-tasks that this transaction closes.
        closed: dict[int, _Closed] = {}
        shapes: dict[tuple[UUID, int], list[TaskShape]] = {}
        bad: dict[Place, PartlyBad] = {}
        totals: dict[UUID, Counter[str]] = defaultdict(Counter)
        consumed: dict[UUID, dict[tuple[int, int], Amount]] = defaultdict(dict)
        learned = _Learned()
        for outcome in outcomes:
            row = live.get((outcome.subtask, outcome.attempt))
            if row is None or outcome.subtask in closed or row.nonce != outcome.nonce:
                done.dropped += 1
                continue
            subtask = open_subtask(row)
            where = (subtask.job, subtask.pass_number)
            if where not in shapes:
                shapes[where] = task_shapes(connection, *where)
            bad.update(partly_bad(connection, [(*where, r.block) for r in subtask.ranges], shapes))
            more, returns, verdict = _take_in(
                outcome,
                subtask,
                row,
                shapes[where],
                bad,
                totals[subtask.job],
                consumed[subtask.job],
                learned,
                done,
            )
            answers += more
            put_back(connection, subtask.job, subtask.pass_number, returns)
            closed[subtask.id] = _Closed(subtask, row.bytes, row.holder, verdict, outcome.usage)
        answers = without_bad(answers, bad)
        done.rows += sum(a.final for a in answers)
        for job, total in totals.items():
            used = spend(connection, job, consumed[job])
            total.update(tokens_cached=used.tokens_cached, tokens_out=used.tokens_out)
        if closed:
            counts = [
                _counts(job, total, [a for a in answers if a.job == job]) for job, total in totals.items()
            ]
            rows = [one.row() for one in closed.values()]
            close: Asked = (
                _CLOSE,
                {"closed": json.dumps(rows), "counts": json.dumps(counts), "jobs": list(totals)},
            )
            of_jobs = (
                (job, [c.subtask.id for c in closed.values() if c.subtask.job == job]) for job in totals
            )
            tell = words.telling([words.done(job, ids) for job, ids in of_jobs], totals)
            done.sealed += append(connection, answers, shapes, first=[close], last=[tell])
        # Last, and in one order: these few rows are shared by all aggregators.
        learned.store(connection)
    for job, total in totals.items():
        traces.add(job, "record", began, subtasks=total["subtasks"], tokens=total["tokens"])
    return done


@dataclass(frozen=True, slots=True)
class _Closed:
    """A sub-task that is closed by its outcome."""

    subtask: OpenSubtask
    #: By which it was priced.
    bytes: int
    worker: str
    state: str
    usage: Usage

    def row(self) -> dict[str, Any]:
        return {
            "id": self.subtask.id,
            "state": self.state,
            "worker": self.worker,
            "busy_s": self.usage.busy_s,
            "tokens": self.usage.tokens,
            "job": str(self.subtask.job),
            "pass": self.subtask.pass_number,
            "bytes": self.bytes,
        }


def _take_in(
    outcome: Outcome,
    subtask: OpenSubtask,
    row: Any,
    shapes: Sequence[TaskShape],
    bad: Mapping[Place, PartlyBad],
    total: Counter[str],
    consumed: dict[tuple[int, int], Amount],
    learned: _Learned,
    done: Recorded,
) -> tuple[list[BlockAnswers], list[Return], str]:
    """What an outcome says: answers, rows that return, and the state in which its sub-task closes.

    ``total`` and ``consumed`` take in what it used.
    """
    asked = asked_for(shapes, subtask.todo)
    answers: list[BlockAnswers] = []
    returns: list[Return] = []
    used: dict[tuple[int, int], Amount] = {}
    error = outcome.error or ("failed", "the attempt failed")
    verdict = outcome.verdict
    if verdict == "done":
        try:
            answers, returns = _answered(outcome, subtask, asked, bad)
            used = by_block(outcome.spent, subtask.ranges, {s.name: s.number for s in asked})
            for at, amount in used.items():
                consumed.setdefault(at, Amount()).add(amount)
        except BadColumn as bad:
            answers, verdict, error = [], "failed", ("bad_outcome", str(bad))
    if verdict == "failed":
        done.failed += 1
        if outcome.refused:
            learned.refusals[outcome.refused, row.holder] = (row.boot, error[1])
        returns, given_up = failed(
            subtask.ranges,
            tries=subtask.tries,
            deaths=subtask.deaths,
            exclusive=subtask.exclusive,
            error=error[0],
            blameless=error[0] in _BLAMELESS or bool(outcome.refused),
        )
        answers = give_up(subtask.job, subtask.pass_number, subtask.id, given_up, asked)
    else:
        done.accepted += 1
        learned.see(row, outcome.usage)
    u = outcome.usage
    # A sub-task of prompts is packed and priced by its rows' own texts; what was read is all of each prompt.
    read = sum(amount.tokens_in for amount in used.values()) if used else u.tokens
    total.update(tokens=read, computed=u.computed_tokens, subtasks=1)
    total["busy_us"] += int(u.busy_s * 1e6)
    return answers, returns, verdict


def _answered(
    outcome: Outcome, subtask: OpenSubtask, asked: Sequence[TaskShape], bad: Mapping[Place, PartlyBad]
) -> tuple[list[BlockAnswers], list[Return]]:
    """A done outcome, cut by block. Raises BadColumn.

    Rows with a retriable error return, until their tries are spent; an error of a cell that is bad anyway sends none.
    """
    n_rows = sum(map(len, subtask.ranges))
    columns: dict[int, Column] = {}
    for shape in asked:
        column = outcome.columns.get(shape.name)
        if column is None:
            raise BadColumn(f"no column for task {shape.name}")
        check(
            column, kind=shape.kind, n_rows=n_rows, n_labels=shape.n_labels, dim=shape.dim, dtype=shape.dtype
        )
        columns[shape.number] = column
    again: Positions = np.array([], dtype=np.int64)
    if subtask.tries + 1 < MAX_TRIES:
        again = returned_rows(columns, _dropped(subtask, columns, bad))
    columns = {number: mark_returned(c, again) for number, c in columns.items()}
    answers: list[BlockAnswers] = []
    returns: list[Return] = []
    start = 0
    for r in subtask.ranges:
        end = start + len(r)
        mine = [int(i) - start for i in again if start <= i < end]
        cells = {number: cut(c, start, end) for number, c in columns.items()}
        answers.append(
            BlockAnswers(
                subtask.job, subtask.pass_number, r.block, subtask.id, r.lo, r.hi, cells, len(r) - len(mine)
            )
        )
        returns.extend(
            Return(
                part(r, r.lo + lo, r.lo + hi),
                tries=subtask.tries + 1,
                deaths=subtask.deaths,
                exclusive=subtask.exclusive,
                after_s=backoff_s(subtask.tries + 1),
            )
            for lo, hi in runs(mine)
        )
        start = end
    return answers, returns


def _dropped(
    subtask: OpenSubtask, tasks: Iterable[int], bad: Mapping[Place, PartlyBad]
) -> dict[int, set[int]]:
    """Task number -> positions in the sub-task of the cells that ``without_bad`` drops."""
    found: dict[int, set[int]] = {task: set() for task in tasks}
    start = 0
    for r in subtask.ranges:
        if (here := bad.get((subtask.job, subtask.pass_number, r.block))) is not None:
            for task, positions in found.items():
                positions.update((start + here.positions(task, r.lo, r.hi)).tolist())
        start += len(r)
    return found


def give_up(
    job: UUID, pass_number: int, subtask: int, rows: Iterable[GivenUp], asked: Sequence[TaskShape]
) -> list[BlockAnswers]:
    """Rows whose cells become errors, as answers."""
    return [
        BlockAnswers(
            job,
            pass_number,
            r.block,
            subtask,
            r.position,
            r.position + 1,
            {s.number: errors_column(s.kind, [CellError(r.error, r.message)]) for s in asked},
            1,
        )
        for r in rows
    ]


def record_given_up(connection: Connection, subtask: OpenSubtask, rows: Sequence[GivenUp]) -> None:
    """Write error cells for rows that the dispatcher gives up, in the transaction that closed their sub-task."""
    shapes = task_shapes(connection, subtask.job, subtask.pass_number)
    asked = asked_for(shapes, subtask.todo)
    by_pass = {(subtask.job, subtask.pass_number): shapes}
    given_up = give_up(subtask.job, subtask.pass_number, subtask.id, rows, asked)
    places = [(a.job, a.pass_number, a.block) for a in given_up]
    answers = without_bad(given_up, partly_bad(connection, places, by_pass))
    counts = [_counts(subtask.job, Counter(), answers)]
    connection.execute(_COUNT, {"counts": json.dumps(counts), "jobs": [subtask.job]})
    append(connection, answers, by_pass)
    notify(connection, JOB, str(subtask.job))


@dataclass
class _Learned:
    """What the outcomes of one transaction say about devices."""

    timed: list[Timed] = field(default_factory=list)
    loads: list[tuple[LoadKey, float]] = field(default_factory=list)
    #: (digest of a model, worker) -> boot, why.
    refusals: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def see(self, row: Any, u: Usage) -> None:
        """Learn from an accepted outcome. A clone ran where it should not have; what loaded also ran cold.

        Bytes are those that the sub-task was priced by, never the worker's count: what is learned is applied to such.
        """
        if row.clone:
            return
        if u.load_s > 0:
            self.loads.append(((row.model, row.device), u.load_s))
        elif (u.tokens >= _LEARN_FROM_TOKENS and u.busy_s > 0) or u.busy_s >= _LEARN_FROM_S:
            # Within what is possible, for a worker of an older minor does not count them: rows of one length, one row.
            squares = min(max(u.squares, u.tokens**2 / row.n_rows), u.tokens**2)
            self.timed.append(
                Timed(
                    key=(row.learned_as, row.device, row.numerics),
                    worker=row.holder,
                    device_kind=row.device_kind,
                    parameters=row.parameters,
                    work=Workload(row.n_rows, u.tokens, squares),
                    seconds=u.busy_s,
                    text_bytes=row.bytes,
                )
            )

    def store(self, connection: Connection) -> None:
        learn(connection, self.timed, self.loads)
        for (digest, worker), (boot, why) in sorted(self.refusals.items()):
            connection.execute(_REFUSE, {"digest": digest, "worker": worker, "boot": boot, "why": why})


def _counts(job: UUID, total: Counter[str], answers: Sequence[BlockAnswers]) -> dict[str, Any]:
    """What is counted in a job: what is inserted, never what was sent."""
    ok = error = 0
    for a in answers:
        for column in a.columns.values():
            n_ok, n_error, _, _ = column.counts()
            ok, error = ok + n_ok, error + n_error
    return {
        "job": str(job),
        "ok": ok,
        "error": error,
        "tokens": total["tokens"],
        "computed": total["computed"],
        "busy_s": total["busy_us"] / 1e6,
        "subtasks": total["subtasks"],
        "tokens_cached": total["tokens_cached"],
        "tokens_out": total["tokens_out"],
    }
