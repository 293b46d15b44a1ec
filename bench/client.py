"""A client in a process of its own: streams short rows in and every result back out, and says what that took.

MOTET_URL=… MOTET_TOKEN=… python bench/client.py --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import peak_rss_mb
from stage import label_tasks, pss_mb, stream_short_texts
from uploading import FirstResult

from motet import Client


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--tasks", type=int, default=4)
    arguments = parser.parse_args()
    texts = stream_short_texts(arguments.rows)
    cpu, start = time.process_time(), time.perf_counter()
    with Client() as client:
        name = f"rows of {os.getpid()}"
        first = FirstResult(client, name)
        job = client.submit(texts, label_tasks(arguments.tasks), name=name, progress=False)
        submit_s = time.perf_counter() - start
        rows = cells = 0
        for row in job.results():
            assert row.index == rows, f"row {row.index} came in the place of {rows}"
            rows += 1
            cells += sum(cell.ok for cell in row.values())
        total_s = time.perf_counter() - start
        first.join()
    assert (rows, cells) == (arguments.rows, arguments.rows * arguments.tasks), f"{rows} rows, {cells} cells"
    told = {
        "job": job.id,
        "cells": cells,
        "submit_s": submit_s,
        "first_result_s": first.seconds,
        "total_s": total_s,
        "cpu_s": time.process_time() - cpu,
        "peak_mb": peak_rss_mb(os.getpid()),
        "pss_mb": pss_mb(os.getpid()),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
