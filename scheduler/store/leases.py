"""Leases, rescue and recall: the right of one attempt to run one open sub-task.

Lock order everywhere: leader, jobs by id, sub-tasks by id, block_pass, pass. Each function that writes is one
transaction that begins with the fence.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from sqlalchemy import Connection, text

from motet.states import CARVED
from scheduler.policy.carve import Carved, Range
from scheduler.policy.lifecycle import Return
from scheduler.store.arrays import Elements
from scheduler.store.database import Asked, Database, together
from scheduler.store.leadership import fence, fenced, must_lead
from scheduler.store.places import PLACES, at_places
from scheduler.store.schema import spelt
from scheduler.store.words import land, tell

LeaseKey = tuple[int, int]


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
    #: Seconds since it was made, as of when it was read.
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


#: Attempts as a table, which `_attempts` fills.
_ATTEMPTS = "unnest(CAST(:subtasks AS bigint[]), CAST(:attempts AS smallint[])) k (subtask, attempt)"


def _attempts(keys: Collection[LeaseKey]) -> dict[str, Elements]:
    # As text these arrays take the leader longer than all else that it does for a lease which it extends.
    both = np.array([*keys], np.int64).reshape(-1, 2)
    return {"subtasks": Elements("q", both[:, 0]), "attempts": Elements("h", both[:, 1])}


_HELD = """
    SELECT l.subtask_id, l.attempt, s.job_id, s.pass_number, s.n_rows, s.bytes, l.worker, l.boot, l.predicted_s,
           s.exclusive, l.clone, date_part('epoch', clock_timestamp() - l.leased) AS age_s
      FROM lease l JOIN subtask s ON s.id = l.subtask_id"""
_ALL_HELD = text(f"{_HELD} ORDER BY l.subtask_id, l.attempt")
_HELD_OF = text(f"""{_HELD} JOIN {_ATTEMPTS} ON l.subtask_id = k.subtask AND l.attempt = k.attempt
     ORDER BY l.subtask_id, l.attempt""")


def held(connection: Connection, keys: Collection[LeaseKey] | None = None) -> list[Held]:
    """Live leases by id: all, or those of these attempts."""
    asked = (_ALL_HELD,) if keys is None else (_HELD_OF, _attempts(keys))
    # Fetched all at once, and unpacked: one by one and by name takes four times as long, and there are thousands of rows.
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
            age_s,
        ) in connection.execute(*asked).all()
    ]


_KEYS = text("""
    SELECT subtask_id, attempt FROM lease WHERE subtask_id > :after ORDER BY subtask_id, attempt LIMIT :limit""")


def held_keys(connection: Connection, after: int, limit: int) -> list[LeaseKey]:
    """Attempts with a live lease, of sub-tasks with ids beyond ``after``: so many, by id."""
    return [
        (subtask, attempt)
        for subtask, attempt in connection.execute(_KEYS, {"after": after, "limit": limit}).all()
    ]


_DUE = text("""
    SELECT l.subtask_id, l.attempt, l.until < now.at AS expired
      FROM (SELECT clock_timestamp() AS at) now JOIN lease l ON l.until < now.at + make_interval(secs => :within_s)""")


def due(connection: Connection, within_s: float) -> dict[LeaseKey, bool]:
    """Leases that end within so many seconds, by the clock of the database; True: it has passed their end."""
    found = connection.execute(_DUE, {"within_s": within_s}).all()
    return {(subtask, attempt): expired for subtask, attempt, expired in found}


_FATES = text(f"""
    SELECT k.subtask, k.attempt, l.subtask_id IS NOT NULL AS leased, coalesce(s.state, '') AS state,
           coalesce(s.worker, '') AS worker, coalesce(s.busy_s, 0) AS busy_s
      FROM {_ATTEMPTS}
      LEFT JOIN subtask s ON s.id = k.subtask
      LEFT JOIN lease l ON l.subtask_id = k.subtask AND l.attempt = k.attempt""")


class Fate(NamedTuple):
    """What became of a lease."""

    leased: bool
    #: Of its sub-task; "": there is none, since it was recalled or its job was removed.
    state: str
    #: Who had the sub-task when it closed, and its device's seconds.
    worker: str
    busy_s: float


def fates(connection: Connection, keys: Collection[LeaseKey]) -> dict[LeaseKey, Fate]:
    """What became of each of these leases."""
    return fates_in(together(connection, asked_fates(keys))[0])


def asked_fates(keys: Collection[LeaseKey]) -> Asked:
    """The statement of ``fates``."""
    return _FATES, _attempts(keys)


def fates_in(rows: Iterable[Sequence[Any]]) -> dict[LeaseKey, Fate]:
    """What ``asked_fates`` has found."""
    return {(subtask, attempt): Fate(*fate) for subtask, attempt, *fate in rows}


# A lease that is locked is about to be deleted with its outcome recorded. To wait for that could be a deadlock.
_EXTEND = text(f"""
    UPDATE lease SET until = clock_timestamp() + make_interval(secs => :lease_s)
      FROM (SELECT l.subtask_id, l.attempt
              FROM {_ATTEMPTS} JOIN lease l ON l.subtask_id = k.subtask AND l.attempt = k.attempt
               FOR NO KEY UPDATE OF l SKIP LOCKED) free
     WHERE lease.subtask_id = free.subtask_id AND lease.attempt = free.attempt""")
_EXTEND_ALL = text(
    "UPDATE lease SET until = greatest(until, clock_timestamp() + make_interval(secs => :lease_s))"
)


def extend(database: Database, epoch: int, keys: Sequence[LeaseKey], lease_s: float) -> None:
    """Keep these leases alive."""
    with database.transaction() as connection:
        leads, _ = together(connection, fenced(epoch), (_EXTEND, {**_attempts(keys), "lease_s": lease_s}))
        must_lead(leads)


def extend_all(database: Database, epoch: int, lease_s: float) -> None:
    """A new leader has heard no beat yet: every live lease gets one more term."""
    with database.transaction() as connection:
        fence(connection, epoch)
        connection.execute(_EXTEND_ALL, {"lease_s": lease_s})


_RUNNING = text(
    f"SELECT id FROM job WHERE id = ANY(:jobs) AND state IN {spelt(CARVED)} ORDER BY id FOR SHARE"
)
_CURSORS = text(f"""
    SELECT b.job_id, b.pass_number, b.block_number, b.cursor
      FROM {PLACES} k (job, pass, block)
      JOIN block_pass b ON b.job_id = k.job AND b.pass_number = k.pass AND b.block_number = k.block
     WHERE b.state = 'ready' ORDER BY 1, 2, 3 FOR NO KEY UPDATE OF b""")
_STILL_PIECES = text("SELECT id, job_id, pass_number FROM piece WHERE id = ANY(:ids) ORDER BY id FOR UPDATE")
# Blocks and pieces are locked by now, so that this takes locks of passes alone.
_OPEN = text(f"""
    WITH k AS MATERIALIZED (
      SELECT nextval(pg_get_serial_sequence('subtask', 'id')) AS id, c.*
        FROM (SELECT c.*, j.job, j.pass, d.device, d.device_kind,
                     (CAST(:of_blocks AS int[]))[c.first : c.last] AS blocks,
                     (CAST(:of_los AS int[]))[c.first : c.last] AS los, (CAST(:of_his AS int[]))[c.first : c.last] AS his,
                     (CAST(:of_sizes AS bigint[]))[c.first : c.last] AS sizes
                FROM ROWS FROM (
                       unnest(CAST(:nth_pass AS int[])), unnest(CAST(:nth_device AS int[])),
                       unnest(CAST(:firsts AS int[])), unnest(CAST(:lasts AS int[])), unnest(CAST(:todo AS bigint[])),
                       unnest(CAST(:n_rows AS int[])), unnest(CAST(:bytes AS bigint[])), unnest(CAST(:tries AS smallint[])),
                       unnest(CAST(:deaths AS smallint[])), unnest(CAST(:exclusive AS smallint[])),
                       unnest(CAST(:predicted_s AS real[])), json_array_elements_text(CAST(:workers AS json)),
                       json_array_elements_text(CAST(:boots AS json)), json_array_elements_text(CAST(:nonces AS json)))
                     WITH ORDINALITY c (nth_pass, nth_device, first, last, todo, n_rows, bytes, tries, deaths, exclusive,
                                        predicted_s, worker, boot, nonce, place)
                JOIN ROWS FROM (unnest(CAST(:of_jobs AS uuid[])), unnest(CAST(:of_passes AS smallint[])))
                     WITH ORDINALITY j (job, pass, nth) ON j.nth = c.nth_pass
                JOIN ROWS FROM (json_array_elements_text(CAST(:devices AS json)),
                                json_array_elements_text(CAST(:device_kinds AS json)))
                     WITH ORDINALITY d (device, device_kind, nth) ON d.nth = c.nth_device
               ORDER BY place) c),
    advanced AS (
      UPDATE block_pass b SET cursor = k.cursor
        FROM ROWS FROM ({PLACES}, unnest(CAST(:cursors AS int[]))) k (job, pass, block, cursor)
       WHERE b.job_id = k.job AND b.pass_number = k.pass AND b.block_number = k.block),
    eaten AS (DELETE FROM piece WHERE id = ANY(:eaten)),
    left_over AS (
      INSERT INTO piece (job_id, pass_number, block_number, lo, hi, bytes)
      SELECT job, pass, block, lo, hi, bytes FROM jsonb_to_recordset(CAST(:leftovers AS jsonb)) AS l (
        job uuid, pass smallint, block int, lo int, hi int, bytes bigint)),
    counted AS (
      UPDATE pass p SET rows_waiting = p.rows_waiting - less.n_rows, bytes_waiting = p.bytes_waiting - less.bytes
        FROM unnest(CAST(:of_jobs AS uuid[]), CAST(:of_passes AS smallint[]), CAST(:of_rows AS bigint[]),
                    CAST(:of_bytes AS bigint[])) less (job, pass, n_rows, bytes)
       WHERE p.job_id = less.job AND p.number = less.pass),
    opened AS (
      INSERT INTO subtask (id, job_id, pass_number, blocks, los, his, sizes, todo, n_rows, bytes, tries, deaths, exclusive,
                           attempts) OVERRIDING SYSTEM VALUE
      SELECT id, job, pass, blocks, los, his, sizes, todo, n_rows, bytes, tries, deaths, exclusive = 1, 1 FROM k),
    leased AS (
      INSERT INTO lease (subtask_id, attempt, worker, boot, nonce, device, device_kind, predicted_s, until)
      SELECT id, 1, worker, boot, nonce, device, device_kind, predicted_s,
             clock_timestamp() + make_interval(secs => :lease_s) FROM k)
    SELECT id FROM k ORDER BY place""")


#: Columns of the cuts of `_OPEN`, and of their ranges, with their struct codes.
_NUMBERS = {
    "nth_pass": "i",
    "nth_device": "i",
    "firsts": "i",
    "lasts": "i",
    "todo": "q",
    "n_rows": "i",
    "bytes": "q",
    "tries": "h",
    "deaths": "h",
    "exclusive": "h",
}
_OF_RANGES = {"of_blocks": "i", "of_los": "i", "of_his": "i", "of_sizes": "q"}


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
    jobs = sorted({UUID(c.job) for c in cuts})
    uncarved = {place for c in cuts if not c.carved.pieces for place in _ranges(c)}
    ids = [id_ for c in cuts for id_ in c.carved.pieces]
    with database.transaction() as connection:
        # Locks in their order; what of them turns out not to be needed is let go with all others.
        leads, live, cursors, pieces = together(
            connection,
            fenced(epoch),
            (_RUNNING, {"jobs": jobs}),
            (_CURSORS, at_places(uncarved)),
            (_STILL_PIECES, {"ids": ids}),
        )
        must_lead(leads)
        running = {str(job.id) for job in live}
        taken = _take_rows(
            [c for c in cuts if c.job in running],
            {(str(job), number, block): cursor for job, number, block, cursor in cursors},
            {id_: (str(job), number) for id_, job, number in pieces},
        )
        return _open(connection, taken, lease_s) if taken.cuts else []


#: Job, pass, block.
_Place = tuple[str, int, int]


@dataclass(slots=True)
class _Taken:
    """Cuts whose rows are still where they were carved, and how the frontier stands without them."""

    cuts: list[Cut] = field(default_factory=list)
    cursors: dict[_Place, int] = field(default_factory=dict)
    pieces: list[int] = field(default_factory=list)


def _take_rows(cuts: Sequence[Cut], cursors: dict[_Place, int], pieces: dict[int, tuple[str, int]]) -> _Taken:
    """Which of the cuts hold; those before count for those after.

    ``cursors``: how far the blocks that are ready are carved. ``pieces``: job and pass of those that are still there.
    """
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


def _open(connection: Connection, taken: _Taken, lease_s: float) -> list[Leased]:
    """Take the rows, and open and lease the sub-tasks."""
    # All out of one system call.
    random = secrets.token_hex(16 * len(taken.cuts))
    nonces = [random[i : i + 32] for i in range(0, len(random), 32)]
    sizes = [(cut.carved.rows, cut.carved.bytes) for cut in taken.cuts]
    ranges = [r for cut in taken.cuts for r in cut.carved.ranges]
    lasts = [*accumulate(len(cut.carved.ranges) for cut in taken.cuts)]
    passes: dict[tuple[str, int], int] = {}
    devices: dict[tuple[str, str], int] = {}
    # Numbers as arrays, texts as JSON: as one JSON of everything Postgres takes twice as long for them.
    numbers = np.array(
        [
            (
                passes.setdefault((cut.job, cut.pass_number), len(passes) + 1),
                devices.setdefault((cut.device, cut.device_kind), len(devices) + 1),
                last - len(cut.carved.ranges) + 1,
                last,
                cut.carved.todo,
                n_rows,
                size,
                cut.carved.tries,
                cut.carved.deaths,
                cut.carved.exclusive,
            )
            for cut, last, (n_rows, size) in zip(taken.cuts, lasts, sizes, strict=True)
        ],
        np.int64,
    )
    of_ranges = np.array([(r.block, r.lo, r.hi, r.bytes) for r in ranges], np.int64)
    opened = {
        **{name: Elements(code, numbers[:, i]) for i, (name, code) in enumerate(_NUMBERS.items())},
        **{name: Elements(code, of_ranges[:, i]) for i, (name, code) in enumerate(_OF_RANGES.items())},
        "predicted_s": Elements("f", np.array([cut.predicted_s for cut in taken.cuts])),
        "workers": json.dumps([cut.worker for cut in taken.cuts]),
        "boots": json.dumps([cut.boot for cut in taken.cuts]),
        "nonces": json.dumps(nonces),
        "devices": json.dumps([device for device, _ in devices]),
        "device_kinds": json.dumps([kind for _, kind in devices]),
    }
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
    rows: Counter[tuple[str, int]] = Counter()
    bytes_: Counter[tuple[str, int]] = Counter()
    for cut, (n_rows, size) in zip(taken.cuts, sizes, strict=True):
        rows[cut.job, cut.pass_number] += n_rows
        bytes_[cut.job, cut.pass_number] += size
    asked = {
        # Summed up here, for Postgres takes the cuts for a hundred passes, and reads all of them.
        "of_jobs": [UUID(job) for job, _ in passes],
        "of_passes": [number for _, number in passes],
        "of_rows": [rows[pass_] for pass_ in passes],
        "of_bytes": [bytes_[pass_] for pass_ in passes],
        **opened,
        **at_places(taken.cursors),
        "cursors": list(taken.cursors.values()),
        "eaten": taken.pieces,
        "leftovers": json.dumps(leftovers),
        "lease_s": lease_s,
    }
    (ids,) = together(connection, (_OPEN, asked))
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
        for (subtask,), nonce, cut in zip(ids, nonces, taken.cuts, strict=True)
    ]


# -- clones ----------------------------------------------------------------------------------------

JOBS_OF = text("SELECT DISTINCT job_id FROM subtask WHERE id = ANY(:ids)")
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
    #: As in ``Assignment``.
    measured: bool = False


def clone(database: Database, epoch: int, clones: Sequence[SecondLease], lease_s: float) -> list[Leased]:
    """Lease these open sub-tasks a second time, each as a new attempt, in one transaction.

    One is left out that has closed, has no lease or two, is held by that very worker, or is suspected of killing
    its worker: a clone must not carry poison to a healthy device.
    """
    ids = sorted({c.subtask for c in clones})
    with database.transaction() as connection:
        fence(connection, epoch)
        jobs = sorted(connection.execute(JOBS_OF, {"ids": ids}).scalars())
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
        measured=asked.measured,
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
#: Counts what has come to wait in passes of jobs whose locks the caller holds; its parameters: ``waiting``.
MORE_WAITS = """
    UPDATE pass SET rows_waiting = pass.rows_waiting + k.n_rows, bytes_waiting = pass.bytes_waiting + k.bytes
      FROM unnest(CAST(:jobs AS uuid[]), CAST(:passes AS smallint[]), CAST(:rows AS bigint[]), CAST(:bytes AS bigint[]))
           k (job, number, n_rows, bytes)
     WHERE pass.job_id = k.job AND pass.number = k.number"""
_MORE_WAITS = text(MORE_WAITS)


def waiting(waits: Mapping[tuple[UUID, int], tuple[int, int]]) -> dict[str, list[Any]]:
    """(job, pass) -> rows, bytes, as the parameters of ``MORE_WAITS``."""
    return {
        "jobs": [job for job, _ in waits],
        "passes": [number for _, number in waits],
        "rows": [rows for rows, _ in waits.values()],
        "bytes": [size for _, size in waits.values()],
    }


def more_waits(connection: Connection, waits: Mapping[tuple[UUID, int], tuple[int, int]]) -> None:
    """Count what has come to wait in passes of jobs whose locks the caller holds: (job, pass) -> rows, bytes."""
    if waits:
        connection.execute(_MORE_WAITS, waiting(waits))


def put_back(connection: Connection, job: UUID, pass_number: int, returns: Iterable[Return]) -> None:
    """Rows become pieces again, in the transaction that closed their sub-task; the dispatcher is told."""
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
    rows, size = (int(sum(n)) for n in zip(*((p["hi"] - p["lo"], p["bytes"]) for p in pieces), strict=True))
    more_waits(connection, {(job, pass_number): (rows, size)})
    tell(connection, [land(job)])
