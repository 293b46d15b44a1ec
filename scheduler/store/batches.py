"""Batches: where each of them is in its life, and which process works on it.

Whoever works on a batch owns it for a while and says so again and again; what a process leaves behind that was killed is
taken over by another one. Every move asks whether the batch is still its mover's, and in the state that it was seen in.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from motet.errors import Conflict, NotFound
from motet.states import ENDED
from scheduler.blocks import is_digest, keyed
from scheduler.store.endings import cancel_job
from scheduler.store.events import tell_event
from scheduler.store.registry import secret_of
from scheduler.store.schema import spelt
from scheduler.store.tables.doors import BatchState

#: States that a batch never leaves.
OVER: frozenset[BatchState] = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """A batch as it is stored, with what its job tells."""

    id: str
    tenant_id: UUID
    endpoint: str
    input_file: str
    input_sha256: str
    window: str
    notes: Mapping[str, str] | None
    priority: str
    output_expires_s: float | None
    state: BatchState
    job_id: UUID | None
    #: Names of models in its lines -> name@version; None before the lines were checked.
    models: Mapping[str, str] | None
    #: Tasks are asked beside its lines: then more than one cell of a row may be answered.
    beside: bool
    lines: int
    completed: int
    failed: int
    usage: Mapping[str, Any] | None
    errors: Sequence[Mapping[str, Any]] | None
    output_file: str | None
    error_file: str | None
    created: datetime
    expires: datetime
    in_progress: datetime | None
    finalizing: datetime | None
    cancelling: datetime | None
    ended: datetime | None
    tries: int
    #: Seconds until ``expires``.
    left_s: float
    #: Of its job: state, why it ended, and rows answered and failed so far. None where it has none.
    job_state: str | None
    job_reason: str | None
    rows_ok: int | None
    rows_error: int | None
    #: Its rows in all.
    rows: int | None


_SHOWN = """
    SELECT b.id, b.tenant_id, b.endpoint, b.input_file, b.input_sha256, b."window", b.notes, b.priority,
           b.output_expires_s, b.state, b.job_id, b.models, b.beside, b.lines, b.completed, b.failed, b.usage, b.errors,
           b.output_file, b.error_file, b.created, b.expires, b.in_progress, b.finalizing, b.cancelling, b.ended,
           b.tries, CAST(extract(epoch FROM b.expires - clock_timestamp()) AS double precision) AS left_s,
           j.state AS job_state, j.reason AS job_reason, j.cells_ok AS rows_ok, j.cells_error AS rows_error,
           j.n_rows AS rows
      FROM batch b LEFT JOIN job j ON j.id = b.job_id"""
_FIND = text(f"{_SHOWN} WHERE b.id = :batch AND b.tenant_id = :tenant")
_LIST = text(f"{_SHOWN} WHERE b.tenant_id = :tenant ORDER BY b.created DESC, b.id DESC LIMIT :limit")
_LIST_AFTER = text(f"""
    {_SHOWN} WHERE b.tenant_id = :tenant
       AND (b.created, b.id) < (SELECT created, id FROM batch WHERE id = :after AND tenant_id = :tenant)
     ORDER BY b.created DESC, b.id DESC LIMIT :limit""")
# Requests of one tenant that say the same wait for each other: the second one finds the first one's batch.
_ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(hashtextextended(:what, 0))")
_BY_KEY = text("SELECT id, request_digest FROM batch WHERE tenant_id = :tenant AND idempotency_key = :key")
_JUST_MADE = text("""
    SELECT id FROM batch WHERE tenant_id = :tenant AND request_digest = :digest
       AND created > now() - make_interval(secs => :within_s) ORDER BY created DESC LIMIT 1""")
_ADD = text("""
    INSERT INTO batch (id, tenant_id, endpoint, input_file, input_sha256, "window", notes, priority,
                       output_expires_s, idempotency_key, request_digest, expires)
    VALUES (:id, :tenant, :endpoint, :input_file, :input_sha256, :window, CAST(:notes AS jsonb), :priority,
            :output_expires_s, :key, :digest,
            clock_timestamp() + make_interval(secs => CAST(:window_s AS double precision)))""")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """A batch that is asked for."""

    endpoint: str
    input_file: str
    input_sha256: str
    window: str
    window_s: float
    notes: Mapping[str, str] | None
    priority: str
    output_expires_s: float | None
    #: Sha256 of what was asked.
    request_digest: bytes


def add_batch(
    connection: Connection, tenant: UUID, batch: NewBatch, *, key: str | None, again_s: float
) -> StoredBatch:
    """Make a batch, or find the one that this request made before: under the same key, or, where it says that it is sent
    again (``again_s``: made by an equal request in so many seconds before; 0: it does not say so).

    Raises Conflict where the key belongs to another request.
    """
    secret = secret_of(connection, tenant)
    digest = keyed(secret, batch.request_digest)
    connection.execute(_ONE_AT_A_TIME, {"what": f"{tenant} {key or digest.hex()}"})
    before: str | None = None
    if key is not None:
        found = connection.execute(_BY_KEY, {"tenant": tenant, "key": key}).first()
        if found is not None:
            if not is_digest(secret, batch.request_digest, bytes(found.request_digest)):
                raise Conflict(
                    f"this Idempotency-Key made batch {found.id}, from another body; use a new key"
                )
            before = found.id
    elif again_s:
        at = {"tenant": tenant, "digest": digest, "within_s": again_s}
        before = connection.execute(_JUST_MADE, at).scalar()
    if before is None:
        before = f"batch_{secrets.token_hex(12)}"
        values = {name: getattr(batch, name) for name in batch.__slots__ if name != "request_digest"}
        notes = None if batch.notes is None else json.dumps(batch.notes)
        made = {**values, "id": before, "tenant": tenant, "key": key, "digest": digest, "notes": notes}
        connection.execute(_ADD, made)
    return find_batch(connection, tenant, before)


def find_batch(connection: Connection, tenant: UUID, batch: str) -> StoredBatch:
    """Raises NotFound."""
    row = connection.execute(_FIND, {"batch": batch, "tenant": tenant}).first()
    if row is None:
        raise NotFound("no such batch")
    return _stored(row)


def list_batches(
    connection: Connection, tenant: UUID, *, after: str | None, limit: int
) -> Sequence[StoredBatch]:
    """Newest first; those before ``after``."""
    at = {"tenant": tenant, "limit": limit, **({"after": after} if after else {})}
    return list(map(_stored, connection.execute(_LIST_AFTER if after else _LIST, at)))


def _stored(row: Row[Any]) -> StoredBatch:
    return StoredBatch(**row._mapping)


_LOCK = text("SELECT state, job_id FROM batch WHERE id = :batch AND tenant_id = :tenant FOR NO KEY UPDATE")
_CANCEL = text("""
    UPDATE batch SET state = 'cancelling', cancelling = clock_timestamp(), owned_until = '-infinity', tries = 0
     WHERE id = :batch""")


def cancel_batch(connection: Connection, tenant: UUID, batch: str) -> StoredBatch:
    """Let a batch end with what is done; again, and of one that has ended, is harmless. Raises NotFound."""
    # The job first, as everywhere: its end locks it.
    found = find_batch(connection, tenant, batch)
    if found.job_id is not None and found.state in ("validating", "in_progress"):
        cancel_job(connection, tenant, found.job_id)
    held = connection.execute(_LOCK, {"batch": batch, "tenant": tenant}).one()
    if held.state in ("validating", "in_progress"):
        connection.execute(_CANCEL, {"batch": batch})
    return find_batch(connection, tenant, batch)


# -- working on them

# What waits for the end of its job is nobody's work before that.
_TAKE = text(f"""
    UPDATE batch SET owner = :owner, owned_until = clock_timestamp() + make_interval(secs => :for_s), tries = tries + 1
     WHERE id = (SELECT b.id FROM batch b LEFT JOIN job j ON j.id = b.job_id
                  WHERE b.ended IS NULL AND b.owned_until < clock_timestamp()
                    AND (b.state <> 'in_progress' OR j.id IS NULL OR j.state IN {spelt(ENDED)})
                  ORDER BY b.created LIMIT 1 FOR NO KEY UPDATE OF b SKIP LOCKED)
 RETURNING id, tenant_id""")
_KEEP = text("""
    UPDATE batch SET owned_until = clock_timestamp() + make_interval(secs => :for_s)
     WHERE id = :batch AND owner = :owner AND owned_until > '-infinity' RETURNING state""")
_LEAVE = text("""
    UPDATE batch SET owner = '', owned_until = clock_timestamp() + make_interval(secs => :for_s), tries = 0
     WHERE id = :batch AND owner = :owner AND owned_until > '-infinity'""")
_MINE = "WHERE id = :batch AND owner = :owner AND state = :seen AND owned_until > '-infinity'"
_CHECKED = text(f"""
    UPDATE batch SET lines = :lines, models = CAST(:models AS jsonb), beside = :beside, tries = 0 {_MINE}""")
_HAS_JOB = text(f"UPDATE batch SET job_id = :job {_MINE}")
_STARTED = text(f"""
    UPDATE batch SET state = 'in_progress', in_progress = clock_timestamp(), owned_until = '-infinity', tries = 0
     {_MINE}""")
_FINALIZING = text(f"UPDATE batch SET state = 'finalizing', finalizing = clock_timestamp() {_MINE}")
_END = text(f"""
    UPDATE batch SET state = :state, ended = clock_timestamp(), completed = :completed, failed = :failed,
           usage = CAST(:usage AS jsonb), errors = CAST(:errors AS jsonb), output_file = :output_file,
           error_file = :error_file, owned_until = '-infinity'
     {_MINE}""")


class NotMine(Exception):
    """Another process took the batch, or its user cancelled it: whoever meets this leaves it alone."""


@dataclass(frozen=True, slots=True)
class Owned:
    """A batch that a process works on: every move of it is proved by ``owner`` and the state that was seen."""

    batch: StoredBatch
    owner: str

    def _move(self, connection: Connection, statement: Any, **values: Any) -> None:
        at = {"batch": self.batch.id, "owner": self.owner, "seen": self.batch.state, **values}
        if not connection.execute(statement, at).rowcount:
            raise NotMine

    def keep(self, connection: Connection, for_s: float) -> None:
        """Go on owning it. Raises NotMine, also where its state has changed."""
        at = {"batch": self.batch.id, "owner": self.owner, "for_s": for_s}
        if connection.execute(_KEEP, at).scalar() != self.batch.state:
            raise NotMine

    def leave(self, connection: Connection, for_s: float) -> None:
        """Let anybody take it again, in so many seconds."""
        connection.execute(_LEAVE, {"batch": self.batch.id, "owner": self.owner, "for_s": for_s})

    def checked(self, connection: Connection, lines: int, models: Mapping[str, str], *, beside: bool) -> None:
        """Its lines are good, and name these models. Raises NotMine."""
        self._move(connection, _CHECKED, lines=lines, models=json.dumps(models), beside=beside)

    def has_job(self, connection: Connection, job: UUID) -> None:
        """Raises NotMine."""
        self._move(connection, _HAS_JOB, job=job)

    def started(self, connection: Connection) -> None:
        """Its job has all rows. Raises NotMine."""
        self._move(connection, _STARTED)

    def finalizing(self, connection: Connection) -> None:
        """Raises NotMine."""
        self._move(connection, _FINALIZING)

    def end(
        self,
        connection: Connection,
        state: BatchState,
        *,
        completed: int = 0,
        failed: int = 0,
        usage: Mapping[str, Any] | None = None,
        errors: Sequence[Mapping[str, Any]] | None = None,
        output_file: str | None = None,
        error_file: str | None = None,
    ) -> None:
        """Raises NotMine."""
        self._move(
            connection,
            _END,
            state=state,
            completed=completed,
            failed=failed,
            usage=None if usage is None else json.dumps(usage),
            errors=None if errors is None else json.dumps(errors),
            output_file=output_file,
            error_file=error_file,
        )
        body = {"batch": self.batch.id, "state": state, "completed": completed, "failed": failed}
        tell_event(connection, self.batch.tenant_id, "batch_ended", self.batch.job_id, body)


def take_batch(connection: Connection, owner: str, for_s: float) -> Owned | None:
    """The oldest batch that waits for somebody to work on it, owned for so many seconds; None: there is none."""
    taken = connection.execute(_TAKE, {"owner": owner, "for_s": for_s}).first()
    return None if taken is None else Owned(find_batch(connection, taken.tenant_id, taken.id), owner)


# -- what was answered

_BLOCKS = text("SELECT number FROM block WHERE job_id = :job AND number >= :first ORDER BY number LIMIT :n")
_SHOWN_COLUMNS = text("""
    SELECT b.number, b.payload, c.task_number, c.column_id
      FROM block b LEFT JOIN block_column c ON c.job_id = b.job_id AND c.block_number = b.number
     WHERE b.job_id = :job AND b.number = ANY(:numbers) ORDER BY b.number""")


_DONE_BLOCKS = text("""
    SELECT number, first_row FROM block WHERE job_id = :job AND passes_open = 0 AND NOT number = ANY(:known)
     ORDER BY number LIMIT :n""")


def done_blocks(
    connection: Connection, job: UUID, known: Collection[int], n: int
) -> list[tuple[int, int, bytes, dict[int, int]]]:
    """(number, first row, payload, task number -> column id) of some blocks of which all is answered, without ``known``."""
    at = {"job": job, "known": sorted(known), "n": n}
    first_rows = {row.number: row.first_row for row in connection.execute(_DONE_BLOCKS, at)}
    found = _shown_columns(connection, job, list(first_rows))
    return [(number, first_rows[number], *found[number]) for number in sorted(found)]


def answered_blocks(
    connection: Connection, job: UUID, first: int, n: int
) -> list[tuple[int, bytes, dict[int, int]]]:
    """(number, payload, task number -> column id) of the next blocks of a job from ``first`` on, whether all of their
    tasks are answered or not."""
    numbers = list(connection.execute(_BLOCKS, {"job": job, "first": first, "n": n}).scalars())
    found = _shown_columns(connection, job, numbers)
    return [(number, *found[number]) for number in sorted(found)]


def _shown_columns(
    connection: Connection, job: UUID, numbers: Sequence[int]
) -> dict[int, tuple[bytes, dict[int, int]]]:
    """Of these blocks the payload, and the column of each task that is answered there."""
    found: dict[int, tuple[bytes, dict[int, int]]] = {}
    for row in connection.execute(_SHOWN_COLUMNS, {"job": job, "numbers": numbers}):
        _, columns = found.setdefault(row.number, (bytes(row.payload), {}))
        if row.task_number is not None:
            columns[row.task_number] = row.column_id
    return found
