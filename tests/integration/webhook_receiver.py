"""A real server that webhooks are posted to: it keeps what it gets, and answers as it is told. For tests."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    #: Seconds since 1970.
    at: float

    def proves(self, secret: str) -> bool:
        """A receiver's own check, as the specification of Standard Webhooks describes it."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signed = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.{self.body.decode()}"
        digest = base64.b64encode(hmac.new(key, signed.encode(), hashlib.sha256).digest()).decode()
        fresh = abs(int(self.headers["webhook-timestamp"]) - self.at) < 300
        return fresh and f"v1,{digest}" in self.headers["webhook-signature"].split(" ")


@dataclass
class Receiver:
    """Answers each request by ``answer``: a status, or a function of the handler that answers by itself."""

    port: int = 0
    tls: bool = False
    answer: int | Callable[[BaseHTTPRequestHandler], object] = 204
    got: Queue[Received] = field(default_factory=Queue)

    def url(self, host: str = "127.0.0.1", path: str = "/hook?a=b") -> str:
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    def next(self, within_s: float = 10.0) -> Received:
        return self.got.get(timeout=within_s)


@contextmanager
def receiving(certificate: Path | None = None) -> Iterator[Receiver]:
    """A receiver, with TLS where there is a file that holds its key and its certificate."""
    receiver = Receiver(tls=certificate is not None)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.got.put(Received(self.path, headers, body, time.time()))
            if callable(receiver.answer):
                receiver.answer(self)
                return
            self.send_response(receiver.answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *_: None  # type: ignore[method-assign]
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()


def certificate_for(host: str, folder: Path) -> Path:
    """A file with a key and a certificate of this host, signed by itself."""
    made = folder / f"{host}.pem"
    key, shown = folder / "key.pem", folder / "shown.pem"
    ask = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    name = ["-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}"]
    files = ["-keyout", str(key), "-out", str(shown)]
    subprocess.run(["openssl", *ask, *name, *files], check=True, capture_output=True)
    made.write_text(key.read_text() + shown.read_text())
    return made
