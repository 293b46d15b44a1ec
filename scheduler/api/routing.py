"""How routes are declared: a handler returns a message, whose declaration describes the answer and writes it."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from enum import Enum
from functools import cache, wraps
from inspect import cleandoc
from typing import Any, TypeVar, get_type_hints

from fastapi import APIRouter, Depends, Request
from pydantic import TypeAdapter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from motet.messages.message import ApiMessage
from motet.messages.refusals import ErrorBody
from scheduler.api.auth import ALLOWED, authenticate
from scheduler.api.bodies import SMALL_BYTES, clean_object, json_body, taken, whole_body
from scheduler.api.resources import Use

M = TypeVar("M", bound=ApiMessage)

_ERRORS = {
    401: "No token, or one that is wrong, expired or revoked.",
    403: "The token's scope does not allow this.",
    404: "It does not exist, or belongs to another tenant.",
    409: "It does not fit the present state.",
    413: "Too many bytes.",
    422: "The request is wrong; `problems` says where.",
    429: "Too much is under way; come back after `Retry-After` seconds.",
    503: "Postgres or Redis does not answer; come back after `Retry-After` seconds.",
}


#: What FastAPI says of an answer that nobody describes.
_UNSAID = "Successful Response"
#: Arguments of a handler that are no part of the request.
_NOT_ASKED = {"use", "caller", "request", "return"}


class Routes(APIRouter):
    """A router whose handlers may return messages. Each is written in the thread that made it, without a second check;
    it is described by its own words, and so are the errors that the route may give. Each asks who calls (auth.py), also
    one that somebody adds and forgets to think about."""

    def __init__(self, tags: list[str | Enum] | None = None) -> None:
        super().__init__(tags=tags, dependencies=[Depends(authenticate)])

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        hints = get_type_hints(endpoint)
        message = options.get("response_model")
        if isinstance(hints["return"], type) and issubclass(hints["return"], ApiMessage):
            message = options["response_model"] = hints["return"]
            endpoint = _replying(endpoint, options.get("status_code") or 200)
        if isinstance(message, type) and options.get("response_description", _UNSAID) == _UNSAID:
            options["response_description"] = cleandoc(message.__doc__ or "")
        methods = options["methods"] or ["GET"]
        errors = _errors(path, methods[0], asks=bool(hints.keys() - _NOT_ASKED))
        options["responses"] = {**errors, **(options["responses"] or {})}
        super().add_api_route(path, endpoint, **options)


def _errors(path: str, method: str, *, asks: bool) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of a route: the errors that it may give. ``asks``: its address may be wrong."""
    codes = {503}
    if "anyone" not in ALLOWED[method, path]:
        codes |= {401, 403, 429}
    if "{" in path:
        codes |= {404}
    if asks:
        codes |= {422}
    if method in ("POST", "PUT"):
        codes |= {409, 413, 422}
    return {code: {"model": ErrorBody, "description": _ERRORS[code]} for code in sorted(codes)}


def _replying(handler: Callable[..., Any], status: int) -> Callable[..., Any]:
    @wraps(handler)
    def here(*args: Any, **named: Any) -> Response:
        return reply(handler(*args, **named), status)

    @wraps(handler)
    async def later(*args: Any, **named: Any) -> Response:
        return reply(await handler(*args, **named), status)

    return later if inspect.iscoroutinefunction(handler) else here


def reply(message: ApiMessage, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A message as an answer."""
    return Response(
        _adapter(type(message)).dump_json(message, by_alias=True), status, headers, "application/json"
    )


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def takes(message: type[ApiMessage], example: Mapping[str, Any]) -> dict[str, Any]:
    """``openapi_extra=`` of a route whose body is a message."""
    schema = TypeAdapter(message).json_schema()
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "description": schema["description"], "content": content}}


def takes_bytes(says: str, **forms: str) -> dict[str, Any]:
    """``openapi_extra=`` of a route that reads its own body: what each type of content holds."""
    content = {
        f"application/{name.replace('_', '-')}": {"schema": {"type": "string", "format": kind}}
        for name, kind in forms.items()
    }
    return {"requestBody": {"required": True, "description": says, "content": content}}


def gives_bytes(says: str, *types: str) -> dict[str, Any]:
    """What ``responses=`` says of an answer that is no JSON."""
    return {
        "description": says,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in types},
    }


def body(message: type[M], *, newer: bool = False) -> Any:
    """The body of a request as a message: ``Annotated[M, body(M)]``. ``newer``: fields that are not known are passed
    over, for senders that may be newer than this server."""

    async def read(request: Request, use: Use) -> AsyncIterator[M]:
        async with whole_body(request, use, SMALL_BYTES) as raw:
            yield await run_in_threadpool(lambda: taken(message, clean_object(json_body(raw)), newer=newer))

    return Depends(read)
