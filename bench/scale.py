"""What one machine does, what each process of it pays for, and which of them is full first. Prints docs/scale.md's figures.

1. One job of 1,000,000 short rows x 4 label tasks, end to end: client, API, dispatcher, aggregator, Postgres and
   Valkey as processes, two stand-ins for workers on the real wire (bench/stand_in.py). CPU seconds are those of
   /proc, Postgres with all its backends.
2. The leader with 10, 100 and 1,000 workers, as below, and what a sub-task takes in Valkey: payload and message until
   it is answered.

Last line, JSON: rows_per_s, first_result_s (from the first row read to the first one answered), cpu_us_per_row by process, full_at_rows_per_s (one core of each process), wal and stored
bytes per row, redis bytes per row under way, dispatcher_step_ms by workers, next_bottleneck.

With ``--workers N`` the leader alone is measured, with 100 workers up to N (bench/leading.py): idle; while all of them
are filled with three sub-tasks each; and full, while a hundredth of the leases has changed, and while all that a tenth of
the workers held has been answered. Last line, JSON: idle_step_ms and full_step_ms (medians of beat steps, wall clock),
subtasks_s (taken in as ended, placed, leased, packed and published anew a second of all steps from the word that they ended
until that tenth has work, while all else is live; the aggregator has recorded them before, and the leader's beat steps
went on meanwhile: else that second would pay for several ones of beats and leases), dispatcher_mb (largest resident sets of this process, the client included, and of the one that publishes), longest_step_s, and
step_slope_idle and step_slope_full (log-log slopes over the numbers of workers).

With ``--texts N`` a cluster of two real CPU workers answers the demo's four tasks for N of its texts, three times each: as
fast as they are read, and where they come over ``--over`` seconds, as from a database or over a line. Last line, JSON:
first_result_s and total_s of both, medians, from the first row read to the first and the last row answered. Over an
older checkout: PYTHONPATH=CHECKOUT python bench/scale.py --texts N --save FILE.

    python bench/scale.py                    about three minutes
    python bench/scale.py --quick            100,000 rows, up to 100 workers
    python bench/scale.py --workers 10000    the leader: about five minutes
    python bench/scale.py --texts 5000       first results of real work: some minutes
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import cluster, cluster_folder, finish, options, say, table, texts
from leading import BESIDE, ROWS, Lap, Leading, know_the_speed, leading
from stage import Run, Stage, drive
from uploading import Wait, median, wait_for

from motet import Client

#: Processes of the scheduler's side, which are full at one core each; Postgres has as many as there are backends.
ONE_CORE = ("api", "dispatch", "aggregate")


def leader(arguments: argparse.Namespace) -> None:
    """Measure and tell how the leader's step grows with workers."""
    looks, patience_s, least = arguments.size.of(full=(9, 60.0, 100), quick=(5, 20.0, 100), smoke=(2, 5.0, 2))
    counts = sorted({*(n for n in (least, 1_000) if n < arguments.workers), arguments.workers})
    with cluster_folder() as folder, Stage(folder) as stage:
        stage.register()
        know_the_speed(stage)
        found = [leading(stage, count, looks=looks, patience_s=patience_s) for count in counts]
    most = found[-1]
    tell_leader(found)
    tell_stages(most)
    finish(
        "scale_workers",
        {
            "workers": most.workers,
            "idle_step_ms": round(most.idle_ms, 1),
            "full_step_ms": round(most.full_ms, 1),
            "subtasks_s": round(most.subtasks_s),
            "dispatcher_mb": round(most.dispatcher_mb),
            "longest_step_s": round(max(s.longest_s for s in found), 3),
            "step_slope_idle": slope({s.workers: s.idle_ms for s in found}),
            "step_slope_full": slope({s.workers: s.full_ms for s in found}),
        },
        arguments,
        whole=most.workers >= 10_000,
        details={str(s.workers): _laps(s) for s in found},
    )


def tell_leader(found: Sequence[Leading]) -> None:
    """The figures of the leader as a table."""
    table(
        "the leader's step (ms, CPU in brackets)",
        ("workers", "idle", "full", "leases", "longest", "sub-tasks/s", "process MiB"),
        [
            (
                f"{s.workers:,}",
                f"{s.idle_ms:.1f} ({1e3 * statistics.median(x.cpu_s for x in s.idle):.1f})",
                f"{s.full_ms:.1f} ({1e3 * statistics.median(x.cpu_s for x in s.changed):.1f})",
                f"{s.leases:,}",
                f"{s.longest_s * 1e3:.0f}",
                f"{s.subtasks_s:,.0f}",
                f"{s.dispatcher_mb:.0f}",
            )
            for s in found
        ],
    )


def tell_stages(found: Leading) -> None:
    """What a sub-task takes the leader, stage by stage."""
    table(
        f"a sub-task at {found.workers:,} workers",
        ("stage", "us", "CPU us"),
        [
            (stage, f"{wall:.1f}", f"{cpu:.1f}")
            for stage, (wall, cpu) in [
                *((stage, both) for stage, both in found.stages.items() if not stage.startswith(BESIDE)),
                ("all", found.step_us),
                *((stage, both) for stage, both in found.stages.items() if stage.startswith(BESIDE)),
            ]
        ],
    )


def slope(points: Mapping[int, float]) -> float:
    """Of the straight line through the logarithms; 0 of a single point."""
    if len(points) < 2:
        return 0.0
    xs, ys = [math.log(n) for n in points], [math.log(y) for y in points.values()]
    return round(statistics.linear_regression(xs, ys).slope, 3)


