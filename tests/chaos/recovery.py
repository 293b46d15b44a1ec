"""How long work was held up by a fault: the watcher looks into Postgres, ten times a second.

A wound is healed when *everything that was under way at the fault is recorded, and one sub-task that was leased
after it as well*. The first half waits for what the fault took with it (a killed worker's rows done again, a wiped
queue sent again, outcomes merged), the second for the whole way through: carve, lease, send, run, merge. Jobs with
rows that end their process are left out of the first half: they take what it takes to find the row; and a wound that
comes while they run is not alone, since their neighbours wait for the worker that such a row holds up.

While Postgres is away nobody can say what is under way: then that is noted when it is back.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from tests.chaos.house import House

LOOK_S = 0.1
#: (job, pass, block) -> ranges [lo, hi) in the block's order.
Ranges = Mapping[tuple[str, int, int], Sequence[tuple[int, int]]]


@dataclass(slots=True)
class Wound:
    """One fault, and what must be recorded until work goes on."""

    kind: str
    at: float
    #: None: not known yet.
    under_way: Ranges | None
    #: Sub-tasks with a larger id were leased after the fault.
    newest_id: int
    #: Postgres was there, no other wound open, nothing frozen and no deadly row about, from the fault until it healed.
    alone: bool
    healed_s: float | None = None
    closed: threading.Event = field(default_factory=threading.Event)


def covered(lo: int, hi: int, done: Iterable[tuple[int, int]]) -> bool:
    """Whether the union of the done ranges holds [lo, hi)."""
    for a, b in sorted(done):
        if a <= lo < b:
            lo = b
    return lo >= hi


class Watcher:
    """A thread that looks on: how much waits, what is recorded, which wounds have healed."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._line: psycopg.Connection[Any] | None = None
        self._lock = threading.Lock()
        self._open: list[Wound] = []
        self._newest_id = 0
        self._deadly_runs = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        #: Jobs with a row that ends its process.
        self.deadly: set[str] = set()
        #: Cells of running jobs that are not final, as last seen.
        self.waiting = 0
        self.wounds: list[Wound] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        if self._line:
            self._line.close()

    def wound(self, kind: str, *, frozen: bool) -> Wound:
        """Call right before the fault: notes what is under way."""
        with self._lock:
            under_way: Ranges | None = None
            try:
                under_way = self._under_way()
            except (psycopg.Error, OSError):
                self._line = None
            for other in self._open:
                other.alone = False
            alone = not (frozen or self._open or self._deadly_runs or under_way is None)
            made = Wound(kind, time.monotonic(), under_way, self._newest_id, alone)
            self._open.append(made)
            self.wounds.append(made)
        return made

    def call_off(self, wound: Wound) -> None:
        """The fault did not come about."""
        with self._lock:
            if wound in self._open:
                self._open.remove(wound)
            self.wounds.remove(wound)
        wound.closed.set()

    @property
    def open(self) -> int:
        """Wounds that have not healed."""
        return len(self._open)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_S):
            try:
                with self._lock:
                    self._look()
            except (psycopg.Error, OSError):
                self._line = None

    def _ask(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        if self._line is None or self._line.closed:
            self._line = psycopg.connect(self._house.database_url, autocommit=True, connect_timeout=2)
        return self._line.execute(statement, values).fetchall()

    def _look(self) -> None:
        waits = """SELECT coalesce(sum(n_rows * n_tasks - cells_ok - cells_error - cells_skipped), 0)
                     FROM job WHERE state = 'running'"""
        self.waiting = int(self._ask(waits)[0][0])
        running = {str(row[0]) for row in self._ask("SELECT id FROM job WHERE state = 'running'")}
        self._deadly_runs = bool(self.deadly & running)
        if not self._open:
            return
        for wound in self._open:
            if wound.under_way is None:
                wound.under_way, wound.newest_id = self._under_way(), self._newest_id
        newest_done = self._ask("SELECT coalesce(max(id), 0) FROM subtask WHERE state = 'done'")[0][0]
        jobs = sorted({job for wound in self._open for job, _, _ in wound.under_way or ()})
        done = self._done([job for job in jobs if job in running])
        now = time.monotonic()
        for wound in list(self._open):
            if self._deadly_runs:
                wound.alone = False
            later = newest_done > wound.newest_id
            # Nothing waits: then there is nothing that could be leased after it.
            if (later or not running) and all(
                job not in running or all(covered(lo, hi, done[job, number, block]) for lo, hi in ranges)
                for (job, number, block), ranges in (wound.under_way or {}).items()
            ):
                wound.healed_s = now - wound.at
                self._open.remove(wound)
                wound.closed.set()

    def _under_way(self) -> Ranges:
        self._newest_id = self._ask("SELECT coalesce(max(id), 0) FROM subtask")[0][0]
        found: dict[tuple[str, int, int], list[tuple[int, int]]] = defaultdict(list)
        held = """SELECT job_id, pass_number, blocks, los, his FROM subtask
                   WHERE state = 'open' AND EXISTS (SELECT 1 FROM lease WHERE subtask_id = subtask.id)"""
        for job, number, blocks, los, his in self._ask(held):
            if str(job) not in self.deadly:
                for block, lo, hi in zip(blocks, los, his, strict=True):
                    found[str(job), number, block].append((lo, hi))
        return dict(found)

    def _done(self, jobs: Sequence[str]) -> Mapping[tuple[str, int, int], list[tuple[int, int]]]:
        found: dict[tuple[str, int, int], list[tuple[int, int]]] = defaultdict(list)
        if jobs:
            closed = """SELECT job_id, pass_number, blocks, los, his FROM subtask
                         WHERE state = 'done' AND job_id = ANY(%s::uuid[])"""
            for job, number, blocks, los, his in self._ask(closed, list(jobs)):
                for block, lo, hi in zip(blocks, los, his, strict=True):
                    found[str(job), number, block].append((lo, hi))
        return found
