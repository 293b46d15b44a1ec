"""Workers without a model, on the real wire: beats, Celery messages, payloads, outcomes. Started by the benchmarks.

    MOTET_REDIS_URL=… python bench/stand_in.py --workers 2

Every task of a pass gets a label and a score that depend on the text's length alone, as fast as Python makes them.
Beats come from one thread, answers from another, so that a thousand of them fit into one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import redis

sys.path.insert(0, str(Path(__file__).parent))

from motet.protocol.columns import Column
from motet.protocol.redis_url import redis_py_url
from motet.protocol.transport import RedisWorkerTransport, queue_name
from motet.protocol.wire import Assignment, Beat, Outcome, Usage

ENGINES = ("encoder",)
BEAT_S = 1.0
#: Seconds that a row is said to take, unless a benchmark wants slower devices and so smaller sub-tasks.
ROW_S = 1e-6


@dataclass
class StandIn:
    """One worker: what it holds, and its side of Redis."""

    name: str
    transport: RedisWorkerTransport
    device: str = "stand-in"
    resident: tuple[str, ...] = ()
    seq: int = 0
    rows_done: int = 0
    #: Device seconds that it says a row took.
    row_s: float = ROW_S
    held: set[tuple[int, int]] = field(default_factory=set)

    def beat(self) -> None:
        self.seq += 1
        self.transport.beat(
            Beat(
                worker=self.name,
                boot="stand-in",
                seq=self.seq,
                host="bench",
                pid=os.getpid(),
                device_kind="cpu",
                device_name=self.device,
                memory_mb=16_000,
                engines=ENGINES,
                resident=self.resident,
                held=tuple(self.held),
                rows_done=self.rows_done,
            )
        )

    def run(self, key: tuple[int, int]) -> None:
        """Answer one attempt."""
        self.held.add(key)
        try:
            payload = self.transport.fetch(*key)
            if payload is not None:
                assignment = Assignment.decode(payload)
                self.resident = (assignment.model.digest,)
                self.transport.report(*key, answer(assignment, self.name, self.row_s).encode())
                self.rows_done += len(assignment.texts)
        finally:
            self.held.discard(key)


def answer(assignment: Assignment, worker: str, row_s: float) -> Outcome:
    """A label and a score per row and task, by the length of the text."""
    began = time.perf_counter()
    lengths = np.fromiter(map(len, assignment.texts), np.int64, len(assignment.texts))
    n, size = len(lengths), int(lengths.sum())
    columns = {
        task.name: Column(
            kind="label",
            status=bytes(n),
            arrays={
                "codes": ((lengths + i) % len(task.manifest.labels)).astype("<i2").tobytes(),
                "scores": (1 / (1 + lengths + i)).astype("<f4").tobytes(),
            },
        )
        for i, task in enumerate(assignment.tasks)
    }
    tokens = max(1, size // 4)
    usage = Usage(
        tokens=tokens, computed_tokens=tokens, text_bytes=size, busy_s=time.perf_counter() - began + row_s * n
    )
    return Outcome(
        subtask=assignment.subtask,
        attempt=assignment.attempt,
        nonce=assignment.nonce,
        worker=worker,
        boot="stand-in",
        verdict="done",
        columns=columns,
        usage=usage,
    )


def workers_of(url: str, count: int, device: str = "stand-in", *, row_s: float = ROW_S) -> list[StandIn]:
    """So many workers over one line to Redis."""
    line = RedisWorkerTransport(url, "")
    workers = []
    for i in range(count):
        transport = copy.copy(line)
        transport._worker = f"stand-in-{i}"
        workers.append(StandIn(transport._worker, transport, device, row_s=row_s))
    return workers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--row-s", type=float, default=ROW_S, help="device seconds that a row is said to take"
    )
    url, arguments = os.environ["MOTET_REDIS_URL"], parser.parse_args()
    workers = {queue_name(w.name): w for w in workers_of(url, arguments.workers, row_s=arguments.row_s)}
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())

    def beat() -> None:
        while not stopping.is_set():
            began = time.monotonic()
            for worker in workers.values():
                worker.beat()
            stopping.wait(max(0.0, BEAT_S - (time.monotonic() - began)))

    threading.Thread(target=beat, daemon=True).start()
    queues = redis.Redis.from_url(redis_py_url(url))
    while not stopping.is_set():
        # As kombu takes them; the scheduler's message names the attempt in its headers.
        taken = queues.brpop(list(workers), timeout=0.5)
        if taken:
            subtask, attempt = json.loads(taken[1])["headers"]["motet"]
            workers[taken[0].decode()].run((subtask, attempt))


if __name__ == "__main__":
    main()
