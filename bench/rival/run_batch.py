"""`vllm run-batch` in its own environment: its model is loaded once, and it works on one file after the other.

It says "ready" when its model is loaded. Then each line of stdin holds the paths of a file and of its answers, as JSON; the
line of stdout that answers it says the seconds from reading the file to the last answer written.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
import time
from typing import Any

from vllm.entrypoints.launchers import run_batch as program

work = program.run_batch


async def works(engine: Any, arguments: Any) -> None:
    """In place of its work on the one file that its arguments name."""
    print("ready", file=told, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        given = copy.copy(arguments)
        given.input_file, given.output_file = json.loads(line)
        began = time.perf_counter()
        await work(engine, given)
        print(time.perf_counter() - began, file=told, flush=True)


if __name__ == "__main__":
    # vLLM writes its log to stdout too.
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    program.run_batch = works
    asyncio.run(program.main(program.parse_args()))
