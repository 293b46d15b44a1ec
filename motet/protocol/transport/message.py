"""One Celery message as kombu stores it in Redis: ids and counts, no text."""

from __future__ import annotations

import base64
import json
import uuid

from motet.protocol.transport.keys import queue_name
from motet.protocol.wire import Assignment

#: The Celery task that workers register; the scheduler publishes it by name and never imports it.
ENTRY_POINT = "motet.run"


def celery_message(worker: str, assignment: Assignment) -> str:
    """One Celery message (protocol 2) as kombu stores it in a Redis list."""
    a = assignment
    task_id = str(uuid.uuid4())
    args = [a.subtask, a.attempt, a.job, len(a.texts)]
    body = json.dumps([args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": ENTRY_POINT,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "shadow": a.pass_kind,
                "eta": None,
                "expires": None,
                "retries": 0,
                "timelimit": [None, None],
                "argsrepr": f"(subtask={a.subtask}, attempt={a.attempt}, rows={len(a.texts)})",
                "kwargsrepr": "{}",
                "origin": "motet-dispatcher",
                "ignore_result": True,
                "motet": [a.subtask, a.attempt],
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue_name(worker)},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


def attempt_of(body: bytes) -> tuple[int, int] | None:
    """(sub-task, attempt) of a message; None where it is not one of ours."""
    try:
        subtask, attempt = json.loads(body)["headers"]["motet"]
        return int(subtask), int(attempt)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return None
