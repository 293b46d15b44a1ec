"""The client's sending of media: each once by content, before the rows that refer to it, several in a request.

The server says which ones it lacks; of two rows with one picture, and of an upload that broke off, nothing goes twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeAlias

import msgpack

from motet.errors import MotetError
from motet.http import BodyRefused, Http, json_of
from motet.media.medium import Medium
from motet.messages.media import MAX_DIGESTS, MediaQuery, MissingMedia

#: Bytes and media of one request. More: the server holds more of them at a time; fewer: more requests.
REQUEST_BYTES, REQUEST_MEDIA = 4 << 20, min(512, MAX_DIGESTS)
#: Bytes that wait to be sent, beyond which reading waits. More: memory of the client.
HELD_BYTES = 64 << 20
#: Digests remembered of what the server has. More: memory; fewer: it is asked again for a picture that rows repeat.
_KNOWN = 100_000
#: Seconds between two looks at what is waited for.
_GLANCE_S = 0.25


#: Sha256 -> a medium's bytes, and it in small where that is sent.
_Batch: TypeAlias = "dict[str, tuple[bytes, bytes | None]]"


@dataclass(slots=True)
class MediaSent:
    """What was sent of media so far."""

    #: Different ones that were asked for, and of them those that the server had.
    media: int = 0
    there: int = 0
    #: Bytes of those that were sent.
    bytes: int = 0


class MediaSender:
    """Takes media from threads that read, and sends them. ``flush`` returns when all of them are stored."""

    def __init__(self, http: Http, *, apart: bool, key: str | None = None) -> None:
        """``key``: Idempotency-Key of the job whose rows will follow, where there is one. ``apart``: send in a thread of its own, from ``begin`` on; else in ``flush``, for a process that may be forked."""
        self._http = http
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="motet-media-send") if apart else None
        self._headers = {} if key is None else {"Idempotency-Key": key}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waiting: _Batch = {}
        self._bytes = 0
        self._most_waiting = HELD_BYTES
        self._under_way: list[Future[None]] = []
        self._known: dict[str, None] = {}
        self._most_bytes = REQUEST_BYTES
        #: What is waited for, for the thread that draws the bar to tell.
        self.news: list[MotetError] = []
        self.sent = MediaSent()

    def add(self, medium: Medium, data: bytes, thumb: bytes | None = None) -> None:
        """Take one on, and it in small. Waits while too many are under way. Raises what kept others from being sent."""
        with self._lock:
            if medium.sha256 in self._known or medium.sha256 in self._waiting:
                return
            self._waiting[medium.sha256] = data, thumb
            self._bytes += len(data)
            if self._bytes < self._most_waiting or self._thread is None:
                return
            before = self._under_way[-1:]
        self._go(self._take())
        for one in before:
            one.result()

    def begin(self) -> None:
        """From now on send while others are read."""
        self._most_waiting = REQUEST_BYTES
        self._go(self._take())

    def flush(self, tell: Callable[[MotetError], object]) -> None:
        """Return when all that was taken on is stored. ``tell`` hears, in this thread, what is waited for.

        Raises InvalidJob, Overloaded, Unauthorized, Unreachable.
        """
        batch = self._take()
        if self._thread is None:
            self._send_all(batch)
        self._go(batch)
        while self._under_way:
            if wait(self._under_way[:1], _GLANCE_S).done:
                self._under_way.pop(0).result()
            while self.news:
                tell(self.news.pop(0))

    def close(self) -> None:
        """Send nothing more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> _Batch:
        with self._lock:
            batch, self._waiting, self._bytes = self._waiting, {}, 0
        return batch

    def _go(self, batch: _Batch) -> None:
        if batch and self._thread is not None:
            self._under_way.append(self._thread.submit(self._send_all, batch))

    def _send_all(self, batch: _Batch) -> None:
        while batch:
            digests = list(batch)[:REQUEST_MEDIA]
            some = {sha256: batch.pop(sha256) for sha256 in digests}
            missing = self._missing(digests)
            self.sent.media += len(some)
            self.sent.there += len(some) - len(missing)
            self._send({sha256: some[sha256] for sha256 in missing})
            with self._lock:
                self._known.update(dict.fromkeys(digests))
                while len(self._known) > _KNOWN:
                    del self._known[next(iter(self._known))]

    def _missing(self, digests: list[str]) -> list[str]:
        asked = MediaQuery(media=tuple(digests)).to_json()
        answer = self._request("/v1/media/missing", json.dumps(asked).encode(), "application/json")
        known = set(digests)
        return [sha256 for sha256 in MissingMedia.of(answer).missing if sha256 in known]

    def _send(self, media: _Batch) -> None:
        """In requests of some of them each, and of fewer where a proxy takes no large bodies."""
        left = list(media.values())
        while left:
            n = size = 0
            while n < len(left) and (not n or size + len(left[n][0]) <= self._most_bytes):
                size += len(left[n][0])
                n += 1
            try:
                whole, small = zip(*left[:n], strict=True)
                told = {"media": whole, "thumbs": small} if any(small) else {"media": whole}
                self._request("/v1/media", msgpack.packb(told), "application/msgpack")
            except BodyRefused as refusal:
                if n == 1:
                    raise
                if self._most_bytes == REQUEST_BYTES:
                    self.news.append(refusal)
                self._most_bytes = size // 2
            else:
                self.sent.bytes += size
                left = left[n:]

    def _request(self, path: str, body: bytes, kind: str) -> dict[str, object]:
        headers = {"Content-Type": kind, **self._headers}
        answer = self._http.request(
            "POST", path, content=body, headers=headers, stop=self._stop, refused=self.news.append
        )
        return json_of(answer)  # type: ignore[no-any-return]
