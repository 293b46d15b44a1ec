"""`vllm run-batch` in its own environment, on a clock of its own: the last line says the seconds of its work.

The clock begins when its model is loaded, and ends when the last answer is in its file.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from vllm.entrypoints.launchers import run_batch as program


def main() -> None:
    work, took = program.run_batch, []

    async def timed(*given: Any, **named: Any) -> None:
        began = time.perf_counter()
        await work(*given, **named)
        took.append(time.perf_counter() - began)

    program.run_batch = timed
    asyncio.run(program.main(program.parse_args()))
    print(*took, flush=True)


if __name__ == "__main__":
    main()
