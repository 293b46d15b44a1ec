"""Dependence, block by block: a pass that reads other tasks' answers waits in a block until these are sealed there.

A condition is held against the rows at that moment; of a pass that needs no answer, as soon as the block has landed.

All functions work inside the transaction that sealed them, or that landed the block, and that holds the job's lock. So
whoever looks finds a pass either waiting, or with rows to carve, and every row taken out of it counted as skipped.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from motet.conditions import condition
from motet.protocol.columns import CellError
from motet.protocol.wire import by_offset
from motet.states import Skip
from motet.tasks import deciding_fields, stored_task
from scheduler.blocks import Reads, absent, decode_block, read_in_order, row_order, uint32_bytes
from scheduler.readable import Readable
from scheduler.store.database import together
from scheduler.store.leases import more_waits
from scheduler.store.payload_rows import upstream_answers
from scheduler.store.places import PLACES, Place, at_places
from scheduler.store.words import land, tell

_FAILED = text(f"""
    SELECT k.job, k.pass AS pass_, k.block, t.name, s.errors
      FROM {PLACES} k (job, pass, block)
      JOIN pass p ON p.job_id = k.job AND p.number = k.pass CROSS JOIN LATERAL unnest(p.needs) n (task)
      JOIN task t ON t.job_id = k.job AND t.number = n.task
      JOIN block_column b ON b.job_id = k.job AND b.block_number = k.block AND b.task_number = n.task
      JOIN sealed_column s ON s.id = b.column_id AND s.n_error + s.n_skipped > 0
     ORDER BY k.job, k.pass, k.block, n.task""")
# Whose last needed column has just come to be shown.
_FREE = text("""
    SELECT b.job_id, b.pass_number, b.block_number, b.todo, k.lengths, k.n_rows, k.bad, k.bad_fields,
           coalesce(b.row_order, k.row_order) AS row_order, b.row_order IS NOT NULL AS own,
           p.reads, p.bytes_beside, p.max_tokens
      FROM unnest(CAST(:jobs AS uuid[]), CAST(:blocks AS int[])) w (job, block)
      JOIN block_pass b ON b.job_id = w.job AND b.block_number = w.block AND b.state = 'waiting'
      JOIN pass p ON p.job_id = b.job_id AND p.number = b.pass_number
      JOIN block k ON k.job_id = b.job_id AND k.number = b.block_number
     WHERE NOT EXISTS (SELECT FROM unnest(p.needs) n (task)
                        WHERE NOT EXISTS (SELECT FROM block_column c WHERE c.job_id = b.job_id
                                             AND c.block_number = b.block_number AND c.task_number = n.task))
     ORDER BY b.job_id, b.pass_number, b.block_number FOR NO KEY UPDATE OF b""")
_READS = text("""
    SELECT t.number, t.name, t.spec, ARRAY(SELECT o.name FROM task o WHERE o.job_id = t.job_id) AS names
      FROM task t WHERE t.job_id = :job AND t.pass_number = :pass ORDER BY t.number""")
_RELEASE = text("""
    UPDATE block_pass SET state = 'ready', n = :n, row_order = :row_order
     WHERE job_id = :job AND pass_number = :pass AND block_number = :block""")
_COUNT_SKIPPED = text("UPDATE job SET cells_skipped = cells_skipped + :n WHERE id = :job")


@dataclass(frozen=True, slots=True)
class Emptied:
    """A pass that was released in a block without a row to do: it is to be sealed at once."""

    place: Place
    todo: int


def left_out(connection: Connection, places: Collection[Place]) -> dict[Place, dict[int, CellError]]:
    """Of each of these places that has any: offset -> why its cells are skipped, of rows that lack what they need.

    Rows that came in broken are among them, and those for which its condition does not hold. It is the same now and
    when the place is sealed: sealed columns never change.
    """
    found: dict[Place, dict[int, CellError]] = defaultdict(dict)
    at = at_places(places)
    failed, conditional = together(connection, (_FAILED, at), (_CONDITIONS, at))
    for row in failed:
        here = found[row.job, row.pass_, row.block]
        for offset, e in (row.errors or {}).items():
            here.setdefault(int(offset), because(row.name, e["error"], e["message"]))
    if conditional:
        _hold_conditions(connection, conditional, found)
    return dict(found)


_CONDITIONS = text(f"""
    SELECT k.job, k.pass AS pass_, k.block, p.condition, b.payload, b.bad, b.bad_fields, b.n_rows
      FROM {PLACES} k (job, pass, block)
      JOIN pass p ON p.job_id = k.job AND p.number = k.pass AND p.condition IS NOT NULL
      JOIN block b ON b.job_id = k.job AND b.number = k.block""")
_NOT_HELD = CellError(Skip.CONDITION, "the condition of its task does not hold")


def _hold_conditions(
    connection: Connection, asked: Sequence[Any], found: dict[Place, dict[int, CellError]]
) -> None:
    """Add the rows for which a place's condition (``_CONDITIONS``) does not hold to those that lack what they need."""
    upstream = upstream_answers(connection, [(str(row.job), row.pass_, row.block) for row in asked])
    for row in asked:
        place = (row.job, row.pass_, row.block)
        _, answers = upstream[str(row.job), row.pass_, row.block]
        held = condition(row.condition)
        here = found[place]
        stored = decode_block(bytes(row.payload))
        readable = Readable(stored.values, {}, {a.name: a for a in answers})
        # Where what it compares came in broken, the cell says that.
        bad = {int(i) for i in row.bad}.union(
            *(by_offset(row.bad_fields.get(readable.name_of(one), {})) for one in held.placeholders)
        )
        rows = [i for i in range(row.n_rows) if i not in here and i not in bad]
        columns = [readable.compared(one, rows) for one in held.placeholders]
        for i, *values in zip(rows, *columns, strict=True):
            if not held.holds(dict(zip(held.placeholders, values, strict=True))):
                here[i] = _NOT_HELD


