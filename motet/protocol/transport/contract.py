"""What the scheduler and a worker ask of a transport. Two keep this contract, proved by one suite: Redis, and memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from motet.protocol.wire import Assignment, Beat, Control, Running

#: Unreadable entries kept for an operator to look at.
DEAD_KEPT = 100


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the outcome stream, not yet acknowledged."""

    id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Lag:
    """How far the aggregators are behind."""

    #: Entries on the outcome stream.
    entries: int
    #: Seconds that the oldest of them has been there; 0 where there is none.
    oldest_s: float


@dataclass(frozen=True, slots=True)
class Heard:
    """What workers said last."""

    #: Newest beat of every worker, with figures that are `FOR_PEOPLE` perhaps of an earlier one; where nothing else is
    #: new, the object of the look before.
    beats: dict[str, Beat]
    #: Workers whose beat is another one than when this transport looked last.
    renewed: frozenset[str]


class TransportLost(Exception):
    """Redis does not answer; nothing is known about what was under way. Try again later."""


class SchedulerTransport(Protocol):
    """What the dispatcher and the aggregator need. Every method may raise TransportLost."""

    def identity(self) -> str:
        """Changes when Redis was restarted or emptied: then whatever was under way in it is gone."""
        ...

    def hear(self) -> Heard:
        """Newest beat of every worker that has one, and whose is new. A worker whose beat has expired is forgotten."""
        ...

    def beats(self) -> dict[str, Beat]:
        """Newest beat of every worker that has one, each with its own ``seq`` and figures for people."""
        ...

    def publish_all(self, by_worker: Mapping[str, Sequence[Assignment]]) -> None:
        """Payload, then Celery message, for each. Twice is harmless: the worker runs an attempt once.

        What Redis refuses for one worker is sent to the others all the same, before TransportLost is raised.
        """
        ...

    def queued(self, worker: str) -> set[tuple[int, int]]:
        """Attempts whose message still waits in the worker's queue."""
        ...

    def queued_at(self, workers: Collection[str]) -> dict[str, set[tuple[int, int]]]:
        """``queued`` of each of these workers, in one round trip."""
        ...

    def control(self, controls: Mapping[str, Control]) -> None:
        """Replace the control word of these workers."""
        ...

    def running(self, worker: str) -> Running | None:
        """Rows that ran in the worker's last micro-batch, if it never said that the batch ended."""
        ...

    def running_at(self, workers: Collection[str]) -> dict[str, Running | None]:
        """``running`` of each of these workers, in one round trip."""
        ...

    def forget(self, worker: str) -> None:
        """Drop everything of a worker that is gone: its queue, payloads and words."""
        ...

    def read_outcomes(self, consumer: str, count: int, block_s: float, reclaim_s: float) -> list[Entry]:
        """Entries for this consumer: first those another consumer left for ``reclaim_s``, then new ones."""
        ...

    def inherit(self, consumer: str, gone: Callable[[str], bool], count: int) -> list[Entry]:
        """Entries that consumers which are ``gone`` had read and not settled, for this consumer, at most ``count``.

        Those first that count as read by this consumer itself, and never reached it: the answer was lost on the way.
        So ask only when everything that was read is settled. Consumers that are gone and left nothing are forgotten.
        """
        ...

    def acknowledge(self, entries: Iterable[str]) -> None:
        """Remove entries whose outcome is committed. Only ever call this after COMMIT."""
        ...

    def bury(self, entry: Entry, why: str) -> None:
        """Remove an entry that cannot be read; of the last DEAD_KEPT such the reasons are kept, while there is room."""
        ...

    def waiting_outcomes(self) -> set[tuple[int, int]]:
        """(sub-task, attempt) of outcomes on the stream: these must not be rescued, only merged."""
        ...

    def outcome_backlog(self) -> int:
        """Entries on the stream."""
        ...

    def outcome_lag(self) -> Lag:
        """Entries on the stream, and how long the oldest has waited there by the transport's own clock."""
        ...

    def count_differences(self, more: int) -> None:
        """An audit of the leader found so many more differences."""
        ...

    def differences(self) -> int:
        """What audits have found since Redis was emptied."""
        ...

    def dead_letters(self) -> int:
        """Unreadable entries that are kept, at most DEAD_KEPT."""
        ...

    def memory_share(self) -> float:
        """Used share of Redis' own memory limit; 0 where it has none."""
        ...


class WorkerTransport(Protocol):
    """What one worker needs. Every method may raise TransportLost."""

    def beat(self, beat: Beat) -> Control | None:
        """Say the beat, hear the newest control word."""
        ...

    def hear(self) -> Control | None:
        """The newest control word, between two beats."""
        ...

    def say(self, words: Sequence[tuple[str, bytes]]) -> None:
        """Tell API processes, by name, what `encode_said` made. Whoever does not listen now never hears it; nothing is kept."""
        ...

    def fetch(self, subtask: int, attempt: int) -> bytes | None:
        """Payload of an attempt, or None where it has expired or was lost."""
        ...

    def mark_running(self, running: Running | None) -> None:
        """Before a micro-batch: its rows. After it: None."""
        ...

    def report(self, subtask: int, attempt: int, outcome: bytes) -> None:
        """Put an encoded outcome on the stream, and drop the attempt's payload."""
        ...
