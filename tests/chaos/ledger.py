"""The jobs of a run: submitted by the real client, by several tenants, through everything that happens; then judged."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from motet import Client
from motet.errors import MotetError, NotFound
from motet.job import Job
from motet.tasks import Function
from tests.chaos.house import House
from tests.chaos.oracle import WAITS, Came, Order, Verdict, judge, order
from tests.chaos.recovery import Watcher

#: So long may one call of a client go on trying: longer than two faults one after the other.
CLIENT_S = 120.0
#: So often is a job submitted before that is trouble.
TRIES = 3
#: States of a job that has not ended.
UNDER_WAY = ("loading", "running")


def asked(name: str) -> Function:
    """The task of this name."""
    function, _, template = WAITS.get(name, (name, "", "{text}"))
    return Function(function, input=template)


@dataclass(slots=True)
class Entry:
    """A job, and what must become of it."""

    order: Order
    job: Job | None = None
    #: Its cells at the moment that cancel was answered: they stay so.
    frozen: Mapping[str, Any] | None = None
    deleted: bool = False
    #: A cancel or delete was sent whose answer never came: it may have come to pass, or not.
    asked: Literal["", "cancel", "delete"] = ""
    #: Held while it is cancelled, deleted or judged.
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class Freed:
    """How long workers held what had been cancelled or deleted."""

    after_s: float
    #: No other fault came meanwhile.
    alone: bool


@dataclass(slots=True)
class Ledger:
    """All jobs of a run. Its methods are called by many threads."""

    house: House
    watcher: Watcher
    seed: int
    clients: Sequence[Client]
    entries: dict[int, Entry] = field(default_factory=dict)
    #: What may not be: errors that a client did not wait out, threads that died or did not end.
    troubles: list[str] = field(default_factory=list)
    #: Of each answered cancel or delete of which a worker held something.
    freed: list[Freed] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def open(cls, house: House, watcher: Watcher, seed: int, tenants: int) -> Ledger:
        clients = [Client(house.url, token, timeout=CLIENT_S) for token in house.tenants(tenants)]
        return cls(house, watcher, seed, clients)

    def close(self) -> None:
        for client in self.clients:
            client.close()

    # -- during the run

    def new(self, *, rows: int = 0, tasks: Sequence[str] = (), poison: Sequence[str] = ()) -> Order:
        """The next job of this seed."""
        with self._lock:
            number = next(self._numbers)
            made = order(self.seed, number, len(self.clients), rows=rows, tasks=tasks, poison=poison)
            self.entries[number] = Entry(made)
        return made

    def submit(self, order: Order, source: Any = None) -> None:
        """Send it, and again under the same key for as long as that fails. ``source``: instead of its own texts."""
        errors = []
        for _ in range(TRIES):
            try:
                job = self.clients[order.tenant].submit(
                    list(order.texts) if source is None else source,
                    {name: asked(name) for name in order.tasks},
                    name=f"chaos {order.number}",
                    priority=order.priority,
                    progress=False,
                    key=f"chaos-{self.seed}-{order.number}",
                )
            except MotetError as error:
                errors.append(f"{type(error).__name__}: {error}")
                source = None
            else:
                if order.deadly:
                    self.watcher.deadly.add(job.id)
                self.entries[order.number].job = job
                return
        self.troubles.append(f"job {order.number}: submit: {'; then '.join(errors)}")

    def later(self, name: str, act: Callable[[], object]) -> threading.Thread:
        """Run this beside. It must end before the jobs are judged; what it raises is trouble."""

        def run() -> None:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - a thread that ends in silence would hide what it met
                self.troubles.append(f"{name}: {type(error).__name__}: {error}")

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()
        return thread

    def cancel(self, order: Order) -> bool:
        """Cancel it; False where it had ended before. Raises MotetError where no answer came."""
        with self._ending(order) as entry:
            if entry is None or entry.job is None:
                return False
            held = self._held(entry.job)
            entry.asked = "cancel"
            entry.job.cancel()
            entry.asked = ""
            if entry.job.record["state"] != "cancelled":
                return False
            entry.frozen = entry.job.record["cells"]
            self._await_free(held)
        return True

    def delete(self, order: Order) -> bool:
        """Delete it; False where it had ended before. Raises MotetError where no answer came."""
        with self._ending(order) as entry:
            if entry is None or entry.job is None or entry.job.refresh().record["state"] not in UNDER_WAY:
                return False
            held = self._held(entry.job)
            entry.asked = "delete"
            # Its first answer may have been lost: then it is not found.
            with suppress(NotFound):
                entry.job.delete()
            entry.asked, entry.deleted = "", True
            self._await_free(held)
        return True

    @contextmanager
    def _ending(self, order: Order) -> Iterator[Entry | None]:
        entry = self.entries.get(order.number)  # gone where it was judged before
        if entry is None:
            yield None
            return
        with entry.lock:
            yield entry

    def _held(self, job: Job) -> set[tuple[int, int]]:
        rows = self.house.sql(
            "SELECT l.subtask_id, l.attempt FROM lease l JOIN subtask s ON s.id = l.subtask_id WHERE s.job_id = %s",
            job.id,
        )
        return {(int(subtask), int(attempt)) for subtask, attempt in rows}

    def _await_free(self, held: set[tuple[int, int]]) -> None:
        began, faults = time.monotonic(), len(self.watcher.wounds)
        wound = self.watcher.wounds[-1] if self.watcher.wounds else None

        def look() -> None:
            while time.monotonic() - began < 30:
                if not any(held & set(beat.held) for beat in self.house.living().values()):
                    break
                time.sleep(0.1)
            alone = wound is not None and wound.alone and len(self.watcher.wounds) == faults
            self.freed.append(Freed(time.monotonic() - began, alone))

        if held:
            self.later("freed", look)

    # -- after it

    def join(self, within_s: float, prefix: str = "") -> None:
        """Wait for what runs beside. What has not ended then is trouble."""
        until = time.monotonic() + within_s
        for thread in [one for one in self._threads if one.name.startswith(prefix)]:
            thread.join(max(0.1, until - time.monotonic()))
            if thread.is_alive():
                self.troubles.append(f"{thread.name} still runs")

    def await_end(self, within_s: float) -> float:
        """Wait until all that runs beside has ended and every job is terminal. Returns the seconds that took."""
        began = time.monotonic()
        self.join(within_s)
        for entry in list(self.entries.values()):
            if entry.job is not None and not entry.deleted:
                left_s = max(0.1, within_s - (time.monotonic() - began))
                try:
                    entry.job.wait(check=False, timeout=left_s)
                except NotFound:
                    if entry.asked != "delete":
                        self.troubles.append(f"job {entry.order.number}: wait: NotFound")
                except (TimeoutError, MotetError) as error:
                    self.troubles.append(f"job {entry.order.number}: wait: {type(error).__name__}")
        return time.monotonic() - began

    @property
    def kept(self) -> tuple[int, int]:
        """How many jobs must be stored now, at least and at most."""
        there = [entry for entry in self.entries.values() if not entry.deleted]
        return len([entry for entry in there if entry.asked != "delete"]), len(there)

    def judge(self) -> Verdict:
        """Compare all that is stored with all that must be."""
        verdict = Verdict()
        for entry in list(self.entries.values()):
            self.judge_one(verdict, entry)
        return verdict

    def judge_one(self, verdict: Verdict, entry: Entry) -> None:
        """Compare one job that has ended with what it must be."""
        order, job = entry.order, entry.job
        if job is None:
            verdict.breach("stuck", f"job {order.number} could not be submitted")
            return
        client = self.clients[order.tenant]
        try:
            job = client.job(job.id)
        except NotFound:
            if not entry.deleted and entry.asked != "delete":
                verdict.breach("lost", f"job {order.number} is not there", order.cells)
            return
        if entry.deleted:
            verdict.breach("wrong", f"job {order.number} was deleted and is there")
            return
        record = job.record
        if record["state"] not in ("succeeded", "cancelled"):
            verdict.breach(
                "stuck", f"job {order.number} is {record['state']}: {record['reason']} {record['cells']}"
            )
            return
        cells = record["cells"]
        count = judge(verdict, order, cells_of(job), record["state"])
        _compare_counters(verdict, entry, record["state"], cells, count)
        stored, distinct = self.house.sql(
            "SELECT count(*), count(DISTINCT (row, task)) FROM results WHERE job_id = %s",
            job.id,
            timeout_s=30,
        )[0]
        if stored != distinct:
            verdict.breach("doubled", f"job {order.number}: SQL shows {stored - distinct} cells twice")


def _compare_counters(
    verdict: Verdict, entry: Entry, state: str, cells: Mapping[str, int], count: Mapping[str, int]
) -> None:
    order = entry.order
    if cells["ok"] + cells["error"] + cells["skipped"] != order.cells:
        verdict.breach("wrong", f"job {order.number}: counters {dict(cells)} do not add up to {order.cells}")
    if state == "succeeded" and any(cells[name] != count[name] for name in count):
        verdict.breach("wrong", f"job {order.number}: counters {dict(cells)}, cells {dict(count)}")
    if entry.frozen is not None and any(cells[name] != entry.frozen[name] for name in count):
        verdict.breach("wrong", f"job {order.number}: {dict(entry.frozen)} at its cancel, {dict(cells)} now")
    if state == "cancelled" and entry.frozen is None and entry.asked != "cancel":
        verdict.breach("wrong", f"job {order.number} is cancelled, and nobody did that")
    if state == "cancelled" and (count["ok"] > cells["ok"] or count["error"] > cells["error"]):
        verdict.breach("wrong", f"job {order.number}: counters {dict(cells)}, cells {dict(count)}")


def cells_of(job: Job) -> Iterator[tuple[int, Mapping[str, Came]]]:
    """Each row of a job, and its cells by task."""
    for row in job.results(check=False):
        yield (
            row.index,
            {
                task: Came(cell.status, cell.value if cell.error is None else cell.error.error)
                for task, cell in row.items()
            },
        )
