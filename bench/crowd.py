"""Thousands of workers without a model in one process, on the real wire. Started by bench/scale.py.

    MOTET_REDIS_URL=… MOTET_SCHEDULER_REDIS_URL=… python bench/crowd.py --workers 10000

Each beats once a second, takes every message from its queue, and holds it until it is told to answer. Orders come line
by line on stdin: ``answer 300`` answers the 300 oldest attempts, ``free 100`` all that the 100 workers with the oldest
ones hold, of which beats tell when ``tell`` is ordered; the line ``answered 300`` says that so many outcomes are on the
stream. A slice of a tenth of a second beats for a tenth of the workers, so that a look at any moment finds some of the
beats new. Beats of workers that hold something tell of new figures each time, as those of a worker at work.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import time
from collections import OrderedDict
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import redis
from stand_in import ENGINES, answer

from motet.protocol.redis_url import redis_py_url
from motet.protocol.transport.keys import OUTCOMES, WORKERS, beat_key, payload_key, queue_name
from motet.protocol.transport.message import attempt_of
from motet.protocol.wire import Assignment, Beat

#: Slices of a second: more are more even, and cost a round trip each.
SLICES = 10
DEVICE = "crowd"
#: Device seconds that a row is said to take: a sub-task of two seconds has 12 rows.
ROW_S = 2.0 / 12


class Crowd:
    """All workers, and what they hold."""

    def __init__(self, url: str, queues: str, count: int) -> None:
        self.redis = redis.Redis.from_url(redis_py_url(url))
        #: By the scheduler's rights: a worker may take messages one at a time alone, which is a round trip for each.
        self.queues = redis.Redis.from_url(redis_py_url(queues))
        self.names = [f"crowd-{i}" for i in range(count)]
        self.seq = 0
        #: Attempt -> the worker that holds it, oldest first.
        self.held: OrderedDict[tuple[int, int], str] = OrderedDict()
        self.of_worker: dict[str, set[tuple[int, int]]] = {name: set() for name in self.names}
        #: What was answered and no beat tells of yet, by worker.
        self.untold: dict[str, set[tuple[int, int]]] = {}

    def beat(self, slice_: int) -> None:
        """A slice of the workers takes what waits for it, and beats."""
        names = self.names[slice_::SLICES]
        self.seq += slice_ == 0
        if not names:
            return
        pipe = self.queues.pipeline(transaction=True)
        for name in names:
            pipe.lrange(queue_name(name), 0, -1)
        pipe.unlink(*map(queue_name, names))
        for name, taken in zip(names, pipe.execute()[:-1], strict=True):
            for message in taken:
                key = attempt_of(message)
                assert key is not None
                self.held[key] = name
                self.of_worker[name].add(key)
        pipe = self.redis.pipeline(transaction=False)
        for name in names:
            pipe.set(beat_key(name), self._beat(name), ex=60)
        pipe.sadd(WORKERS, *names)
        pipe.execute()

    def _beat(self, name: str) -> bytes:
        held = tuple(self.of_worker[name])
        return Beat(
            worker=name,
            boot="crowd",
            seq=self.seq + 1,
            host="bench",
            pid=os.getpid(),
            device_kind="cpu",
            device_name=DEVICE,
            memory_mb=16_000,
            engines=ENGINES,
            held=held,
            utilisation=0.9 + self.seq % 10 / 100 if held else 0.0,
            backlog_s=len(held) * 2.0 - self.seq % 20 / 10 if held else 0.0,
            rows_done=6 * self.seq if held else 0,
        ).encode()

    def answer(self, count: int) -> int:
        """Put the outcomes of the oldest attempts on the stream. How many."""
        oldest = [self.held.popitem(last=False) for _ in range(min(count, len(self.held)))]
        for key, name in oldest:
            self.of_worker[name].discard(key)
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
