"""A small reverse proxy before a real API, with the habits of those that stand before real ones. For tests."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

#: What nginx says with its own refusals.
PAGE = (
    "<html>\r\n<head><title>{0}</title></head>\r\n<body><center><h1>{0}</h1></center>\r\n<hr>nginx\r\n</html>"
)
#: Headers of one connection alone.
_HOP = frozenset({"connection", "transfer-encoding", "keep-alive", "content-length"})


@dataclass
class Proxy:
    """Its limits, which a test may change, and what it saw."""

    url: str = ""
    #: Bodies that are larger are refused with 413 before they are read; nginx' default is 1 MiB.
    most_body_bytes: int = 1 << 20
    #: An API that is silent for so long is given up with ``late``; None: the line is cut without a word.
    patience_s: float = 60.0
    late: int | None = 504
    #: (method, path) -> a status with which it answers by itself, or None.
    fault: Callable[[str, str], int | None] = lambda method, path: None
    #: (method, path with query, status) of each answer; 0 where there was none.
    seen: list[tuple[str, str, int]] = field(default_factory=list)

    def statuses(self, method: str, part: str) -> list[int]:
        return [status for m, path, status in self.seen if m == method and part in path]


@contextmanager
def proxied(api_url: str, **limits: object) -> Iterator[Proxy]:
    """A proxy on a free port of this machine before the API at this address."""
    proxy = Proxy(**limits)  # type: ignore[arg-type]
    api = urlsplit(api_url).netloc

    class Route(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def pass_on(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if size > proxy.most_body_bytes:
                self.refuse(413, "413 Request Entity Too Large")
                # As nginx does it: what comes after the refusal is read and thrown away, then the line is closed.
                self.wfile.flush()
                while size > 0 and (read := self.rfile.read(min(size, 1 << 16))):
                    size -= len(read)
                self.close_connection = True
                return
            body = self.rfile.read(size)
            status = proxy.fault(self.command, self.path)
            if status is not None:
                self.refuse(status, f"{status} of the proxy")
                return
            line = http.client.HTTPConnection(api, timeout=proxy.patience_s)
            try:
                line.request(self.command, self.path, body or None, dict(self.headers))
                answer = line.getresponse()
                raw = answer.read()
            except TimeoutError:
                if proxy.late is None:
                    proxy.seen.append((self.command, self.path, 0))
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                else:
                    self.refuse(proxy.late, f"{proxy.late} Gateway Time-out")
                return
            finally:
                line.close()
            self.say(answer.status, raw, {k: v for k, v in answer.getheaders() if k.lower() not in _HOP})

        def refuse(self, status: int, words: str) -> None:
            self.say(status, PAGE.format(words).encode(), {"Content-Type": "text/html"})

        def say(self, status: int, raw: bytes, headers: dict[str, str]) -> None:
            proxy.seen.append((self.command, self.path, status))
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = pass_on  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Route) as server:
        server.daemon_threads = True
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
