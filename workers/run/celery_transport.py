"""Celery's Redis transport, which passes over what is no message of the dispatcher's.

Celery's own ends the worker's loop at the first entry of the queue that it cannot read (celery#7975, #4308). Only
one kind of message is meant for a worker, so everything else is recognised before Celery sees it.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from queue import Empty
from typing import Any

from kombu.exceptions import InconsistencyError
from kombu.transport import TRANSPORT_ALIASES, redis
from redis import RedisError

from motet.protocol.logs import event
from motet.protocol.transport import ENTRY_POINT

log = logging.getLogger(__name__)

#: Bytes of a body: ids and counts take some hundred.
MAX_BODY = 10_000
#: The headers and properties that Celery is shown, and what each may be. Others are passed over: a newer dispatcher
#: may send them.
HEADERS: Mapping[str, tuple[type, ...]] = {
    "task": (str,),
    "id": (str,),
    "motet": (list,),
    "lang": (str, type(None)),
    "root_id": (str, type(None)),
    "parent_id": (str, type(None)),
    "shadow": (str, type(None)),
    "retries": (int,),
    "argsrepr": (str, type(None)),
    "kwargsrepr": (str, type(None)),
    "origin": (str, type(None)),
    "ignore_result": (bool,),
    # What would make Celery wait, give up or call others.
    "eta": (type(None),),
    "expires": (type(None),),
    "group": (type(None),),
}
PROPERTIES: Mapping[str, tuple[type, ...]] = {
    "delivery_tag": (str,),
    "delivery_info": (dict,),
    "body_encoding": (str,),
    "correlation_id": (str, type(None)),
    "reply_to": (str, type(None)),
    "delivery_mode": (int,),
    "priority": (int,),
}
NEEDED = ("task", "id", "motet", "delivery_tag", "delivery_info", "body_encoding")


class Channel(redis.Channel):
    """Reads the queue."""

    def _brpop_read(self, **options: Any) -> Any:
        known = self.connection.read
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except (Empty, OSError, RedisError, InconsistencyError):
            raise
        except Exception as error:
            if self.connection.read != known:
                # It was read, so it is not the entry that is at fault.
                raise
            event(log, "not a message", logging.WARNING, error=type(error).__name__)
            return True


class Transport(redis.Transport):
    """Celery's, for a worker's own queue."""

    Channel = Channel
    #: Entries that were JSON.
    read = 0

    def _deliver(self, message: Any, queue: str) -> None:
        self.read += 1
        shown = as_celery_may_see(message)
        if shown is None:
            event(log, "not a message", logging.WARNING, error="form")
            return
        super()._deliver(shown, queue)  # type: ignore[no-untyped-call]


def install() -> None:
    """Have Celery use it, whatever form the Redis URL has."""
    ours = f"{__name__}:{Transport.__name__}"
    TRANSPORT_ALIASES.update(redis=ours, rediss=ours)


def as_celery_may_see(message: Any) -> dict[str, Any] | None:
    """A message with the fields that are known; None where it is none of the dispatcher's. Pure."""
    try:
        headers = _known(message["headers"], HEADERS)
        properties = _known(message["properties"], PROPERTIES)
        good = (
            message["content-type"] == "application/json"
            and message["content-encoding"] == "utf-8"
            and headers["task"] == ENTRY_POINT
            and properties["body_encoding"] == "base64"
            and _names_one_attempt(message["body"], headers["motet"])
        )
    except Exception:  # noqa: BLE001 - any stranger's JSON
        return None
    return {**message, "headers": headers, "properties": properties} if good else None


def _known(given: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Those of the values that have a kind. Raises where one is of another kind, or one that is needed is absent."""
    known = {name: value for name, value in given.items() if name in kinds}
    if not all(isinstance(value, kinds[name]) for name, value in known.items()):
        raise TypeError
    if not all(name in known for name in NEEDED if name in kinds):
        raise KeyError
    return known


def _names_one_attempt(body: str, key: list[Any]) -> bool:
    """Whether the body is (sub-task, attempt, job, rows) of the attempt that the header names, and no more."""
    if len(body) > MAX_BODY:
        return False
    (subtask, attempt, job, rows), keywords, embedded = json.loads(base64.b64decode(body, validate=True))
    return (
        [subtask, attempt] == key
        and all(type(number) is int for number in (subtask, attempt, rows))
        and isinstance(job, str)
        and keywords == {}
        and not any(embedded.values())
    )