def _laps(found: Leading) -> dict[str, object]:
    def told(laps: list[Lap]) -> list[list[float]]:
        return [[round(lap.seconds * 1e3, 2), round(lap.cpu_s * 1e3, 2), lap.sent] for lap in laps]

    return {
        "idle": round(found.idle_ms, 1),
        "full": round(found.full_ms, 1),
        "longest": round(found.longest_s * 1e3, 1),
        "leases": found.leases,
        "sent_per_s": round(found.subtasks_s),
        "stage_us": {stage.strip(): [round(us, 1) for us in both] for stage, both in found.stages.items()},
        "idle_laps": told(found.idle),
        "changed": told(found.changed),
        "filling": told(found.filling)[:20],
        "refilling": told(found.refilling),
    }


def real_work(arguments: argparse.Namespace) -> None:
    """Measure and tell how long callers of real work wait while rows are on their way."""
    rounds = arguments.size.of(full=3, quick=1, smoke=1)
    rows = texts(arguments.texts)
    found: dict[str, list[Wait]] = {"at once": [], "slowly": []}
    with cluster() as running, Client(running.url, running.tokens["user"]) as client:
        wait_for(client, rows[:256], 0.0)  # loads the models
        for _ in range(rounds):
            found["at once"].append(wait_for(client, rows, 0.0))
            found["slowly"].append(wait_for(client, rows, arguments.over))
    waits = {how: median(some) for how, some in found.items()}
    table(
        f"{len(rows):,} texts of the demo x 4 tasks, medians of {rounds}",
        ("how they come", "sent after s", "first result s", "all results s"),
        [
            (how, f"{w.submit_s:.2f}", f"{w.first_result_s:.2f}", f"{w.total_s:.2f}")
            for how, w in waits.items()
        ],
    )
    at_once, slowly = waits["at once"], waits["slowly"]
    finish(
        "scale_texts",
        {
            "rows": len(rows),
            "first_result_s": round(at_once.first_result_s, 2),
            "total_s": round(at_once.total_s, 2),
            "slow_over_s": arguments.over,
            "slow_first_result_s": round(slowly.first_result_s, 2),
            "slow_total_s": round(slowly.total_s, 2),
        },
        arguments,
        whole=arguments.texts >= 5_000,
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--workers", type=int, help="measure the leader alone, with up to so many workers")
    parser.add_argument(
        "--texts", type=int, help="measure first results of so many of the demo's texts alone"
    )
    parser.add_argument(
        "--over", type=float, default=10.0, help="seconds over which they come  [default: %(default)s]"
    )
    arguments = parser.parse_args()
    if arguments.texts:
        real_work(arguments)
        return
    if arguments.workers:
        leader(arguments)
        return
    rows, counts, looks = arguments.size.of(
        full=(1_000_000, (10, 100, 1000), 7), quick=(100_000, (10, 100), 5), smoke=(1_000, (2,), 2)
    )
    with cluster_folder() as folder, Stage(folder) as stage:
        stage.register()
        drive(stage, min(rows, 20_000))
        run = drive(stage, rows)
        know_the_speed(stage)
        steps = [leading(stage, count, looks=looks, patience_s=20.0) for count in counts]
    tell(run)
    tell_leader(steps)
    per_row = {name: seconds / run.rows * 1e6 for name, seconds in run.cpu_s.items()}
    # In a run of a fraction of a second a process may have taken less than the clock of its CPU time tells: a hundredth.
    full_at = {name: round(1e6 / max(per_row[name], 1e4 / run.rows)) for name in ONE_CORE}
    finish(
        "scale",
        {
            "rows_per_s": round(run.rows_per_s),
            "first_result_s": round(run.first_result_s, 2),
            "cpu_us_per_row": {name: round(us, 2) for name, us in per_row.items()},
            "full_at_rows_per_s": full_at,
            "next_bottleneck": min(full_at, key=full_at.__getitem__),
            "text_bytes_per_row": round(run.text_bytes / run.rows, 1),
            "stored_bytes_per_row": round(run.stored_bytes / run.rows, 1),
            "wal_bytes_per_row": round(run.wal_bytes / run.rows, 1),
            "subtasks": run.subtasks,
            "redis_bytes": {
                "subtask": round(steps[-1].valkey_bytes),
                "row": round(steps[-1].valkey_bytes / ROWS),
            },
            "redis_peak_mb": round(run.redis_peak_mb, 1),
            "dispatcher_step_ms": {
                str(s.workers): {
                    "idle": round(s.idle_ms, 1),
                    "full": round(s.full_ms, 1),
                    "longest": round(s.longest_s * 1e3, 1),
                    "leases": s.leases,
                    "sent_per_s": round(s.subtasks_s),
                }
                for s in steps
            },
        },
        arguments,
        details={
            "rows": run.rows,
            "cells": run.cells,
            "submit_s": round(run.submit_s, 2),
            "running_s": round(run.running_s, 2),
            "total_s": round(run.total_s, 2),
            "peaks_mb": {name: round(mb, 1) for name, mb in run.peaks_mb.items()},
        },
    )


def tell(run: Run) -> None:
    """The figures as tables."""
    say(
        f"{run.rows:,} rows x 4 tasks: first result after {run.first_result_s:.2f} s, submitted in "
        f"{run.submit_s:.1f} s, ran {run.running_s:.1f} s, {run.total_s:.1f} s in all, {run.rows_per_s:,.0f} rows/s, {run.subtasks:,} sub-tasks"
    )
    table(
        "CPU by process",
        ("process", "s", "us per row", "us per cell", "rows/s of one core"),
        [
            (
                name,
                f"{s:.2f}",
                f"{s / run.rows * 1e6:.2f}",
                f"{s / run.cells * 1e6:.2f}",
                f"{run.rows / max(s, 1e-9):,.0f}",
            )
            for name, s in sorted(run.cpu_s.items(), key=lambda item: -item[1])
        ],
    )


if __name__ == "__main__":
    main()
