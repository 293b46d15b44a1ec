"""Tables of events, and of those who are told of them."""

from __future__ import annotations

from sqlalchemy import ARRAY, BigInteger, ForeignKey, Integer, LargeBinary, Text, TypedColumns, Uuid
from sqlalchemy.dialects.postgresql import JSONB

from scheduler.store.schema import NOW, TIME, identity, index, key, may, must, table


class _OutboxColumns(TypedColumns):
    """Events, written in the transaction of what they tell, and delivered at least once.

    job_id: The job, which may have been removed since; NULL: a batch ended before it had one.
    body: States, ids, counts, labels and numbers; never a text of a user.
    handed: When the webhooks were found that it goes to; NULL: not yet.
    """

    id = identity()
    tenant_id = must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    kind = must(Text, check="kind IN ('job_ended', 'batch_ended', 'row_matched')")
    job_id = may(Uuid)
    body = must(JSONB)
    created = must(TIME, default=NOW)
    handed = may(TIME)


outbox = table(
    "outbox",
    _OutboxColumns,
    index("outbox_one_end", "job_id", unique=True, where="kind = 'job_ended'"),
    index("outbox_new", "id", where="handed IS NULL"),
)


class _WebhookColumns(TypedColumns):
    """Addresses of a tenant that are told of events.

    kinds: Kinds of events that it is told of.
    job_id: It is told of this job alone, which may have been removed since; NULL: of all.
    secret: Secret: keys the signature of each delivery, as Standard Webhooks has it.
    by: Id of the token that asked for it.
    failures: Tries in a row that failed.
    rest_until: It is left alone until then.
    """

    id = key(Text)
    tenant_id = must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    url = must(Text)
    kinds = must(ARRAY(Text))
    job_id = may(Uuid)
    secret = must(LargeBinary)
    created = must(TIME, default=NOW)
    by = must(Text, default="''")
    failures = must(Integer, default="0")
    rest_until = must(TIME, default="'-infinity'")


webhook = table("webhook", _WebhookColumns)


class _DeliveryColumns(TypedColumns):
    """An event on its way to a webhook.

    happened: When the event was written.
    attempts: Tries so far.
    next_at: When it is tried next.
    until: It is given up where it was not delivered by then.
    ended: When it was delivered or given up.
    said: Why the last try failed.
    """

    webhook_id = key(Text, ForeignKey("webhook.id", ondelete="CASCADE"))
    event_id = key(BigInteger, ForeignKey("outbox.id", ondelete="CASCADE"))
    state = must(Text, default="'waiting'", check="state IN ('waiting', 'delivered', 'given_up')")
    happened = must(TIME)
    attempts = must(Integer, default="0")
    next_at = must(TIME, default=NOW)
    until = must(TIME)
    ended = may(TIME)
    said = must(Text, default="''")


delivery = table(
    "delivery",
    _DeliveryColumns,
    index("delivery_by_event", "event_id"),
    index("delivery_due", "webhook_id", "next_at", where="state = 'waiting'"),
)


class _DelivererColumns(TypedColumns):
    """The one process that delivers events.

    until: Another process may deliver from then on.
    """

    id = key(Integer, check="id = 1")
    holder = must(Text, default="''")
    until = must(TIME, default="'-infinity'")


deliverer = table("deliverer", _DelivererColumns)
