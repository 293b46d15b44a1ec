"""Thousands of workers without a model in one process, on the real wire. Started by bench/scale.py.

    MOTET_REDIS_URL=… MOTET_SCHEDULER_REDIS_URL=… python bench/crowd.py --workers 10000

Each beats once a second, takes every message from its queue, and holds it until it is told to answer. Orders come line
by line on stdin: ``answer 300`` answers the 300 oldest attempts, ``free 100`` all that the 100 workers with the oldest
ones hold, of which beats tell when ``tell`` is ordered; the line ``answered 300`` says that so many outcomes are on the
stream. A slice of a tenth of a second beats for a tenth of the workers, so that a look at any moment finds some of the
beats new. Beats of workers that hold something tell of new figures each time, as those of a worker at work.

On a cluster each worker pays for its own beats. Here all of them share two cores with the leader that is measured, so
what is alike in commands is written once and answers are only counted: what travels is the same, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import time
from collections import OrderedDict
from collections.abc import Collection
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import hiredis
import msgpack
import redis
from stand_in import ENGINES, answer

from motet.protocol.redis_url import redis_py_url
from motet.protocol.transport.connection import as_command
from motet.protocol.transport.keys import OUTCOMES, WORKERS, beat_key, payload_key, queue_name
from motet.protocol.transport.message import attempt_of
from motet.protocol.wire import FOR_PEOPLE, Assignment, Beat

#: Slices of a second: more are more even, and cost a round trip each.
SLICES = 10
DEVICE = "crowd"
#: Device seconds that a row is said to take: a sub-task of two seconds has 12 rows.
ROW_S = 2.0 / 12


class Line:
    """A connection on which commands that are written already are sent."""

    def __init__(self, client: redis.Redis) -> None:
        connection: Any = client.connection_pool.get_connection()
        connection.connect()
        # Kept, for the socket closes with them.
        self._kept, self._socket = (client, connection), connection._sock
        self._socket.settimeout(60.0)
        self._reader = hiredis.Reader()

    def exchange(self, commands: bytes, count: int) -> list[Any]:
        """The answers to so many commands."""
        self._socket.sendall(commands)
        answers: list[Any] = []
        while len(answers) < count:
            if (answered := self._reader.gets()) is not False:
                answers.append(answered)
                continue
            told = self._socket.recv(1 << 18)
            assert told, "Valkey is gone"
            self._reader.feed(told)
        return answers


class Slice:
    """Workers that beat at the same moment, and what is alike in their commands each time."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        queues = [queue_name(name).encode() for name in names]
        self.take = b"".join(
            [
                as_command(b"MULTI"),
                *(as_command(b"LRANGE", queue, b"0", b"-1") for queue in queues),
                as_command(b"UNLINK", *queues),
                as_command(b"EXEC"),
            ]
        )
        self.there = as_command(b"SADD", WORKERS.encode(), *map(str.encode, names))


