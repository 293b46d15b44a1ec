"""The API: FastAPI over the store, closed by default, and the server that runs it.

One process holds no state that another could miss: any number of them may stand behind one address.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import FrameType

import uvicorn
from fastapi import Depends, FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motet.protocol.settings import Settings
from scheduler.api import (
    activity,
    aliases,
    asks,
    blobs,
    cluster,
    doctor,
    explain,
    fits,
    jobs,
    line,
    media,
    metrics,
    models,
    opening,
    parts,
    planning,
    results,
    tokens,
    webhooks,
)
from scheduler.api.auth import ASK, authenticate, is_page
from scheduler.api.openai.app import ONLINE, PREFIX, OpenAIDoors
from scheduler.api.openai.batch_work import BATCHES_AT_ONCE, BatchWorker
from scheduler.api.refusals import EXPECTED, CutOff, refusal
from scheduler.api.resources import Resources
from scheduler.pulse import pulse
from scheduler.webhooks.deliverer import Deliverer

log = logging.getLogger(__name__)

_DESCRIPTION = """Submit rows × tasks as one job, stream merged rows while it runs.
Every route but `/healthz`, `/readyz` and this description needs `Authorization: Bearer <id>.<secret>`."""


#: Probes ask every few seconds, callers of open jobs hundreds of times a second: a line for each would hide all others.
_NO_NEWS = frozenset({"/healthz", "/readyz", "/metrics", ASK, *(PREFIX + path for path in ONLINE)})
#: In the order of the API's description.
_ROUTES = (
    opening, parts, asks, jobs, planning, activity, explain, results, fits, models, aliases, blobs, media, tokens, webhooks, cluster, doctor,
    metrics,
)  # fmt: skip


def create_app(settings: Settings) -> FastAPI:
    """The application. Needs ``database_url`` and ``blob_dir``; connects to nothing until it is asked."""
    use = Resources.of(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        listening = asyncio.create_task(use.bell.run())
        sweeping = asyncio.create_task(blobs.keep_swept(use))
        counting = asyncio.create_task(use.feeds.meter.keep_told())
        deliverer = Deliverer(use.database, settings, heard=app.state.figures.deliveries.saw)
        delivering = asyncio.create_task(deliverer.run())
        batching = [asyncio.create_task(BatchWorker(use).run()) for _ in range(BATCHES_AT_ONCE)]
        try:
            yield
        finally:
            use.bell.stop()
            for task in (listening, sweeping, counting, delivering, *batching):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            use.close()

    app = FastAPI(
        title="motet",
        version="0.1.0",
        description=_DESCRIPTION,
        lifespan=lifespan,
        # Of every route, also of one that somebody adds here; those of modules have it from `Routes`.
        dependencies=[Depends(authenticate)],
        redoc_url=None,
        # A path is right or wrong: a redirect would be built from a header that the client wrote.
        redirect_slashes=False,
    )
    app.state.resources = use
    for module in _ROUTES:
        # As they are: `include_router` would read every handler anew for each application, most of a second.
        app.router.routes += module.routes.routes
    for kind in EXPECTED:
        app.add_exception_handler(kind, _refuse)
    app.state.figures = metrics.Figures(use)
    app.add_middleware(asks.AsksAhead, use=use)
    app.add_middleware(OpenAIDoors, use=use)
    app.add_middleware(line.RequestBound)
    app.add_middleware(AccessLog, requests=app.state.figures.requests)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    return activity.refused(error) if is_page(request) else refusal(error)


class AccessLog:
    """One log line per request, with an id that the answer carries too; the last to catch what nobody expected."""

    def __init__(self, app: ASGIApp, requests: metrics.Requests) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex[:16]
        start = time.monotonic()
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            status = status or 499
        except CutOff as why:
            log.warning("answer cut off", extra={"request": request_id, "why": str(why)})
            # Without the end of the body: the server then closes the connection.
        except Exception as error:
            log.error("request failed", exc_info=error, extra={"request": request_id})
            if status:
                # The answer has begun: cutting it off is the only way left to say that it is not whole.
                raise ConnectionAbortedError from None
            await refusal(error)(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "-")
            took_s = time.monotonic() - start
            self._requests.saw(scope["method"], route, status, took_s)
            level = logging.DEBUG if route in _NO_NEWS else logging.INFO
            if log.isEnabledFor(level):
                log.log(
                    level,
                    "request",
                    extra={
                        "request": request_id,
                        "method": scope["method"],
                        # The route, not the path: a path may hold anything, and a query is nobody's business here.
                        "route": route,
                        "status": status,
                        "ms": round(took_s * 1000, 1),
                        "tenant": scope.get("state", {}).get("tenant"),
                    },
                )


class Server(uvicorn.Server):
    """Sends those home who wait for news, so that a shutdown does not wait for them."""

    def __init__(self, config: uvicorn.Config, use: Resources) -> None:
        super().__init__(config)
        self.use = use

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.use.bell.stop()
        super().handle_exit(sig, frame)


def server(settings: Settings) -> Server:
    """The server, not yet running: limits that protect it, and none of its own logs of what was asked."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        server_header=False,
        # Whoever stands in front of us may lie about who asked; nothing here depends on it.
        proxy_headers=False,
        # Connections and requests have bounds of their own (line.py), which are told with a time to come back.
        limit_concurrency=None,
        timeout_keep_alive=line.KEEP_ALIVE_S,
        timeout_graceful_shutdown=10,
        # Not httptools: it sets no limit to a request's head, and sends chunks to a proxy that speaks HTTP/1.0.
        http=line.Line,
        h11_max_incomplete_event_size=64 * 1024,
        loop="uvloop",
        callback_notify=_pulse(settings),
        timeout_notify=1,
    )
    # Its lines would hold queries; ours (AccessLog) hold routes.
    logging.getLogger("uvicorn.access").disabled = True
    return Server(config, app.state.resources)


def _pulse(settings: Settings) -> Callable[[], Awaitable[None]]:
    """Called once a second by the loop that serves: where that hangs, so does this."""
    beat = pulse(settings.pulse)

    async def tell() -> None:
        beat()

    return tell


def serve(settings: Settings) -> None:
    """Run the API until SIGTERM or SIGINT; requests under way are finished first."""
    line.allow_open_files()
    # uvicorn raises the signal again when it has served to the end: to end when asked is no failure, so the code is 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    server(settings).run()
