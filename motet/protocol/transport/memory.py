"""A transport without Redis, for tests and the simulator: both sides in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from motet.protocol.transport.contract import DEAD_KEPT, Entry, Heard, Lag
from motet.protocol.wire import Assignment, Beat, Control, Running


@dataclass
class MemoryTransport:
    """The same contract without Redis: the scheduler's side, and a worker's side through ``worker(name)``."""

    payloads: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    queues: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    newest_beats: dict[str, Beat] = field(default_factory=dict)
    controls: dict[str, Control] = field(default_factory=dict)
    under_way: dict[str, Running] = field(default_factory=dict)
    entries: dict[str, tuple[tuple[int, int], bytes]] = field(default_factory=dict)
    #: Entry -> (consumer, when it was read).
    pending: dict[str, tuple[str, float]] = field(default_factory=dict)
    #: Entry -> when it was put on the stream.
    reported_at: dict[str, float] = field(default_factory=dict)
    buried: list[tuple[Entry, str]] = field(default_factory=list)
    #: API process -> what workers said to it.
    said: dict[str, list[bytes]] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    canary: str = "0"
    #: Differences that audits found.
    found: int = 0
    _next: int = 0
    _heard: dict[str, Beat] = field(default_factory=dict)

    def identity(self) -> str:
        return self.canary

    def beats(self) -> dict[str, Beat]:
        return self.hear().beats

    def hear(self) -> Heard:
        before, self._heard = self._heard, dict(self.newest_beats)
        renewed = (name for name, beat in self._heard.items() if before.get(name) is not beat)
        return Heard(dict(self._heard), frozenset(renewed))

    def publish_all(self, by_worker: Mapping[str, Sequence[Assignment]]) -> None:
        for worker, assignments in by_worker.items():
            for a in assignments:
                self.payloads[worker, a.subtask, a.attempt] = a.encode()
                self.queues.setdefault(worker, []).append(a.key)

    def queued(self, worker: str) -> set[tuple[int, int]]:
        return self.queued_at([worker])[worker]

    def queued_at(self, workers: Collection[str]) -> dict[str, set[tuple[int, int]]]:
        return {worker: set(self.queues.get(worker, ())) for worker in workers}

    def control(self, controls: Mapping[str, Control]) -> None:
        self.controls.update(controls)

    def running(self, worker: str) -> Running | None:
        return self.running_at([worker])[worker]

    def running_at(self, workers: Collection[str]) -> dict[str, Running | None]:
        return {worker: self.under_way.get(worker) for worker in workers}

    def forget(self, worker: str) -> None:
        for store in (self.queues, self.newest_beats, self.controls, self.under_way):
            store.pop(worker, None)
        self.payloads = {key: p for key, p in self.payloads.items() if key[0] != worker}

    def read_outcomes(self, consumer: str, count: int, block_s: float, reclaim_s: float) -> list[Entry]:
        now = self.clock()
        idle = [i for i, (_, since) in self.pending.items() if now - since >= reclaim_s]
        chosen = (idle or [i for i in self.entries if i not in self.pending])[:count]
        self.pending.update((i, (consumer, now)) for i in chosen)
        return [Entry(i, self.entries[i][1]) for i in chosen]

    def inherit(self, consumer: str, gone: Callable[[str], bool], count: int) -> list[Entry]:
        chosen = [i for i, (name, _) in self.pending.items() if name == consumer or gone(name)][:count]
        self.pending.update((i, (consumer, self.clock())) for i in chosen)
        return [Entry(i, self.entries[i][1]) for i in chosen]

    def acknowledge(self, entries: Iterable[str]) -> None:
        for i in entries:
            for store in (self.entries, self.pending, self.reported_at):
                store.pop(i, None)

    def bury(self, entry: Entry, why: str) -> None:
        self.buried.append((entry, why))
        self.acknowledge([entry.id])

    def waiting_outcomes(self) -> set[tuple[int, int]]:
        return {key for key, _ in self.entries.values()}

    def outcome_backlog(self) -> int:
        return len(self.entries)

    def outcome_lag(self) -> Lag:
        oldest = min(self.reported_at.values(), default=None)
        return Lag(len(self.entries), 0.0 if oldest is None else max(0.0, self.clock() - oldest))

    def count_differences(self, more: int) -> None:
        self.found += more

    def differences(self) -> int:
        return self.found

    def dead_letters(self) -> int:
        return min(len(self.buried), DEAD_KEPT)

    def memory_share(self) -> float:
        return 0.0

    def empty(self) -> None:
        """Lose everything, as FLUSHALL or a restart of Redis does."""
        for store in (self.payloads, self.queues, self.newest_beats, self.controls, self.under_way):
            store.clear()
        for kept in (self.entries, self.pending, self.reported_at):
            kept.clear()
        self.buried.clear()
        self.canary = str(int(self.canary) + 1)

    def worker(self, name: str) -> MemoryWorkerTransport:
        return MemoryWorkerTransport(self, name)


@dataclass
class MemoryWorkerTransport:
    """One worker's side of a MemoryTransport."""

    shared: MemoryTransport
    name: str

    def beat(self, beat: Beat) -> Control | None:
        self.shared.newest_beats[self.name] = beat
        return self.shared.controls.get(self.name)

    def hear(self) -> Control | None:
        return self.shared.controls.get(self.name)

    def say(self, words: Sequence[tuple[str, bytes]]) -> None:
        for api, body in words:
            self.shared.said.setdefault(api, []).append(body)

    def fetch(self, subtask: int, attempt: int) -> bytes | None:
        return self.shared.payloads.get((self.name, subtask, attempt))

    def mark_running(self, running: Running | None) -> None:
        if running is None:
            self.shared.under_way.pop(self.name, None)
        else:
            self.shared.under_way[self.name] = running

    def report(self, subtask: int, attempt: int, outcome: bytes) -> None:
        self.shared._next += 1
        entry = f"{self.shared._next}-0"
        self.shared.entries[entry] = ((subtask, attempt), outcome)
        self.shared.reported_at[entry] = self.shared.clock()
        self.shared.payloads.pop((self.name, subtask, attempt), None)

    def take(self) -> tuple[int, int] | None:
        """Pop the next message, as Celery does for a real worker."""
        queue = self.shared.queues.get(self.name)
        return queue.pop(0) if queue else None
