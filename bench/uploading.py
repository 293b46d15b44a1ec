"""What a client waits for while rows are still on their way: its first result, and the whole.

Used by bench/scale.py. It asks nothing that an older motet has not, so it can be run over an older checkout too.
"""

from __future__ import annotations

import statistics
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from motet import Client
from motet.demo.texts import TASKS

#: Seconds between two looks whether the job is open.
_GLANCE_S = 0.01


class FirstResult(threading.Thread):
    """Waits for the first row of the job of this name, beside whoever sends its rows."""

    def __init__(self, client: Client, name: str) -> None:
        super().__init__(daemon=True)
        self._client, self._name = client, name
        self._began = time.perf_counter()
        #: From here on until the first row was read.
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        while not (found := [job for job in self._client.jobs(limit=1) if job.name == self._name]):
            time.sleep(_GLANCE_S)
        next(found[0].results(order="done"))
        self.seconds = time.perf_counter() - self._began


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Seconds from the first row read on the client's side."""

    submit_s: float
    first_result_s: float
    total_s: float


def wait_for(client: Client, texts: Sequence[str], came_s: float) -> Wait:
    """Send these texts, which come over so many seconds, and read all results as blocks are done."""
    name = uuid.uuid4().hex
    first = FirstResult(client, name)
    began = time.perf_counter()
    # Values that no run before had, or its blocks would be shown again; and nothing is kept for the next one.
    job = client.submit(_slowly(texts, came_s), TASKS, name=name, reuse=False, progress=False)
    submit_s = time.perf_counter() - began
    rows = sum(len(block) for block in job.blocks(order="done"))
    total_s = time.perf_counter() - began
    assert rows == len(texts), f"{rows:,} rows of {len(texts):,} came back"
    first.join()
    return Wait(submit_s=submit_s, first_result_s=first.seconds, total_s=total_s)


def _slowly(texts: Sequence[str], came_s: float) -> Iterator[str]:
    """The texts, evenly over so many seconds."""
    began = time.monotonic()
    for i, text in enumerate(texts):
        left_s = began + came_s * i / len(texts) - time.monotonic()
        if left_s > 0.001:
            time.sleep(left_s)
        yield text


def median(waits: Sequence[Wait]) -> Wait:
    """Of each figure by itself."""
    return Wait(
        submit_s=statistics.median(w.submit_s for w in waits),
        first_result_s=statistics.median(w.first_result_s for w in waits),
        total_s=statistics.median(w.total_s for w in waits),
    )
