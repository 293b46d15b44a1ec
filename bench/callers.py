"""Callers in a process of their own: so many connections, each of which asks again as soon as it is answered.

Raw sockets and protocols on uvloop, not wrk: every answer is read and kept, so that it can be held to its key. One
request costs about 0.06 ms of CPU here. The order comes as JSON on stdin, what was seen goes as JSON to stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import uvloop


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to ask whom, and for how long."""

    port: int
    path: str
    #: Bearer token; empty: none is sent.
    token: str
    callers: int
    seconds: float
    #: Text n is asked by the caller that comes n-th, under key ``name``-n.
    texts: list[str]
    name: str
    #: motet's body, with a key; else LitServe's.
    keyed: bool
    #: What a chat in OpenAI's form says beside its message; None: no chat is asked.
    chat: dict[str, Any] | None = None


class Caller(asyncio.Protocol):
    """One connection."""

    def __init__(self, all_: Callers) -> None:
        self._all = all_
        self._read = bytearray()
        self._n = -1
        self._began = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        assert self._transport is not None
        self._began = time.perf_counter()
        self._n = self._all.next(self._began)
        if self._n < 0:
            self._transport.close()
            return
        self._transport.write(self._all.request(self._n))

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, blank, body = self._read.partition(b"\r\n\r\n")
        if not blank:
            return
        size = next(
            int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
        )
        if len(body) < size:
            return
        self._all.answered(self._n, int(head[9:12]), bytes(body), self._began)
        self._read.clear()
        self._n = -1
        self._ask()

    def connection_lost(self, _: Exception | None) -> None:
        if self._n >= 0:
            self._all.answered(self._n, 0, b"", self._began)
        self._all.gone()


class Callers:
    """All connections of one round."""

    def __init__(self, order: Order, done: asyncio.Event) -> None:
        self._order, self._done = order, done
        self._head = (
            f"POST {order.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            + (f"Authorization: Bearer {order.token}\r\n" if order.token else "")
            + "Content-Length: "
        ).encode()
        self._next = 0
        self._left = order.callers
        self._until = time.perf_counter() + order.seconds
        #: (number of the ask, status, body, seconds, whether it was answered within the round)
        self.seen: list[tuple[int, int, str, float, bool]] = []

    def next(self, now: float) -> int:
        """The number of the next ask; -1: the round is over."""
        if now >= self._until:
            return -1
        self._next += 1
        return self._next - 1

    def request(self, n: int) -> bytes:
        body = json.dumps(self._asked(n)).encode()
        return b"%s%d\r\n\r\n%s" % (self._head, len(body), body)

    def _asked(self, n: int) -> dict[str, Any]:
        text = self._order.texts[n % len(self._order.texts)]
        if self._order.chat is not None:
            return {"messages": [{"role": "user", "content": text}], **self._order.chat}
        return {"rows": [text], "key": f"{self._order.name}-{n}"} if self._order.keyed else {"text": text}

    def answered(self, n: int, status: int, body: bytes, began: float) -> None:
        now = time.perf_counter()
        self.seen.append((n, status, body.decode("utf-8", "replace"), now - began, now <= self._until))

    def gone(self) -> None:
        self._left -= 1
        if not self._left:
            self._done.set()


async def ask(order: Order) -> list[tuple[int, int, str, float, bool]]:
    """One round."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    callers = Callers(order, done)
    for _ in range(order.callers):
        await loop.create_connection(lambda: Caller(callers), "127.0.0.1", order.port)
    await done.wait()
    return callers.seen


def to_json(order: Order) -> str:
    return json.dumps(asdict(order))


def main() -> None:
    order = Order(**json.load(sys.stdin))
    began = time.perf_counter()
    seen = uvloop.run(ask(order))
    took_s = time.perf_counter() - began
    used = os.times()
    json.dump({"seen": seen, "took_s": took_s, "cpu_s": used.user + used.system}, sys.stdout)


if __name__ == "__main__":
    main()
