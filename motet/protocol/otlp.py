"""Sends spans by OTLP over HTTP, with OpenTelemetry's own exporter. Imported only where traces are on.

Nobody waits for it: spans stand in a bounded queue, a thread of OpenTelemetry's sends them in batches, and what
the receiver does not take in time is dropped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags

from motet.protocol.logs import event
from motet.protocol.spans import TraceSpan

log = logging.getLogger(__name__)

#: Seconds that one export may take, tries included, and that the end of a process may wait for the last one.
EXPORT_S, END_S = 5.0, 2.0
#: Spans that wait to be sent; the oldest of more are dropped.
WAITING = 4096
#: Seconds between two exports.
EVERY_S = 1.0

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class OtlpSender:
    """Sends the spans of one process."""

    def __init__(self, process: str, endpoint: str, instance: str) -> None:
        # It would log a stack trace for each batch that is not taken; we say it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = _Telling(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S))
        self._ids = _Ids()
        where = {"service.instance.id": instance} if instance else {}
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": f"motet-{process}"} | where),
            id_generator=self._ids,
            # All spans of a job or none: a share of each job would be no trace.
            sampler=ALWAYS_ON,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, max_queue_size=WAITING, schedule_delay_millis=EVERY_S * 1000)
        )
        self._tracer = self._provider.get_tracer("motet")

    def send(self, span: TraceSpan) -> None:
        """Queue a span."""
        self._ids.next(span)
        context = trace.set_span_in_context(trace.INVALID_SPAN)
        if span.parent is not None:
            parent = SpanContext(span.job.int, span.parent, is_remote=True, trace_flags=_SAMPLED)
            context = trace.set_span_in_context(NonRecordingSpan(parent))
        attributes = {
            f"motet.{name}": value if isinstance(value, (int, float)) else str(value)[:100]
            for name, value in span.attributes.items()
        }
        sent = self._tracer.start_span(
            span.name, context, attributes=attributes | {"motet.job": str(span.job)}, start_time=span.start_ns
        )
        if span.error:
            sent.set_status(Status(StatusCode.ERROR, span.error))
        sent.end(span.end_ns)

    def close(self) -> None:
        """Send what waits, within END_S."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(END_S)
        # Ends the tries of an export that is still under way.
        self._exporter.shutdown()


class _Ids(IdGenerator):
    """The ids that the next span of this thread is to have."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self._given = threading.local()

    def next(self, span: TraceSpan) -> None:
        self._given.trace = span.job.int
        self._given.span = span.id or self._random.generate_span_id()

    def generate_trace_id(self) -> int:
        return int(self._given.trace)

    def generate_span_id(self) -> int:
        return int(self._given.span)


class _Telling(SpanExporter):
    """Says once that the receiver takes nothing, and once that it does again."""

    def __init__(self, exporter: OTLPSpanExporter) -> None:
        self._exporter = exporter
        self._lost = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        lost = result is not SpanExportResult.SUCCESS
        if lost != self._lost:
            event(log, "traces are lost" if lost else "traces are taken again", logging.WARNING)
        self._lost = lost
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
