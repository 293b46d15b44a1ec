"""How much more memory the scheduler needs for a long job: peak of API + dispatcher + aggregator at N rows and at n.

Two runs, each with processes of its own: Postgres, Valkey, API, dispatcher and aggregator as `motet up` starts them,
two stand-ins for workers on the real wire (bench/stand_in.py: no model, labels by length), and a client in a process
of its own, which streams short rows in and all results back out through HTTP, row by row. Four label tasks, one pass.
The peak is VmHWM of /proc, which the kernel keeps and no sampling can miss. Last line, JSON:

  rss_growth_mb   sum of the three peaks (MiB) at 1,000,000 rows minus the same at 10,000

    python bench/memory.py            about one minute
    python bench/memory.py --quick    100,000 rows against 10,000: shows growth per row, not yet flatness
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import cluster_folder, finish, options, say, table
from stage import Run, Stage, drive

COUNTED = ("api", "dispatch", "aggregate")


def main() -> None:
    arguments = options(__doc__).parse_args()
    # A smoke run starts one cluster alone, and sets its run beside itself.
    sizes = arguments.size.of(full=(10_000, 1_000_000), quick=(10_000, 100_000), smoke=(500,))
    small, large = sizes[0], sizes[-1]
    runs: dict[int, Run] = {}
    for rows in sizes:
        with cluster_folder() as folder, Stage(folder) as stage:
            stage.register()
            runs[rows] = drive(stage, rows)
        say(
            f"  {rows:>9,} rows: {runs[rows].rows_per_s:,.0f} rows/s, from the first row sent to the last result read"
        )
    names = list(runs[small].peaks_mb)
    table(
        "largest resident set (MiB)",
        ("process", f"{small:,} rows", f"{large:,} rows", "more", f"PSS at the end, {large:,}"),
        [
            (
                name + ("" if name in COUNTED else " (not counted)"),
                f"{runs[small].peaks_mb[name]:.1f}",
                f"{runs[large].peaks_mb[name]:.1f}",
                f"{runs[large].peaks_mb[name] - runs[small].peaks_mb[name]:+.1f}",
                f"{runs[large].pss_mb[name]:.1f}",
            )
            for name in names
        ],
    )
    growth = sum(runs[large].peaks_mb[name] - runs[small].peaks_mb[name] for name in COUNTED)
    details = {
        str(rows): {"peaks_mb": run.peaks_mb, "pss_mb": run.pss_mb, "rows_per_s": round(run.rows_per_s)}
        for rows, run in runs.items()
    }
    finish("memory", {"rss_growth_mb": round(growth, 1)}, arguments, details=details)


if __name__ == "__main__":
    main()
