"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``.

Their SDK tries 408, 409, 429 and 5xx again, so whatever no second try would mend is a 400, 403, 404 or 413.
"""

from __future__ import annotations

from math import ceil

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from motet.errors import Conflict, InvalidJob, Late, MotetError, NotFound, Overloaded, Unauthorized
from motet.protocol.transport import TransportLost
from scheduler.api.refusals import RETRY_AFTER_S, Forbidden, TooLarge, Unavailable
from scheduler.store.database import StoreUnavailable

WRONG = "invalid_request_error"
_SERVER = "server_error"


class DoorError(MotetError):
    """A refusal in OpenAI's words. ``status``: of the answer; in a batch, of the line's."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    @property
    def type(self) -> str:
        return WRONG if self.status < 500 else _SERVER

    def body(self) -> dict[str, str | None]:
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


def as_door_error(error: Exception) -> DoorError:
    """Any error in their words. What is not known tells nothing."""
    match error:
        case DoorError():
            return error
        case Forbidden():
            return DoorError(str(error), code="insufficient_permissions", status=403)
        case Unauthorized():
            return DoorError(str(error), code="invalid_api_key", status=401)
        case NotFound():
            return DoorError(str(error), code="not_found", status=404)
        case Conflict():
            return DoorError(str(error), code="conflict")
        case TooLarge():
            return DoorError(str(error), code="too_large", status=413)
        case InvalidJob():
            where = error.problems[0].field if error.problems else None
            return DoorError(str(error), param=where)
        case RequestValidationError():
            return DoorError("the request cannot be read")
        case Overloaded():
            return DoorError(str(error), code="rate_limit_exceeded", status=429)
        case Late():
            status = 504 if error.stored else 503
            return DoorError(str(error), code="timeout", status=status)
        case StoreUnavailable() | TransportLost() | Unavailable():
            return DoorError(
                "a store does not answer; nothing is lost, try again", code="unavailable", status=503
            )
        case HTTPException():
            return DoorError("the request cannot be read", status=error.status_code)
        case _:
            return DoorError(
                "the server failed; its log says more under this request's id", code="internal", status=500
            )


def door_refusal(error: Exception) -> JSONResponse:
    """The answer to a request that met this error."""
    told, headers = as_door_error(error), dict[str, str]()
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(max(1, ceil(error.retry_after_s)))}
    elif told.status in (429, 503):
        headers = {"Retry-After": str(ceil(RETRY_AFTER_S))}
    elif told.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    body = told.body()
    body["message"] = (body["message"] or "").encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": body}, told.status, headers)
