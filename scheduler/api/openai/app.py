"""The doors themselves: paths under ``/openai/v1``, who may use which, and every answer in OpenAI's form.

A table of their own, as closed as that of motet's routes: what is not in it is refused, and nothing is read of a request
before it is known whose it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from scheduler.api.auth import ASK_COSTS, SUBMITS, authenticated
from scheduler.api.openai import batches, files, naming, online
from scheduler.api.openai.refusals import DoorError, door_refusal
from scheduler.api.refusals import EXPECTED
from scheduler.api.resources import Resources

log = logging.getLogger(__name__)

#: What clients set as ``base_url``, behind the server's address.
PREFIX = "/openai/v1"

Handler = Callable[..., Awaitable[Response]]

#: (method, path) -> what answers it. All of it may be used by whoever submits jobs.
DOORS: dict[tuple[str, str], Handler] = {
    ("POST", "/files"): files.upload_file,
    ("GET", "/files"): files.list_files,
    ("GET", "/files/{file}"): files.show_file,
    ("DELETE", "/files/{file}"): files.delete_file,
    ("GET", "/files/{file}/content"): files.file_content,
    ("POST", "/batches"): batches.create_batch,
    ("GET", "/batches"): batches.list_batches,
    ("GET", "/batches/{batch}"): batches.show_batch,
    ("POST", "/batches/{batch}/cancel"): batches.cancel_batch,
    ("GET", "/models"): naming.list_models,
    ("GET", "/models/{model}"): naming.show_model,
    ("POST", "/chat/completions"): online.chat,
    ("POST", "/completions"): online.complete,
    ("POST", "/embeddings"): online.embed,
    ("POST", "/responses"): online.respond,
    ("POST", "/rerank"): online.rerank,
    ("POST", "/classify"): online.classify,
}
#: Those that are asked as often as open jobs are.
ONLINE = frozenset(path for (_, path), handler in DOORS.items() if handler.__module__ == online.__name__)
#: What may stand in a path: ids of ours, and names of models.
_PLACE = r"([A-Za-z0-9_.@-]{1,200})"
_PATHS = {
    path: re.compile(re.sub(r"\\{\w+\\}", _PLACE, re.escape(path))) for path in {path for _, path in DOORS}
}


class OpenAIDoors:
    """Answers what is asked under PREFIX; all else goes on."""

    def __init__(self, app: ASGIApp, use: Resources) -> None:
        self._app, self._use = app, use

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(f"{PREFIX}/"):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except EXPECTED as error:
            response = door_refusal(error)
        except ClientDisconnect:
            raise
        except Exception as error:
            log.error("request failed", exc_info=error)
            response = door_refusal(error)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        # Some clients put a slash behind every path.
        asked = request.scope["path"].removeprefix(PREFIX).rstrip("/")
        path, places = _found(asked)
        # What log and metrics know it by.
        request.scope["route"] = SimpleNamespace(path=f"{PREFIX}{path}" if path else "-")
        caller = await authenticated(request, self._use, SUBMITS, ASK_COSTS if path in ONLINE else 1.0)
        handler = DOORS.get((request.method, path))
        if handler is None:
            if path:
                raise DoorError("this path does not know this method", code="method_not_allowed", status=405)
            raise DoorError("no such path; docs/openai.md lists them", code="not_found", status=404)
        return await handler(request, self._use, caller, *places)


def _found(asked: str) -> tuple[str, tuple[Any, ...]]:
    """The path of the table, and what stands in its places; "" where there is none."""
    for path, form in _PATHS.items():
        if (found := form.fullmatch(asked)) is not None:
            return path, found.groups()
    return "", ()
