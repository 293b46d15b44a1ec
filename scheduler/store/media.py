"""Media of a tenant: stored once by content, referred to by blocks, gone with the last of these.

Who knows a digest learns only whether his own tenant has it. An upload claims what it sends or asks for, until its rows are
here: what it counts on does not go meanwhile with another job. Locks are taken in the order of keys, and the tenant's row,
which counts bytes, last; behind the job's row and shared columns.
"""

from __future__ import annotations

import builtins
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.errors import InvalidJob, Overloaded, Problem
from scheduler.store.database import together

#: Seconds for which a medium that no block refers to is kept for an upload that claimed it. Shorter: a slow upload loses
#: pictures before their rows land; longer: those of an upload that broke off stay.
UNUSED_S = 6 * 3600.0
#: A claim younger than this is not written anew: an upload asks for the same medium again and again.
_CLAIM_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMedium:
    """A medium on its way into the store."""

    key: builtins.bytes
    media_type: str
    bytes: int
    width: int | None
    height: int | None
    #: Envelope of its bytes.
    payload: builtins.bytes
    #: It in small, a JPEG, where its sender made one.
    thumb: builtins.bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMedium:
    """What is known of a stored medium."""

    media_type: str
    bytes: int
    width: int | None
    height: int | None


#: Of two uploads that claim the same medium neither knows of the other: then only time ends the claim.
_CLAIMED = """claimed = clock_timestamp(),
    claimed_by = CASE WHEN medium.claimed IS NULL OR medium.claimed_by = CAST(:by AS bytea) THEN CAST(:by AS bytea) END"""
# Not DO NOTHING: what is there already counts as sent just now, so that no sweep takes it before its rows are here.
# All payloads are one value: as an array of them they would travel as text, twice as long.
_ADD = text(f"""
    WITH stored AS (
        INSERT INTO medium (tenant_id, claimed_by, key, media_type, bytes, width, height, thumb, payload)
        SELECT :tenant, CAST(:by AS bytea), k.key, k.media_type, k.bytes, k.width, k.height, k.thumb,
               substr(CAST(:payloads AS bytea), k.first, k.length)
          FROM (SELECT * FROM unnest(CAST(:keys AS bytea[]), CAST(:types AS text[]), CAST(:sizes AS int[]), CAST(:widths AS int[]),
                                     CAST(:heights AS int[]), CAST(:thumbs AS bytea[]), CAST(:firsts AS int[]), CAST(:lengths AS int[]))
                       n (key, media_type, bytes, width, height, thumb, first, length)
                 ORDER BY n.key) k
        ON CONFLICT (tenant_id, key) DO UPDATE SET thumb = coalesce(EXCLUDED.thumb, medium.thumb), {_CLAIMED}
        RETURNING bytes, xmax = 0 AS is_new)
    SELECT coalesce(sum(bytes) FILTER (WHERE is_new), 0) FROM stored""")
_COUNT = text("""
    UPDATE tenant SET media_bytes = media_bytes + :more WHERE id = :tenant RETURNING media_bytes""")


def add_media(
    connection: Connection, tenant: UUID, media: Collection[NewMedium], quota: int, by: bytes | None = None
) -> None:
    """Store these, as far as they are not there. Again is harmless.

    ``by``: keyed digest of the key of the upload that claims them, where it told one. ``quota``: bytes of all media of a tenant; 0: no limit. Raises Overloaded beyond it.
    """
    each = sorted({one.key: one for one in media}.values(), key=lambda one: one.key)
    columns = {
        "keys": [one.key for one in each],
        "types": [one.media_type for one in each],
        "sizes": [one.bytes for one in each],
        "widths": [one.width for one in each],
        "heights": [one.height for one in each],
        "thumbs": [one.thumb for one in each],
        "lengths": [len(one.payload) for one in each],
        "firsts": list(accumulate((len(one.payload) for one in each[:-1]), initial=1)),
        "payloads": b"".join([one.payload for one in each]),
    }
    more = int(connection.execute(_ADD, {"tenant": tenant, "by": by, **columns}).scalar_one())
    if not more:
        return
    held = int(connection.execute(_COUNT, {"tenant": tenant, "more": more}).scalar_one())
    if quota and held > quota:
        raise Overloaded(
            f"the tenant's quota is {quota / 1e6:,.0f} MB of pictures, and {(held - more) / 1e6:,.0f} are stored; "
            "remove jobs that are not needed any more, or raise MOTET_MAX_MEDIA_MB",
            30.0,
        )


