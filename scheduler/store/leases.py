"""Demand, frontiers, leases and rescue: everything the dispatcher reads and writes.

Lock order everywhere: leader, jobs by id, sub-tasks by id, block_pass, pass. Each function that writes is one
transaction that begins with the fence.
"""

from __future__ import annotations

import json
import secrets
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.protocol.columns import Column
from motet.protocol.manifest import Manifest
from scheduler.blocks import Reads, read_in_order
from scheduler.policy.carve import Carved, Frontier, OpenBlock, Piece, Range
from scheduler.policy.lifecycle import Refusal, Return
from scheduler.policy.place import Demand
from scheduler.store.database import Database
from scheduler.store.leadership import fence, see_transport
from scheduler.store.results import read_columns

LeaseKey = tuple[int, int]

_MANIFESTS_KEPT = 1000
#: Lengths of rows kept between steps, eight bytes each: those of the blocks that are carved on.
_LENGTHS_KEPT = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A live lease, with what is needed to judge and to rescue it."""

    subtask: int
    attempt: int
    job: UUID
    pass_number: int
    n_rows: int
    #: UTF-8 bytes that its pass reads of its rows.
    bytes: int
    worker: str
    boot: str
    predicted_s: float
    exclusive: bool
    #: A second lease of its sub-task, made beside a straggler.
    clone: bool
    #: The database's clock has passed its end.
    expired: bool
    #: Seconds until its end, and since it was made.
    left_s: float
    age_s: float

    @property
    def key(self) -> LeaseKey:
        return (self.subtask, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A sub-task with its fresh lease: committed, not yet sent."""

    subtask: int
    attempt: int
    nonce: str
    worker: str
    job: str
    pass_number: int
    carved: Carved
    predicted_s: float
    #: As in ``Assignment``.
    measured: bool = False


# -- what waits ------------------------------------------------------------------------------------

# The first passes of each tenant in each class, then the second ones: whoever has many hides nobody.
_DEMAND = text("""
    WITH waiting AS (
        SELECT p.job_id, p.number, dense_rank() OVER (ORDER BY j.created, j.id) AS age,
               row_number() OVER (PARTITION BY j.priority, j.tenant_id ORDER BY j.created, j.id, p.number) AS turn,
               j.priority
          FROM pass p JOIN job j ON j.id = p.job_id WHERE j.state = 'running' AND p.rows_waiting > 0
         ORDER BY turn, j.priority, age, p.number LIMIT :limit)
    SELECT p.job_id, p.number, j.tenant_id, t.weight, j.priority, p.numerics, p.rate_key,
           cardinality(p.needs) > 0 AS dependent, m.id AS model, m.created AS model_created,
           array_prepend(p.model_id, ARRAY(SELECT k.model_id FROM task k
                                            WHERE k.job_id = p.job_id AND k.pass_number = p.number)) AS model_ids,
           p.rows_waiting - coalesce(later.n_rows, 0) AS n_rows,
           p.bytes_waiting - coalesce(later.bytes, 0) AS bytes,
           w.age,
           CASE WHEN p.tokens > 0 THEN CAST(p.bytes_done AS double precision) / p.tokens ELSE 0 END AS bytes_per_token,
           date_part('epoch', j.deadline - clock_timestamp()) AS left_s
      FROM waiting w JOIN pass p ON p.job_id = w.job_id AND p.number = w.number
      JOIN job j ON j.id = p.job_id JOIN tenant t ON t.id = j.tenant_id JOIN model m ON m.id = p.model_id
      LEFT JOIN LATERAL (SELECT sum(hi - lo) AS n_rows, CAST(sum(bytes) AS bigint) AS bytes FROM piece
                          WHERE piece.job_id = p.job_id AND piece.pass_number = p.number
                            AND not_before > clock_timestamp()) later ON true
     ORDER BY w.priority, w.age, p.number""")


def demand(connection: Connection, now: float, limit: int = 500) -> list[Demand]:
    """Passes of running jobs with rows that may be carved now; deadlines are told on the clock of ``now``.

    Where more than ``limit`` wait each tenant has as many of them in each class, its oldest.
    """
    rows = [row for row in connection.execute(_DEMAND, {"limit": limit}) if row.n_rows > 0]
    models = _manifests(connection, {(row.model, row.model_created) for row in rows})
    return [
        Demand(
            job=str(row.job_id),
            pass_number=row.number,
            tenant=str(row.tenant_id),
            weight=row.weight,
            priority=row.priority,
            age=row.age,
            model_ids=frozenset(row.model_ids),
            numerics=row.numerics,
            model=models[row.model, row.model_created],
            rate_key=row.rate_key,
            dependent=row.dependent,
            rows_waiting=row.n_rows,
            bytes_waiting=row.bytes,
            bytes_per_token=row.bytes_per_token,
            deadline=None if row.left_s is None else now + row.left_s,
        )
        for row in rows
    ]


