"""Refusals: every error as the body and status that docs/http.md promises, and nothing more."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from motet.errors import (
    Conflict,
    Gone,
    InvalidJob,
    Late,
    MotetError,
    NotFound,
    Overloaded,
    Problem,
    Unauthorized,
)
from motet.messages.refusals import ErrorRecord
from motet.protocol.transport import TransportLost
from motet.tasks import short
from scheduler.store.database import StoreUnavailable

#: Errors that have an answer of their own; anything else is ours, and told to the log.
EXPECTED = (MotetError, StoreUnavailable, TransportLost, RequestValidationError, HTTPException)

#: When to come back where nobody knows when it will be better.
RETRY_AFTER_S = 2.0


class Forbidden(Unauthorized):
    """The token is good, but not for this."""


class TooLarge(InvalidJob):
    """More bytes than one request may bring."""

    def __init__(self, what: str, limit: int, remedy: str = "send it in smaller parts") -> None:
        super().__init__(Problem(what, f"more than {limit:,} bytes", f"at most {limit:,} bytes", remedy))


class Unavailable(MotetError):
    """Something that the API stands on does not answer now."""


class CutOff(Exception):
    """An answer that has begun cannot be finished; its connection is cut, so that nobody takes it for whole."""


def refusal(error: Exception) -> JSONResponse:
    """The answer to a request that met this error."""
    status, headers = 500, dict[str, str]()
    match error:
        case Forbidden():
            status = 403
        case Unauthorized():
            status, headers = 401, {"WWW-Authenticate": "Bearer"}
        case Gone():
            status = 410
        case NotFound():
            status = 404
        case Conflict():
            status = 409
        case TooLarge():
            status = 413
        case InvalidJob() | RequestValidationError():
            status = 422
        case Overloaded():
            status = 429
        case Late():
            # Nothing was stored: come back. Else the rows go on, and a gateway would say the same.
            status = 504 if error.stored else 503
        case StoreUnavailable() | TransportLost() | Unavailable():
            status = 503
        case HTTPException():
            status, headers = error.status_code, dict(error.headers or {})
    told = error_of(error)
    if told.retry_after_s is not None:
        headers["Retry-After"] = str(told.retry_after_s)
    return JSONResponse({"error": told.to_json(sparse=True)}, status, headers)


def error_of(error: Exception) -> ErrorRecord:
    """An error as its answer tells it. What is not known tells nothing."""
    return replace(_record(error), retry_after_s=_retry_after_s(error))


def _retry_after_s(error: Exception) -> int | None:
    """Whole seconds after which to come back; None: that would not help."""
    match error:
        case Overloaded():
            return max(1, ceil(error.retry_after_s))
        case Late(stored=False) | StoreUnavailable() | TransportLost() | Unavailable():
            return ceil(RETRY_AFTER_S)
        case _:
            return None


def _record(error: Exception) -> ErrorRecord:
    match error:
        case Forbidden():
            return _told("forbidden", str(error))
        case Unauthorized():
            return _told("unauthorized", str(error))
        case Gone():
            return _told("gone", str(error), first_row=error.first_row)
        case NotFound():
            return _told("not_found", str(error))
        case Conflict():
            return _told("conflict", str(error), next_part=error.next_part)
        case InvalidJob():
            kind = "too_large" if isinstance(error, TooLarge) else "invalid_job"
            return _told(kind, str(error), problems=error.problems, more=error.more or None)
        case Overloaded():
            return _told("overloaded", str(error))
        case Late():
            return _told("late", str(error), row=error.row, stored=error.stored)
        case StoreUnavailable():
            return _told("unavailable", "the database does not answer; nothing is lost, try again")
        case TransportLost():
            return _told("unavailable", "Redis does not answer; nothing is lost, try again")
        case Unavailable():
            return _told("unavailable", str(error))
        case RequestValidationError():
            return _record(InvalidJob.first([_problem(e) for e in error.errors()]))
        case HTTPException():
            return _told(*_ROUTER.get(error.status_code, ("invalid_job", "the request cannot be read")))
        case _:
            return _told("internal", "the server failed; its log says more under this request's id")


#: What the router itself refuses: no such route, or not with this method.
_ROUTER = {
    404: ("not_found", "no such route; docs/http.md and /docs list them"),
    405: ("method_not_allowed", "this route does not know this method"),
}


def _told(kind: str, message: str, **more: Any) -> ErrorRecord:
    return ErrorRecord(type=kind, message=message.encode("utf-8", "backslashreplace").decode(), **more)


def _problem(error: dict[str, Any]) -> Problem:
    """A parameter that does not fit, in our words: the value itself is not repeated in full."""
    place = [str(part) for part in error.get("loc", ())]
    return Problem(
        ".".join(place[1:]) or ".".join(place) or "request",
        short(error.get("input", "nothing")),
        str(error.get("msg", "another value")).lower(),
        "see docs/http.md",
    )
