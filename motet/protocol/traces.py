"""Where a job spends its time: OpenTelemetry spans from submit to seal, sent by OTLP over HTTP. Off by default.

A trace's id is the job's UUID, and the ids of the spans that others hang from are digests of what they are about.
So no context travels in messages: each process adds its own spans, and they fit together.

    job                      from created to finished; sent by whoever ends the job
    ├─ submit                from created to closed
    │  ├─ plan               tasks to passes
    │  └─ land               one part of the rows
    ├─ send                  lease and publish one sub-task
    │  └─ execute            on the worker, from fetch to the outcome on the stream
    ├─ record                one transaction of the aggregator, as far as it concerns the job
    └─ seal                  merge one (block, pass)

Attributes are ids, names of machines and models, and counts; never a text. Times are each process' own clock, but
for ``job`` and ``submit``, which are the database's. While it is off nothing is imported and nothing is kept.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Protocol
from urllib.parse import urlsplit
from uuid import UUID

from motet.errors import SetupError
from motet.protocol.logs import event
from motet.protocol.spans import JOB as JOB
from motet.protocol.spans import SEND as SEND
from motet.protocol.spans import SUBMIT as SUBMIT
from motet.protocol.spans import Attribute, TraceSpan

log = logging.getLogger(__name__)

Moment = datetime | float


class Sender(Protocol):
    """Takes spans without ever waiting or raising."""

    def send(self, span: TraceSpan) -> None: ...

    def close(self) -> None:
        """Send what waits, for a short while."""
        ...


#: None: traces are off.
_sender: Sender | None = None
_held = threading.local()
_nothing: AbstractContextManager[None] = nullcontext()


def configure(process: str, endpoint: str, instance: str = "") -> None:
    """Send the spans of this process to ``endpoint``, an OTLP/HTTP receiver; leave them out where it is empty.

    ``instance``: which of several such processes this is. Raises SetupError for a URL that is none, and where the
    extra ``traces`` is not installed.
    """
    global _sender
    stop()
    if not endpoint:
        return
    endpoint = full_url(endpoint)
    try:
        from motet.protocol.otlp import OtlpSender
    except ImportError:
        raise SetupError(
            "MOTET_TRACES is set, but OpenTelemetry is not installed; run: pip install 'motet[traces]'"
        ) from None
    _sender = OtlpSender(process, endpoint, instance)
    atexit.register(stop)


def stop() -> None:
    """Send what waits, for a short while, and nothing from now on. Again is harmless."""
    global _sender
    sender, _sender = _sender, None
    if sender is not None:
        sender.close()


def span(job: UUID | str, name: str, **attributes: Attribute) -> AbstractContextManager[None]:
    """What is done inside this context was done for ``job``. Costs next to nothing where traces are off."""
    return _nothing if _sender is None else _timed(job, name, attributes)


def add(
    job: UUID | str, name: str, start: Moment, end: Moment | None = None, **attributes: Attribute
) -> None:
    """A span that began at ``start`` and ends at ``end``, or now. Floats are Unix seconds."""
    if _sender is not None:
        _record(job, name, _ns(start), time.time_ns() if end is None else _ns(end), attributes)


def together() -> AbstractContextManager[None]:
    """Spans told inside are sent when it ends without an error: what was rolled back did not happen."""
    return _nothing if _sender is None else _hold()


# -- while they are on


@contextmanager
def _timed(job: UUID | str, name: str, attributes: Mapping[str, Attribute]) -> Iterator[None]:
    start_ns, error = time.time_ns(), ""
    try:
        yield
    except BaseException as raised:
        # Its class alone: what it says may repeat a text.
        error = type(raised).__name__
        raise
    finally:
        _record(job, name, start_ns, time.time_ns(), attributes, error)


@contextmanager
def _hold() -> Iterator[None]:
    before: list[TraceSpan] | None = getattr(_held, "spans", None)
    spans: list[TraceSpan] = []
    _held.spans = spans
    try:
        yield
    finally:
        _held.spans = before
    for one in spans:
        _record(one.job, one.name, one.start_ns, one.end_ns, one.attributes, one.error)


def _record(
    job: UUID | str,
    name: str,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, Attribute],
    error: str = "",
) -> None:
    try:
        _pass_on(TraceSpan(UUID(str(job)), name, start_ns, end_ns, attributes, error))
    except Exception as trouble:  # noqa: BLE001 - whatever it is, no work may fail because somebody watches it
        event(log, "a span was lost", logging.WARNING, span=name, error=type(trouble).__name__)


def _pass_on(one: TraceSpan) -> None:
    spans: list[TraceSpan] | None = getattr(_held, "spans", None)
    if spans is not None:
        spans.append(one)
    elif (sender := _sender) is not None:
        sender.send(one)


def _ns(moment: Moment) -> int:
    return int((moment.timestamp() if isinstance(moment, datetime) else moment) * 1e9)


def full_url(endpoint: str) -> str:
    """The receiver's URL; its usual path where only the host is named."""
    try:
        url = urlsplit(endpoint)
    except ValueError:
        url = urlsplit("")
    if url.scheme not in ("http", "https") or not url.netloc:
        raise SetupError(
            f"MOTET_TRACES: got {endpoint!r}; expected the URL of an OTLP/HTTP receiver,"
            " such as http://127.0.0.1:4318/v1/traces"
        )
    return endpoint if url.path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