_MANIFESTS = text("SELECT id, created, manifest FROM model WHERE id = ANY(:ids)")
#: A model never changes; after a restore of an older dump its id may name another, born at another time.
_Model = tuple[int, datetime]
_manifests_read: dict[_Model, Manifest] = {}


def _manifests(connection: Connection, wanted: Collection[_Model]) -> dict[_Model, Manifest]:
    """The manifests of these models, read and parsed once.

    Threads of the API ask at the same time, so what one has found it does not look up again where another may empty it.
    """
    found = {model: known for model in wanted if (known := _manifests_read.get(model)) is not None}
    if missing := [model for model in wanted if model not in found]:
        for row in connection.execute(_MANIFESTS, {"ids": [id_ for id_, _ in missing]}):
            found[row.id, row.created] = Manifest.from_json(row.manifest)
        if len(_manifests_read) > _MANIFESTS_KEPT:
            _manifests_read.clear()
        _manifests_read.update(found)
    return found


_PIECES = text("""
    SELECT p.id, p.block_number, p.lo, p.hi, p.bytes, p.tries, p.deaths, p.exclusive, bp.todo
      FROM piece p JOIN block_pass bp USING (job_id, pass_number, block_number)
     WHERE p.job_id = :job AND p.pass_number = :pass AND p.not_before <= clock_timestamp()
     ORDER BY p.block_number, p.lo LIMIT :limit""")
_OPEN_BLOCKS = text("""
    SELECT block_number, cursor, n, todo FROM block_pass
     WHERE job_id = :job AND pass_number = :pass AND state = 'ready' AND cursor < n
     ORDER BY block_number LIMIT :limit""")
_LENGTHS = text("""
    SELECT b.number, coalesce(w.row_order, b.row_order) AS row_order, b.lengths, b.n_rows,
           p.reads, p.bytes_beside, p.max_tokens
      FROM block b JOIN pass p ON p.job_id = b.job_id AND p.number = :pass
      JOIN block_pass w ON w.job_id = b.job_id AND w.pass_number = p.number AND w.block_number = b.number
     WHERE b.job_id = :job AND b.number = ANY(:blocks)""")


def frontier(connection: Connection, job: str, pass_number: int, *, rows: int, limit: int = 16) -> Frontier:
    """The next pieces and open blocks of a pass: enough for so many rows, at most ``limit`` of each."""
    job_id = UUID(job)
    at = {"job": job_id, "pass": pass_number, "limit": limit}
    pieces = [
        Piece(
            row.id,
            Range(row.block_number, row.lo, row.hi, row.bytes),
            row.todo,
            tries=row.tries,
            deaths=row.deaths,
            exclusive=row.exclusive,
        )
        for row in connection.execute(_PIECES, at)
    ]
    wanted = rows - sum(len(p.range) for p in pieces)
    opened = []
    for row in connection.execute(_OPEN_BLOCKS, at) if wanted > 0 else ():
        opened.append(row)
        wanted -= row.n - row.cursor
        if wanted <= 0:
            break
    lengths = _lengths_of(connection, job_id, pass_number, [row.block_number for row in opened])
    return Frontier(
        pieces=pieces,
        blocks=[
            OpenBlock(row.block_number, row.cursor, row.n, row.todo, lengths[row.block_number])
            for row in opened
            if row.block_number in lengths
        ],
    )


#: (job, pass, block) -> bytes of the first i rows in order, for every i. Of what may be carved they never change.
_lengths_read: OrderedDict[tuple[UUID, int, int], array[int]] = OrderedDict()


def _lengths_of(
    connection: Connection, job: UUID, pass_number: int, blocks: Sequence[int]
) -> dict[int, array[int]]:
    """``OpenBlock.cumulative`` of these blocks, decoded once."""
    missing = [block for block in blocks if (job, pass_number, block) not in _lengths_read]
    if missing:
        for row in connection.execute(_LENGTHS, {"job": job, "pass": pass_number, "blocks": missing}):
            reads = Reads(tuple(row.reads), row.bytes_beside, row.max_tokens)
            sizes = read_in_order(row.row_order, row.lengths, row.n_rows, reads)
            _lengths_read[job, pass_number, row.number] = array("Q", accumulate(sizes, initial=0))
    found = {}
    for block in blocks:
        key = (job, pass_number, block)
        if key in _lengths_read:  # the job may be removed while we read
            _lengths_read.move_to_end(key)
            found[block] = _lengths_read[key]
    kept = sum(map(len, _lengths_read.values())) if missing else 0
    while kept > _LENGTHS_KEPT:
        kept -= len(_lengths_read.popitem(last=False)[1])
    return found