_SHARE = text("""
    SELECT CAST(sum(b.n) AS float8) / nullif(sum(k.n_rows), 0)
      FROM (SELECT p.job_id, p.number FROM pass p JOIN job j ON j.id = p.job_id
             WHERE j.tenant_id = :tenant AND p.condition = :condition AND j.state = 'succeeded'
             ORDER BY j.finished DESC LIMIT 1) p
      JOIN block_pass b ON b.job_id = p.job_id AND b.pass_number = p.number AND b.todo <> 0
      JOIN block k ON k.job_id = b.job_id AND k.number = b.block_number""")


def known_share(connection: Connection, tenant: UUID, condition: str) -> float:
    """The share of the rows, 0 to 1, on which a condition held in the tenant's newest job that had it; 1: not known."""
    share = connection.execute(_SHARE, {"tenant": tenant, "condition": condition}).scalar()
    return 1.0 if share is None else float(share)


def because(task: str, error: str, message: str) -> CellError:
    """The reason of a skipped cell: the task that failed first, and how; or that the row was dropped."""
    if error in (Skip.LATE, Skip.ABANDONED):
        return CellError(error, message)
    return CellError(Skip.UPSTREAM, message if error == Skip.UPSTREAM else f"{task}: {error}")


def release(connection: Connection, blocks: Collection[tuple[UUID, int]]) -> list[Emptied]:
    """Let passes be carved that wait in these blocks for nothing any more, without the rows that lack what they need.

    Those rows are counted as skipped cells, in this transaction, and the dispatcher is told. Returns the passes that
    thereby have nothing to do.
    """
    if not blocks:
        return []
    jobs, numbers = zip(*sorted(blocks), strict=True)
    free = connection.execute(_FREE, {"jobs": list(jobs), "blocks": list(numbers)}).all()
    if not free:
        return []
    failed = left_out(connection, [_place(row) for row in free])
    skipped: Counter[UUID] = Counter()
    rows: Counter[tuple[UUID, int]] = Counter()
    size: Counter[tuple[UUID, int]] = Counter()
    released: list[dict[str, Any]] = []
    for row in free:
        job, number, block = place = _place(row)
        order = row_order(bytes(row.row_order))
        without = failed.get(place, {})
        left = [i for i in order if i not in without]
        own = uint32_bytes(left) if row.own or len(left) < len(order) else None
        released.append({"job": job, "pass": number, "block": block, "n": len(left), "row_order": own})
        if row.bad_fields and len(left) < len(order):
            bad = absents(row, _reads_of(connection, row))
            skipped[job] += sum(len(skips(order, without, here)) for here in bad.values())
        else:
            skipped[job] += (len(order) - len(left)) * (row.todo & (1 << 64) - 1).bit_count()
        rows[job, number] += len(left)
        reads = Reads(tuple(row.reads), row.bytes_beside, row.max_tokens)
        in_order = bytes(row.row_order) if own is None else own
        size[job, number] += sum(read_in_order(in_order, row.lengths, row.n_rows, reads))
    connection.execute(_RELEASE, released)
    more_waits(connection, {at: (n, size[at]) for at, n in sorted(rows.items())})
    connection.execute(_COUNT_SKIPPED, [{"job": job, "n": n} for job, n in sorted(skipped.items())])
    tell(connection, [land(job) for job in sorted(skipped)])
    return [Emptied(_place(row), row.todo) for row, made in zip(free, released, strict=True) if not made["n"]]


def _place(row: Row[Any]) -> Place:
    return (row.job_id, row.pass_number, row.block_number)


def _reads_of(connection: Connection, row: Row[Any]) -> dict[int, tuple[str, ...]]:
    """The fields that decide whether each task can be asked a row which is to be computed in this place."""
    tasks = connection.execute(_READS, {"job": row.job_id, "pass": row.pass_number})
    return {
        t.number: deciding_fields(t.name, stored_task(t.spec), t.names)
        for t in tasks
        if row.todo >> t.number & 1
    }


def absents(block: Row[Any], reads: Mapping[int, Sequence[str]]) -> dict[int, dict[int, tuple[str, str]]]:
    """Of each of these tasks the rows of a block that it cannot be asked, and why (``scheduler.blocks.absent``).

    ``reads``: number of a task -> the fields that it reads.
    """
    bad = {int(i): (str(error), str(message)) for i, (error, message) in block.bad.items()}
    bad_fields = {name: by_offset(reasons) for name, reasons in block.bad_fields.items()}
    return {number: absent(bad, bad_fields, fields) for number, fields in reads.items()}


def skips(
    order: Sequence[int], failed: Mapping[int, CellError], bad: Collection[int]
) -> dict[int, CellError]:
    """Of the rows that a pass would be done on those that are skipped in a task, and why.

    ``bad``: rows that the task cannot be asked anyway; these are errors of its own.
    """
    return {i: failed[i] for i in order if i in failed and i not in bad} if failed else {}
