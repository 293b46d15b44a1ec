"""What is noted of each request of a batch beside its rows, and lines counted by it. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

from motet.protocol.columns import OK, STATE_MASK, Column


class LineNote(NamedTuple):
    """What is noted of a request beside its rows."""

    #: Number of the task that answers it.
    task: int
    #: Places of the lines that ask it.
    places: Sequence[int]
    #: Tasks beside it, whose numbers follow.
    beside: int
    rows: int


@dataclass(slots=True)
class CountedLines:
    """The lines of one batch that are answered, as far as its blocks were looked at."""

    completed: int = 0
    failed: int = 0
    blocks: set[int] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)
    #: First row of a request that goes on in another block -> its note; and of its rows whether they have an answer.
    _begun: dict[int, LineNote] = field(default_factory=dict)
    _rows: dict[int, bool] = field(default_factory=dict)

    def add(self, block: int, first_row: int, notes: Sequence[str], columns: Mapping[int, Column]) -> None:
        """Count a block that is done. ``notes``: LINE of each row. ``columns``: by number of task."""
        self.blocks.add(block)
        note: LineNote | None = None
        for at, told in enumerate(notes):
            if told:
                note = LineNote(*json.loads(told))
                self._begun[first_row + at] = note
            # Of a request that began in another block it is not known which task answers it: no other one is asked.
            asked = columns.values() if note is None else [columns[note.task]]
            self._rows[first_row + at] = any(one.status[at] & STATE_MASK == OK for one in asked)
        for first, begun in list(self._begun.items()):
            rows = range(first, first + begun.rows)
            if all(row in self._rows for row in rows):
                answered = [self._rows.pop(row) for row in rows]
                del self._begun[first]
                self.completed += len(begun.places) * all(answered)
                self.failed += len(begun.places) * (not all(answered))
