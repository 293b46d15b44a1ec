"""One Celery message as kombu stores it in Redis: ids and counts, no text."""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from random import getrandbits

from motet.protocol.transport.keys import queue_name
from motet.protocol.wire import Assignment

#: The Celery task that workers register; the scheduler publishes it by name and never imports it.
ENTRY_POINT = "motet.run"


def celery_message(worker: str, assignment: Assignment) -> str:
    """One Celery message (protocol 2) as kombu stores it in a Redis list."""
    a = assignment
    body = f"[[{a.subtask}, {a.attempt}, {_quoted(a.job)}, {len(a.texts)}], {_BODY}]"
    return _MESSAGE % {
        "body": base64.b64encode(body.encode()).decode(),
        "id": _new_id(),
        "shadow": _quoted(a.pass_kind),
        "subtask": a.subtask,
        "attempt": a.attempt,
        "rows": len(a.texts),
        "queue": _quoted(queue_name(worker)),
        "tag": _new_id(),
    }


#: JSON of a text. Few are said again and again: kinds of passes, queues, jobs.
_quoted = lru_cache(32_768)(json.dumps)
_BODY = json.dumps([{}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])[1:-1]
#: A leader writes thousands of these a second, so all that is alike in them is written once.
_MESSAGE = (
    json.dumps(
        {
            "body": "%(body)s",
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": ENTRY_POINT,
                "id": "%(id)s",
                "root_id": "%(id)s",
                "parent_id": None,
                "group": None,
                "shadow": "<shadow>",
                "eta": None,
                "expires": None,
                "retries": 0,
                "timelimit": [None, None],
                "argsrepr": "(subtask=%(subtask)d, attempt=%(attempt)d, rows=%(rows)d)",
                "kwargsrepr": "{}",
                "origin": "motet-dispatcher",
                "ignore_result": True,
                "motet": "<motet>",
            },
            "properties": {
                "correlation_id": "%(id)s",
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "<queue>"},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": "%(tag)s",
            },
        }
    )
    .replace('"<shadow>"', "%(shadow)s")
    .replace('"<motet>"', "[%(subtask)d, %(attempt)d]")
    .replace('"<queue>"', "%(queue)s")
)


def _new_id() -> str:
    """A random UUID of version 4: nobody is kept out by it, so a system call for each would be for nothing."""
    h = f"{getrandbits(128):032x}"
    return f"{h[:8]}-{h[8:12]}-4{h[13:16]}-a{h[17:20]}-{h[20:]}"


def attempt_of(body: bytes) -> tuple[int, int] | None:
    """(sub-task, attempt) of a message; None where it is not one of ours."""
    try:
        subtask, attempt = json.loads(body)["headers"]["motet"]
        return int(subtask), int(attempt)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return None