class Crowd:
    """All workers, and what they hold."""

    def __init__(self, url: str, queues: str, count: int) -> None:
        self.redis = redis.Redis.from_url(redis_py_url(url))
        self._beats = Line(self.redis)
        #: By the scheduler's rights: a worker may take messages one at a time alone, which is a round trip for each.
        self._queues = Line(redis.Redis.from_url(redis_py_url(queues)))
        self.names = [f"crowd-{i}" for i in range(count)]
        self._slices = [Slice(self.names[i::SLICES]) for i in range(SLICES)]
        self.seq = 0
        #: Attempt -> the worker that holds it, oldest first.
        self.held: OrderedDict[tuple[int, int], str] = OrderedDict()
        self.of_worker: dict[str, set[tuple[int, int]]] = {name: set() for name in self.names}
        #: What was answered and no beat tells of yet, by worker.
        self.untold: dict[str, set[tuple[int, int]]] = {}
        #: Worker -> how its beats begin, up to what is for people, as long as it holds the same.
        self._begins: dict[str, bytes] = {}

    def beat(self, slice_: int) -> None:
        """A slice of the workers takes what waits for it, and beats."""
        some = self._slices[slice_]
        self.seq += slice_ == 0
        if not some.names:
            return
        *_, queued = self._queues.exchange(some.take, len(some.names) + 3)
        for name, taken in zip(some.names, queued[:-1], strict=True):
            for message in taken:
                key = attempt_of(message)
                assert key is not None
                self.held[key] = name
                self.of_worker[name].add(key)
                self._begins.pop(name, None)
        beats = [
            as_command(b"SET", beat_key(name).encode(), self._beat(name), b"EX", b"60") for name in some.names
        ]
        self._beats.exchange(b"".join(beats) + some.there, len(some.names) + 1)

    def _beat(self, name: str) -> bytes:
        held = self.of_worker[name]
        begins = self._begins.get(name)
        if begins is None:
            begins = self._begins[name] = _parts(name, tuple(held), 0)[0]
        return begins + _ends(len(held), self.seq)

    def answer(self, count: int) -> int:
        """Put the outcomes of the oldest attempts on the stream. How many."""
        oldest = [self.held.popitem(last=False) for _ in range(min(count, len(self.held)))]
        for key, name in oldest:
            self.of_worker[name].discard(key)
            self._begins.pop(name, None)
        return self._answer(oldest)

    def free(self, count: int) -> int:
        """Answer all that the workers with the oldest attempts hold; beats tell of it later. How many attempts."""
        self.untold = {
            name: self.of_worker[name].copy() for name in islice(dict.fromkeys(self.held.values()), count)
        }
        keys = [(key, name) for name, held in self.untold.items() for key in held]
        for key, _ in keys:
            del self.held[key]
        return self._answer(keys)

    def tell(self) -> int:
        """From now on beats tell of what `free` has answered. How many attempts."""
        for name, keys in self.untold.items():
            self.of_worker[name] -= keys
            self._begins.pop(name, None)
        return sum(map(len, self.untold.values()))

    def _answer(self, oldest: list[tuple[tuple[int, int], str]]) -> int:
        pipe = self.redis.pipeline(transaction=False)
        for key, name in oldest:
            pipe.get(payload_key(name, *key))
        payloads = pipe.execute()
        for (key, name), payload in zip(oldest, payloads, strict=True):
            outcome = answer(Assignment.decode(payload), name, ROW_S).encode()
            pipe.xadd(OUTCOMES, {"s": key[0], "a": key[1], "m": outcome})
            pipe.delete(payload_key(name, *key))
        pipe.execute()
        return len(oldest)


@lru_cache(64)
def _ends(held: int, seq: int) -> bytes:
    """How the beats of all workers end that hold so many attempts."""
    return _parts("", range(held), seq)[1]


def _parts(name: str, held: Collection[Any], seq: int) -> tuple[bytes, bytes]:
    """A beat up to what is for people, and the rest of it."""
    beat = Beat(
        worker=name,
        boot="crowd",
        seq=seq + 1,
        host="bench",
        pid=os.getpid(),
        device_kind="cpu",
        device_name=DEVICE,
        memory_mb=16_000,
        engines=ENGINES,
        held=tuple(held),
        utilisation=0.9 + seq % 10 / 100 if held else 0.0,
        backlog_s=len(held) * 2.0 - seq % 20 / 10 if held else 0.0,
        rows_done=6 * seq if held else 0,
    ).encode()
    begins, first, ends = beat.partition(msgpack.packb(FOR_PEOPLE[0]))
    return begins, first + ends


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=100)
    arguments = parser.parse_args()
    crowd = Crowd(os.environ["MOTET_REDIS_URL"], os.environ["MOTET_SCHEDULER_REDIS_URL"], arguments.workers)
    for slice_ in range(SLICES):
        crowd.beat(slice_)
    print("ready", flush=True)
    slice_, due = 0, time.monotonic()
    while True:
        wait_s = max(0.0, due - time.monotonic())
        if select.select([sys.stdin], [], [], wait_s)[0]:
            order = sys.stdin.readline().split()
            if not order:
                return
            match order:
                case ["free", count]:
                    did = crowd.free(int(count))
                case ["tell"]:
                    did = crowd.tell()
                case _:
                    did = crowd.answer(int(order[1]))
            print("answered", did, flush=True)
            continue
        crowd.beat(slice_)
        # A slice that takes longer than its time is not made up for: then beats are rarer.
        slice_, due = (slice_ + 1) % SLICES, max(due + 1 / SLICES, time.monotonic())


if __name__ == "__main__":
    main()
