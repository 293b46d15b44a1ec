"""What a sub-task costs beside its model: CPU of every process, and how many a second the live path can send.

1. A job of short rows x 4 label tasks through the real services, with stand-ins for workers that say that a row takes
   62.5 ms: so that a sub-task, two seconds of work, has some 32 rows, and its own cost is not drowned by that of its
   rows. CPU seconds are those of /proc, Postgres with all its backends, client and stand-ins included.
2. The live path alone, in this process: 64 sub-tasks of 32 rows a step to 64 workers, their rows found (frontier),
   leased, their payloads built, published. Then one sub-task a step. Wall clock; each a median of steps.

Last line, JSON: cpu_ms_per_subtask (all processes), share_of_subtask (of a sub-task's two seconds), cpu_ms by process,
subtasks_per_s of the run, live_path_per_s at 64 and at 1 a step, live_path_ms per sub-task by stage.

    python bench/dispatch.py            about a minute
    python bench/dispatch.py --quick    a quarter of it
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import cluster_folder, finish, options, say, table
from stage import Run, Stage, drive, label_tasks, short_texts

from motet.client import Client
from motet.protocol.transport import RedisTransport
from scheduler.payloads import Payloads
from scheduler.policy.carve import Carved, Frontier, OpenBlock, Range
from scheduler.store import demand, leases
from scheduler.store.database import Database
from scheduler.store.leadership import lead
from scheduler.store.leases import Cut
from scheduler.store.manifests import Manifests

SUBTASK_S = 2.0
ROWS = 32
WORKERS = 64
STAGES = ("frontier", "lease", "payload", "publish")


def main() -> None:
    arguments = options(__doc__).parse_args()
    rows, steps = arguments.size.of(full=(128_000, 100), quick=(16_000, 20), smoke=(640, 2))
    with cluster_folder() as folder, Stage(folder) as stage:
        stage.register()
        drive(stage, min(rows, 2_000), workers=WORKERS, row_s=SUBTASK_S / ROWS)
        run = drive(stage, rows, workers=WORKERS, row_s=SUBTASK_S / ROWS)
        with stopped(stage.pids["dispatch"]):
            live = live_path(stage, (64, 1), steps)
    cpu_ms = {name: seconds / run.subtasks * 1e3 for name, seconds in run.cpu_s.items()}
    tell(run, cpu_ms, live)
    finish(
        "dispatch",
        {
            "cpu_ms_per_subtask": round(sum(cpu_ms.values()), 3),
            "share_of_subtask": round(sum(cpu_ms.values()) / 1e3 / SUBTASK_S, 5),
            "cpu_ms": {name: round(ms, 3) for name, ms in cpu_ms.items()},
            "subtasks_per_s": round(run.subtasks / run.running_s),
            "live_path_per_s": {str(n): round(1e3 / sum(ms.values())) for n, ms in live.items()},
            "live_path_ms": {str(n): {name: round(ms[name], 4) for name in STAGES} for n, ms in live.items()},
        },
        arguments,
        details={"rows": run.rows, "subtasks": run.subtasks, "running_s": round(run.running_s, 2)},
    )


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def live_path(stage: Stage, counts: Sequence[int], steps: int) -> dict[int, dict[str, float]]:
    """Sub-tasks in a step -> milliseconds of each stage per sub-task."""
    transport = RedisTransport(stage.redis.scheduler)
    try:
        with stage.database() as database, Client(stage.url, stage.tokens["user"]) as client:
            epoch = _lead(database)
            found = {}
            for count in counts:
                # The first steps read models and make plans.
                job = client.submit(short_texts((steps + 5) * count * ROWS), label_tasks(4))
                payloads = Payloads(database, Manifests())
                laps = [_step(database, transport, payloads, epoch, job.id, count) for _ in range(steps + 5)]
                found[count] = {
                    name: statistics.median(lap[name] * 1e3 / count for lap in laps[5:]) for name in STAGES
                }
                job.cancel()
            for i in range(WORKERS):
                transport.forget(f"nobody-{i}")
    finally:
        transport.close()
    return found


def _step(
    database: Database, transport: RedisTransport, payloads: Payloads, epoch: int, job: str, count: int
) -> dict[str, float]:
    """Send so many sub-tasks. The seconds of each stage."""
    start = time.perf_counter()
    with database.transaction() as connection:
        frontier = demand.frontier(connection, job, 0, demand.Lengths(), rows=count * ROWS, limit=count)
    found = time.perf_counter()
    cuts = _cuts(job, frontier, count)
    carved = time.perf_counter()
    leased = leases.lease(database, epoch, cuts, 600.0)
    held = time.perf_counter()
    by_worker = payloads.assignments(leased)
    built = time.perf_counter()
    transport.publish_all(by_worker)
    sent = time.perf_counter()
    assert len(leased) == count, f"{len(leased)} of {count} cuts were leased"
    return {
        "frontier": found - start,
        "lease": held - carved,
        "payload": built - held,
        "publish": sent - built,
    }


def _lead(database: Database) -> int:
    """The stopped dispatcher's lease runs out first."""
    deadline = time.monotonic() + 30
    while (epoch := lead(database, "bench", None, 600.0)) is None:
        assert time.monotonic() < deadline, "another dispatcher leads"
        time.sleep(0.2)
    return epoch


def _cuts(job: str, frontier: Frontier, count: int) -> list[Cut]:
    """So many sub-tasks of ROWS rows each, in order, one for each worker."""
    return [
        Cut(
            job=job,
            pass_number=0,
            worker=f"nobody-{i % WORKERS}",
            boot="b",
            device="nobody",
            device_kind="cpu",
            predicted_s=SUBTASK_S,
            carved=Carved(ranges=(cut,), todo=block.todo),
        )
        for i, (block, cut) in zip(range(count), _ranges(frontier.blocks), strict=False)
    ]


def _ranges(blocks: list[OpenBlock]) -> Iterator[tuple[OpenBlock, Range]]:
    for block in blocks:
        for lo in range(block.cursor, block.n, ROWS):
            hi = min(block.n, lo + ROWS)
            yield block, Range(block.number, lo, hi, block.bytes_between(lo, hi))


def tell(run: Run, cpu_ms: dict[str, float], live: dict[int, dict[str, float]]) -> None:
    """The figures as tables."""
    say(
        f"{run.rows:,} rows x 4 tasks in {run.subtasks:,} sub-tasks of {run.rows / run.subtasks:.0f} rows: "
        f"{run.subtasks / run.running_s:,.0f} sub-tasks/s"
    )
    table(
        "CPU per sub-task by process",
        ("process", "ms", "of its two seconds"),
        [
            (name, f"{ms:.3f}", f"{ms / 1e3 / SUBTASK_S:.3%}")
            for name, ms in (
                *sorted(cpu_ms.items(), key=lambda item: -item[1]),
                ("all", sum(cpu_ms.values())),
            )
        ],
    )
    table(
        "the live path alone, ms per sub-task",
        ("sub-tasks a step", *STAGES, "all", "sub-tasks/s"),
        [
            (
                count,
                *(f"{ms[name]:.3f}" for name in STAGES),
                f"{sum(ms.values()):.3f}",
                f"{1e3 / sum(ms.values()):,.0f}",
            )
            for count, ms in live.items()
        ],
    )


if __name__ == "__main__":
    main()
