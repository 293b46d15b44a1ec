"""What bulk work adds to a one-row job, and what one-row jobs cost bulk work: one device, phases in turn.

p99_ratio               p99 of one-row jobs, submit to result in hand, under a full bulk job / on the idle cluster
added_over_micro_batch  milliseconds that bulk work adds to that p99 / the bulk micro-batch meanwhile, as printed
bulk_loss               1 - bulk tokens per device-second under one-row jobs / without them. Device-seconds are those of
                        the clock, idle gaps too, less those that the one-row jobs ran. It holds what cutting bulk
                        micro-batches short costs, and every gap

Each round is one idle phase, then a bulk job: alone, and then beside one-row jobs. Both kinds ask for the demo's four
tasks. The worker's own figures come from its traces (docs/operations.md), one span for each sub-task.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID

from harness import EXACT, cluster, finish, options, say, table, texts, timed
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from motet import Client

#: So long nobody asks before each one-row job.
PAUSE_S = 0.2
#: Bulk is cut short for so long after the last one-row job (workers/executor.py), and one sub-task more.
TAIL_S = 13.0
#: Spans are sent each second.
SPANS_S = 3.0
#: Small blocks, so that each sub-task has rows of all lengths and every stretch of the job the same mix.
BLOCK_ROWS = "128"


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
    """What a device did for a bulk job between the ends of two of its sub-tasks."""

    seconds: float
    tokens: int
    #: Device-seconds of the bulk job, and of one-row jobs.
    busy_s: float
    interactive_s: float
    #: Mean micro-batch of each sub-task.
    micro_batch_s: Sequence[float]

    @classmethod
    def of(cls, ran: Sequence[Ran], job: str, began: float, ended: float) -> Stretch:
        bulk = sorted((r for r in ran if r.job == job and began <= r.end_s <= ended), key=lambda r: r.end_s)
        if len(bulk) < 2:
            raise SystemExit("fewer than two bulk sub-tasks ended in a phase; make it longer with --calls")
        first, *bulk = bulk
        last = bulk[-1]
        return cls(
            seconds=last.end_s - first.end_s,
            tokens=sum(r.tokens for r in bulk),
            busy_s=sum(r.busy_s for r in bulk),
            interactive_s=sum(r.busy_s for r in ran if r.job != job and first.end_s < r.end_s <= last.end_s),
            micro_batch_s=[r.busy_s / r.micro_batches for r in bulk],
        )

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
    calls = arguments.calls or (20 if arguments.quick else 60)
    rounds = arguments.rounds or (1 if arguments.quick else 4)
    bulk_texts = texts(arguments.rows or (1_000_000 if arguments.gpu else 15_000))
    single = texts(10 + 2 * calls * rounds)
    alone_s = 7.0 if arguments.quick else 20.0
    idle: list[float] = []
    loaded: list[float] = []
    #: For each round the bulk job, and when it began to run alone, to run beside one-row jobs, and no more.
    phases: list[tuple[str, float, float, float]] = []
    os.environ["MOTET_BLOCK_ROWS"] = BLOCK_ROWS
    with (
        spans() as bodies,
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

        # Its cost is learned, and its budget settles.
        client.submit(bulk_texts[:400], EXACT, reuse=False, progress=False).wait()
        for _ in range(10):
            one()
        for _ in range(rounds):
            idle += [one() for _ in range(calls)]
            bulk = client.submit(bulk_texts, EXACT, priority="bulk", reuse=False, progress=False)
            time.sleep(TAIL_S)
            began = time.time()
            time.sleep(alone_s)
            asked = time.time()
            loaded += [one() for _ in range(calls)]
            phases.append((bulk.id, began, asked, time.time()))
            if bulk.state != "running":
                raise SystemExit("the bulk job ended before the one-row jobs did; give it more with --rows")
            bulk.cancel()
            say(f"  p50 idle {statistics.median(idle):.0f} ms, under bulk {statistics.median(loaded):.0f} ms")
        time.sleep(SPANS_S)
    ran = list(told(bodies))
    alone = [Stretch.of(ran, job, began, asked) for job, began, asked, _ in phases]
    beside = [Stretch.of(ran, job, asked, ended) for job, _, asked, ended in phases]
    micro_batch_ms = 1000 * statistics.mean(s for stretch in beside for s in stretch.micro_batch_s)
    added_ms = p99(loaded) - p99(idle)
    loss = statistics.median(1 - b.tokens_s / a.tokens_s for a, b in zip(alone, beside, strict=True))
    table(
        "a job of one row and four tasks, submit to result, milliseconds",
        ("", "jobs", "p50", "p99", "worst"),
        [
            (side, len(ms), f"{statistics.median(ms):.1f}", f"{p99(ms):.1f}", f"{max(ms):.1f}")
            for side, ms in (("idle", idle), ("under bulk", loaded))
        ],
    )
    table(
        "the bulk job on its device",
        ("", "micro-batch ms", "of its longest sub-task", "tokens/s", "one-row jobs", "idle"),
        [
            (
                side,
                f"{1000 * statistics.mean(s for one in stretches for s in one.micro_batch_s):.1f}",
                f"{1000 * max(s for one in stretches for s in one.micro_batch_s):.1f}",
                f"{statistics.median(one.tokens_s for one in stretches):,.0f}",
                f"{statistics.median(one.interactive_s / one.seconds for one in stretches):.1%}",
                f"{statistics.median(one.idle for one in stretches):.1%}",
            )
            for side, stretches in (("alone", alone), ("beside one-row jobs", beside))
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
        quick=arguments.quick,
        details={
            "device": "gpu" if arguments.gpu else "cpu",
            "bulk_micro_batch_ms": round(micro_batch_ms, 1),
            "bulk_tokens_s_alone": [round(one.tokens_s) for one in alone],
            "bulk_tokens_s_beside": [round(one.tokens_s) for one in beside],
            "idle_ms": idle,
            "loaded_ms": loaded,
        },
    )


def p99(ms: Sequence[float]) -> float:
    return statistics.quantiles(ms, n=100, method="inclusive")[-1]


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
