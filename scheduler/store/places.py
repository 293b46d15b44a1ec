"""Places, which are passes in blocks, as parameters of statements that are about many of them at once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from uuid import UUID

#: A (block, pass): job, pass number, block number.
Place = tuple[UUID, int, int]
#: A set of places as ``at_places`` sends it: what a statement costs is then its rows, not its round trips.
PLACES = "unnest(CAST(:jobs AS uuid[]), CAST(:passes AS smallint[]), CAST(:blocks AS int[]))"


def at_places(places: Collection[tuple[UUID | str, int, int]]) -> dict[str, list[Any]]:
    """The parameters that ``PLACES`` names."""
    return {
        "jobs": [job for job, _, _ in places],
        "passes": [number for _, number, _ in places],
        "blocks": [block for _, _, block in places],
    }
