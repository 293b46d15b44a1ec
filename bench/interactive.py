"""What bulk work adds to a one-row job, and what one-row jobs cost bulk work: one device, phases in turn.

p99_ratio               p99 of one-row jobs, submit to result in hand, under a full bulk job / on the idle cluster
bulk_loss               1 - bulk tokens per device-second beside one-row jobs / without them. Device-seconds are those
                        of the clock, gaps too, less those in which one-row jobs ran; so it holds what cutting bulk
                        micro-batches short costs
added_over_micro_batch  milliseconds that bulk work adds to that p99 / its mean micro-batch meanwhile

Each round is one idle phase, then a bulk job: alone, and then beside one-row jobs. Both kinds ask for the demo's four
tasks. The first one-row job after a quiet while meets a bulk micro-batch of full length: it stands in a line of its
own. The worker's figures come from its traces, one span for each sub-task. A CPU slot has a core of its own, and
all other processes the rest: so it is a device as a GPU is one.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, pairwise
from uuid import UUID

import psutil
from harness import EXACT, Size, cluster, finish, options, say, table, texts, timed
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from motet import Client
from motet.job import Job
from motet.local.cluster import Cluster

#: So long nobody asks before each one-row job.
PAUSE_S = 0.2
#: Bulk is cut short for so long after the last one-row job (workers/run/executor.py), and one sub-task more.
TAIL_S, SMOKE_TAIL_S = 12.0, 0.5
#: Spans are sent each second.
SPANS_S = 2.0
#: Small blocks, so that each sub-task has rows of all lengths and every stretch of the job the same mix.
BLOCK_ROWS = "128"
#: Seconds of a sub-task in a smoke run, where a phase is short.
SMOKE_SUBTASK_S = "0.2"
#: Ends of sub-tasks that a phase waits for: one may come from before it, and a stretch lies between two.
ENDS = 3


@dataclass(frozen=True)
class Ran:
    """One attempt, as its worker tells it."""

    job: str
    end_s: float
    tokens: int
    micro_batches: int
    busy_s: float


@dataclass(frozen=True)
class Stretch:
    """What the device did between the ends of two neighbouring sub-tasks of a bulk job."""

    seconds: float
    tokens: int
    #: Device-seconds of the bulk job, and of one-row jobs.
    busy_s: float
    interactive_s: float
    #: Mean micro-batch.
    micro_batch_s: float

    @property
    def tokens_s(self) -> float:
        """Bulk tokens per device-second that one-row jobs left."""
        return self.tokens / (self.seconds - self.interactive_s)

    @property
    def idle(self) -> float:
        """Share of the time in which the device ran nothing."""
        return 1 - (self.busy_s + self.interactive_s) / self.seconds


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--calls", type=int, help="one-row jobs of a phase  [default: 60, or 20 if quick]")
    parser.add_argument("--rounds", type=int, help="[default: 4, or 1 if quick]")
    parser.add_argument(
        "--rows", type=int, help="texts of a bulk job  [default: 15,000, or 1,000,000 with --gpu]"
    )
    parser.add_argument("--gpu", action="store_true", help="on the first GPU in place of one CPU slot")
    arguments = parser.parse_args()
    size = arguments.size
    calls = arguments.calls or size.of(full=60, quick=20, smoke=3)
    rounds = arguments.rounds or size.of(full=4, quick=1, smoke=1)
    many = 1_000_000 if arguments.gpu else 15_000
    bulk_texts = texts(arguments.rows or size.of(full=many, quick=many, smoke=8_000))
    single = texts(5 + (2 * calls + 1) * rounds)
    alone_s = size.of(full=20.0, quick=6.0, smoke=0.5)
    idle: list[float] = []
    loaded: list[float] = []
    first: list[float] = []
    #: For each round the bulk job, and when it began to run alone, to run beside one-row jobs, and no more.
    phases: list[tuple[str, float, float, float]] = []
    os.environ["MOTET_BLOCK_ROWS"] = BLOCK_ROWS
    if size is Size.SMOKE:
        os.environ["MOTET_SUBTASK_S"] = SMOKE_SUBTASK_S
    with (
        spans() as bodies,
        nullcontext() if arguments.gpu else a_core_of_its_own() as move_others,
        cluster(0 if arguments.gpu else 1, gpu=arguments.gpu) as running,
        Client(running.url, running.tokens["user"]) as client,
    ):

        def one() -> float:
            time.sleep(PAUSE_S)
            text = single.pop()

            def ask() -> None:
                job = client.submit([text], EXACT, priority="interactive", reuse=False, progress=False)
                (row,) = job.results()
                assert not row.errors

            return timed(ask) * 1000

        if move_others:
            move_others(running)
        # Its cost is learned, and its budget settles.
        client.submit(
            bulk_texts[: size.of(full=300, quick=300, smoke=64)], EXACT, reuse=False, progress=False
        ).wait()
        for _ in range(size.of(full=5, quick=5, smoke=1)):
            one()
        for _ in range(rounds):
            idle += [one() for _ in range(calls)]
            bulk = client.submit(bulk_texts, EXACT, priority="bulk", reuse=False, progress=False)
            time.sleep(size.of(full=TAIL_S, quick=TAIL_S, smoke=SMOKE_TAIL_S))
            began = time.time()
            with at_least_ends(bulk):
                time.sleep(alone_s)
            asked = time.time()
            with at_least_ends(bulk):
                first.append(one())
                loaded += [one() for _ in range(calls)]
            phases.append((bulk.id, began, asked, time.time()))
            if bulk.state != "running":
                raise SystemExit("the bulk job ended before the one-row jobs did; give it more with --rows")
            bulk.cancel()
            say(f"  p50 idle {statistics.median(idle):.0f} ms, under bulk {statistics.median(loaded):.0f} ms")
        time.sleep(SPANS_S)
    ran = sorted(told(bodies), key=lambda one: one.end_s)
    alone = [list(stretches(ran, job, began, asked)) for job, began, asked, _ in phases]
    beside = [list(stretches(ran, job, asked, ended)) for job, _, asked, ended in phases]
    if not all((*alone, *beside)):
        raise SystemExit("fewer than two bulk sub-tasks ended in a phase; make it longer with --calls")
    micro_batch_ms = 1000 * statistics.mean(one.micro_batch_s for one in chain(*beside))
    added_ms = p99(loaded) - p99(idle)
    loss = statistics.median(1 - speed(b) / speed(a) for a, b in zip(alone, beside, strict=True))
    table(
        "a job of one row and four tasks, submit to result, milliseconds",
        ("", "jobs", "p50", "p99", "worst"),
        [
            (side, len(ms), f"{statistics.median(ms):.1f}", f"{p99(ms):.1f}", f"{max(ms):.1f}")
            for side, ms in (("idle", idle), ("under bulk", loaded), ("the first under bulk", first))
        ],
    )
    table(
        "the bulk job on its device",
        ("", "micro-batch ms", "longest, of a sub-task", "tokens/s", "one-row jobs", "idle"),
        [
            (
                side,
                f"{1000 * statistics.mean(one.micro_batch_s for one in parts):.1f}",
                f"{1000 * max(one.micro_batch_s for one in parts):.1f}",
                f"{speed(parts):,.0f}",
                f"{statistics.mean(one.interactive_s / one.seconds for one in parts):.1%}",
                f"{statistics.mean(one.idle for one in parts):.1%}",
            )
            for side, parts in (("alone", list(chain(*alone))), ("beside one-row jobs", list(chain(*beside))))
        ],
    )
    say(
        f"bulk adds {added_ms:.0f} ms to p99, {added_ms / micro_batch_ms:.2f} micro-batches; loses {loss:.1%}"
    )
    finish(
        "interactive",
        {
            "p99_ratio": round(p99(loaded) / p99(idle), 2),
            "bulk_loss": round(loss, 4),
            "added_over_micro_batch": round(added_ms / micro_batch_ms, 2),
        },
        arguments,
        details={
            "device": "gpu" if arguments.gpu else "cpu",
            "bulk_micro_batch_ms": round(micro_batch_ms, 1),
            "bulk_tokens_s_alone": [round(speed(parts)) for parts in alone],
            "bulk_tokens_s_beside": [round(speed(parts)) for parts in beside],
            "idle_ms": idle,
            "loaded_ms": loaded,
            "first_ms": first,
        },
    )


@contextmanager
def at_least_ends(job: Job) -> Iterator[None]:
    """Goes on when enough sub-tasks of a running job have ended since the beginning, however slow the device is."""
    before = job.refresh().usage["subtasks"]
    yield
    while job.refresh().usage["subtasks"] < before + ENDS and job.state == "running":
        time.sleep(0.05)


def p99(ms: Sequence[float]) -> float:
    return statistics.quantiles(ms, n=100, method="inclusive")[-1] if len(ms) > 1 else ms[0]


def stretches(ran: Sequence[Ran], job: str, began: float, ended: float) -> Iterator[Stretch]:
    """A stretch for each bulk sub-task of a phase but the first; the device runs them one after the other."""
    for before, one in pairwise(r for r in ran if r.job == job and began <= r.end_s <= ended):
        yield Stretch(
            seconds=one.end_s - before.end_s,
            tokens=one.tokens,
            busy_s=one.busy_s,
            interactive_s=sum(r.busy_s for r in ran if r.job != job and before.end_s < r.end_s <= one.end_s),
            micro_batch_s=one.busy_s / one.micro_batches,
        )


def speed(parts: Sequence[Stretch]) -> float:
    """Bulk tokens per device-second; the median, since neighbours on the machine disturb single stretches."""
    return statistics.median(one.tokens_s for one in parts)


@contextmanager
def a_core_of_its_own() -> Iterator[Callable[[Cluster], None]]:
    """Start a cluster on one core inside, so that its CPU slot has one thread; the function moves all others away."""
    cores = os.sched_getaffinity(0)
    slot = {min(cores)}

    def move_others(running: Cluster) -> None:
        processes = [psutil.Process()]
        for name, pid in running.pids.items():
            if name != "workers":
                processes += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for thread in (thread for process in processes for thread in process.threads()):
            os.sched_setaffinity(thread.id, cores - slot or cores)

    os.sched_setaffinity(0, slot)
    yield move_others
    os.sched_setaffinity(0, cores)


@contextmanager
def spans() -> Iterator[list[bytes]]:
    """What the processes started inside send of their traces, as it comes in."""
    bodies: list[bytes] = []

    class Take(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Take) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["MOTET_TRACES"] = f"http://127.0.0.1:{server.server_address[1]}"
        yield bodies
        server.shutdown()


def told(bodies: Sequence[bytes]) -> Iterator[Ran]:
    """The attempts that workers ran."""
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                if span.name == "execute":
                    about = {a.key: a.value.int_value or a.value.double_value for a in span.attributes}
                    yield Ran(
                        job=str(UUID(bytes=span.trace_id)),
                        end_s=span.end_time_unix_nano / 1e9,
                        tokens=int(about["motet.tokens"]),
                        micro_batches=int(about["motet.micro_batches"]),
                        busy_s=about["motet.busy_s"],
                    )


if __name__ == "__main__":
    main()
