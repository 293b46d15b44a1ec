"""Which dispatcher leads: one lease row with an epoch, checked first in every transaction of the scheduler.

Not an advisory lock: a frozen leader would keep one for ever (reference: reliability 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from sqlalchemy import Connection, text

from scheduler.store.database import Asked, Database


class NotLeading(Exception):
    """Another dispatcher leads, or the lease ran out: stop writing and stand by."""


# The clock, because an older dump brings an older epoch back: workers that lived through it obey no smaller one.
_TAKE = text("""
    UPDATE leader SET epoch = greatest(epoch + 1, CAST(floor(date_part('epoch', clock_timestamp())) AS bigint)),
           holder = :me, until = clock_timestamp() + make_interval(secs => :lease_s)
     WHERE id = 1 AND (until < clock_timestamp() OR holder = :gone) RETURNING epoch""")
_HOLDER = text("SELECT holder FROM leader WHERE id = 1 AND until > clock_timestamp()")
_RENEW = text("""
    UPDATE leader SET until = clock_timestamp() + make_interval(secs => :lease_s)
     WHERE id = 1 AND holder = :me AND epoch = :epoch AND until > clock_timestamp() RETURNING epoch""")
_RESIGN = text("UPDATE leader SET until = '-infinity' WHERE id = 1 AND holder = :me AND epoch = :epoch")
# FOR SHARE conflicts with a take-over: an old leader commits before the new epoch begins, or not at all.
_FENCE = text("SELECT 1 FROM leader WHERE id = 1 AND epoch = :epoch AND until > clock_timestamp() FOR SHARE")
_SEEN = text("SELECT transport FROM leader WHERE id = 1")
_SEE = text("UPDATE leader SET transport = :identity WHERE id = 1 AND epoch = :epoch")


def lead(
    database: Database,
    me: str,
    epoch: int | None,
    lease_s: float,
    is_gone: Callable[[str], bool] = lambda _: False,
) -> int | None:
    """Renew the lease of ``epoch``, or take it where it has run out or its holder is gone. The epoch we lead in, or None.

    What a holder that is gone had sent to Postgres is committed before we lead, or never: it had locked the lease.
    An epoch is the second of Postgres' clock in which it was taken, and at the least one more than the last.
    """
    with database.transaction() as connection:
        if epoch is not None:
            kept = connection.execute(_RENEW, {"me": me, "epoch": epoch, "lease_s": lease_s}).scalar()
            if kept is not None:
                return epoch
        holder = connection.execute(_HOLDER).scalar()
        if holder is not None and not is_gone(holder):
            return None
        return connection.execute(_TAKE, {"me": me, "lease_s": lease_s, "gone": holder}).scalar()


def resign(database: Database, me: str, epoch: int) -> None:
    """Let a standby lead at once."""
    with database.transaction() as connection:
        connection.execute(_RESIGN, {"me": me, "epoch": epoch})


def fence(connection: Connection, epoch: int) -> None:
    """The first statement of every transaction of the dispatcher. Raises NotLeading."""
    must_lead(connection.execute(*fenced(epoch)).all())


def fenced(epoch: int) -> Asked:
    """The statement of ``fence``, for a transaction that begins with several at once: ``must_lead`` with its rows."""
    return _FENCE, {"epoch": epoch}


def must_lead(found: Collection[object]) -> None:
    """Raise NotLeading where the fence has found nothing."""
    if not found:
        raise NotLeading


def transport_seen(connection: Connection) -> str:
    """Identity of Redis as some leader last dealt with it."""
    return str(connection.execute(_SEEN).scalar_one())


def see_transport(connection: Connection, epoch: int, identity: str) -> None:
    """Record Redis' identity, in the transaction that drew the consequences of its change."""
    connection.execute(_SEE, {"identity": identity, "epoch": epoch})


def record_transport(database: Database, epoch: int, identity: str) -> None:
    """``see_transport`` in a transaction of its own."""
    with database.transaction() as connection:
        fence(connection, epoch)
        see_transport(connection, epoch, identity)