# -- leases ----------------------------------------------------------------------------------------

_HELD = text("""
    SELECT l.subtask_id, l.attempt, s.job_id, s.pass_number, s.n_rows, s.bytes, l.worker, l.boot, l.predicted_s,
           s.exclusive, l.clone, l.until < now.at AS expired, date_part('epoch', l.until - now.at) AS left_s,
           date_part('epoch', now.at - l.leased) AS age_s
      FROM lease l JOIN subtask s ON s.id = l.subtask_id CROSS JOIN (SELECT clock_timestamp() AS at) now""")


def held(connection: Connection) -> list[Held]:
    """Every live lease."""
    # Unpacked, since a name asked of a row takes twice as long, and there are thousands in each step.
    return [
        Held(
            subtask=subtask,
            attempt=attempt,
            job=job,
            pass_number=pass_number,
            n_rows=n_rows,
            bytes=size,
            worker=worker,
            boot=boot,
            predicted_s=predicted_s,
            exclusive=exclusive,
            clone=clone,
            expired=expired,
            left_s=left_s,
            age_s=age_s,
        )
        for (
            subtask,
            attempt,
            job,
            pass_number,
            n_rows,
            size,
            worker,
            boot,
            predicted_s,
            exclusive,
            clone,
            expired,
            left_s,
            age_s,
        ) in connection.execute(_HELD)
    ]


_SPENT = text("SELECT id, state, worker, busy_s FROM subtask WHERE id = ANY(:ids) AND state <> 'open'")


def spent(connection: Connection, subtasks: Collection[int]) -> dict[int, tuple[str, str, float]]:
    """Of these sub-tasks those that closed: state, who had it, and its device's seconds.

    One that is neither here nor leased was recalled, or its job is gone: it spent nothing.
    """
    return {
        row.id: (row.state, row.worker, row.busy_s)
        for row in connection.execute(_SPENT, {"ids": list(subtasks)})
    }


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


_EXTEND = text("""
    UPDATE lease SET until = clock_timestamp() + make_interval(secs => :lease_s)
      FROM unnest(CAST(:subtasks AS bigint[]), CAST(:attempts AS smallint[])) k (subtask_id, attempt)
     WHERE lease.subtask_id = k.subtask_id AND lease.attempt = k.attempt""")
_EXTEND_ALL = text(
    "UPDATE lease SET until = greatest(until, clock_timestamp() + make_interval(secs => :lease_s))"
)


def extend(database: Database, epoch: int, keys: Sequence[LeaseKey], lease_s: float) -> None:
    """Keep these leases alive."""
    with database.transaction() as connection:
        fence(connection, epoch)
        connection.execute(
            _EXTEND, {"subtasks": [s for s, _ in keys], "attempts": [a for _, a in keys], "lease_s": lease_s}
        )


def extend_all(database: Database, epoch: int, lease_s: float) -> None:
    """A new leader has heard no beat yet: every live lease gets one more term."""
    with database.transaction() as connection:
        fence(connection, epoch)
        connection.execute(_EXTEND_ALL, {"lease_s": lease_s})


_RUNNING = text("SELECT id FROM job WHERE id = ANY(:jobs) AND state = 'running' ORDER BY id FOR SHARE")
# Every statement is for all cuts of a step at once: what a sub-task costs is then its rows, not its round trips.
_PLACES = "unnest(CAST(:jobs AS uuid[]), CAST(:passes AS smallint[]), CAST(:blocks AS int[])"
_CURSORS = text(f"""
    SELECT b.job_id, b.pass_number, b.block_number, b.cursor
      FROM {_PLACES}) k (job, pass, block)
      JOIN block_pass b ON b.job_id = k.job AND b.pass_number = k.pass AND b.block_number = k.block
     WHERE b.state = 'ready' ORDER BY 1, 2, 3 FOR NO KEY UPDATE OF b""")
