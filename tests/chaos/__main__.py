"""Chaos from the command line: real processes under a seeded schedule of faults, judged by an oracle.

python -m tests.chaos --faults 1000 --jobs 200 --rows 30000       what `make chaos` runs
CHAOS_SEED=7 python -m tests.chaos --faults 60                    the same faults in the same order
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import Plan, run, table

DEFAULT_SEED = 20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CHAOS_SEED", DEFAULT_SEED)))
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--patience",
        type=float,
        default=15.0,
        help="seconds until the next fault, where work does not go on before",
    )
    parser.add_argument(
        "--attack", type=float, default=math.inf, help="seconds after which faults come faster"
    )
    parser.add_argument("--data", type=Path, help="keep the cluster's folder, with its logs, here")
    parser.add_argument("--save", type=Path, help="write the last line to this file too")
    options = parser.parse_args()
    plan = Plan(
        seed=options.seed,
        faults=options.faults,
        jobs=options.jobs,
        rows=options.rows,
        patience_s=options.patience,
        attack_s=options.attack,
        workers=options.workers,
    )
    with tempfile.TemporaryDirectory(prefix="motet-chaos-") as folder:
        report = run(options.data or Path(folder, "data"), plan, lambda words: print(words, flush=True))
    print(table(report))
    for failure in report.failures[:50]:
        print(failure)
    line = json.dumps({"benchmark": "chaos", **report.to_json()}, ensure_ascii=False)
    if options.save:
        options.save.write_text(json.dumps(json.loads(line), indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(line)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
