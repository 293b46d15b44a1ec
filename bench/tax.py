"""What motet costs over the best loop by hand: the demo's four tasks, two CPU workers against two processes, both storing.

framework_tax  seconds of a motet job, from the texts in the client's hand to every block sealed in Postgres / seconds
               of the hand-written loop (bench/bare.py: sorted by length, the fastest token budget, four answers
               from one forward pass, fp32, chunks to whoever is free, COPY into the same Postgres), in turn. Models are in
               memory on both sides before the clock starts. The cluster idles while the loop runs; what that costs the
               loop is the idle CPU told below.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from bare import BUDGETS, Loop
from harness import (
    EXACT,
    cluster,
    cpu_s,
    finish,
    idle_share,
    in_turn,
    options,
    ratio,
    say,
    table,
    texts,
    timed,
)

from motet import Client
from motet.job import Job


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, help="texts of a job  [default: 6,600, or 1,000 if quick]")
    parser.add_argument("--rounds", type=int, help="[default: 3, or 1 if quick]")
    arguments = parser.parse_args()
    size = arguments.size
    rows = arguments.rows or size.of(full=6600, quick=1000, smoke=24)
    rounds = arguments.rounds or size.of(full=3, quick=1, smoke=1)
    processes = size.of(full=2, quick=2, smoke=1)
    sample = texts(rows)
    few = sample[: size.of(full=400, quick=120, smoke=8)]
    with (
        cluster(processes) as running,
        Client(running.url, running.tokens["user"]) as client,
        Loop(processes, running.database_url) as loop,
    ):
        jobs: list[Job] = []
        spent: dict[str, float] = {"motet": 0.0, "loop": 0.0}

        def motet() -> float:
            def run() -> None:
                jobs.append(client.submit(sample, EXACT, reuse=False, progress=False))
                jobs[-1].wait()

            return counted("motet", running.pids.values, lambda: timed(run))

        def by_hand() -> float:
            return counted("loop", lambda: loop.pids, lambda: loop.run(sample, budget))

        def counted(side: str, pids: Callable[[], object], run: Callable[[], float]) -> float:
            before = cpu_s(pids())
            seconds = run()
            spent[side] += cpu_s(pids()) - before
            return seconds

        budget = loop.warm_up(few, size.of(full=BUDGETS, quick=(512, 1024), smoke=(512,)))
        client.submit(few, EXACT, reuse=False, progress=False).wait()
        client.submit(few, EXACT, reuse=False, progress=False).wait()
        idle = idle_share(running.pids.values(), size.of(full=4.0, quick=4.0, smoke=0.1))
        say(f"{rows:,} texts x {len(EXACT)} tasks; the loop's fastest budget is {budget:,} tokens; seconds:")
        found = in_turn({"loop": by_hand, "motet": motet}, rounds)
        usage = jobs[-1].usage
    table(
        f"{processes} processes, four answers a text, stored in Postgres",
        ("", "median s", "rows/s", "CPU s a run"),
        [
            (
                side,
                f"{statistics.median(s):.2f}",
                f"{rows / statistics.median(s):.1f}",
                f"{spent[side] / rounds:.1f}",
            )
            for side, s in found.items()
        ],
    )
    tax = ratio(found, "motet", "loop")
    say(f"the idle cluster takes {idle:.1%} of a core")
    details = {
        "rows": rows,
        "seconds": found,
        "cpu_s": {side: round(s / rounds, 2) for side, s in spent.items()},
        "idle_share_of_a_core": round(idle, 4),
        "loop_budget_tokens": budget,
        "usage": usage,
    }
    finish("tax", {"framework_tax": round(tax, 4)}, arguments, details=details)


if __name__ == "__main__":
    main()
