"""Rows of blobs as they come, are asked for, and go when nothing names them any more.

A blob's ``created`` is when it was last stored or asked for: nothing younger than a day is swept.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

_RECORD = text("""
    INSERT INTO blob (sha256, bytes) VALUES (:sha256, :bytes)
    ON CONFLICT (sha256) DO UPDATE SET created = clock_timestamp()""")
_TOUCH = text("""
    UPDATE blob SET created = clock_timestamp()
     WHERE sha256 = :sha256 AND created < clock_timestamp() - interval '1 hour'""")
_ADOPT = text("""
    INSERT INTO blob (sha256, bytes, created)
    SELECT sha256, bytes, clock_timestamp() - make_interval(secs => age_s)
      FROM unnest(CAST(:shas AS text[]), CAST(:sizes AS bigint[]), CAST(:ages AS double precision[]))
           k (sha256, bytes, age_s)
     ORDER BY sha256 ON CONFLICT (sha256) DO NOTHING""")
# Hidden models count: finished jobs name them, and they may come back. So does what training runs made and need, and
# what users uploaded or batches read.
_NAMED = """
    SELECT 1 FROM model m, jsonb_each_text(m.manifest -> 'files') f (path, sha256) WHERE f.sha256 = blob.sha256
     UNION ALL SELECT 1 FROM fit WHERE fit.checkpoint = blob.sha256 OR blob.sha256 = ANY(fit.files)
     UNION ALL SELECT 1 FROM file WHERE file.sha256 = blob.sha256
     UNION ALL SELECT 1 FROM batch WHERE batch.input_sha256 = blob.sha256 AND batch.ended IS NULL"""
# First the locks, then a look with a fresh snapshot: a model that came in between is seen.
_LOCK = text(f"""
    SELECT sha256 FROM blob WHERE created < clock_timestamp() - make_interval(secs => :kept_s) AND NOT EXISTS ({_NAMED})
     ORDER BY sha256 LIMIT :limit FOR UPDATE SKIP LOCKED""")
_TAKE = text(f"""
    DELETE FROM blob WHERE sha256 = ANY(:shas) AND created < clock_timestamp() - make_interval(secs => :kept_s)
       AND NOT EXISTS ({_NAMED}) RETURNING sha256""")


def record_blob(connection: Connection, sha256: str, size: int) -> None:
    """Record a blob whose file is in place; again makes it young again. Waits for a sweep that takes it just now."""
    connection.execute(_RECORD, {"sha256": sha256, "bytes": size})


def touch_blob(connection: Connection, sha256: str) -> None:
    """Somebody asked for it: it is young again."""
    connection.execute(_TOUCH, {"sha256": sha256})


def adopt_blobs(connection: Connection, files: Sequence[tuple[str, int, float]]) -> None:
    """Record files (digest, bytes, seconds since they were written) that have no row yet."""
    shas, sizes, ages = ([f[i] for f in files] for i in range(3))
    connection.execute(_ADOPT, {"shas": shas, "sizes": sizes, "ages": ages})


def take_unnamed_blob(connection: Connection, sha256: str) -> bool:
    """Delete the row of this blob, if nothing names it. The caller deletes its file before it commits."""
    return connection.execute(_TAKE, {"shas": [sha256], "kept_s": 0.0}).first() is not None


def take_unnamed_blobs(connection: Connection, kept_s: float, limit: int) -> list[str]:
    """Delete rows of blobs that no model names and that are older than ``kept_s``; their digests.

    The caller deletes their files before it commits: until then nobody can record one of them anew.
    """
    at = {"kept_s": kept_s, "limit": limit}
    shas = list(connection.execute(_LOCK, at).scalars())
    return list(connection.execute(_TAKE, {"shas": shas, "kept_s": kept_s}).scalars()) if shas else []
