"""Messages about webhooks: addresses that are told of events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from motet.messages.message import ApiMessage, Limit

#: What a webhook may be told of.
EventName = Literal["job.ended", "batch.ended", "row.matched"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookRequest(ApiMessage):
    """An address that is to be told of events."""

    #: Where they are posted to: https, and a host of the public internet unless an administrator allows it.
    url: Annotated[str, Limit("a URL such as https://example.com/hook", least=1, most=2000)]
    #: What it is told of; null: everything.
    events: (
        Annotated[
            tuple[EventName, ...],
            Limit("a list of job.ended, batch.ended, row.matched", least=1, most=3, unique=True),
        ]
        | None
    ) = None
    #: Id of the one job that it is told of; null: all.
    job: Annotated[str, Limit("a job's id", least=1, most=100)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookRecord(ApiMessage):
    """A webhook and how its deliveries stand, without its secret."""

    #: What it is found by.
    id: str
    #: Where events are posted to.
    url: str
    #: What it is told of.
    events: tuple[str, ...] = ()
    #: Id of the one job that it is told of; null: all.
    job: str | None = None
    #: When it was made, as RFC 3339.
    created: str = ""
    #: Name of the token that asked for it.
    by: str = ""
    #: Events that are tried now or later.
    waiting: int = 0
    #: Events of the last days that it took.
    delivered: int = 0
    #: Events of the last days that it did not take in a day of tries.
    given_up: int = 0
    #: Tries in a row that failed, up to now.
    failures: int = 0
    #: When the oldest event happened that waits, as RFC 3339; null: none waits.
    oldest_waiting: str | None = None
    #: Why the last try failed, of an event that it has not taken.
    last_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook(WebhookRecord):
    """A webhook. Its secret is known only in the answer that made it."""

    #: ``whsec_…``, which proves that a message is motet's, where it was just made; else null.
    secret: str | None = None

    def __repr__(self) -> str:
        return f"Webhook(id={self.id!r}, url={self.url!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookList(ApiMessage):
    """The webhooks of a tenant, the oldest first."""

    #: The webhooks.
    webhooks: tuple[WebhookRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookTest(ApiMessage):
    """What became of a message of type ``test``, sent once, at once."""

    #: Whether the receiver took it.
    taken: bool
    #: Status of its answer, where it took it.
    status: int | None = None
    #: Why it was not taken.
    error: str = ""
    #: Seconds until that was known.
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest(ApiMessage):
    """Which events are delivered again: one, or those that were given up and those of the last ``since_s`` seconds."""

    #: The ``webhook-id`` of one event.
    event: Annotated[str, Limit("a webhook-id such as msg_17_64f", least=1, most=60)] | None = None
    #: Seconds before now, from which on all events are delivered again.
    since_s: (
        Annotated[float, Limit("seconds, more than 0 and at most 604,800", above=0, most=604_800)] | None
    ) = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed(ApiMessage):
    """Events that are being delivered again."""

    #: How many.
    events: int