_CLAIM = text(f"""
    UPDATE medium SET {_CLAIMED} WHERE id IN (
      SELECT id FROM medium WHERE tenant_id = :tenant AND key = ANY(:keys)
         AND (claimed IS NULL OR claimed < clock_timestamp() - make_interval(secs => {_CLAIM_S})
              OR claimed_by IS DISTINCT FROM CAST(:by AS bytea) AND claimed_by IS NOT NULL)
       ORDER BY key FOR NO KEY UPDATE)""")
_KNOWN = text("""
    SELECT key, media_type, bytes, width, height FROM medium WHERE tenant_id = :tenant AND key = ANY(:keys)""")


def claim_media(
    connection: Connection, tenant: UUID, keys: Collection[bytes], by: bytes | None = None
) -> dict[bytes, StoredMedium]:
    """Those of these media that the tenant has: they stay until the rows are here of whoever asks (``add_media``)."""
    at = {"tenant": tenant, "keys": sorted(keys), "by": by}
    connection.execute(_CLAIM, at)
    return known_media(connection, tenant, keys)


def known_media(connection: Connection, tenant: UUID, keys: Collection[bytes]) -> dict[bytes, StoredMedium]:
    """Those of these media that the tenant has."""
    found = connection.execute(_KNOWN, {"tenant": tenant, "keys": sorted(keys)})
    return {
        bytes(row.key): StoredMedium(
            media_type=row.media_type, bytes=row.bytes, width=row.width, height=row.height
        )
        for row in found
    }


_BLOCKS = text("""
    SELECT first_row, payload FROM block b
     WHERE job_id = :job AND cardinality(media) > 0
       AND EXISTS (SELECT FROM unnest(CAST(:rows AS bigint[])) r WHERE r >= first_row AND r < first_row + n_rows)""")


def blocks_with_media(connection: Connection, job: UUID, rows: Sequence[int]) -> list[tuple[int, bytes]]:
    """First row and payload of the blocks of these rows, where they refer to media."""
    (found,) = together(connection, (_BLOCKS, {"job": job, "rows": list(rows)}))
    return [(row.first_row, bytes(row.payload)) for row in found]


_THUMBS = text("""
    SELECT key, thumb FROM medium WHERE tenant_id = :tenant AND key = ANY(:keys) AND thumb IS NOT NULL""")


def thumbs(connection: Connection, tenant: UUID, keys: Collection[bytes]) -> dict[bytes, bytes]:
    """Those of these media in small of which somebody sent that."""
    (found,) = together(connection, (_THUMBS, {"tenant": tenant, "keys": sorted(keys)}))
    return {bytes(row.key): bytes(row.thumb) for row in found}


_HOLD = text("""
    SELECT id, key FROM medium WHERE tenant_id = :tenant AND key = ANY(:keys) ORDER BY key FOR NO KEY UPDATE""")
_REFER = text("""
    UPDATE medium m SET refs = m.refs + k.n,
           claimed = CASE WHEN m.claimed_by = CAST(:by AS bytea) THEN NULL ELSE m.claimed END
      FROM unnest(CAST(:ids AS bigint[]), CAST(:counts AS int[])) k (id, n) WHERE m.id = k.id""")


def refer_to_media(
    connection: Connection, tenant: UUID, blocks: Sequence[Sequence[bytes]], by: bytes | None
) -> list[list[int]]:
    """Count these blocks as referring to these media, by their keys; the ids for each block. Claims of ``by`` end.

    Raises InvalidJob where one is not stored: it was swept between its upload and this.
    """
    counts = Counter(key for block in blocks for key in block)
    if not counts:
        return [[] for _ in blocks]
    found = connection.execute(_HOLD, {"tenant": tenant, "keys": sorted(counts)})
    ids: Mapping[bytes, int] = {bytes(row.key): row.id for row in found}
    if absent := len(counts) - len(ids):
        raise not_stored("rows", absent)
    at = {"ids": [ids[key] for key in counts], "counts": list(counts.values()), "by": by}
    connection.execute(_REFER, at)
    return [[ids[key] for key in block] for block in blocks]


def not_stored(field: str, count: int, row: int | None = None) -> InvalidJob:
    """Rows name media that are not there."""
    what = "a picture that is not stored" if count == 1 else f"{count:,} pictures that are not stored"
    remedy = "send the bytes first (PUT /v1/media/{sha256}), or submit again with the same key"
    return InvalidJob(Problem(field, what, "pictures that were sent before their rows", remedy, row))


_OF_BLOCKS = text("""
    SELECT u.id, count(*) AS n FROM block b, unnest(b.media) u (id)
     WHERE b.job_id = :job AND b.number = ANY(:numbers) GROUP BY u.id""")
