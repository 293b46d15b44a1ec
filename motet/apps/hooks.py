"""A local server for webhooks: it proves that a message is motet's, and notes when each row's came (docs/webhooks.md)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: The host that motet must be allowed to post to (MOTET_WEBHOOK_HOSTS): this machine.
HOST = "127.0.0.1"
#: Seconds that a message may be old.
_FRESH_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """When a row's message came first, and when its event was written, in Unix seconds; both clocks are this machine's."""

    written_s: float
    came_s: float


class HookReceiver:
    """What came so far. Usable from several threads."""

    def __init__(self) -> None:
        self.url = ""
        #: Of the webhook; messages that it does not prove are refused.
        self.secret = ""
        #: By index of the row.
        self.rows: dict[int, Receipt] = {}
        self._changed = threading.Condition()

    def take(self, headers: Mapping[str, str], body: bytes) -> int:
        """The status to answer with: 204, or 401 for what is not motet's. The same message again changes nothing."""
        came_s = time.time()
        if not is_proved(self.secret, headers, body, now=came_s):
            return 401
        event = json.loads(body)
        if event["type"] == "row.matched":
            written_s = datetime.fromisoformat(event["timestamp"]).timestamp()
            with self._changed:
                self.rows.setdefault(event["data"]["row"], Receipt(written_s=written_s, came_s=came_s))
                self._changed.notify_all()
        return 204

    def wait_for(self, rows: set[int], within_s: float) -> set[int]:
        """Wait until the messages of these rows are there; return those that are missing after ``within_s``."""
        with self._changed:
            self._changed.wait_for(lambda: rows <= self.rows.keys(), within_s)
            return rows - self.rows.keys()


def is_proved(secret: str, headers: Mapping[str, str], body: bytes, *, now: float) -> bool:
    """Whether a message was signed with this secret within the last minutes."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        sent_at = int(headers["webhook-timestamp"])
        signed = f"{headers['webhook-id']}.{sent_at}.".encode() + body
        given = headers["webhook-signature"].split()
    except (KeyError, ValueError):
        return False
    proof = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return abs(now - sent_at) < _FRESH_S and any(hmac.compare_digest(proof, one) for one in given)


@contextmanager
def receiving() -> Iterator[HookReceiver]:
    """A receiver on a free port of this machine, until the end of the block."""
    receiver = HookReceiver()

    class Handler(BaseHTTPRequestHandler):
        # Connections are kept: a new one for each message would cost it a millisecond.
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = receiver.take({name.lower(): value for name, value in self.headers.items()}, body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer((HOST, 0), Handler)
    server.daemon_threads = True
    receiver.url = f"http://{HOST}:{server.server_address[1]}/alerts"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
