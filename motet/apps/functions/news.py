"""How much a piece of news belongs to a watch list: the scores of its classes, added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def watch(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The sum of the scores that each row holds, whatever their names. Runs at the workers."""
    return [round(sum(score or 0.0 for score in row.values()), 6) for row in rows]
