"""Media of sub-tasks: fetched by digest from the API under the sub-task's lease, before its rows are prepared.

While a sub-task waits for its turn its pictures come, so the device waits for none. What was fetched is kept for a while:
the passes of other models, clones and rows that run again read the same ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgpack
from cachetools import LRUCache

from motet.errors import MotetError
from motet.http import Address, Http
from motet.media.medium import Medium
from motet.protocol.columns import CellError
from motet.protocol.logs import event
from motet.protocol.values import Value
from motet.protocol.wire import LEASE_HEADER, Assignment

log = logging.getLogger(__name__)

#: Bytes of media that are kept when their sub-task is over. More: memory; fewer: what several passes read is fetched for
#: each of them.
KEPT_BYTES = 64 << 20
#: Media asked for at once: the API answers with as many of them as fit.
AT_ONCE = 256
#: Seconds for which a request is tried while the API is away. Longer: rows wait that another worker could run; shorter:
#: an API that restarts costs rows one of their tries.
PATIENCE_S = 20.0

LOST = CellError("lost_medium", "the picture could not be fetched", retriable=True)


class MediaSource(Protocol):
    """Where media come from."""

    def some(self, sha256s: Sequence[str], lease: str) -> Mapping[str, bytes]:
        """The bytes of the first of these, at least of one; none: there is no more of them. Raises MotetError."""
        ...


class HttpMedia:
    """The API's ``POST /v1/media/fetch``."""

    def __init__(self, url: str, token: str) -> None:
        self._http = Http(Address(url=url.rstrip("/"), token=token), timeout_s=PATIENCE_S)

    def some(self, sha256s: Sequence[str], lease: str) -> Mapping[str, bytes]:
        answer = self._http.request(
            "POST",
            "/v1/media/fetch",
            content=json.dumps({"media": list(sha256s)}).encode(),
            headers={"Content-Type": "application/json", LEASE_HEADER: lease},
        )
        try:
            told = msgpack.unpackb(answer.content)
            return {str(sha256): bytes(data) for sha256, data in told["media"].items()}
        except Exception as error:  # noqa: BLE001 - whatever a proxy sent in its place
            raise MotetError(f"an answer without media: {type(error).__name__}") from None


class Media:
    """Fetches, verifies and keeps. Any thread may call it."""

    def __init__(
        self,
        source: MediaSource,
        *,
        kept_bytes: int = KEPT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._clock = source, clock
        self._lock = threading.Lock()
        #: (tenant, sha256) -> bytes.
        self._kept: LRUCache[tuple[str, str], bytes] = LRUCache(kept_bytes, len)

    def of(self, order: Assignment, wanted: Callable[[], bool]) -> Mapping[str, bytes]:
        """Sha256 -> bytes of the media that its rows refer to, as far as they could be had. Raises nothing.

        ``wanted``: whether somebody waits for the attempt still.
        """
        digests = list(dict.fromkeys(one.sha256 for value in order.values for one in _media_in(value)))
        if not digests:
            return {}
        began = self._clock()
        found = self._known(order.tenant, digests)
        left = [sha256 for sha256 in digests if sha256 not in found]
        fetched, lease = len(left), order.lease
        while left and wanted():
            asked = left[:AT_ONCE]
            try:
                some = self._source.some(asked, lease)
            except MotetError as error:
                event(log, "media not fetched", logging.WARNING, **_ids(order), error=type(error).__name__)
                break
            good = {s: some[s] for s in asked if s in some and hashlib.sha256(some[s]).hexdigest() == s}
            self._keep(order.tenant, good)
            found |= good
            # What is missing now is missing for good: this attempt's rows of it are lost.
            left = [s for s in asked if s not in some] * bool(some) + left[AT_ONCE:]
        event(
            log,
            "media fetched",
            logging.DEBUG,
            **_ids(order),
            media=fetched,
            kept=len(digests) - fetched,
            lost=len(digests) - len(found),
            seconds=round(self._clock() - began, 3),
        )
        return found

    def _known(self, tenant: str, digests: Sequence[str]) -> dict[str, bytes]:
        with self._lock:
            held = {sha256: self._kept.get((tenant, sha256)) for sha256 in digests}
        return {sha256: data for sha256, data in held.items() if data is not None}

    def _keep(self, tenant: str, new: Mapping[str, bytes]) -> None:
        with self._lock:
            for sha256, data in new.items():
                if len(data) <= self._kept.maxsize:
                    self._kept[tenant, sha256] = data


def given(values: Sequence[Value], media: Mapping[str, bytes]) -> list[Any]:
    """The values as an engine gets them: each medium as its bytes, or LOST in the place of a row whose medium is."""
    return [_given(value, media) for value in values]


def _given(value: Value, media: Mapping[str, bytes]) -> Any:
    if type(value) is Medium:
        return media.get(value.sha256, LOST)
    if type(value) is dict:
        inside = {name: _given(one, media) if type(one) is Medium else one for name, one in value.items()}
        return LOST if any(one is LOST for one in inside.values()) else inside
    return value


def _media_in(value: Value) -> Iterator[Medium]:
    if type(value) is Medium:
        yield value
    elif type(value) is dict:  # what a function reads of several fields
        yield from (one for one in value.values() if type(one) is Medium)


def _ids(order: Assignment) -> dict[str, int]:
    return {"subtask": order.subtask, "attempt": order.attempt}
