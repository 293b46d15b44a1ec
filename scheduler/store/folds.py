"""Folded state in Postgres: read and written by landings, under the lock of the job's row; swept when nothing of it counts.

A key is a row, whatever is folded of it. Its digest is keyed, and its state, which may hold a value of a caller's, is an
envelope.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.protocol.envelope import packed_plain, unwrap, wrap
from motet.protocol.values import Value
from motet.states import State
from scheduler.blocks import IncomingPart, decode_block, keyed
from scheduler.policy.folds import FoldGroup, fold_rows, groups_of, keeps_s, keys_of
from scheduler.store.landing import LoadingJob
from scheduler.store.schema import spelt

#: A key's end is a multiple of this share of how long it is kept: an index that seldom changes lets updates stay in
#: their page. Larger: keys stay longer than they count.
_STEP = 1 / 8

# The time behind the lock: so the times of landings are in the order of their commits.
_READ = text("""
    SELECT CAST(extract(epoch FROM t.now) AS double precision) AS now, f.key, f.state
      FROM (SELECT clock_timestamp() AS now) t LEFT JOIN fold f ON f.job_id = :job AND f.key = ANY(:keys)""")
#: Part of the statement that stores a landing.
WRITE = """
    INSERT INTO fold (job_id, key, state, until)
    SELECT :job, k.key, k.state, to_timestamp(k.until)
      FROM unnest(CAST(:fold_keys AS bytea[]), CAST(:fold_states AS bytea[]),
                  CAST(:fold_untils AS double precision[])) k (key, state, until)
        ON CONFLICT (job_id, key) DO UPDATE SET state = excluded.state, until = excluded.until"""
_EXPIRED = text("""
    DELETE FROM fold WHERE ctid = ANY (ARRAY(
      SELECT ctid FROM fold WHERE until < (SELECT clock_timestamp()) ORDER BY until LIMIT :limit
         FOR UPDATE SKIP LOCKED))""")
_OF_CLOSED = text(f"""
    DELETE FROM fold WHERE ctid = ANY (ARRAY(
      SELECT f.ctid FROM job j JOIN fold f ON f.job_id = j.id
       WHERE j.folds IS NOT NULL AND j.state NOT IN {spelt((State.OPEN, State.PAUSED))} LIMIT :limit
         FOR UPDATE OF f SKIP LOCKED))""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """Rows with what they were given, and what is to be written with them."""

    part: IncomingPart
    #: Parameters of ``WRITE``, beside the job.
    written: dict[str, Any]


def fold(connection: Connection, job: LoadingJob, part: IncomingPart) -> Folding:
    """Fold rows that are about to land. The caller holds the lock of the job's row, and writes what comes of it."""
    groups = groups_of(job.folds)
    digests = {template: _digests(job, template, part) for template in groups}
    group_of = {key: groups[template] for template, keys in digests.items() for key in keys if key}
    rows = connection.execute(_READ, {"job": job.id, "keys": list(group_of)}).all()
    now = float(rows[0].now)
    stored = {bytes(row.key): unwrap(bytes(row.state)) for row in rows if row.key is not None}
    after = fold_rows(job.folds, part, digests, stored, now)
    keys = sorted(after.states)
    return Folding(
        # In the order of the job's fields, by which passes are priced.
        part=IncomingPart(
            columns={name: after.part.columns[name] for name in job.fields},
            bad=after.part.bad,
            bad_fields=after.part.bad_fields,
        ),
        written={
            "fold_keys": keys,
            "fold_states": [wrap(after.states[key]) for key in keys],
            "fold_untils": [_until(group_of[key], now) for key in keys],
        },
    )


def _digests(job: LoadingJob, template: str, part: IncomingPart) -> list[bytes | None]:
    return [
        None if value is None else keyed(job.secret, hashlib.sha256(packed_plain([template, value])).digest())
        for value in keys_of(template, part)
    ]


_GIVEN = text("SELECT number, payload, bad_fields FROM block WHERE job_id = :job AND number = ANY(:blocks)")


def given(
    connection: Connection, job: UUID, names: Collection[str], blocks: Sequence[int]
) -> dict[int, dict[str, Sequence[Value]]]:
    """Number of a block -> fold -> what each of its rows was given; None where the row was bad for it."""
    found: dict[int, dict[str, Sequence[Value]]] = {}
    for row in connection.execute(_GIVEN, {"job": job, "blocks": list(blocks)}) if names else ():
        values = decode_block(bytes(row.payload)).values
        found[row.number] = {name: list(values[name]) for name in names}
        for name in names:
            for _, _, offsets in row.bad_fields.get(name, ()):
                for i in offsets:
                    found[row.number][name][i] = None  # type: ignore[index]
    return found


def _until(group: FoldGroup, now: float) -> float | None:
    """When a key may be deleted, in seconds since 1970; None: with its job."""
    lasts = keeps_s(group)
    if lasts is None:
        return None
    step = lasts * _STEP
    return math.ceil((now + lasts) / step) * step


def sweep(connection: Connection, limit: int = 5_000) -> int:
    """Delete keys of which nothing counts any more, and those of jobs that take no more rows. How many.

    A landing that reads such a key just now writes it again, whole: both go by the same clock.
    """
    return sum(connection.execute(query, {"limit": limit}).rowcount for query in (_EXPIRED, _OF_CLOSED))