_STILL_PIECES = text("SELECT id, job_id, pass_number FROM piece WHERE id = ANY(:ids) ORDER BY id FOR UPDATE")
# Blocks and pieces are locked by now, so that this takes locks of passes alone.
_OPEN = text(f"""
    WITH k AS MATERIALIZED (
      SELECT nextval(pg_get_serial_sequence('subtask', 'id')) AS id, c.*
        FROM (SELECT * FROM jsonb_to_recordset(CAST(:cuts AS jsonb)) AS c (
                place int, job uuid, pass smallint, blocks int[], los int[], his int[], sizes bigint[], todo bigint,
                n_rows int, bytes bigint, tries smallint, deaths smallint, exclusive boolean,
                worker text, boot text, nonce text, device text, device_kind text, predicted_s real) ORDER BY place) c),
    advanced AS (
      UPDATE block_pass b SET cursor = k.cursor
        FROM {_PLACES}, CAST(:cursors AS int[])) k (job, pass, block, cursor)
       WHERE b.job_id = k.job AND b.pass_number = k.pass AND b.block_number = k.block),
    eaten AS (DELETE FROM piece WHERE id = ANY(:eaten)),
    left_over AS (
      INSERT INTO piece (job_id, pass_number, block_number, lo, hi, bytes)
      SELECT job, pass, block, lo, hi, bytes FROM jsonb_to_recordset(CAST(:leftovers AS jsonb)) AS l (
        job uuid, pass smallint, block int, lo int, hi int, bytes bigint)),
    counted AS (
      UPDATE pass p SET rows_waiting = p.rows_waiting - less.n_rows, bytes_waiting = p.bytes_waiting - less.bytes
        FROM (SELECT job, pass, sum(n_rows) AS n_rows, sum(bytes) AS bytes FROM k GROUP BY job, pass) less
       WHERE p.job_id = less.job AND p.number = less.pass),
    opened AS (
      INSERT INTO subtask (id, job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes, tries, deaths, exclusive,
                           attempts) OVERRIDING SYSTEM VALUE
      SELECT id, job, pass, blocks, los, his, sizes, todo, n_rows, bytes, tries, deaths, exclusive, 1 FROM k),
    leased AS (
      INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, device, device_kind, predicted_s, until)
      SELECT id, 1, worker, boot, nonce, device, device_kind, predicted_s,
             clock_timestamp() + make_interval(secs => :lease_s) FROM k)
    SELECT id FROM k ORDER BY place""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One carved sub-task on its way to a lease."""

    job: str
    pass_number: int
    worker: str
    boot: str
    #: Its name, and its kind as the beat has it.
    device: str
    device_kind: str
    predicted_s: float
    carved: Carved
    #: As in ``Assignment``.
    measured: bool = False


def lease(database: Database, epoch: int, cuts: Sequence[Cut], lease_s: float) -> list[Leased]:
    """Open these sub-tasks, each with a first lease, in one transaction.

    A cut whose job has ended, or whose rows were taken meanwhile, is left out: nothing of it is changed.
    """
    with database.transaction() as connection:
        fence(connection, epoch)
        jobs = {c.job for c in cuts}
        running = {
            str(id_) for id_ in connection.execute(_RUNNING, {"jobs": sorted(map(UUID, jobs))}).scalars()
        }
        taken = _take_rows(connection, [c for c in cuts if c.job in running])
        return _open(connection, taken, lease_s) if taken.cuts else []


#: Job, pass, block.
_Place = tuple[str, int, int]


@dataclass(slots=True)
class _Taken:
    """Cuts whose rows are still where they were carved, and how the frontier stands without them."""

    cuts: list[Cut] = field(default_factory=list)
    cursors: dict[_Place, int] = field(default_factory=dict)
    pieces: list[int] = field(default_factory=list)


def _take_rows(connection: Connection, cuts: Sequence[Cut]) -> _Taken:
    """Lock what the cuts were carved from, and see which of them hold; those before count for those after."""
    uncarved = [c for c in cuts if not c.carved.pieces]
    cursors = _cursors(connection, {place for c in uncarved for place in _ranges(c)})
    pieces = _pieces(connection, {id_ for c in cuts for id_ in c.carved.pieces})
    taken = _Taken()
    for cut in cuts:
        if cut.carved.pieces:
            if any(pieces.get(id_) != (cut.job, cut.pass_number) for id_ in cut.carved.pieces):
                continue
            for id_ in cut.carved.pieces:
                del pieces[id_]
            taken.pieces += cut.carved.pieces
        else:
            ranges = _ranges(cut)
            if any(cursors.get(place) != r.lo for place, r in ranges.items()):
                continue
            ends = {place: r.hi for place, r in ranges.items()}
            cursors |= ends
            taken.cursors |= ends
        taken.cuts.append(cut)
    return taken


def _ranges(cut: Cut) -> dict[_Place, Range]:
    return {(cut.job, cut.pass_number, r.block): r for r in cut.carved.ranges}


def _cursors(connection: Connection, places: Collection[_Place]) -> dict[_Place, int]:
    """How far these blocks are carved, locked; without those that are not ready."""
    if not places:
        return {}
    found = connection.execute(_CURSORS, _at(places))
    return {(str(job), number, block): cursor for job, number, block, cursor in found}


def _pieces(connection: Connection, ids: Collection[int]) -> dict[int, tuple[str, int]]:
    """The job and pass of those of these pieces that are still there, locked."""
    if not ids:
        return {}
    found = connection.execute(_STILL_PIECES, {"ids": list(ids)})
    return {id_: (str(job), number) for id_, job, number in found}


def _at(places: Collection[_Place]) -> dict[str, list[Any]]:
    """Places as the parameters that ``_PLACES`` names."""
    return {
        "jobs": [UUID(job) for job, _, _ in places],
        "passes": [number for _, number, _ in places],
        "blocks": [block for _, _, block in places],
    }


def _open(connection: Connection, taken: _Taken, lease_s: float) -> list[Leased]:
    """Take the rows, and open and lease the sub-tasks."""
    nonces = [secrets.token_hex(16) for _ in taken.cuts]
    opened = [
        {
            "place": place,
            "job": cut.job,
            "pass": cut.pass_number,
            "blocks": [r.block for r in cut.carved.ranges],
            "los": [r.lo for r in cut.carved.ranges],
            "his": [r.hi for r in cut.carved.ranges],
            "sizes": [r.bytes for r in cut.carved.ranges],
            "todo": cut.carved.todo,
            "n_rows": cut.carved.rows,
            "bytes": cut.carved.bytes,
            "tries": cut.carved.tries,
            "deaths": cut.carved.deaths,
            "exclusive": cut.carved.exclusive,
            "worker": cut.worker,
            "boot": cut.boot,
            "nonce": nonce,
            "device": cut.device,
            "device_kind": cut.device_kind,
            "predicted_s": cut.predicted_s,
        }
        for place, (cut, nonce) in enumerate(zip(taken.cuts, nonces, strict=True))
    ]
    leftovers = [
        {
            "job": cut.job,
            "pass": cut.pass_number,
            "block": left.block,
            "lo": left.lo,
            "hi": left.hi,
            "bytes": left.bytes,
        }
        for cut in taken.cuts
        if (left := cut.carved.leftover) is not None
    ]
    ids = connection.execute(
        _OPEN,
        {
            **_at(taken.cursors),
            "cursors": list(taken.cursors.values()),
            "eaten": taken.pieces,
            "leftovers": json.dumps(leftovers),
            "cuts": json.dumps(opened),
            "lease_s": lease_s,
        },
    ).scalars()
    return [
        Leased(
            subtask=subtask,
            attempt=1,
            nonce=nonce,
            worker=cut.worker,
            job=cut.job,
            pass_number=cut.pass_number,
            carved=cut.carved,
            predicted_s=cut.predicted_s,
            measured=cut.measured,
        )
        for subtask, nonce, cut in zip(ids, nonces, taken.cuts, strict=True)
    ]


# -- clones ----------------------------------------------------------------------------------------

_JOBS_OF = text("SELECT DISTINCT job_id FROM subtask WHERE id = ANY(:ids)")
_CLONABLE = text("""
    SELECT s.*, l.worker AS holder FROM subtask s JOIN lease l ON l.subtask_id = s.id
     WHERE s.id = ANY(:ids) AND s.job_id = ANY(:jobs) AND s.state = 'open' AND s.deaths = 0 AND NOT s.exclusive
       AND NOT EXISTS (SELECT 1 FROM lease other WHERE other.subtask_id = s.id AND other.attempt <> l.attempt)
     ORDER BY s.id FOR NO KEY UPDATE OF s""")
_CLONE = text("""
    WITH k AS (SELECT * FROM jsonb_to_recordset(CAST(:clones AS jsonb)) AS c (
                 subtask bigint, worker text, boot text, nonce text, device text, device_kind text, predicted_s real)),
    counted AS (UPDATE subtask s SET attempts = s.attempts + 1 FROM k WHERE s.id = k.subtask RETURNING s.id, s.attempts)
    INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, device, device_kind, predicted_s, clone, until)
    SELECT k.subtask, counted.attempts, k.worker, k.boot, k.nonce, k.device, k.device_kind, k.predicted_s, true,
           clock_timestamp() + make_interval(secs => :lease_s)
      FROM k JOIN counted ON counted.id = k.subtask RETURNING subtask_id, attempt""")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondLease:
    """A sub-task that another worker is to run as well."""

    subtask: int
    worker: str
    boot: str
    #: Its name, and its kind as the beat has it.
    device: str
    device_kind: str
    predicted_s: float


def clone(database: Database, epoch: int, clones: Sequence[SecondLease], lease_s: float) -> list[Leased]:
    """Lease these open sub-tasks a second time, each as a new attempt, in one transaction.

    One is left out that has closed, has no lease or two, is held by that very worker, or is suspected of killing
    its worker: a clone must not carry poison to a healthy device.
    """
    ids = sorted({c.subtask for c in clones})
    with database.transaction() as connection:
        fence(connection, epoch)
        jobs = sorted(connection.execute(_JOBS_OF, {"ids": ids}).scalars())
        running = list(connection.execute(_RUNNING, {"jobs": jobs}).scalars())
        clonable = {row.id: row for row in connection.execute(_CLONABLE, {"ids": ids, "jobs": running})}
        chosen: dict[int, tuple[SecondLease, str]] = {}
        for c in clones:
            if c.subtask in clonable and clonable[c.subtask].holder != c.worker:
                chosen.setdefault(c.subtask, (c, secrets.token_hex(16)))
        if not chosen:
            return []
        asked = [
            {
                "subtask": c.subtask,
                "worker": c.worker,
                "boot": c.boot,
                "nonce": nonce,
                "device": c.device,
                "device_kind": c.device_kind,
                "predicted_s": c.predicted_s,
            }
            for c, nonce in chosen.values()
        ]
        made = connection.execute(_CLONE, {"clones": json.dumps(asked), "lease_s": lease_s})
        return [_cloned(clonable[subtask], attempt, *chosen[subtask]) for subtask, attempt in made]


def _cloned(row: Any, attempt: int, asked: SecondLease, nonce: str) -> Leased:
    subtask = open_subtask(row)
    return Leased(
        subtask=subtask.id,
        attempt=attempt,
        nonce=nonce,
        worker=asked.worker,
        job=str(subtask.job),
        pass_number=subtask.pass_number,
        carved=Carved(
            ranges=subtask.ranges,
            todo=subtask.todo,
            tries=subtask.tries,
            deaths=subtask.deaths,
            exclusive=subtask.exclusive,
        ),
        predicted_s=asked.predicted_s,
    )


# -- rescue and recall -----------------------------------------------------------------------------

LOCK_JOBS = text("SELECT id, state FROM job WHERE id = ANY(:jobs) ORDER BY id FOR NO KEY UPDATE")
_DROP_LEASES = text("""
    DELETE FROM lease USING unnest(CAST(:subtasks AS bigint[]), CAST(:attempts AS smallint[])) k (subtask_id, attempt)
     WHERE lease.subtask_id = k.subtask_id AND lease.attempt = k.attempt
 RETURNING lease.subtask_id, lease.worker""")
_LEFT_ALONE = text("""
    SELECT s.* FROM subtask s
     WHERE s.id = ANY(:ids) AND s.state = 'open' AND NOT EXISTS (SELECT 1 FROM lease l WHERE l.subtask_id = s.id)
     ORDER BY s.id FOR UPDATE""")
_CLOSE = text("""
    UPDATE subtask SET state = 'lost', closed = clock_timestamp(), worker = k.worker
      FROM unnest(CAST(:ids AS bigint[]), CAST(:workers AS text[])) k (id, worker) WHERE subtask.id = k.id""")
_UNDO = text("DELETE FROM subtask WHERE id = ANY(:ids)")
_COUNT_LOST = text("""
    UPDATE job SET attempts_lost = attempts_lost + k.n
      FROM (SELECT job_id, count(*) AS n FROM subtask WHERE id = ANY(:ids) GROUP BY job_id) k WHERE job.id = k.job_id""")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSubtask:
    """A sub-task that is about to close: what is needed to put its rows back, or to take its answers in."""

    id: int
    job: UUID
    pass_number: int
    ranges: tuple[Range, ...]
    todo: int
    tries: int
    deaths: int
    exclusive: bool


def close_lost(connection: Connection, lost: Sequence[Held]) -> list[OpenSubtask]:
    """Drop these leases and close the sub-tasks that have no other, each with the name of the worker that had it.

    The caller returns their rows, in the same transaction.
    """
    closed, worker = _drop_leases(connection, lost)
    ids = [s.id for s in closed]
    connection.execute(_CLOSE, {"ids": ids, "workers": [worker[i] for i in ids]})
    connection.execute(_COUNT_LOST, {"ids": ids})
    return closed


def recall(database: Database, epoch: int, held: Sequence[Held]) -> int:
    """Take these attempts back from where they wait and have not begun, in one transaction.

    A sub-task without another lease never was: its row goes, and its rows return with nothing counted against
    them. How many did. Recalled twice, or answered meanwhile, is harmless.
    """
    with database.transaction() as connection:
        fence(connection, epoch)
        recalled, _ = _drop_leases(connection, held)
        connection.execute(_UNDO, {"ids": [s.id for s in recalled]})
        returns: dict[tuple[UUID, int], list[Return]] = defaultdict(list)
        for s in recalled:
            returns[s.job, s.pass_number] += (
                Return(r, tries=s.tries, deaths=s.deaths, exclusive=s.exclusive) for r in s.ranges
            )
        for (job, pass_number), back in sorted(returns.items()):
            put_back(connection, job, pass_number, back)
    return len(recalled)


def _drop_leases(connection: Connection, held: Sequence[Held]) -> tuple[list[OpenSubtask], dict[int, str]]:
    """Drop these leases. The open sub-tasks that have no other, locked, and sub-task -> the worker that had it."""
    connection.execute(LOCK_JOBS, {"jobs": sorted({h.job for h in held})})
    dropped = connection.execute(
        _DROP_LEASES, {"subtasks": [h.subtask for h in held], "attempts": [h.attempt for h in held]}
    )
    worker = {row.subtask_id: row.worker for row in dropped}
    alone = connection.execute(_LEFT_ALONE, {"ids": sorted(worker)})
    return [open_subtask(row) for row in alone], worker


def open_subtask(row: Any) -> OpenSubtask:
    """A sub-task row as data."""
    return OpenSubtask(
        id=row.id,
        job=row.job_id,
        pass_number=row.pass_number,
        ranges=tuple(
            Range(b, lo, hi, size)
            for b, lo, hi, size in zip(row.blocks, row.los, row.his, row.sizes, strict=True)
        ),
        todo=row.todo,
        tries=row.tries,
        deaths=row.deaths,
        exclusive=row.exclusive,
    )


_PUT_BACK = text("""
    INSERT INTO piece (job_id, pass_number, block_number, lo, hi, bytes, tries, deaths, exclusive, not_before)
    SELECT :job, :pass, block, lo, hi, bytes, tries, deaths, exclusive,
           CASE WHEN after_s > 0 THEN clock_timestamp() + make_interval(secs => after_s) ELSE '-infinity' END
      FROM jsonb_to_recordset(CAST(:pieces AS jsonb)) AS k (block int, lo int, hi int, bytes bigint, tries smallint,
           deaths smallint, exclusive boolean, after_s float8)""")
_MORE_WAITS = text("""
    UPDATE pass SET rows_waiting = rows_waiting + :rows, bytes_waiting = bytes_waiting + :bytes
     WHERE job_id = :job AND number = :pass""")


def put_back(connection: Connection, job: UUID, pass_number: int, returns: Iterable[Return]) -> None:
    """Rows become pieces again, in the transaction that closed their sub-task."""
    pieces = [
        {
            "block": r.range.block,
            "lo": r.range.lo,
            "hi": r.range.hi,
            "bytes": r.range.bytes,
            "tries": r.tries,
            "deaths": r.deaths,
            "exclusive": r.exclusive,
            "after_s": r.after_s,
        }
        for r in returns
    ]
    if not pieces:
        return
    at = {"job": job, "pass": pass_number}
    connection.execute(_PUT_BACK, {**at, "pieces": json.dumps(pieces)})
    connection.execute(
        _MORE_WAITS,
        {**at, "rows": sum(p["hi"] - p["lo"] for p in pieces), "bytes": sum(p["bytes"] for p in pieces)},
    )


def record_transport(database: Database, epoch: int, identity: str) -> None:
    """Remember which Redis the leader has dealt with."""
    with database.transaction() as connection:
        fence(connection, epoch)
        see_transport(connection, epoch, identity)


# -- payloads --------------------------------------------------------------------------------------

_TEXTS = text("""
    SELECT b.job_id, b.number, b.payload, b.row_order, b.first_row, b.bad_fields <> '{}'
      FROM unnest(CAST(:jobs AS uuid[]), CAST(:blocks AS int[])) k (job, block)
      JOIN block b ON b.job_id = k.job AND b.number = k.block""")
_PASS = text("""
    SELECT p.kind, p.numerics, p.max_tokens, p.input, p.needs, m.manifest, j.tenant_id, j.priority
      FROM pass p JOIN model m ON m.id = p.model_id JOIN job j ON j.id = p.job_id
     WHERE p.job_id = :job AND p.number = :pass""")
_TASKS = text("""
    SELECT t.number, t.name, t.spec, m.manifest FROM task t JOIN model m ON m.id = t.model_id
     WHERE t.job_id = :job AND t.pass_number = :pass ORDER BY t.number""")


def block_texts(
    connection: Connection, blocks: Collection[tuple[str, int]]
) -> dict[tuple[str, int], tuple[bytes, bytes, int, bool]]:
    """(job, block) -> payload, row order, first row, and whether some pass has an order of its own from the start.

    Of those that are still there.
    """
    jobs, numbers = zip(*blocks, strict=True)
    at = {"jobs": [UUID(job) for job in jobs], "blocks": list(numbers)}
    return {
        (str(job), number): (bytes(payload), bytes(order), first_row, partly_bad)
        for job, number, payload, order, first_row, partly_bad in connection.execute(_TEXTS, at)
    }


_UPSTREAM = text(f"""
    SELECT w.job_id, w.pass_number, w.block_number, w.row_order, n.task, t.name, t.spec, t.labels, c.column_id
      FROM {_PLACES}) k (job, pass, block)
      JOIN block_pass w ON w.job_id = k.job AND w.pass_number = k.pass AND w.block_number = k.block
      JOIN pass p ON p.job_id = k.job AND p.number = k.pass LEFT JOIN LATERAL unnest(p.needs) n (task) ON true
      LEFT JOIN task t ON t.job_id = k.job AND t.number = n.task
      LEFT JOIN block_column c ON c.job_id = k.job AND c.block_number = k.block AND c.task_number = n.task""")


@dataclass(frozen=True, slots=True)
class UpstreamAnswer:
    """What another task answered in a block."""

    name: str
    spec: Mapping[str, Any]
    labels: tuple[str, ...]
    column: Column


def upstream_answers(
    connection: Connection, places: Collection[tuple[str, int, int]]
) -> dict[tuple[str, int, int], tuple[bytes | None, list[UpstreamAnswer]]]:
    """Of these released places that are still there: their own row order, if any, and the answers that they read."""
    rows = connection.execute(_UPSTREAM, _at(places)).all()
    columns = read_columns(connection, sorted({row.column_id for row in rows} - {None}))
    found: dict[tuple[str, int, int], tuple[bytes | None, list[UpstreamAnswer]]] = {}
    # A job may be removed while we read.
    gone = {row.job_id for row in rows if row.task is not None and row.column_id not in columns}
    for row in rows:
        if row.job_id in gone:
            continue
        where = (str(row.job_id), row.pass_number, row.block_number)
        order = None if row.row_order is None else bytes(row.row_order)
        _, answers = found.setdefault(where, (order, []))
        if row.task is not None:
            answers.append(UpstreamAnswer(row.name, row.spec, tuple(row.labels), columns[row.column_id]))
    return found


def pass_of(connection: Connection, job: str, pass_number: int) -> tuple[Any, list[Any]] | None:
    """The pass and its tasks with their manifests; None where the job was removed."""
    at = {"job": UUID(job), "pass": pass_number}
    found = connection.execute(_PASS, at).first()
    return (found, list(connection.execute(_TASKS, at))) if found else None


# -- what was learned ------------------------------------------------------------------------------

_REFUSALS = text("SELECT model_id, worker, boot, why FROM refusal")
_STALE = text("""
    SELECT id FROM job WHERE state = 'loading' AND touched < clock_timestamp() - make_interval(secs => :silent_s)""")
_OVERDUE = text("""
    SELECT id, to_char(deadline AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS at FROM job
     WHERE state IN ('loading', 'running') AND deadline < clock_timestamp()""")


def refusals(connection: Connection) -> list[Refusal]:
    """Everything that could not be loaded where."""
    return [Refusal(row.model_id, row.worker, row.boot, row.why) for row in connection.execute(_REFUSALS)]


def overdue(connection: Connection, silent_s: float) -> dict[UUID, str]:
    """Jobs whose deadline passed, or whose upload fell silent, with the reason they fail for."""
    found: dict[UUID, str] = {}
    for row in connection.execute(_STALE, {"silent_s": silent_s}):
        found[row.id] = f"the upload was abandoned: no part for {silent_s:.0f} s"
    for row in connection.execute(_OVERDUE):
        found[row.id] = f"its deadline passed: {row.at}; what was done by then can be read"
    return found
