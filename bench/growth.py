"""How the policy's cost grows: with workers, with jobs, with rows; and a billion rows on 10,000 GPUs, simulated.

slope_decision_workers  log-log slope of CPU per decision (ask, place, end) over 100 to 100,000 workers, one busy job
slope_decision_jobs     the same over 100 to 100,000 jobs of 1,000 tenants on 100 workers
slope_memory_rows       log-log slope of the largest resident set of a process that does nothing but this, over a million to a
                        billion rows on 20 GPUs; what Python holds of it beside its own start is told in KiB
us_per_subtask          CPU of the policy per sub-task, in microseconds, while a billion rows run on 10,000 mixed GPUs:
                        placing, carving, learning; the virtual cluster itself is told apart

Decisions are those of the classes that the dispatcher runs (scheduler/policy/placing/, carve.py, cost.py). A slope of 0 is
constant, of 1 linear. CPU time of this thread, medians of slices, so that neighbours on the machine disturb little. What
the live path adds to a sub-task (lease, payload, publish) is told by bench/dispatch.py, and printed here from its last
full run.

    python bench/growth.py            some minutes
    python bench/growth.py --quick    within a minute: a hundredth of the rows, a decade less
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count

from harness import RESULTS, finish, options, peak_rss_mb, say, table

from motet.protocol.manifest import Manifest
from scheduler.policy.carve import Carved
from scheduler.policy.cost import Rate, Rates
from scheduler.policy.place import Placer
from scheduler.policy.placing.records import Demand, WorkerState
from scheduler.simulation.cluster import Model, Scenario, SimulatedDevice, SimulatedJob, UncarvedRows
from scheduler.simulation.events import Attempt, Simulation, Subtask
from scheduler.simulation.policy import Motet, _Pass

MODEL = Manifest(name="m", version="1", engine="encoder", answers="vector", trunk="m", parameters=10**6)
SPEEDS = {"a": 4.0, "b": 2.0, "c": 1.0, "d": 0.5}
#: Decisions of one slice, and slices of one point.
SLICE, SLICES = 500, 9
ROW_BYTES, TOKEN_S = 256, 2e-5


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows-in-this-process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows_in_this_process:
        run_rows(arguments.rows_in_this_process)
        return
    tens, many_rows, (gpus, rows) = arguments.size.of(
        full=((100, 1_000, 10_000, 100_000), (10**6, 10**7, 10**8, 10**9), (10_000, 10**9)),
        quick=((100, 1_000, 10_000), (10**6, 10**7, 10**8), (1_000, 10**7)),
        smoke=((10, 100), (10**4, 10**5), (20, 10**5)),
    )
    workers = {n: decision_us(n, 1) for n in tens}
    jobs = {n: decision_us(100, n) for n in tens}
    memory = {n: memory_kb(n) for n in many_rows}
    big = billion(gpus, rows)
    keys = {
        "slope_decision_workers": round(slope(workers), 3),
        "slope_decision_jobs": round(slope(jobs), 3),
        "slope_memory_rows": round(slope({n: peak for n, (peak, _) in memory.items()}), 4),
        "us_per_subtask": round(big["policy_us"], 1),
    }
    table("CPU of one decision, microseconds", ("", *(f"{n:,}" for n in tens)), [
        ("workers", *(f"{us:.1f}" for us in workers.values())),
        ("jobs", *(f"{us:.1f}" for us in jobs.values())),
    ])  # fmt: skip
    table(
        "largest resident set, KiB",
        ("", *(f"{n:,} rows" for n in memory)),
        [
            ("process", *(f"{peak:,}" for peak, _ in memory.values())),
            ("growth", *(f"{grown:,}" for _, grown in memory.values())),
        ],
    )
    table(
        f"simulated: {rows:,} rows on {gpus:,} GPUs of four speeds",
        ("", ""),
        [
            ("sub-tasks", f"{big['subtasks']:,.0f}"),
            ("policy CPU a sub-task", f"{big['policy_us']:.1f} us"),
            ("virtual cluster CPU a sub-task", f"{big['cluster_us']:.1f} us"),
            ("CPU in all", f"{big['cpu_s']:.0f} s"),
            ("largest resident set", f"{big['rss_mb']:.0f} MiB"),
            ("makespan, bound / makespan", f"{big['makespan_s']:.0f} s, {big['efficiency']:.4f}"),
        ],
    )
    told = live_path()
    say(told or "the live path was not measured here yet: python bench/dispatch.py")
    finish(
        "growth",
        keys,
        arguments,
        details={"decision_us": {"workers": workers, "jobs": jobs}, "memory_kb": memory, "simulated": big},
    )


def decision_us(workers: int, jobs: int) -> float:
    """CPU microseconds of one decision in a steady state: an end is heard, and whoever asks is answered."""
    placer, names = Placer(Rates(), subtask_s=2.0, ahead_s=0.5, depth=3), list(SPEEDS)
    for name, speed in SPEEDS.items():
        placer.rates.learned["m", name, "fast"] = Rate.prior(TOKEN_S / speed)
    for i in range(workers):
        placer.worker(
            WorkerState(
                name=f"w{i}", boot="1", device_kind="cuda", device_name=names[i % 4], engines=("encoder",), resident=(MODEL.digest,)
            ),
            0.0,
        )  # fmt: skip
    for i in range(jobs):
        placer.want(
            Demand(
                job=f"j{i}", pass_number=0, tenant=f"t{i % 1000}", weight=1.0 + i % 3, priority=1, age=i, model_ids=frozenset(),
                model=MODEL, rows_waiting=10**9, bytes_waiting=10**9 * ROW_BYTES,
            )
        )  # fmt: skip
    ids, now = count(), 0.0
    flying = deque(_fill(placer, now, ids))
    taken = []
    # Ends come in the order of starts, which spreads them over all workers.
    for _ in range(SLICES):
        gc.collect()
        before = time.thread_time()
        for _ in range(SLICE):
            now += 2.0 / workers
            placer.closed(flying.popleft(), now, 2.0)
            flying += _fill(placer, now, ids)
        taken.append((time.thread_time() - before) / SLICE)
    return statistics.median(taken) * 1e6


def _fill(placer: Placer, now: float, ids: Iterator[int]) -> Iterator[int]:
    for p in placer.place(now):
        rows = max(1, int(p.budget_s / (p.price.of(1, ROW_BYTES) - p.price.start_s)))
        key = next(ids)
        placer.opened(p, key, now, rows=rows, size=rows * ROW_BYTES, seconds=p.budget_s)
        yield key


def memory_kb(rows: int) -> tuple[int, int]:
    """The largest resident set of a fresh process in which so many rows run on 20 GPUs, and what it grew by meanwhile."""
    command = [sys.executable, __file__, "--rows-in-this-process", str(rows)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, before = map(int, told.split())
    return peak, peak - before


def run_rows(rows: int) -> None:
    """What `memory_kb` starts."""
    scenario, _ = cluster(20, rows, row_s=4e-4)
    before = peak_rss_mb(os.getpid())
    Simulation(scenario, Motet(), spans=False).run()
    print(round(1024 * peak_rss_mb(os.getpid())), round(1024 * before))


def clock_s(reads: int = 20_000) -> float:
    """CPU of one look at the clock of this thread: a system call, eight of them for each sub-task."""
    began = time.thread_time()
    for _ in range(reads):
        time.thread_time()
    return (time.thread_time() - began) / reads


CLOCK_S = clock_s()


class Timed(Motet):
    """The policy, with the CPU that it takes, without that of looking at the clock."""

    cpu_s = 0.0

    def arrived(self, job: SimulatedJob, rows: UncarvedRows, now: float) -> None:
        began = time.thread_time()
        super().arrived(job, rows, now)
        self.cpu_s += time.thread_time() - began - CLOCK_S

    def ended(self, attempt: Attempt, now: float, busy_s: float | None, load_s: float) -> None:
        began = time.thread_time()
        super().ended(attempt, now, busy_s, load_s)
        self.cpu_s += time.thread_time() - began - CLOCK_S

    def decide(self, now: float) -> Iterator[tuple[Subtask, str]]:
        began = time.thread_time()
        for word in super().decide(now):
            self.cpu_s += time.thread_time() - began - CLOCK_S
            yield word
            began = time.thread_time()
        self.cpu_s += time.thread_time() - began - CLOCK_S

    def _subtask(self, pass_: _Pass, carved: Carved) -> Subtask:
        # What the virtual rows truly cost is the virtual cluster's to know.
        began = time.thread_time()
        subtask = super()._subtask(pass_, carved)
        self.cpu_s -= time.thread_time() - began + CLOCK_S
        return subtask

    def tick(self, now: float) -> Iterable[tuple[Subtask, str] | Attempt]:
        began = time.thread_time()
        words = list(super().tick(now))
        self.cpu_s += time.thread_time() - began - CLOCK_S
        return words


def billion(gpus: int, rows: int) -> dict[str, float]:
    """So many rows on so many GPUs, about two minutes of work for each."""
    scenario, bound_s = cluster(gpus, rows, row_s=120 * gpus * 1.875 / rows)
    policy = Timed()
    began = time.thread_time()
    outcome = Simulation(scenario, policy, spans=False).run()
    cpu_s = time.thread_time() - began
    return {
        "gpus": gpus,
        "rows": rows,
        "subtasks": outcome.subtasks,
        "policy_us": policy.cpu_s / outcome.subtasks * 1e6,
        "cluster_us": (cpu_s - policy.cpu_s) / outcome.subtasks * 1e6,
        "cpu_s": cpu_s,
        "rss_mb": peak_rss_mb(os.getpid()),
        "makespan_s": outcome.makespan_s,
        "efficiency": bound_s / outcome.makespan_s,
    }


def cluster(gpus: int, rows: int, *, row_s: float) -> tuple[Scenario, float]:
    """GPUs of four speeds and one job, and seconds below which no schedule can end."""
    names = list(SPEEDS)
    devices = tuple(
        SimulatedDevice(
            name=f"g{i}", kind=names[i % 4], speed=SPEEDS[names[i % 4]], true_speed=SPEEDS[names[i % 4]]
        )
        for i in range(gpus)
    )
    job = SimulatedJob(name="j", model="m", rows=rows)
    _, size = UncarvedRows(job).total()
    token_s = row_s * rows / (size / 4)
    model = Model(name="m", token_s=token_s, load_s=5.0)
    bound_s = 5.0 + row_s * rows / sum(d.true_speed for d in devices)
    return Scenario(devices=devices, models={"m": model}, jobs=(job,)), bound_s


def slope(points: Mapping[int, float]) -> float:
    """Of the straight line through the logarithms."""
    xs, ys = [math.log(n) for n in points], [math.log(y) for y in points.values()]
    return statistics.linear_regression(xs, ys).slope


def live_path() -> str | None:
    """What bench/dispatch.py measured last, in words."""
    file = RESULTS / "dispatch.json"
    if not file.exists():
        return None
    kept = json.loads(file.read_text("utf-8"))
    rates: Sequence[str] = [
        f"{rate:,} sub-tasks/s at {n} a step" for n, rate in kept["live_path_per_s"].items()
    ]
    return f"the live path (bench/dispatch.py, {kept['hardware']['date']}): {', '.join(rates)}"


if __name__ == "__main__":
    main()
