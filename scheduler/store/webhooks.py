"""Webhooks: who is told of events, which events wait for them, and the one process that delivers.

Events are handed to webhooks first, then each (webhook, event) is tried until it is delivered or given up. A process that
dies between a try and its record leaves a delivery that is tried again: at least once, never lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from motet.errors import Conflict, NotFound
from scheduler.store.database import EVENTS, notify, together

#: Webhooks of one tenant. More: each event is handed to more addresses, and one tenant takes the time of all.
MOST_WEBHOOKS = 50
#: Seconds after which a delivery is given up that did not come through. Longer: a receiver may be away for longer, and
#: is told older news. Shorter than what is left of an event's days in the outbox (``endings.EVENTS_KEPT_DAYS``).
GIVEN_UP_S = 86_400.0
#: Events that are handed over in one transaction.
_HANDED_AT_ONCE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookEntry:
    """A webhook as it is shown."""

    id: str
    url: str
    kinds: tuple[str, ...]
    job_id: UUID | None
    created: datetime
    #: Name of the token that asked for it.
    by: str
    #: Tries in a row that failed.
    failures: int
    waiting: int
    delivered: int
    given_up: int
    #: When the oldest event was written that waits.
    oldest: datetime | None
    #: Why the last try failed that failed, of those that are not delivered.
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DueDelivery:
    """An event that is to be sent to a webhook now."""

    webhook: str
    url: str
    secret: bytes = field(repr=False)
    #: Tries in a row that failed, of whatever event.
    failures: int
    event: int
    kind: str
    #: None: a batch ended before it had one.
    job: UUID | None
    body: Mapping[str, Any]
    created: datetime
    #: Tries so far.
    attempts: int
    #: The job's condition, of a row for which it holds; None where the job was removed.
    notify_when: str | None


# -- registering

_LOCK = text("SELECT id FROM tenant WHERE id = :tenant FOR UPDATE")
_COUNT = text("SELECT count(*) FROM webhook WHERE tenant_id = :tenant")
_ADD = text("""
    INSERT INTO webhook (id, tenant_id, url, kinds, job_id, secret, by)
    VALUES (:id, :tenant, :url, :kinds, :job, :secret, :by)""")
_JOB_IS_MINE = text("SELECT 1 FROM job WHERE id = :job AND tenant_id = :tenant")
_WEBHOOKS = text("""
    SELECT w.id, w.url, w.kinds, w.job_id, w.created, coalesce(k.name, w.by) AS by, w.failures,
           d.waiting, d.delivered, d.given_up, d.oldest, coalesce(d.said, '') AS said
      FROM webhook w LEFT JOIN token k ON k.id = w.by CROSS JOIN LATERAL (
           SELECT count(*) FILTER (WHERE d.state = 'waiting') AS waiting,
                  count(*) FILTER (WHERE d.state = 'delivered') AS delivered,
                  count(*) FILTER (WHERE d.state = 'given_up') AS given_up,
                  min(d.happened) FILTER (WHERE d.state = 'waiting') AS oldest,
                  (array_agg(d.said ORDER BY d.event_id DESC)
                     FILTER (WHERE d.said <> '' AND d.state <> 'delivered'))[1] AS said
             FROM delivery d WHERE d.webhook_id = w.id) d
     WHERE w.tenant_id = :tenant AND (CAST(:id AS text) IS NULL OR w.id = :id) ORDER BY w.created, w.id""")
_SECRET = text("SELECT url, secret FROM webhook WHERE tenant_id = :tenant AND id = :id")
_REMOVE = text("DELETE FROM webhook WHERE tenant_id = :tenant AND id = :id")
_REPLAY = text("""
    UPDATE delivery d SET state = 'waiting', attempts = 0, next_at = clock_timestamp(), ended = NULL, said = '',
           until = clock_timestamp() + make_interval(secs => :given_up_s)
     WHERE d.webhook_id = :id
       AND (CAST(:event AS bigint) IS NULL OR d.event_id = :event)
       AND (d.state = 'given_up' OR :event IS NOT NULL
            OR d.happened > clock_timestamp() - make_interval(secs => CAST(:since_s AS double precision)))""")
_AWAKE = text("UPDATE webhook SET rest_until = '-infinity', failures = 0 WHERE id = :id")


def add_webhook(
    connection: Connection,
    tenant: UUID,
    *,
    id_: str,
    url: str,
    kinds: Sequence[str],
    job: UUID | None,
    secret: bytes,
    by: str,
) -> None:
    """Tell this address of what happens from now on. Raises NotFound for a job that is none, Conflict beyond MOST_WEBHOOKS."""
    connection.execute(_LOCK, {"tenant": tenant})
    if connection.execute(_COUNT, {"tenant": tenant}).scalar_one() >= MOST_WEBHOOKS:
        raise Conflict(f"there are {MOST_WEBHOOKS} webhooks already; remove one")
    if job is not None and connection.execute(_JOB_IS_MINE, {"job": job, "tenant": tenant}).first() is None:
        raise NotFound(f"no job {job}")
    made = {"id": id_, "tenant": tenant, "url": url, "kinds": list(kinds), "job": job}
    connection.execute(_ADD, {**made, "secret": secret, "by": by})


def webhooks(connection: Connection, tenant: UUID, id_: str | None = None) -> list[WebhookEntry]:
    """The webhooks of a tenant, the oldest first, or the one of this id."""
    found = connection.execute(_WEBHOOKS, {"tenant": tenant, "id": id_})
    return [WebhookEntry(**{**row._mapping, "kinds": tuple(row.kinds)}) for row in found]


def webhook_secret(connection: Connection, tenant: UUID, id_: str) -> tuple[str, bytes]:
    """Address and secret of a webhook. Raises NotFound."""
    found = connection.execute(_SECRET, {"tenant": tenant, "id": id_}).first()
    if found is None:
        raise NotFound("no webhook of this id; GET /v1/webhooks lists them")
    return found.url, bytes(found.secret)


def remove_webhook(connection: Connection, tenant: UUID, id_: str) -> bool:
    """Tell it nothing more; what waits for it is dropped. False where there is none."""
    return connection.execute(_REMOVE, {"tenant": tenant, "id": id_}).rowcount == 1


def replay(
    connection: Connection, tenant: UUID, id_: str, *, event: int | None = None, since_s: float | None = None
) -> int:
    """Deliver again, from the beginning: one event, or those that were given up and those of the last ``since_s`` seconds.

    How many. Raises NotFound.
    """
    webhook_secret(connection, tenant, id_)
    at = {"id": id_, "event": event, "since_s": since_s, "given_up_s": GIVEN_UP_S}
    again = connection.execute(_REPLAY, at).rowcount
    connection.execute(_AWAKE, {"id": id_})
    notify(connection, EVENTS)
    return int(again)


# -- how it stands with all of them

#: Seconds for which an event may wait for a webhook that takes others. Longer: nobody delivers, or not fast enough.
BEHIND_S = 60.0
#: Seconds for which a webhook may fail before somebody should look.
FAILING_S = 3600.0
# What was not handed over yet waits only where there is anybody to hear of it.
_PENDING = text("""
    SELECT count(*) AS events,
           CAST(coalesce(extract(epoch FROM clock_timestamp() - min(since)), 0) AS double precision) AS oldest_s,
           (SELECT count(*) FROM webhook WHERE failures > 0) AS failing
      FROM (SELECT happened AS since FROM delivery WHERE state = 'waiting' UNION ALL
            SELECT created FROM outbox WHERE handed IS NULL AND EXISTS (SELECT 1 FROM webhook)) waiting""")
_FAILING = text("""
    SELECT w.id, CAST(extract(epoch FROM clock_timestamp() - min(d.happened)) AS double precision) AS for_s
      FROM webhook w JOIN delivery d ON d.webhook_id = w.id AND d.state = 'waiting'
     WHERE w.failures > 0 GROUP BY w.id
    HAVING min(d.happened) < clock_timestamp() - make_interval(secs => :failing_s) ORDER BY for_s DESC, w.id""")
_BEHIND = text("""
    SELECT count(*) AS events,
           CAST(coalesce(extract(epoch FROM clock_timestamp() - min(since)), 0) AS double precision) AS oldest_s
      FROM (SELECT d.next_at AS since FROM delivery d JOIN webhook w ON w.id = d.webhook_id
             WHERE d.state = 'waiting' AND w.failures = 0 UNION ALL
            SELECT created FROM outbox WHERE handed IS NULL AND EXISTS (SELECT 1 FROM webhook)) waiting
     WHERE since < clock_timestamp() - make_interval(secs => :behind_s)""")
_ANY = text("SELECT count(*) FROM webhook")


@dataclass(frozen=True, slots=True)
class PendingEvents:
    """Events that wait to be delivered."""

    events: int
    #: Seconds since the oldest of them was written; 0: there is none.
    oldest_s: float
    #: Webhooks whose last try failed.
    failing: int


@dataclass(frozen=True, slots=True)
class WebhooksSeen:
    """What the doctor looks at."""

    webhooks: int
    #: Those that fail for FAILING_S or longer, the longest first -> seconds since the oldest event that they did not take.
    failing: Mapping[str, float]
    #: Events that are due for BEHIND_S or longer though their webhooks take others, and seconds of the oldest.
    behind: int
    behind_s: float


def pending_events(connection: Connection) -> PendingEvents:
    """Of all tenants."""
    return PendingEvents(*connection.execute(_PENDING).one())


def webhooks_seen(connection: Connection) -> WebhooksSeen:
    """Of all tenants."""
    failing = {row.id: row.for_s for row in connection.execute(_FAILING, {"failing_s": FAILING_S})}
    behind = connection.execute(_BEHIND, {"behind_s": BEHIND_S}).one()
    count = connection.execute(_ANY).scalar_one()
    return WebhooksSeen(int(count), failing, int(behind.events), float(behind.oldest_s))


# -- delivering

_TAKE = text("""
    UPDATE deliverer SET holder = :me, until = clock_timestamp() + make_interval(secs => :lease_s)
     WHERE id = 1 AND (holder = :me OR until < clock_timestamp() OR holder = :gone) RETURNING id""")
_HOLDER = text("SELECT holder FROM deliverer WHERE id = 1")
_RESIGN = text("UPDATE deliverer SET until = '-infinity' WHERE id = 1 AND holder = :me")
_HAND = text("""
    WITH new AS (
      SELECT id, tenant_id, kind, job_id, created FROM outbox WHERE handed IS NULL ORDER BY id LIMIT :limit
         FOR UPDATE SKIP LOCKED),
    told AS (
      INSERT INTO delivery (webhook_id, event_id, happened, until)
      SELECT w.id, n.id, n.created, n.created + make_interval(secs => :given_up_s)
        FROM new n JOIN webhook w ON w.tenant_id = n.tenant_id AND n.kind = ANY(w.kinds)
         AND (w.job_id IS NULL OR w.job_id = n.job_id) AND w.created <= n.created
      ON CONFLICT DO NOTHING)
    UPDATE outbox SET handed = clock_timestamp() FROM new WHERE outbox.id = new.id RETURNING outbox.id""")
# Of each webhook that does not rest the next few; one alone of a webhook that failed last.
_DUE = text("""
    SELECT w.id AS webhook, w.url, w.secret, w.failures, o.id AS event, o.kind, o.job_id AS job, o.body, o.created, d.attempts,
           j.notify_when
      FROM webhook w CROSS JOIN LATERAL (
           SELECT event_id, attempts FROM delivery
            WHERE webhook_id = w.id AND state = 'waiting' AND next_at <= clock_timestamp()
            ORDER BY next_at LIMIT CASE WHEN w.failures > 0 THEN 1 ELSE :most END) d
      JOIN outbox o ON o.id = d.event_id LEFT JOIN job j ON j.id = o.job_id
     WHERE w.rest_until <= clock_timestamp()
     ORDER BY o.created, o.id""")
_DELIVERED = text("""
    UPDATE delivery SET state = 'delivered', attempts = attempts + 1, ended = clock_timestamp()
     WHERE webhook_id = :webhook AND event_id = :event AND state = 'waiting'""")
_WORKS = text(
    "UPDATE webhook SET failures = 0, rest_until = '-infinity' WHERE id = :webhook AND failures > 0"
)
_FAILED = text("""
    UPDATE delivery SET attempts = attempts + 1, said = :said,
           next_at = clock_timestamp() + make_interval(secs => :again_s),
           state = CASE WHEN until <= clock_timestamp() + make_interval(secs => :again_s) THEN 'given_up' ELSE state END,
           ended = CASE WHEN until <= clock_timestamp() + make_interval(secs => :again_s) THEN clock_timestamp() END
     WHERE webhook_id = :webhook AND event_id = :event AND state = 'waiting' RETURNING state""")
_RESTS = text("""
    UPDATE webhook SET failures = failures + 1, rest_until = clock_timestamp() + make_interval(secs => :rest_s)
     WHERE id = :webhook""")
_GIVE_UP = text("""
    UPDATE delivery d SET state = 'given_up', ended = clock_timestamp(),
           said = CASE WHEN d.said = '' THEN 'not tried: earlier ones failed' ELSE d.said END
      FROM webhook w WHERE d.webhook_id = w.id AND d.state = 'waiting' AND d.until < clock_timestamp()""")


def may_deliver(connection: Connection, me: str, lease_s: float, gone: str | None) -> bool:
    """Become or stay the process that delivers; ``gone``: the holder, where it is known to have ended."""
    return connection.execute(_TAKE, {"me": me, "lease_s": lease_s, "gone": gone}).first() is not None


def deliverer(connection: Connection) -> str:
    """The process that delivers, or did last."""
    return str(connection.execute(_HOLDER).scalar_one())


def stop_delivering(connection: Connection, me: str) -> None:
    """Let another process deliver at once."""
    connection.execute(_RESIGN, {"me": me})


def next_deliveries(connection: Connection, per_webhook: int) -> tuple[bool, list[DueDelivery]]:
    """Hand new events to their webhooks, and find what is to be sent now, up to so many of each webhook, the oldest event
    first. True where there may be more new events."""
    handed, due = together(
        connection,
        (_HAND, {"limit": _HANDED_AT_ONCE, "given_up_s": GIVEN_UP_S}),
        (_DUE, {"most": per_webhook}),
    )
    return len(handed) == _HANDED_AT_ONCE, [DueDelivery(**row._asdict()) for row in due]


def delivered(connection: Connection, webhook: str, event: int) -> None:
    """It came through. Twice is harmless."""
    connection.execute(_DELIVERED, {"webhook": webhook, "event": event})
    connection.execute(_WORKS, {"webhook": webhook})


def not_delivered(
    connection: Connection, webhook: str, event: int, said: str, *, again_s: float, rest_s: float
) -> bool:
    """It did not: it is tried again, or given up (True) where that would be too late; its webhook rests meanwhile."""
    at = {"webhook": webhook, "event": event, "said": said[:300], "again_s": again_s}
    state = connection.execute(_FAILED, at).scalar()
    connection.execute(_RESTS, {"webhook": webhook, "rest_s": rest_s})
    return bool(state == "given_up")


def give_up(connection: Connection) -> int:
    """Give up what waits behind others that fail, and is too old by now. How many."""
    return int(connection.execute(_GIVE_UP).rowcount)