_LOCK = text("SELECT id FROM medium WHERE id = ANY(:ids) ORDER BY key FOR NO KEY UPDATE")
_RELEASE = text("""
    UPDATE medium m SET refs = m.refs - k.n
      FROM unnest(CAST(:ids AS bigint[]), CAST(:counts AS int[])) k (id, n) WHERE m.id = k.id""")
_UNCLAIMED = "(claimed IS NULL OR claimed < clock_timestamp() - make_interval(secs => :unused_s))"
_DELETE = text(f"""
    DELETE FROM medium WHERE id = ANY(:ids) AND refs <= 0 AND {_UNCLAIMED} RETURNING tenant_id, bytes""")


def release_media(connection: Connection, job: UUID, blocks: Sequence[int]) -> None:
    """Blocks of these numbers are about to go: so do media that no other block refers to.

    What an upload counts on stays until its rows are here, or for UNUSED_S.
    """
    rows = connection.execute(_OF_BLOCKS, {"job": job, "numbers": list(blocks)}).all()
    if not rows:
        return
    at = {"ids": [row.id for row in rows], "counts": [row.n for row in rows]}
    connection.execute(_LOCK, at)
    connection.execute(_RELEASE, at)
    _discount(connection, connection.execute(_DELETE, {**at, "unused_s": UNUSED_S}).all())


_UNUSED = text(f"""
    DELETE FROM medium WHERE id IN (
      SELECT id FROM medium WHERE refs <= 0 AND {_UNCLAIMED}
       ORDER BY key LIMIT :limit FOR UPDATE SKIP LOCKED) RETURNING tenant_id, bytes""")


def sweep_media(connection: Connection, limit: int = 500, unused_s: float = UNUSED_S) -> int:
    """Delete media that uploads sent whose rows never came. How many."""
    gone = connection.execute(_UNUSED, {"limit": limit, "unused_s": unused_s}).all()
    _discount(connection, gone)
    return len(gone)


def _discount(connection: Connection, gone: Sequence[Any]) -> None:
    freed: Counter[UUID] = Counter()
    for row in gone:
        freed[row.tenant_id] += row.bytes
    for tenant in sorted(freed):
        connection.execute(_COUNT, {"tenant": tenant, "more": -freed[tenant]})


@dataclass(frozen=True, slots=True)
class MediaLease:
    """A live lease, and whose media may be read under it."""

    subtask: int
    tenant: UUID
    #: Of the tenant: the key of its digests.
    secret: bytes


_LEASED = text("""
    SELECT j.tenant_id, t.digest_key FROM lease l JOIN subtask s ON s.id = l.subtask_id JOIN job j ON j.id = s.job_id
      JOIN tenant t ON t.id = j.tenant_id
     WHERE l.subtask_id = :subtask AND l.attempt = :attempt AND l.nonce = :nonce AND l.until > clock_timestamp()""")
# Only what rows of its own blocks refer to: a digest that a worker made up finds nothing.
_LEASED_MEDIA = text("""
    SELECT m.id, m.key, m.bytes FROM subtask s JOIN medium m ON m.id IN (
           SELECT unnest(b.media) FROM block b WHERE b.job_id = s.job_id AND b.number = ANY(s.blocks))
     WHERE s.id = :subtask AND m.key = ANY(:keys)""")
_PAYLOADS = text("SELECT key, payload FROM medium WHERE id = ANY(:ids)")


def media_lease(connection: Connection, subtask: int, attempt: int, nonce: str) -> MediaLease | None:
    """The live lease of an attempt that knows its nonce; None where there is none."""
    at = {"subtask": subtask, "attempt": attempt, "nonce": nonce}
    row = connection.execute(_LEASED, at).first()
    return None if row is None else MediaLease(subtask, row.tenant_id, bytes(row.digest_key))


def leased_media(
    connection: Connection, lease: MediaLease, keys: Sequence[bytes], most_bytes: int
) -> tuple[dict[bytes, bytes], set[bytes]]:
    """Envelopes of the first of these media that fit into ``most_bytes``, at least one; and those that are not there.

    Not there is what no row of the sub-task's blocks refers to.
    """
    rows = connection.execute(_LEASED_MEDIA, {"subtask": lease.subtask, "keys": list(keys)}).all()
    found = {bytes(row.key): (row.id, row.bytes) for row in rows}
    ids: list[int] = []
    left = most_bytes
    for key in dict.fromkeys(keys):
        if key in found:
            number, size = found[key]
            left -= size
            if ids and left < 0:
                break
            ids.append(number)
    # In binary: as text each byte would be two letters on its way.
    payloads = together(connection, (_PAYLOADS, {"ids": ids}))[0] if ids else []
    return {bytes(row.key): bytes(row.payload) for row in payloads}, set(keys) - found.keys()
