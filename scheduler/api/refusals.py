"""Refusals: every error as the body and status that docs/http.md promises, and nothing more."""

from __future__ import annotations

from math import ceil
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from motet.errors import Conflict, InvalidJob, MotetError, NotFound, Overloaded, Problem, Unauthorized
from motet.protocol.transport import TransportLost
from motet.tasks import short
from scheduler.store.database import StoreUnavailable

#: When to come back where nobody knows when it will be better.
RETRY_AFTER_S = 2.0


class Forbidden(Unauthorized):
    """The token is good, but not for this."""


class TooLarge(InvalidJob):
    """More bytes than one request may bring."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(
            Problem(
                what, f"more than {limit:,} bytes", f"at most {limit:,} bytes", "send it in smaller parts"
            )
        )


class Unavailable(MotetError):
    """Something that the API stands on does not answer now."""


class CutOff(Exception):
    """An answer that has begun cannot be finished; its connection is cut, so that nobody takes it for whole."""


def refusal(error: Exception) -> JSONResponse:
    """The answer to a request that met this error. What is not known is a 500 that tells nothing."""
    match error:
        case Forbidden():
            return _answer(403, "forbidden", str(error))
        case Unauthorized():
            return _answer(401, "unauthorized", str(error), headers={"WWW-Authenticate": "Bearer"})
        case NotFound():
            return _answer(404, "not_found", str(error))
        case Conflict():
            where: dict[str, Any] = {} if error.next_part is None else {"next_part": error.next_part}
            return _answer(409, "conflict", str(error), **where)
        case InvalidJob():
            status, kind = (413, "too_large") if isinstance(error, TooLarge) else (422, "invalid_job")
            more: dict[str, Any] = {"more": error.more} if error.more else {}
            return _answer(status, kind, str(error), problems=[p.to_json() for p in error.problems], **more)
        case Overloaded():
            return _answer(429, "overloaded", str(error), headers=_come_back(error.retry_after_s))
        case StoreUnavailable():
            return _unavailable("the database does not answer; nothing is lost, try again")
        case TransportLost():
            return _unavailable("Redis does not answer; nothing is lost, try again")
        case Unavailable():
            return _unavailable(str(error))
        case RequestValidationError():
            return refusal(InvalidJob.first([_problem(e) for e in error.errors()]))
        case HTTPException():
            return _http(error)
        case _:
            return _answer(500, "internal", "the server failed; its log says more under this request's id")


def _answer(
    status: int, kind: str, message: str, headers: dict[str, str] | None = None, **more: Any
) -> JSONResponse:
    return JSONResponse({"error": {"type": kind, "message": _utf8(message), **more}}, status, headers)


def _unavailable(message: str) -> JSONResponse:
    return _answer(503, "unavailable", message, headers=_come_back(RETRY_AFTER_S))


def _come_back(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, ceil(seconds)))}


def _http(error: HTTPException) -> JSONResponse:
    """What the router itself refuses: no such route, or not with this method."""
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_job")
    message = {
        404: "no such route; docs/http.md and /docs list them",
        405: "this route does not know this method",
    }.get(error.status_code, "the request cannot be read")
    return _answer(error.status_code, kind, message, headers=dict(error.headers or {}))


def _problem(error: dict[str, Any]) -> Problem:
    """A parameter that does not fit, in our words: the value itself is not repeated in full."""
    place = [str(part) for part in error.get("loc", ())]
    return Problem(
        ".".join(place[1:]) or ".".join(place) or "request",
        short(error.get("input", "nothing")),
        str(error.get("msg", "another value")).lower(),
        "see docs/http.md",
    )


def _utf8(message: str) -> str:
    return message.encode("utf-8", "backslashreplace").decode()
