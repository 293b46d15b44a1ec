"""Thousands of callers connected to one API, of whom 200 ask at a time, in a process of their own; some of them behave badly.

Connections take turns: whoever was answered asks again when all others have. Beside these, bad ones: *deaf* ones ask and
never read, *slow* ones read a byte at a time, *gone* ones ask and hang up. The order comes as JSON on stdin, what was
seen goes as JSON to stdout.
"""

from __future__ import annotations

import asyncio
import json
import resource
import select
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import uvloop


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Whom to ask, how many at a time, and for how long."""

    port: int
    path: str
    token: str
    connections: int
    asking: int
    #: Of each kind.
    bad: int
    #: First without the bad ones, then with them.
    seconds: float
    texts: list[str]
    name: str


class Caller(asyncio.Protocol):
    """One connection of those that behave."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._read = bytearray()
        self._began = 0.0
        self.transport: Any = None
        self.asking = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self) -> None:
        self._began, self.asking = time.perf_counter(), True
        self.transport.write(self._house.request())

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, blank, body = self._read.partition(b"\r\n\r\n")
        if not blank:
            return
        lines = dict(line.split(b": ", 1) for line in bytes(head).lower().split(b"\r\n")[1:])
        if len(body) < int(lines[b"content-length"]):
            return
        status = int(head[9:12])
        self._read.clear()
        self.asking = False
        untold = status in (429, 503) and b"retry-after" not in lines
        self._house.answered(self, status, time.perf_counter() - self._began, untold)

    def connection_lost(self, _: Exception | None) -> None:
        self._house.lost(self)


class House:
    """All callers of one order."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._head = (
            f"POST {order.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {order.token}\r\nContent-Length: "
        ).encode()
        self._number = count()
        self._idle: deque[Caller] = deque()
        self.ended = False
        self.connected = 0
        self.statuses: Counter[int] = Counter()
        self.untold = self.cut = 0
        #: Milliseconds: without bad ones, while these come, which is more to compute, and beside them.
        self.waits: tuple[list[float], list[float], list[float]] = ([], [], [])
        self.part = 0

    def request(self) -> bytes:
        n = next(self._number)
        text = self.order.texts[n % len(self.order.texts)]
        key = f"{self.order.name}-{n}"
        body = json.dumps({"rows": [text], "key": key, "within_s": 60}).encode()
        return b"%s%d\r\n\r\n%s" % (self._head, len(body), body)

    def answered(self, caller: Caller, status: int, seconds: float, untold: bool) -> None:
        self.statuses[status] += 1
        self.untold += untold
        if status == 200:
            self.waits[self.part].append(1000 * seconds)
        self._idle.append(caller)
        self.next()

    def next(self) -> None:
        if not self.ended and self._idle:
            self._idle.popleft().ask()

    def lost(self, caller: Caller) -> None:
        self.connected -= 1
        if self.ended:
            return
        self.cut += 1
        if caller.asking:
            self.next()
        else:
            self._idle.remove(caller)

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        while self.connected < self.order.connections:
            some = min(200, self.order.connections - self.connected)
            made = await asyncio.gather(
                *(
                    loop.create_connection(lambda: Caller(self), "127.0.0.1", self.order.port)
                    for _ in range(some)
                )
            )
            self.connected += some
            self._idle.extend(caller for _, caller in made)


async def deaf(house: House) -> None:
    """Asks and never reads."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.setblocking(False)
        await asyncio.get_running_loop().sock_connect(one, ("127.0.0.1", house.order.port))
        await asyncio.get_running_loop().sock_sendall(one, house.request())
        await asyncio.sleep(2 * house.order.seconds)


async def slow(house: House) -> None:
    """Reads a byte at a time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.order.port, limit=1024)
    writer.write(house.request())
    while await reader.read(1):
        await asyncio.sleep(0.05)


async def gone(house: House) -> None:
    """Asks and hangs up, again and again."""
    while True:
        _, writer = await asyncio.open_connection("127.0.0.1", house.order.port)
        writer.write(house.request())
        await asyncio.sleep(0.2)
        writer.transport.abort()
        # Rarely: what they ask is computed too, and takes its time from the others.
        await asyncio.sleep(10.0)


async def play(order: Order) -> dict[str, Any]:
    """Both parts of an order."""
    house = House(order)
    await house.connect()
    began = house.connected
    for _ in range(order.asking):
        house.next()
    await asyncio.sleep(order.seconds)
    house.part = 1
    bad = [asyncio.ensure_future(kind(house)) for kind in (deaf, slow, gone) for _ in range(order.bad)]
    await asyncio.sleep(order.seconds / 2)
    house.part = 2
    await asyncio.sleep(order.seconds)
    house.ended = True
    left = house.connected
    for one in bad:
        one.cancel()
    await asyncio.gather(*bad, return_exceptions=True)
    return {
        "connected": began,
        "connected_at_end": left,
        "statuses": house.statuses,
        "untold": house.untold,
        "cut": house.cut,
        "waits": house.waits,
    }


def connected(order: Order, api: int) -> dict[str, Any]:
    """What callers in another process saw, and the most memory that the API with this id had meanwhile, in MB."""
    process = psutil.Process(api)
    before = most = process.memory_info().rss
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as playing:  # fmt: skip
        assert playing.stdin is not None
        assert playing.stdout is not None
        playing.stdin.write(json.dumps(asdict(order)))
        playing.stdin.close()
        # It says all it has to say at its end, more than a pipe holds.
        while not select.select([playing.stdout], [], [], 0.1)[0]:
            most = max(most, process.memory_info().rss)
        seen: dict[str, Any] = json.loads(playing.stdout.read())
    return seen | {"api_mb": most / 1e6, "api_mb_before": before / 1e6}


def main() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    order = Order(**json.load(sys.stdin))
    json.dump(uvloop.run(play(order)), sys.stdout)


if __name__ == "__main__":
    main()
