"""The lease book: live leases as the leader knows them, by attempt, worker, sub-task and job. In memory alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, KeysView, Mapping
from functools import lru_cache
from uuid import UUID

from scheduler.store.leases import Held, Leased, LeaseKey

#: Sub-tasks of few jobs are placed at a time, and reading an id takes as long as writing a message.
job_id = lru_cache(1024)(UUID)


class LeaseBook:
    """Whoever asks for a part of it pays for that part."""

    def __init__(self) -> None:
        self._held: dict[LeaseKey, Held] = {}
        self._at: defaultdict[str, dict[LeaseKey, Held]] = defaultdict(dict)
        self._of_subtask: defaultdict[object, set[LeaseKey]] = defaultdict(set)
        self._of_job: defaultdict[object, set[LeaseKey]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Held]:
        return iter(self._held.values())

    def keys(self) -> KeysView[LeaseKey]:
        return self._held.keys()

    def get(self, key: LeaseKey) -> Held | None:
        return self._held.get(key)

    def add(self, held: Held) -> None:
        key = held.key
        self._held[key] = self._at[held.worker][key] = held
        self._of_subtask[held.subtask].add(key)
        self._of_job[held.job].add(key)

    def drop(self, key: LeaseKey) -> Held | None:
        """Take a lease out. None where it is not in."""
        held = self._held.pop(key, None)
        if held is not None:
            del self._at[held.worker][key]
            if not self._at[held.worker]:
                del self._at[held.worker]
            for keys, by in ((self._of_subtask, held.subtask), (self._of_job, held.job)):
                keys[by].discard(key)
                if not keys[by]:
                    del keys[by]
        return held

    def workers(self) -> Collection[str]:
        """Workers that hold any."""
        return self._at.keys()

    def at(self, worker: str) -> Mapping[LeaseKey, Held]:
        """What a worker holds."""
        return self._at.get(worker, {})

    def of(self, subtasks: Iterable[int], jobs: Iterable[UUID]) -> set[LeaseKey]:
        """The leases of these sub-tasks, and of these jobs."""
        found: set[LeaseKey] = set()
        for subtask in subtasks:
            found |= self._of_subtask.get(subtask, set())
        for job in jobs:
            found |= self._of_job.get(job, set())
        return found


def held_of(item: Leased, boot: str, *, clone: bool = False) -> Held:
    """A lease that was just made."""
    return Held(
        subtask=item.subtask,
        attempt=item.attempt,
        job=job_id(item.job),
        pass_number=item.pass_number,
        n_rows=item.carved.rows,
        bytes=item.carved.bytes,
        worker=item.worker,
        boot=boot,
        predicted_s=item.predicted_s,
        exclusive=item.carved.exclusive,
        clone=clone,
        age_s=0.0,
    )
