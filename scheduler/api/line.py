"""Lines: the connections of the API's server. Thousands may be idle, and none of them may be to the others' harm."""

from __future__ import annotations

import asyncio
import resource
from functools import cache

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from scheduler.api.auth import ASK
from scheduler.api.refusals import Unavailable, refusal

#: Connections of one process at most. An idle one costs about 7 kB: more cost memory, fewer refuse callers that wait.
MAX_CONNECTIONS = 16_000
#: Open files that a process keeps for other things than connections: Postgres, Redis, blobs.
SPARE_FILES = 512
#: Requests under way in one process at most. More cost memory (about 30 kB each, and what they bring along); fewer refuse
#: callers that an open job has room for (policy/gather.py).
MAX_UNDER_WAY = 4_096
#: Seconds for which a connection may be without a request, or with the head of one half sent. Longer than proxies keep
#: theirs, which would else use one that was just closed; shorter: callers that ask now and then connect again each time.
KEEP_ALIVE_S = 75
#: Seconds in which who is sent something must read some of it: an answer to an ask, or anything else. Longer: those who
#: never read hold memory and a place; shorter: a stream of results is cut off whose reader pauses.
_READS_ASK_S, _READS_S = 60.0, 600.0
#: Seconds in which the last bytes must be read of a connection that is closed.
_LAST_READ_S = 30.0
#: What supervisors ask, who would restart a server that is merely busy.
_PROBES = frozenset({"/healthz", "/readyz"})
_ASK_ENDS = ASK.rpartition("}")[2]
_FULL = "too many requests are under way in this server; come back in a moment"
_REFUSED = refusal(Unavailable("too many connections to this server; come back in a moment"))


def allow_open_files() -> None:
    """Let this process open as many files as it may: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@cache
def most_connections() -> int:
    """As many as fit beside the other open files of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft < 0 else max(64, min(MAX_CONNECTIONS, soft - SPARE_FILES))


class Line(H11Protocol):
    """One connection."""

    _stalled: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refused = len(self.connections) > most_connections()
        # Who never sends a whole request has this long, as one that was answered has for the next.
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        if self._refused:
            # Now and not at once: whoever has not asked yet might not look for an answer.
            self.transport.write(_written(_REFUSED.status_code, _REFUSED.raw_headers, bytes(_REFUSED.body)))
            self._close()
            return
        waiting, before = self.timeout_keep_alive_task, self.cycle
        # Taken away, since any byte would stop it: it runs on until there is a request.
        self.timeout_keep_alive_task = None
        super().data_received(data)
        if waiting is not None and self.cycle is before:
            self.timeout_keep_alive_task = waiting
        elif waiting is not None:
            waiting.cancel()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._close()

    def _close(self) -> None:
        self.transport.close()
        # What is left to send may never be read.
        self._stop_waiting()
        self._stalled = self.loop.call_later(_LAST_READ_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_waiting()
        asked = self.scope is not None and self.scope["path"].endswith(_ASK_ENDS)
        self._stalled = self.loop.call_later(_READS_ASK_S if asked else _READS_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_waiting()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)
        # Whatever ended it: a timer would keep the connection's memory.
        self._unset_keepalive_if_required()

    def _stop_waiting(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def _written(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    """An answer as bytes, the last of its connection."""
    head = b"".join(b"%s: %s\r\n" % header for header in headers)
    return b"HTTP/1.1 %d Service Unavailable\r\n%sconnection: close\r\n\r\n%s" % (status, head, body)


class RequestBound:
    """Refuses requests beyond ``MAX_UNDER_WAY``: each is known to wait for something, and has its memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        if self._requests >= MAX_UNDER_WAY:
            await refusal(Unavailable(_FULL))(scope, receive, send)
            return
        self._requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests -= 1
