"""Placement on real workers where it is hard: one of two is three times slower, and two models that do not fit together.

The workers are steady (bench/paced.py): what this machine's other programs do does not change their speed.

slow_efficiency   bound / makespan with one worker that takes three times as long. The bound: the work of the job, shared
                  so that both workers work without a pause until the end, each as fast as it was while it worked
loads_per_model   times that models were loaded / models, where two jobs of two models run on two workers, each of which
                  has memory for one model; before, neither is loaded

    python bench/slow.py            about seven minutes
    python bench/slow.py --quick    some two
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import EXACT, Size, cluster_folder, finish, options, say, texts
from paced import FACTOR, Paced, first_tasks, paced, second_tasks
from truth import span_s

from motet import Client
from scheduler.simulation.trace import done_in, rate_of, work_of
from workers.run.device import probe

#: Memory of models at a worker: enough for one that takes 159 MB.
ROOM_MB = 240


def main() -> None:
    arguments = options(__doc__).parse_args()
    rows, rounds = arguments.size.of(full=(1800, 5), quick=(600, 1), smoke=(24, 1))
    share = ROOM_MB / probe("cpu", 2).memory_mb
    say(f"one of two workers takes {FACTOR:g} times as long; {rows:,} texts x {len(EXACT)} tasks:")
    two_models = "two models, and room for one at each of two workers:"
    if arguments.size is Size.SMOKE:
        with cluster_folder() as folder, paced(folder, slow=True, steady=True, memory_share=share) as running:
            efficiency, told = slow(running, rows, rounds)
            say(two_models)
            loads = crowded(running, rows // 2)
    else:
        with cluster_folder() as folder, paced(folder, slow=True, steady=True) as running:
            efficiency, told = slow(running, rows, rounds)
        say(two_models)
        with cluster_folder() as folder, paced(folder, steady=True, memory_share=share) as running:
            loads = crowded(running, rows // 2)
    say(f"  {loads} loads of 2 models")
    keys = {"slow_efficiency": round(statistics.median(efficiency), 4), "loads_per_model": loads / 2}
    finish("slow", keys, arguments, details={"rows": rows, "runs": told})


def slow(running: Paced, rows: int, rounds: int) -> tuple[list[float], Sequence[Mapping[str, Any]]]:
    """Efficiency of each run, and what it was made of."""
    told = []
    with Client(running.url, running.tokens["user"]) as client:
        client.submit(texts(rows // 2), EXACT, reuse=False, progress=False).wait()
        for _ in range(rounds):
            job = client.submit(texts(rows), EXACT, reuse=False, progress=False).wait()
            bound_s, makespan_s = bound_and_makespan(job.activity(timeline=None))
            say(f"  {makespan_s:.2f} s, bound {bound_s:.2f} s: {bound_s / makespan_s:.3f}")
            told.append({"bound_s": round(bound_s, 3), "makespan_s": round(makespan_s, 3)})
    return [run["bound_s"] / run["makespan_s"] for run in told], told


def bound_and_makespan(activity: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds that no schedule can beat with the speeds that the workers had, and those that it took."""
    by_worker: dict[str, list[Mapping[str, Any]]] = {}
    for subtask in done_in(activity):
        by_worker.setdefault(subtask["worker"], []).append(subtask)
    # What a sub-task is worth: seconds on whoever did most, as far as its size tells.
    rate = rate_of(max(by_worker.values(), key=lambda mine: sum(s["tokens"] for s in mine)))
    worth = {name: sum(rate.seconds(work_of(s)) for s in mine) for name, mine in by_worker.items()}
    speeds = [worth[name] / sum(s["busy_s"] for s in mine) for name, mine in by_worker.items()]
    return sum(worth.values()) / sum(speeds), span_s([activity])


def crowded(running: Paced, rows: int) -> int:
    """Loads that two jobs of two models cost."""
    with Client(running.url, running.tokens["user"]) as client:
        before = running.events("loaded")
        jobs = [
            client.submit(texts(rows), tasks, reuse=False, progress=False)
            for tasks in (first_tasks(), second_tasks())
        ]
        for job in jobs:
            job.wait()
        return running.events("loaded") - before


if __name__ == "__main__":
    main()
