"""A tiny receiver of traces over OTLP/HTTP, which keeps what it gets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATH = "/v1/traces"


@dataclass
class Receiver:
    """Where it listens, and (path, body) of each request."""

    url: str = ""
    requests: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def bodies(self) -> list[bytes]:
        return [body for _, body in self.requests]

    def spans(self) -> list[tuple[str, object]]:
        """(service, span) of everything received so far where traces belong."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found: list[tuple[str, object]] = []
        for body in [body for path, body in self.requests if path == PATH]:
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                about = {a.key: a.value.string_value for a in resource.resource.attributes}
                found += [(about["service.name"], s) for scope in resource.scope_spans for s in scope.spans]
        return found


@contextmanager
def receiving() -> Iterator[Receiver]:
    received = Receiver()

    class Take(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.requests.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Take)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    received.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield received
    server.shutdown()
    server.server_close()
