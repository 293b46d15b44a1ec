"""Telling: an event as the message that a webhook gets, and its signature. Standard Webhooks 1.0. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from scheduler.store.webhooks import DueDelivery

#: What stands before the base64 of a secret where it is shown.
SECRET_PREFIX = "whsec_"
_MESSAGE_ID = re.compile(r"msg_([0-9]{1,18})(_[0-9a-f]{1,16})?")


def event_name(kind: str) -> str:
    """``job.ended`` of job_ended: what the outside calls a kind of event."""
    return kind.replace("_", ".")


def event_kind(name: str) -> str:
    """The other way round."""
    return name.replace(".", "_")


def shown_secret(secret: bytes) -> str:
    """A secret as its receiver keeps it."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def message_id(event: int, created: datetime) -> str:
    """The name of an event, the same at each try; the time keeps it apart from others where a backup was restored."""
    return f"msg_{event}_{int(created.timestamp() * 1e6):x}"


def event_of(message: str) -> int | None:
    """The event that a message id names; None where it is no such id."""
    found = _MESSAGE_ID.fullmatch(message)
    return int(found[1]) if found else None


def message(due: DueDelivery) -> bytes:
    """The body: what happened, when, and what about."""
    return body_of(due.kind, due.created, {"job": None if due.job is None else str(due.job), **_data(due)})


def body_of(kind: str, created: datetime, data: Mapping[str, Any]) -> bytes:
    told = {
        "type": event_name(kind),
        "timestamp": created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "data": data,
    }
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()


def _data(due: DueDelivery) -> Mapping[str, Any]:
    told = due.body
    match due.kind:
        case "job_ended":
            cells = {name: told[f"cells_{name}"] for name in ("ok", "error", "skipped")}
            matched = {name: told[name] for name in ("rows_matched",) if name in told}
            total = told["n_rows"] * told["n_tasks"]
            return {
                "state": told["state"],
                "rows": told["n_rows"],
                "cells": {"total": total, **cells},
                **matched,
            }
        case "row_matched":
            return {"condition": due.notify_when, **told}
        case _:
            return told


def signed_headers(secret: bytes, message: str, now_s: float, body: bytes) -> dict[str, str]:
    """The three headers that name, date and prove a message."""
    at = str(int(now_s))
    digest = hmac.digest(secret, f"{message}.{at}.".encode() + body, hashlib.sha256)
    return {
        "webhook-id": message,
        "webhook-timestamp": at,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }
