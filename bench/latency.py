"""What one row waits for beside the model: submit -> result in hand, on an idle cluster, less the bare engine call.

one_row_overhead_ms  median of (a job of one row and four tasks through API, Postgres, dispatcher, Redis, worker,
                     aggregator and back, in the client's hand) - median of (the engine's own prepare and run of the
                     same text, in this process), both in milliseconds and taken in turn
cpu_ms_per_job       CPU of all processes of the cluster, the model's included and the client's not, as /proc has it, for
                     each of many one-row jobs that eight callers submit and read, one after the other each
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from engine import Alone
from harness import EXACT, cluster, cpu_s, finish, options, say, table, texts, timed

from motet import Client

#: Callers that keep the cluster busy while its CPU is counted.
CALLERS = 8
#: So long the cluster is left alone before each job.
PAUSE_S = 0.2


def main() -> None:
    arguments = options(__doc__).parse_args()
    calls = arguments.size.of(full=200, quick=25, smoke=3)
    sample = texts(calls)
    engine = Alone(EXACT)
    jobs, bare = [], []
    with (
        cluster(arguments.size.of(full=2, quick=2, smoke=1)) as running,
        Client(running.url, running.tokens["user"]) as client,
    ):

        def one(text: str) -> None:
            job = client.submit([text], EXACT, priority="interactive", reuse=False, progress=False)
            (row,) = job.results()
            assert not row.errors

        for text in sample[:10]:
            one(text)
        for text in sample:
            time.sleep(PAUSE_S)
            jobs.append(timed(lambda text=text: one(text)) * 1000)
            bare.append(timed(lambda text=text: engine.run(engine.prepare([text]))) * 1000)
        before = cpu_s(running.pids.values())
        with ThreadPoolExecutor(CALLERS) as callers:
            list(callers.map(one, texts(2 * CALLERS * calls)[: 2 * calls]))
        cpu_ms = 1e3 * (cpu_s(running.pids.values()) - before) / (2 * calls)
    overhead = statistics.median(jobs) - statistics.median(bare)
    table(
        "one row of four tasks, milliseconds",
        ("", "median", "p90", "best"),
        [
            (
                side,
                f"{statistics.median(ms):.1f}",
                f"{statistics.quantiles(ms, n=10)[-1]:.1f}",
                f"{min(ms):.1f}",
            )
            for side, ms in (("submit to result", jobs), ("bare engine", bare))
        ],
    )
    say(f"{overhead:.1f} ms beside the model; {cpu_ms:.1f} ms of CPU a job while {CALLERS} ask at once")
    finish(
        "latency",
        {"one_row_overhead_ms": round(overhead, 2), "cpu_ms_per_job": round(cpu_ms, 1)},
        arguments,
        details={"calls": calls, "job_ms": jobs, "bare_ms": bare},
    )


if __name__ == "__main__":
    main()
