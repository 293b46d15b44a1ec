"""Which models give way when another must be loaded: the least recently used, never one in use. Pure."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

ResidentKey = TypeVar("ResidentKey", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Resident(Generic[ResidentKey]):
    """A model in the device's memory."""

    key: ResidentKey
    memory_mb: int
    #: When it last ran, on any clock that only rises.
    used: float


class NeverFits(Exception):
    """The model is larger than all the memory that models may hold here."""

    def __init__(self, need_mb: int, budget_mb: int) -> None:
        self.need_mb, self.budget_mb = need_mb, budget_mb
        super().__init__(f"needs {need_mb} MB, models may hold {budget_mb} MB here")


def evictions(
    residents: Iterable[Resident[ResidentKey]], need_mb: int, budget_mb: int, in_use: Collection[ResidentKey]
) -> list[ResidentKey] | None:
    """The models to evict so that ``need_mb`` fits into ``budget_mb``, in order; [] where it fits already.

    None: it will fit, but not before a model that is in use is free. Raises NeverFits.
    """
    if need_mb > budget_mb:
        raise NeverFits(need_mb, budget_mb)
    held = list(residents)
    free_mb = budget_mb - sum(r.memory_mb for r in held)
    chosen: list[ResidentKey] = []
    for resident in sorted(held, key=lambda r: r.used):
        if free_mb >= need_mb:
            break
        if resident.key not in in_use:
            chosen.append(resident.key)
            free_mb += resident.memory_mb
    return chosen if free_mb >= need_mb else None
