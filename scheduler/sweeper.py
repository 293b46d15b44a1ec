"""The sweeper of the leading dispatcher: deletes what is no longer kept, a slice at a time, while all others are served."""

from __future__ import annotations

import logging
from uuid import UUID

from scheduler.store import endings, folds, keeping, media
from scheduler.store.database import Database
from scheduler.store.leadership import fence

log = logging.getLogger(__name__)


def sweep(database: Database, epoch: int, retention_days: float) -> bool:
    """Delete some of what is no longer kept, in short transactions. True where more of it may be left.

    Raises NotLeading.
    """
    with database.transaction() as connection:
        fence(connection, epoch)
        due = endings.due_for_deletion(connection, retention_days)
        columns = endings.sweep_columns(connection)
        endings.sweep_events(connection)
        forgotten = folds.sweep(connection)
        unused = media.sweep_media(connection)
        fronts = keeping.due_fronts(connection)
    left = endings.SLICE_BLOCKS
    for job in due:
        if _delete_slice(database, epoch, job.id):
            log.info("job deleted", extra={"job": str(job.id), "why": job.why, "blocks": job.n_blocks})
        left -= max(1, job.n_blocks)
        if left <= 0:
            break
    more = [_forget_front(database, epoch, job) for job in fronts]
    return bool(due or columns or forgotten or unused or any(more) or len(fronts) == keeping.ROUND)


def _delete_slice(database: Database, epoch: int, job: UUID) -> bool:
    """Delete some blocks of an ended job. True where nothing of it is left."""
    with database.transaction() as connection:
        fence(connection, epoch)
        return endings.delete_slice(connection, job)


def _forget_front(database: Database, epoch: int, job: UUID) -> bool:
    """Delete some of the rows that an open job has kept long enough. True where there are more."""
    with database.transaction() as connection:
        fence(connection, epoch)
        forgotten = keeping.forget_front(connection, job)
    if forgotten.blocks:
        log.info("front deleted", extra={"job": str(job), "blocks": forgotten.blocks})
    return forgotten.more
